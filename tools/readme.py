"""Write README.md from nbs/index.ipynb: `python tools/readme.py [OUT]`.

Left out: cells with `#| hide` or the tag `hide`, the code of cells with `#| echo: false` or the tag `hide_input`, and
the directives themselves. `<!-- table of FILE.json -->` is followed by the table of that record, `<!-- table of sources -->` and
`<!-- table of methods -->` by the registered sources and methods.
Relative links of the notebook, which count from nbs/, are made to count from the README. Figures are files (nbs/images/*.png)
that Markdown cells name, not outputs: a README cannot carry those.
"""
import json
import posixpath
import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from traitlets.config import Config

ROOT = Path(__file__).resolve().parent.parent
DIRECTIVE = re.compile(r"^#\|\s*(.+?)\s*\n?$", re.M)
LINK = re.compile(r"(\]\(|\b(?:src|href)=\")(?!\w+:|#|/)([^)\s\"]+)")
RECORD = re.compile(r"(<!-- table of (\S+\.json) -->\n)(?:\n\|[^*]*\n\n\*[^\n]*\*\n)?")
SOURCES = re.compile(r"(<!-- table of sources -->\n)(?:\n(?:\|[^\n]*\n)+)?")
METHODS = re.compile(r"(<!-- table of methods -->\n)(?:\n(?:\|[^\n]*\n)+)?")
COLUMNS = ["parameters", "accuracy %", "macro sensitivity %", "macro specificity %", "AUC"]


def markdown_table(rows, caption):
    "Rows (the first has the names of the columns) and the caption below them, as Markdown."
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    lines.insert(1, "| " + " | ".join(["---"]*len(rows[0])) + " |")
    return "\n".join([*lines, "", f"*{caption}*", ""])


def record_table(file):
    "The table of a record, as Markdown: the main table of a run, or rows that the record holds."
    record = json.loads((ROOT / file).read_text(encoding="utf-8"))
    if "rows" in record: return markdown_table(record["rows"], record["caption"])
    summary = record["summary"]
    names = {"hog_svm": "HOG + SVM"}
    rows = [["model", *COLUMNS]]
    for model, row in summary["table"].items():
        rows.append([names.get(model, model), *(row[c] for c in COLUMNS)])
    protocol = summary["protocol"].replace("Hog_svm", "HOG + SVM")
    protocol = protocol.partition(" No ensemble over folds")[0]   # the table has none either
    return markdown_table(rows, protocol)


def sources_table():
    "The registered sources as Markdown."
    sys.path.insert(0, str(ROOT))
    import kdoct.data.sources  # noqa: F401 (they register themselves)
    from kdoct.data.registry import sources_table
    return sources_table() + "\n"


def methods_table():
    "The registered methods of distillation as Markdown."
    sys.path.insert(0, str(ROOT))
    from kdoct.distill.methods import methods_table
    return methods_table() + "\n"


def with_tables(text):
    "Markdown in which each mark of a record, of the sources or of the methods is followed by its table."
    text = RECORD.sub(lambda m: m[1] + "\n" + record_table(m[2]), text)
    text = SOURCES.sub(lambda m: m[1] + "\n" + sources_table(), text)
    return METHODS.sub(lambda m: m[1] + "\n" + methods_table(), text)


def shown(cell):
    "The cell as the README shows it, or None where it is hidden."
    cell = nbformat.from_dict(cell)
    words = set(cell.metadata.get("tags", [])) | {
        d.replace(" ", "") for d in DIRECTIVE.findall(cell.source)
    }
    if "hide" in words: return None
    cell.source = DIRECTIVE.sub("", cell.source).strip("\n")
    if words & {"hide_input", "echo:false"}: cell.metadata["transient"] = {"remove_source": True}
    return cell


def readme(notebook=ROOT / "nbs" / "index.ipynb"):
    "Text of the README that `notebook` makes."
    nb = nbformat.read(notebook, as_version=4)
    nb.cells = [cell for cell in map(shown, nb.cells) if cell is not None]
    text_first = ["text/markdown", "text/html", "text/plain"]
    exporter = MarkdownExporter(
        config=Config({"NbConvertBase": {"display_data_priority": text_first + ["image/png"]}})
    )
    text, resources = exporter.from_notebook_node(nb)
    if resources.get("outputs"):
        raise SystemExit(
            f"{notebook}: {len(resources['outputs'])} output(s) are pictures; save them under "
            f"nbs/images "
            "and name them in a Markdown cell."
        )
    text = LINK.sub(lambda m: m[1] + posixpath.normpath(posixpath.join("nbs", m[2])), text)
    text = with_tables(text)
    text = "\n".join(line.rstrip() for line in text.split("\n"))
    note = "<!-- Made from nbs/index.ipynb by `make readme`: edit that. -->\n\n"
    return note + re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


if __name__ == "__main__":
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "README.md"
    out.write_text(readme(), encoding="utf-8")
