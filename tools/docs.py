"""Build the documentation site: `python tools/docs.py [SITE]`, by default into build/docs.

mkdocs reads mkdocs.yml and calls the hooks below. They add to the guide in docs/ what is made from the
project itself: the README, the notebooks with their stored outputs, a page for every module (from its
docments), the commands and the recipe. No network is needed, no notebook is executed, and no module that
needs torch is imported. Formulas become MathML, so no script is loaded for them.
"""
import ast
import html
import os
import posixpath
import re
import sys
import tokenize
from functools import cache
from io import StringIO
from pathlib import Path
from textwrap import dedent

import nbformat
from jinja2 import DictLoader
from latex2mathml.converter import convert as mathml
from mkdocs.structure.files import File
from nbconvert import MarkdownExporter
from traitlets.config import Config

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
from house import PACKAGES, is_exported  # noqa: E402
from readme import LINK, shown, with_tables  # noqa: E402

CHAPTERS = {  # beginning of a notebook's name -> heading of its chapter
    "00": "Core",
    "01": "Data",
    "02": "Networks and training",
    "03": "Teacher and methods",
    "04": "Student and baseline",
    "05": "Evaluation",
    "06": "Explanation",
    "07": "Deployment",
    "08": "Cross-validation and report",
    "09": "Explorer",
    "10": "Command line",
    "11": "Differences from the paper",
    "12": "Benchmarks",
}
PLACES = {  # file of the project -> page, where the name does not say it
    "README.md": "index.md",
    "nbs/index.ipynb": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changes.md",
    "LICENSE": "license.md",
}


# --- where a file of the project stands on the site

def site_uri(path):
    "Place on the site of a file of the project, both relative and with '/'."
    if path in PLACES: return PLACES[path]
    if path.startswith("docs/"): return path.removeprefix("docs/")
    if path.startswith("nbs/"): path = "notebooks/" + path.removeprefix("nbs/")
    return re.sub(r"\.ipynb$", ".md", path)


def project_path(uri):
    "The file of the project that a page is made from."
    back = {place: path for path, place in PLACES.items() if path != "nbs/index.ipynb"}
    if uri in back: return back[uri]
    notebook = re.sub(r"\.md$", ".ipynb", uri)
    if uri.startswith("notebooks/"): return "nbs/" + notebook.removeprefix("notebooks/")
    if uri.startswith("experiments/"): return notebook
    return "docs/" + uri


def with_site_links(text, uri):
    "Markdown of a file of the project, its relative links turned into links of the site."
    here, folder = posixpath.dirname(uri), posixpath.dirname(project_path(uri))

    def moved(match):
        target, mark, anchor = match[2].partition("#")
        place = site_uri(posixpath.normpath(posixpath.join(folder, target)))
        return match[1] + posixpath.relpath(place, here or ".") + mark + anchor
    return LINK.sub(moved, text)


# --- notebooks

TEMPLATE = """{% extends 'markdown/index.md.j2' %}
{% macro text_block(text) %}
``````{.text .output}
{{ text | strip_ansi | trim('\n') }}
``````
{% endmacro %}
{% block stream %}{{ text_block(output.text) }}{% endblock stream %}
{% block data_text scoped %}{{ text_block(output.data['text/plain']) }}{% endblock data_text %}
{% block data_html scoped %}
<div class="output">
{{ output.data['text/html'] }}
</div>
{% endblock data_html %}
"""
FIRST = ["text/markdown", "text/html", "image/png", "image/jpeg", "text/plain"]


def is_imports_only(cell):
    "Whether an exported cell only imports what the module needs; no lesson."
    if cell.cell_type != "code" or not is_exported(cell.source): return False
    statements = ast.parse(cell.source).body
    return all(isinstance(s, ast.Import | ast.ImportFrom) for s in statements)


@cache
def notebook_exporter():
    "What turns a notebook into Markdown; one for all, because its templates take longer to compile than to fill."
    config = Config({"NbConvertBase": {"display_data_priority": FIRST}})
    return MarkdownExporter(config=config, template_file="page.md.j2",
                            extra_loaders=[DictLoader({"page.md.j2": TEMPLATE})])


def notebook_page(notebook):
    "A notebook as Markdown, and its pictures: name -> bytes."
    nb = nbformat.read(notebook, as_version=4)
    cells = [shown(cell) for cell in nb.cells if not is_imports_only(cell)]
    nb.cells = [cell for cell in cells if cell is not None and cell.source.strip()]
    nb.metadata["language_info"] = {"name": "python"}
    names = {"unique_key": notebook.stem, "output_files_dir": f"{notebook.stem}_files"}
    text, resources = notebook_exporter().from_notebook_node(nb, resources=names)
    def below_title(match): return f'\n<p class="subtitle">{as_html(match[1])}</p>\n'
    text = re.sub(r"\n> *(.+)\n", below_title, text, count=1)
    return re.sub(r"\n{3,}", "\n\n", text), resources.get("outputs", {})


@cache
def cells_of(notebook):
    "A notebook's cells, to be read only."
    return nbformat.read(notebook, as_version=4).cells


def subtitle(notebook):
    "The line below a notebook's title that says what it is about."
    text = next((c.source for c in cells_of(notebook) if c.cell_type == "markdown"), "")
    found = re.search(r"^> *(.+)$", text, re.M)
    return found[1] if found else ""


def exported_module(notebook):
    "Dotted name of the module that a notebook exports; '' if it exports none."
    source = "\n".join(c.source for c in cells_of(notebook) if c.cell_type == "code")
    found = re.search(r"^#\| *default_exp:? +([\w.]+)", source, re.M)
    return found[1] if found else ""


def lesson_notebooks():
    "The notebooks that are pages, by chapter."
    chapters = {heading: [] for heading in CHAPTERS.values()}
    for notebook in sorted((ROOT / "nbs").glob("*.ipynb")):
        heading = CHAPTERS.get(notebook.name[:2], "Further")
        if notebook.name != "index.ipynb": chapters.setdefault(heading, []).append(notebook)
    return chapters


def notebook_list():
    "Page that says which notebook holds what."
    lines = ["# Notebooks", "", "What each notebook is about, and the module it exports. "
             "[Notebooks and packages](../packages.md) says how they are used."]
    for heading, notebooks in lesson_notebooks().items():
        lines += ["", f"## {heading}", "", "| notebook | about | module |", "| --- | --- | --- |"]
        for notebook in notebooks:
            module = exported_module(notebook)
            page = f"[{notebook.stem}]({notebook.stem}.md)"
            link = f"[`kdoct.{module}`](../api/{module}.md)" if module else ""
            lines.append(f"| {page} | {subtitle(notebook)} | {link} |")
    return "\n".join(lines)


# --- modules

def as_html(text):
    "Plain text with `code` in backticks as HTML."
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text, quote=False))


def table(head, rows):
    "Rows of HTML cells as a table."
    def row(cells, tag): return "<tr>" + "".join(f"<{tag}>{c}</{tag}>" for c in cells) + "</tr>"
    body = [row(cells, "td") for cells in rows]
    parts = [f"<thead>{row(head, 'th')}</thead>", "<tbody>", *body, "</tbody>"]
    return "\n".join(['<div class="parameters"><table>', *parts, "</table></div>"])


def unparsed(node): return ast.unparse(node) if node else ""


def code(text): return f"<code>{html.escape(text, quote=False)}</code>" if text else ""


def source_lines(node, lines):
    "Source of a definition without its decorators."
    return dedent("\n".join(lines[node.lineno - 1:node.end_lineno]))


def docments_of(node, source):
    """What the comment beside each parameter says: name -> text; 'return': the result.

    The same that `fastcore.docments` reads, which needs the module imported, and torch with it."""
    tokens = tokenize.generate_tokens(StringIO(source).readline)
    comments = {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}
    arguments = node.args
    stars = [a for a in (arguments.vararg, arguments.kwarg) if a]
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, *stars]
    lines = {a.arg: a.lineno for a in every}
    if node.returns: lines["return"] = node.returns.lineno
    return {name: comments.get(line - node.lineno + 1, "") for name, line in lines.items()}


def arguments_of(node):
    "Parameters of a function: (name with its stars, annotation, default), the last two as source."
    arguments = node.args
    plain = [*arguments.posonlyargs, *arguments.args]
    values = [None]*(len(plain) - len(arguments.defaults)) + arguments.defaults
    found = [(a.arg, a, value) for a, value in zip(plain, values, strict=True)]
    if arguments.vararg: found.append(("*" + arguments.vararg.arg, arguments.vararg, None))
    by_name = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    found += [(a.arg, a, value) for a, value in by_name]
    if arguments.kwarg: found.append(("**" + arguments.kwarg.arg, arguments.kwarg, None))
    found = [row for row in found if row[0] not in ("self", "cls")]
    return [(name, unparsed(a.annotation), unparsed(value)) for name, a, value in found]


PARAMETERS = ["parameter", "type", "default", "meaning"]


def signature(node):
    "How a function is called."
    given = [f"{name}={value}" if value else name for name, _, value in arguments_of(node)]
    return f"{node.name}({', '.join(given)})"


def parameter_rows(node, source):
    "Name, type, default and docment of each parameter, and of the result."
    said = docments_of(node, source)
    rows = [[code(name), code(kind), code(value), as_html(said[name.lstrip("*")])]
            for name, kind, value in arguments_of(node)]
    result = code(unparsed(node.returns))
    if node.returns: rows.append(["<em>returns</em>", result, "", as_html(said["return"])])
    return rows


def function_text(node, lines, name, level="###"):
    "A function: signature, docstring, parameters."
    rows = parameter_rows(node, source_lines(node, lines))
    said = ast.get_docstring(node) or ""
    anchor = name.replace(".", "-").lower()
    text = [f"{level} `{name}` {{#{anchor}}}", "", "```python", signature(node), "```", ""]
    text += [as_html(said), ""]
    if rows: text += [table(PARAMETERS, rows), ""]
    return "\n".join(text)


def field_meaning(node, lines):
    "What the comment behind a field, or its `description`, says."
    if isinstance(node.value, ast.Call):
        said = {k.arg: k.value for k in node.value.keywords}.get("description")
        if isinstance(said, ast.Constant): return said.value
    end = lines[node.end_lineno - 1].encode()[node.end_col_offset:].decode()
    return end.partition("#")[2].strip()


def field_rows(node, lines):
    "Name, type, default and meaning of each field of a class."
    rows = []
    for field in node.body:
        if not isinstance(field, ast.AnnAssign) or field.target.id.startswith("_"): continue
        value = field.value
        is_described = isinstance(value, ast.Call) and ast.unparse(value.func) == "Field"
        if is_described: value = value.args[0] if value.args else None
        kind, meaning = unparsed(field.annotation), field_meaning(field, lines)
        rows.append([code(field.target.id), code(kind), code(unparsed(value)), as_html(meaning)])
    return rows


def class_text(node, lines, patched):
    "A class: docstring, fields, how it is made, public methods."
    bases = ", ".join(map(ast.unparse, node.bases))
    text = [f"### `{node.name}` {{#{node.name.lower()}}}", "",
            "```python", f"class {node.name}" + (f"({bases})" if bases else ""), "```", "",
            as_html(ast.get_docstring(node) or ""), ""]
    fields = field_rows(node, lines)
    if fields: text += [table(["field", "type", "default", "meaning"], fields), ""]
    own = [n for n in node.body if isinstance(n, ast.FunctionDef)]
    for method in [*own, *patched.get(node.name, [])]:
        if method.name == "__init__":
            rows = parameter_rows(method, source_lines(method, lines))
            if rows: text += [table(PARAMETERS, rows), ""]
        elif not method.name.startswith("_") and ast.get_docstring(method):
            text.append(function_text(method, lines, f"{node.name}.{method.name}", "####"))
    return "\n".join(text)


def patched_methods(tree):
    "Functions that `@patch` adds to a class: name of the class -> functions."
    found = {}
    for node in tree.body:
        names = [ast.unparse(d) for d in getattr(node, "decorator_list", [])]
        if "patch" not in names: continue
        owner = ast.unparse(node.args.args[0].annotation)
        found.setdefault(owner, []).append(node)
    return found


def module_page(file):
    "A module: what it is for, its notebook, its public definitions."
    source = file.read_text(encoding="utf-8")
    tree, lines = ast.parse(source), source.splitlines()
    patched = patched_methods(tree)
    methods = {id(m) for ms in patched.values() for m in ms}
    module = ".".join(file.relative_to(ROOT / "kdoct").with_suffix("").parts)
    notebook = re.search(r"File to edit: .*/nbs/(.+)\.ipynb", source)
    about = as_html(ast.get_docstring(tree) or "")
    text = [f"# kdoct.{module}", "", f'<p class="subtitle">{about}</p>', ""]
    if notebook:
        name = notebook[1]
        text += [f"Made from the notebook [{name}](../notebooks/{name}.md).", ""]
    for node in tree.body:
        if getattr(node, "name", "_").startswith("_") or id(node) in methods: continue
        if isinstance(node, ast.ClassDef): text.append(class_text(node, lines, patched))
        elif isinstance(node, ast.FunctionDef): text.append(function_text(node, lines, node.name))
    return module, "\n".join(text)


def modules():
    "Files of all modules, by package."
    files = {p: sorted((ROOT / "kdoct" / p).glob("*.py")) for p in PACKAGES}
    return {p: [f for f in found if f.stem != "__init__"] for p, found in files.items()}


def parsed(file): return ast.parse(file.read_text(encoding="utf-8"))


def api_list():
    "Page of the public names and of all modules."
    import kdoct
    text = ["# Python", "", "What `import kdoct` offers. A name is loaded when it is first used.",
            "", "| name | for |", "| --- | --- |"]
    for name, module in kdoct.PUBLIC.items():
        tree = parsed(ROOT / "kdoct" / f"{module.replace('.', '/')}.py")
        node = next(n for n in tree.body if getattr(n, "name", "") == name)
        said = (ast.get_docstring(node) or "").split("\n")[0]
        link = f"[`kdoct.{name}`]({module}.md#{name.lower()})"
        text.append(f"| {link} | {as_html(said)} |")
    for package, files in modules().items():
        text += ["", f"## kdoct.{package}", "", "| module | about |", "| --- | --- |"]
        for file in files:
            said, module = ast.get_docstring(parsed(file)) or "", f"{package}.{file.stem}"
            text.append(f"| [`kdoct.{module}`]({module}.md) | {as_html(said)} |")
    return "\n".join(text)


# --- commands and recipe

def command_page():
    "Every command with its arguments and options, as `kdoct COMMAND --help` says."
    from typer.main import get_command

    from kdoct.app.cli import app
    text = ["# Commands", "", "The same as `kdoct COMMAND --help`."]
    for name, command in get_command(app).commands.items():
        rows = [option_row(p) for p in command.params if p.name != "help"]
        text += ["", f"## kdoct {name}", "", as_html(command.help or ""), ""]
        if rows: text.append(table(["option", "meaning", "default"], rows))
    return "\n".join(text)


def option_row(option):
    "Name, meaning and default of an argument or option of a command."
    is_argument = option.param_type_name == "argument"
    name = option.metavar or option.name
    if not is_argument: name = ", ".join([*option.opts, *option.secondary_opts])
    is_shown = not option.required and option.default not in (None, "", [], False, ())
    default = str(option.default) if is_shown and not callable(option.default) else ""
    return [code(name), as_html(option.help or ""), code(default)]


def recipe_page():
    "Every field of a recipe, and the presets."
    from kdoct.core.presets import PRESETS
    from kdoct.core.recipe import recipe_fields
    parts = {}
    for name, (value, meaning) in recipe_fields().items():
        row = [code(name), code(repr(value)), as_html(meaning or "")]
        parts.setdefault(name.rpartition(".")[0] or "run", []).append(row)
    text = [
        "# Recipe",
        "",
        "Every setting of a run. `--set NAME=VALUE` changes one; `kdoct recipe` lists "
        "all with the values that a command would use.",
        "",
    ]
    for part, rows in parts.items():
        text += [f"## {part}", "", table(["field", "default", "meaning"], rows), ""]
    text += ["## Presets", "", "What each preset changes.", ""]
    for name, changes in PRESETS.items():
        rows = [[code(field), code(repr(value))] for field, value in changes.items()]
        text += [f"### {name}", "", table(["field", "value"], rows), ""]
    return "\n".join(text)


# --- hooks of mkdocs

LISTS = {  # pages whose links are those of the site already
    "commands.md": command_page,
    "recipe.md": recipe_page,
    "api/index.md": api_list,
    "notebooks/index.md": notebook_list,
}


def pages():
    "What is made from the project: place on the site -> text or bytes."
    documents = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
    made = {site_uri(f): (ROOT / f).read_text(encoding="utf-8") for f in documents}
    terms = (ROOT / "LICENSE").read_text(encoding="utf-8")
    made["license.md"] = f"# License\n\n```text\n{terms}\n```\n"
    made |= {uri: make() for uri, make in LISTS.items()}
    for folder in ("nbs", "experiments"):
        for notebook in sorted((ROOT / folder).glob("*.ipynb")):
            if notebook.name != "index.ipynb": made |= notebook_files(notebook)
        for picture in (ROOT / folder).rglob("*.png"):
            made[site_uri(picture.relative_to(ROOT).as_posix())] = picture.read_bytes()
    for files in modules().values():
        for file in files:
            module, text = module_page(file)
            made[f"api/{module}.md"] = text
    return made


def notebook_files(notebook):
    "The page of a notebook and its pictures: place on the site -> text or bytes."
    uri = site_uri(notebook.relative_to(ROOT).as_posix())
    text, pictures = notebook_page(notebook)
    folder = posixpath.dirname(uri)
    return {uri: text} | {posixpath.join(folder, name): data for name, data in pictures.items()}


def on_config(config):
    "Complete the navigation: chapters of notebooks, packages of modules."
    chapters = [{heading: [{n.stem: f"notebooks/{n.stem}.md"} for n in notebooks]}
                for heading, notebooks in lesson_notebooks().items() if notebooks]
    records = sorted((ROOT / "experiments").glob("*.ipynb"))
    packages = [{f"kdoct.{package}": [{f.stem: f"api/{package}.{f.stem}.md"} for f in files]}
                for package, files in modules().items()]
    config.nav += [
        {"Notebooks": ["notebooks/index.md", *chapters]},
        {"Experiments": [{n.stem: f"experiments/{n.stem}.md"} for n in records]},
        {"Reference": ["api/index.md", "commands.md", "recipe.md", *packages]},
        {"Project": ["contributing.md", "changes.md", "license.md"]},
    ]
    return config


def on_files(files, config):
    "Add the pages that are made from the project."
    for uri, content in pages().items(): files.append(File.generated(config, uri, content=content))
    return files


def on_page_markdown(markdown, page, config, files):
    "Links between files of the project become links between pages; the guide is found first."
    uri = page.file.src_uri
    page.meta["search"] = {"boost": 2 if "/" not in uri else 1}
    if uri == "index.md": page.meta["hide"] = ["navigation"]
    has_site_links = uri.startswith("api/") or uri in LISTS
    return markdown if has_site_links else with_site_links(markdown, uri)


def on_page_content(content, page, config, files):
    "Formulas, which pymdownx.arithmatex has marked, become MathML."
    def formula(match):
        text, is_block = html.unescape(match[2]).strip(), match[1] == "div"
        return mathml(text[2:-2], display="block" if is_block else "inline")
    return re.sub(r'<(span|div) class="arithmatex">(.*?)</\1>', formula, content, flags=re.S)


def refresh_tables():
    "Tables of records in the guide are as the records are."
    for page in (ROOT / "docs").glob("*.md"):
        text = page.read_text(encoding="utf-8")
        if (new := with_tables(text)) != text: page.write_text(new, encoding="utf-8")


def build_site(folder):
    "Build the site into a folder; a broken link is named, and an error."
    os.environ.setdefault("NO_MKDOCS_2_WARNING", "1")
    from mkdocs.__main__ import cli
    options = ["--strict", "--config-file", ROOT / "mkdocs.yml", "--site-dir", folder]
    cli(["build", *map(str, options)], standalone_mode=False)


if __name__ == "__main__":
    refresh_tables()
    site = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "build" / "docs").resolve()
    build_site(site)
    print(f"{site / 'index.html'}")
