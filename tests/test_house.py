"The plan of the house: packages in one order, modules of a readable size, and no private name that crosses a module."
import ast
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ROOT / "kdoct"
MODULES = sorted(p for p in LIBRARY.rglob("*.py") if p.name not in ("__init__.py", "_modidx.py"))
HOUSE = runpy.run_path(str(ROOT / "tools" / "house.py"))


def lint_imports(folder):
    "What import-linter says of the library in a folder, under the project's contract."
    command = [
        str(Path(sys.executable).parent / "lint-imports"),
        "--no-cache",
        "--config",
        str(ROOT / ".importlinter"),
    ]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120,
                          env={"PYTHONPATH": str(folder), "PATH": "/usr/bin:/bin"})


@pytest.fixture
def copied(tmp_path):
    "A copy of the library to plant imports in."
    shutil.copytree(LIBRARY, tmp_path / "kdoct", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def test_packages_import_only_what_stands_below_them():
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("package,import_", [
    ("core", "from kdoct.data.images import decode_image"),
    ("data", "from ..models.backbones import Classifier"),
    ("deploy", "from kdoct.explain.cam import score_cam"),
])
def test_an_import_against_the_order_is_found_also_inside_a_function(copied, package, import_):
    module = next((copied / "kdoct" / package).glob("[a-z]*.py"))
    with open(module, "a", encoding="utf-8") as f: f.write(f"\n\ndef planted():\n    {import_}\n")
    done = lint_imports(copied)
    assert done.returncode == 1 and "BROKEN" in done.stdout, done.stdout


def test_the_picture_has_the_packages_that_there_are():
    packages = sorted(p.name for p in LIBRARY.iterdir() if (p / "__init__.py").exists())
    assert packages == sorted(HOUSE["PACKAGES"])
    assert not HOUSE["upward"](HOUSE["arrows"]())


@pytest.mark.parametrize("module", MODULES, ids=lambda p: ".".join(p.relative_to(LIBRARY).with_suffix("").parts))
def test_module_is_of_a_readable_size_and_imports_no_private_name(module):
    source = module.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 600
    ours = [
        n
        for n in ast.walk(ast.parse(source))
        if isinstance(n, ast.ImportFrom) and (n.level or (n.module or "").startswith("kdoct"))
    ]
    private = [a.name for n in ours for a in n.names if a.name.startswith("_")]
    assert not private


@pytest.mark.parametrize("module", MODULES, ids=lambda p: ".".join(p.relative_to(LIBRARY).with_suffix("").parts))
def test_code_ends_at_column_100_and_definitions_have_40_lines_at_most(module):
    # nbdev writes `__all__` as wide as it likes
    source = re.sub(
        r"^__all__ = \[.*?\]", "", module.read_text(encoding="utf-8"), flags=re.M | re.S
    )
    widths = enumerate(HOUSE["code_widths"](source), start=1)
    assert not [f"line {n} has {width} columns" for n, width in widths if width > 100]
    assert not HOUSE["long_definitions"](source)


def test_a_docment_and_a_docstring_are_no_code_and_a_long_definition_is_named():
    docment = "def f(\n    a,  # " + "x"*100 + "\n):\n"
    long = docment + '    "' + "y"*110 + '"\n' + "    a += 1\n"*37
    assert max(HOUSE["code_widths"](long)) == 10
    assert HOUSE["long_definitions"](long) == ["f"] and not HOUSE["long_definitions"](long[:-11])


def test_statistics_count_what_a_notebook_holds(tmp_path):
    import nbformat
    from nbformat.v4 import new_code_cell, new_notebook
    lesson = "assert f(1) == 2\ntest_eq(f(2), 3)\nprint(f(3))"
    definition = "#| export\ndef f(x):\n    # adds one\n    y = x + 1\n    return y\n"
    cells = ["#| default_exp a.b", "#| export\nimport math", definition, lesson]
    nbformat.write(new_notebook(cells=[new_code_cell(s) for s in cells]), tmp_path / "a.ipynb")
    row = HOUSE["statistics"](tmp_path)
    assert (
        row["exported cells"],
        row["lines"],
        row["public symbols"],
        row["assertions a symbol"],
    ) == (1, 3, 1, 2.0)


def test_wide_and_long_cells_are_counted(tmp_path):
    import nbformat
    from nbformat.v4 import new_code_cell, new_notebook
    long = (
        "#| export\ndef f():\n"
        + "\n".join(f"    a{i} = {i}" for i in range(30))
        + "\n    return "
        + " + ".join(["a1"] * 30)
    )
    nbformat.write(new_notebook(cells=[new_code_cell(long)]), tmp_path / "a.ipynb")
    row = HOUSE["statistics"](tmp_path)
    assert row["cells above 25 lines %"] == 100.0 and row[
        "code beyond column 100 %"
    ] == pytest.approx(100 / 32, abs=0.1)


def names_of(module):
    "Names that a module of ours has, read from its source; None: there is no such module."
    folder = LIBRARY.joinpath(*module.split(".")[1:])
    if (folder / "__init__.py").exists():
        source = (folder / "__init__.py").read_text(encoding="utf-8")
        modules = {p.stem for p in folder.iterdir() if p.suffix == ".py" or p.is_dir()}
        return modules | set(re.findall(r"\w+", source))
    file = folder.with_suffix(".py")
    if not file.exists(): return None
    found = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef): found.add(node.name)
        if isinstance(node, ast.Import | ast.ImportFrom):
            found |= {a.asname or a.name for a in node.names}
        for target in ast.walk(node) if isinstance(node, ast.Assign | ast.AnnAssign) else ():
            if isinstance(target, ast.Name): found.add(target.id)
    return found


IMPORT = re.compile(r"^\s*from (kdoct[\w.]*) import (?:\(([^)]*)\)|([\w, ]+))", re.M)
SHOWN_CODE = [*(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
EXPERIMENTS = sorted((ROOT / "experiments").glob("*.ipynb"))


def imports_in(file):
    "(module, name) that a text, or the code of a notebook, imports from the library."
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".ipynb":
        import nbformat
        cells = nbformat.reads(text, 4).cells
        text = "\n".join(c.source for c in cells if c.cell_type == "code")
    for module, in_brackets, on_the_line in IMPORT.findall(text):
        names = in_brackets or on_the_line
        for name in re.split(r"[,\n]", names):
            if name.strip(): yield module, name.split(" as ")[0].strip()


def test_an_import_is_found_in_text_on_one_line_and_on_several(tmp_path):
    file = tmp_path / "a.md"
    file.write_text(
        "    from kdoct import Recipe\nfrom kdoct.core.files import (\n    locked,\n "
        "   a as b,\n)\n"
    )
    assert list(imports_in(file)) == [
        ("kdoct", "Recipe"), ("kdoct.core.files", "locked"), ("kdoct.core.files", "a")
    ]
    assert "locked" in names_of("kdoct.core.files") and names_of("kdoct.core.nothing") is None


@pytest.mark.parametrize("file", [*SHOWN_CODE, *EXPERIMENTS], ids=lambda p: p.name)
def test_what_experiments_and_documents_import_is_there(file):
    wrong = [(m, n) for m, n in imports_in(file) if n not in (names_of(m) or ())]
    assert not wrong
