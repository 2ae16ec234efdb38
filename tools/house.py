"""The house in numbers and as a picture, made from its notebooks and imports.

    python tools/house.py statistics            a Markdown table of what the notebooks hold
    python tools/house.py picture docs/house.svg   packages from bottom to top, an arrow for each import between them
"""
import ast
import re
import sys
import tokenize
from collections import Counter
from io import StringIO
from pathlib import Path
from textwrap import wrap

import nbformat

ROOT = Path(__file__).resolve().parent.parent
# The one order of the packages: a package imports only what stands before it.
# `.importlinter` holds the same, from the top.
PACKAGES = ("core", "data", "models", "training", "distill", "evaluate", "explain", "deploy", "app")
ASSERTIONS = re.compile(r"test_(?:eq|ne|close|fail|is|shuffled|stdout|warns)|is_close|all_equal")


def is_exported(source):
    "Whether a cell goes into the library."
    return bool(re.match(r"#\|\s*exporti?\b", source))


def is_code_line(line):
    "Neither empty nor a comment of its own."
    return bool(line.strip()) and not line.lstrip().startswith("#")


def code_widths(source):
    "Columns that the code of each line takes; comments and docstrings are left out."
    comments = {}
    for token in tokenize.generate_tokens(StringIO(source).readline):
        if token.type == tokenize.COMMENT: comments[token.start[0]] = token.start[1]
    in_docstrings = set()
    for node in ast.walk(ast.parse(source)):
        is_definition = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        if not is_definition or ast.get_docstring(node) is None: continue
        docstring = node.body[0]
        in_docstrings |= set(range(docstring.lineno, docstring.end_lineno + 1))
    lines = enumerate(source.splitlines(), start=1)
    return [0 if n in in_docstrings else len(line[:comments.get(n)].rstrip()) for n, line in lines]


def long_definitions(source, limit=40):
    "Functions of more lines than this, docstring and signature included."
    functions = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef)]
    return [n.name for n in functions if n.end_lineno - n.lineno + 1 > limit]


def code_cells(notebook):
    "Exported definitions and lesson cells of a notebook, as source."
    cells = [c.source for c in nbformat.read(notebook, 4).cells if c.cell_type == "code"]
    exported = [s for s in cells if is_exported(s)]
    imports_only = [
        s
        for s in exported
        if all(isinstance(n, ast.Import | ast.ImportFrom) for n in ast.parse(s).body)
    ]
    lessons = [s for s in cells if not s.startswith("#| default_exp") and not is_exported(s)]
    return [s for s in exported if s not in imports_only], lessons


def public_symbols(source):
    "Names of public functions and classes that a cell defines."
    definitions = (ast.FunctionDef, ast.ClassDef)
    return [
        n.name
        for n in ast.parse(source).body
        if isinstance(n, definitions) and not n.name.startswith("_")
    ]


def count_assertions(source):
    "Assertions of a lesson: `assert`, and calls of fastcore's tests."
    count = 0
    for node in ast.walk(ast.parse(source)):
        is_call = isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        count += isinstance(node, ast.Assert) or bool(
            is_call and ASSERTIONS.fullmatch(node.func.id)
        )
    return count


def statistics(folder=ROOT / "nbs"):
    "What the notebooks of a folder hold, as one row."
    counts = Counter()
    for notebook in sorted(Path(folder).glob("*.ipynb")):
        definitions, lessons = code_cells(notebook)
        counts["notebooks"] += 1
        for source in definitions:
            lines = [line for line in source.splitlines() if is_code_line(line)]
            counts["cells"] += 1
            counts["long cells"] += len(lines) > 25
            counts["lines"] += len(lines)
            counts["wide lines"] += sum(width > 100 for width in code_widths(source))
            counts["nodes"] += sum(1 for _ in ast.walk(ast.parse(source)))
            counts["words"] += sum(len(re.findall(r"[A-Za-z]{2,}", line)) for line in lines)
            counts["symbols"] += len(public_symbols(source))
        counts["assertions"] += sum(map(count_assertions, lessons))
    return {
        "notebooks": counts["notebooks"],
        "exported cells": counts["cells"],
        "cells above 25 lines %": round(100*counts["long cells"]/counts["cells"], 1),
        "lines": counts["lines"],
        "code beyond column 100 %": round(100*counts["wide lines"]/counts["lines"], 1),
        "syntax nodes a line": round(counts["nodes"]/counts["lines"], 1),
        "words a line": round(counts["words"]/counts["lines"], 1),
        "public symbols": counts["symbols"],
        "assertions a symbol": round(counts["assertions"]/counts["symbols"], 2),
    }


def markdown(rows):
    "Rows of numbers, by name, as a Markdown table."
    columns = list(next(iter(rows.values())))
    head = ["", *columns]
    body = [[name, *(str(row[c]) for c in columns)] for name, row in rows.items()]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"]*len(head), *body))


def package_of(module, level, package):
    "The package of ours that an import names; None: another library."
    if level == 1: return package
    parts = module.split(".") if module else []
    if level == 2: return parts[0] if parts else None
    return parts[1] if len(parts) > 1 and parts[0] == "kdoct" else None


def arrows(folder=ROOT / "kdoct"):
    "How many imports lead from a package to another: {(from, to): number}."
    found = Counter()
    for package in PACKAGES:
        for file in sorted((Path(folder) / package).glob("*.py")):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if not isinstance(node, ast.ImportFrom): continue
                to = package_of(node.module, node.level, package)
                if to in PACKAGES and to != package: found[package, to] += 1
    return found


def upward(found):
    "Arrows that run against the order of the packages."
    return [(a, b) for a, b in found if PACKAGES.index(b) > PACKAGES.index(a)]


def modules_of(package, folder=ROOT / "kdoct"):
    "Names of the modules of a package."
    return sorted(f.stem for f in (Path(folder) / package).glob("*.py") if f.stem != "__init__")


def picture(file):
    "Packages as boxes, the foundation at the bottom; an arrow as wide as it has imports."
    import matplotlib
    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

    plt.rcParams.update({"svg.hashsalt": "kdoct", "svg.fonttype": "none", "font.size": 9})
    found = arrows()
    fig, ax = plt.subplots(figsize=(9, 8))
    for i, package in enumerate(PACKAGES):
        ax.add_patch(
            FancyBboxPatch(
                (0, i), 6.2, 0.66, boxstyle="round,pad=.06", facecolor="#eef3f8", edgecolor="#456"
            )
        )
        ax.text(.05, i + .52, f"kdoct.{package}", weight="bold", va="center")
        ax.text(
            0.05,
            i + 0.17,
            "\n".join(wrap(", ".join(modules_of(package)), 104)),
            va="center",
            fontsize=6.6,
        )
    for (a, b), number in sorted(found.items()):
        i, j = PACKAGES.index(a), PACKAGES.index(b)
        is_up = j > i
        ends = ((6.26, i + .25), (6.26, j + .45))
        bend = f"arc3,rad={-.25 - .02*abs(i - j)}" if not is_up else "arc3,rad=.3"
        ax.add_patch(
            FancyArrowPatch(
                *ends,
                connectionstyle=bend,
                arrowstyle="-|>",
                mutation_scale=9,
                linewidth=0.4 + 0.09 * number,
                color="#c33" if is_up else "#789",
                shrinkA=0,
                shrinkB=0,
            )
        )
    ax.set(xlim=(-.2, 8), ylim=(-.3, len(PACKAGES)))
    ax.axis("off")
    fig.savefig(file, bbox_inches="tight", metadata={"Date": None})
    plt.close(fig)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["statistics"]: print(markdown({"now": statistics()}))
        case ["statistics", folder]: print(markdown({folder: statistics(folder)}))
        case ["picture", file]: picture(file)
        case _: sys.exit(__doc__)
