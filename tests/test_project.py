"The project agrees with itself: one name, version and list of requirements; generated files are as generated."
import ast
import importlib
import importlib.metadata
import inspect
import json
import re
import runpy
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
MODULES = sorted(
    ".".join(p.relative_to(ROOT / "kdoct").with_suffix("").parts)
    for p in (ROOT / "kdoct").rglob("*.py")
    if not p.name.startswith("_")
)
STAGES = ["01_data", "03_teacher", "04_distill", "05g_decide", "05_evaluate"]
PARAMETERS = ["preset", "run", "fold", "data_root", "overrides", "teacher", "student"]


def run(*command, cwd):
    "Run `command`; its output is the message when it fails."
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def project_files():
    "Every file of the project, tracked or new, that git does not ignore."
    listed = run(
        "git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT
    ).split("\0")
    return sorted({ROOT / f for f in listed if f and (ROOT / f).is_file()})


def copy_project(target):
    "A copy of the project to work on."
    for f in project_files():
        to = target / f.relative_to(ROOT)
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(f, to)
    return target


@pytest.fixture(scope="module")
def settings():
    cfg = ConfigParser(delimiters=["="], interpolation=None)
    cfg.read_string((ROOT / "settings.ini").read_text(encoding="utf-8"))
    return cfg["DEFAULT"]


def lines(text): return [line.strip() for line in text.splitlines() if line.strip()]


def norm(requirement):
    "A requirement in one spelling, its extra marker left out."
    r = Requirement(requirement)
    return r.name.lower().replace("_", "-"), str(r.specifier)


# --- name, version, requirements

@pytest.fixture(scope="module")
def metadata(tmp_path_factory):
    "Metadata that setup.py hands to setuptools, made from a copy."
    copy = copy_project(tmp_path_factory.mktemp("metadata"))
    run(sys.executable, "setup.py", "--quiet", "dist_info", cwd=copy)
    (info,) = copy.glob("*.dist-info")
    return importlib.metadata.Distribution.at(info)


def test_name_and_version_agree_everywhere(settings, metadata):
    import kdoct
    assert (
        settings["lib_name"]
        == "kdoct"
        == Path(kdoct.__file__).parent.name
        == metadata.metadata["Name"]
    )
    assert settings["version"] == kdoct.__version__ == metadata.version
    assert f"## {settings['version']}\n" in (ROOT / "CHANGELOG.md").read_text(), (
        "CHANGELOG.md lacks this version"
    )
    nbdev = (ROOT / "pyproject.toml").read_text()
    assert 'lib_name = "kdoct"' in nbdev and 'lib_path = "kdoct"' in nbdev


def test_requirements_agree_everywhere(settings, metadata):
    want = {norm(r) for r in lines(settings["requirements"])}
    made = [Requirement(r) for r in metadata.requires]
    assert {norm(str(r)) for r in made if r.marker is None} == want
    extras = {k.removesuffix("_requirements") for k in settings if k.endswith("_requirements")}
    assert set(metadata.metadata.get_all("Provides-Extra")) == extras
    for extra in extras:
        listed = {norm(r) for r in lines(settings[f"{extra}_requirements"])}
        assert {
            norm(str(r)) for r in made if r.marker and r.marker.evaluate({"extra": extra})
        } == listed
    assert metadata.metadata["Requires-Python"] == f">={settings['min_python']}"
    assert metadata.metadata["License-Expression"] == settings["license"] == "Apache-2.0"


def test_pyproject_repeats_nothing_of_settings():
    headers = re.findall(r"^\[(.+)\]", (ROOT / "pyproject.toml").read_text(), re.M)
    assert headers == ["build-system", "tool.nbdev"]


def test_every_requirement_is_capped(settings):
    lists = [k for k in settings if k == "requirements" or k.endswith("_requirements")]
    listed = [requirement for name in lists for requirement in lines(settings[name])]
    bounds = {r: {s.operator for s in Requirement(r).specifier} for r in listed}
    loose = [r for r, operators in bounds.items() if not {">=", "<"} <= operators]
    assert not loose, f"no lower or no upper bound: {loose}"


def test_ci_runs_make_test_and_nothing_else_but_finds_itself_a_browser():
    script = [
        line
        for line in lines((ROOT / ".ci" / "run").read_text())
        if not line.startswith(("#", "set ", "cd "))
    ]
    assert script == ["tools/browser.sh", "make test"]
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o100, ".ci/run is not executable"


def test_make_knows_the_targets_that_the_documents_name():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    text = "".join((ROOT / doc).read_text() for doc in ("README.md", "CONTRIBUTING.md"))
    named = {
        t
        for words in re.findall(r"(?:`|^ *)make ((?:[a-z]+ ?)+)(?=`| +#|$)", text, re.M)
        for t in words.split()
    }
    assert {"demo", "test"} <= named <= targets


# --- generated files

@pytest.mark.parametrize("command", ["nbdev-export", "nbdev-clean"])
def test_nbdev_leaves_the_tree_unchanged(command, tmp_path):
    copy = copy_project(tmp_path / "copy")
    before = {
        f.relative_to(copy).as_posix(): f.read_bytes() for f in copy.rglob("*") if f.is_file()
    }
    run(BIN / command, cwd=copy)
    after = {f.relative_to(copy).as_posix(): f.read_bytes() for f in copy.rglob("*") if f.is_file()}
    changed = sorted(f for f in before.keys() | after.keys() if before.get(f) != after.get(f))
    assert not changed, f"{command} changes {changed}: run `make export` and commit the result"


def test_every_module_comes_from_a_notebook():
    code = "\n".join(
        "".join(c["source"])
        for nb in NOTEBOOKS
        for c in json.loads(nb.read_text(encoding="utf-8"))["cells"]
    )
    named = re.findall(r"^#\|\s*default_exp:?\s+([\w.]+)", code, re.M)
    assert MODULES == sorted(named), "modules without a notebook, or notebooks never exported"


def test_readme_is_the_one_that_index_makes():
    made = runpy.run_path(str(ROOT / "tools" / "readme.py"))["readme"]()
    assert (ROOT / "README.md").read_text(encoding="utf-8") == made, "run `make readme`"


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_links_lead_somewhere(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!\w+:|#)([^)#\s]+)|(?:src|href)=\"(?!\w+:|#)([^\"#]+)", text)
    missing = [link for pair in links for link in pair if link and not (ROOT / link).exists()]
    assert not missing


def test_readme_hides_cells_and_moves_links(tmp_path):
    table = new_output("display_data", {"text/markdown": "| a |", "text/html": "<table>"})
    nb = new_notebook(cells=[
        new_markdown_cell("# T\n\n![p](images/p.png) [c](../C.md) [u](https://u/x) [h](#h)"),
        new_code_cell("#| hide\nsecret = 1"),
        new_code_cell("secret = 2", metadata={"tags": ["hide"]}),
        new_code_cell("#| echo: false\nsecret = 3", outputs=[table])])
    file = tmp_path / "index.ipynb"
    nbformat.write(nb, file)
    text = runpy.run_path(str(ROOT / "tools" / "readme.py"))["readme"](file)
    assert "![p](nbs/images/p.png) [c](C.md) [u](https://u/x) [h](#h)" in text
    assert "| a |" in text
    assert "secret" not in text and "<table>" not in text and "#|" not in text


# --- what is in the files

def test_ruff_passes_over_notebooks_and_tests():
    read = run(BIN / "ruff", "check", "--show-files", cwd=ROOT)
    for nb in NOTEBOOKS: assert nb.name in read, f"ruff does not read {nb.name}"
    assert "test_project.py" in read and "kdoct/core/files.py" in read
    run(BIN / "ruff", "check", "--no-cache", cwd=ROOT)


PLACES = {  # written in pieces, so that this file does not contain what it looks for
    "a path of one machine": r"(?<![\w.+/~-])/(?:home|root|Users|work|farm|mnt|tmp)/\w",
    "a package registry": "|".join(
        host.replace(" ", re.escape("."))
        for host in (
            "pypi org",
            "pythonhosted org",
            "registry npmjs",
            "download pytorch org",
            "conda anaconda org",
        )
    ),
}


@pytest.mark.parametrize("what", PLACES)
def test_no_file_names(what):
    found = []
    for f in project_files():
        if f.suffix in {".png", ".jpg", ".parquet", ".safetensors"}: continue
        for n, line in enumerate(f.read_text(encoding="utf-8").splitlines(), 1):
            if m := re.search(PLACES[what], line):
                found.append(f"{f.relative_to(ROOT)}:{n}: {m[0]}")
    assert not found, f"{what} in\n" + "\n".join(found)


def test_notebooks_stay_small():
    sizes = {f.name: f.stat().st_size // 1000 for f in project_files() if f.suffix == ".ipynb"}
    assert not {name: kb for name, kb in sizes.items() if kb > 300}, "above 300 kB"


def assigned(source):
    "Names that the top level of `source` assigns, in order."
    names = []
    for node in ast.parse(source).body:
        targets = getattr(node, "targets", [getattr(node, "target", None)])  # x = 1, x:int = 1, anything else
        names += [t.id for t in targets if isinstance(t, ast.Name)]
    return names


@pytest.mark.parametrize("stage", STAGES)
def test_stage_takes_the_agreed_parameters(stage):
    cells = json.loads((ROOT / "nbs" / f"{stage}.ipynb").read_text(encoding="utf-8"))["cells"]
    tagged = ["".join(c["source"]) for c in cells if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1, "papermill needs exactly one cell tagged `parameters`"
    own = {"04_distill": ["role"], "03_teacher": ["name"], "05_evaluate": ["students"]}
    assert sorted(assigned(tagged[0])) == sorted(PARAMETERS + own.get(stage, []))


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_has_the_house_shape(notebook):
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    sources = ["".join(c["source"]) for c in cells]
    titles = [
        s
        for c, s in zip(cells, sources, strict=True)
        if c["cell_type"] == "markdown" and s.startswith("# ")
    ]
    assert len(titles) == 1 and re.search(r"^> \S", titles[0], re.M), (
        "one title with a one-line subtitle"
    )
    errors = [
        o["ename"] for c in cells for o in c.get("outputs", []) if o["output_type"] == "error"
    ]
    assert not errors, f"stored outputs show errors: {errors}"
    exported = [s for s in sources if re.match(r"#\|\s*exporti?\b", s)]
    mixed = [
        s
        for s in exported
        if len({isinstance(n, ast.Import | ast.ImportFrom) for n in ast.parse(s).body}) > 1
    ]
    assert not mixed, f"imports and code in one cell: {mixed[0]}"
    # A stage notebook also runs from an installed wheel, where there is nothing to export to: `make export` does it.
    assert not any("nbdev_export" in s for s in sources), "a notebook does not export itself"


def exported_names(module):
    "The module's own public functions and classes."
    for name in getattr(module, "__all__", []):
        obj = getattr(module, name)
        if (inspect.isfunction(obj) or inspect.isclass(obj)) and obj.__module__ == module.__name__:
            yield name, obj


def undocumented(function):
    "Parameters without the trailing comment that says what they are."
    from fastcore.docments import docments
    known, rest = (
        docments(function),
        (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD),
    )
    parameters = {
        p: v for p, v in inspect.signature(function).parameters.items() if v.kind not in rest
    }
    by_typer = {
        p
        for p, v in parameters.items()
        if getattr(v.default, "help", None) or "typer" in str(v.annotation)
    }
    return [p for p in parameters if p not in {"self", "cls"} | by_typer and not known.get(p)]


@pytest.mark.parametrize("name", MODULES)
def test_public_definitions_are_documented(name):
    module = importlib.import_module(f"kdoct.{name}")
    faults = [f"{n}: no docstring" for n, o in exported_names(module) if not inspect.getdoc(o)]
    for n, o in exported_names(module):
        if inspect.isfunction(o):
            faults += [f"{n}: {p} has no comment" for p in undocumented(inspect.unwrap(o))]
    assert not faults, f"kdoct.{name}\n" + "\n".join(faults)


@pytest.mark.parametrize("extra", ["deploy", "app", "tune", "explain"])
def test_an_extra_is_known_by_what_its_packages_are_imported_as(extra, settings):
    "`require_extra` asks for names to import; they are those that the extra's requirements install."
    from kdoct.core.files import EXTRAS
    wanted = {norm(line)[0] for line in lines(settings[f"{extra}_requirements"])}
    installed_as = importlib.metadata.packages_distributions()
    assert {norm(installed_as[name][0])[0] for name in EXTRAS[extra]} == wanted


def imported_packages():
    "Distributions that modules of the library import when they are loaded."
    text = "\n".join(f.read_text(encoding="utf-8") for f in (ROOT / "kdoct").rglob("*.py"))
    tops = set(re.findall(r"^(?:import|from) (\w+)", text, re.M))
    installed_as = importlib.metadata.packages_distributions()
    return {norm(installed_as[t][0])[0] for t in tops - sys.stdlib_module_names - {"kdoct"}}


def test_what_the_library_imports_when_loaded_is_required_by_name(settings):
    "None of it comes along by chance, with a requirement that may drop it."
    wanted = {norm(line)[0] for line in lines(settings["requirements"])}
    assert imported_packages() <= wanted
