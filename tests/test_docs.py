"The site builds, its links lead somewhere; the guide's commands exist; the public names load."
import ast
import html.parser
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
GUIDE = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def run_python(code, cwd):
    "What a new Python process prints."
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return run(sys.executable, "-c", code, cwd=cwd, PYTHONPATH=path)


def run(*command, cwd, **environment):
    "What a command prints; its errors are the message when it fails."
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600,
                          env={**os.environ, **environment})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# --- the site

class Page(html.parser.HTMLParser):
    "Anchors, links, and what a page loads."

    def __init__(self, file):
        super().__init__()
        self.anchors, self.links, self.loaded = set(), set(), set()
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        given = {name: value or "" for name, value in attributes}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given: self.links.add(given["href"])
        if "src" in given: self.loaded.add(given["src"])
        if tag == "link" and given.get("rel") != "canonical": self.loaded.add(given.get("href", ""))


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    "Pages of the built site, by file."
    folder = tmp_path_factory.mktemp("site")
    run(sys.executable, "tools/docs.py", str(folder), cwd=ROOT, PYTHONPATH=str(ROOT))
    return folder, {file: Page(file) for file in sorted(folder.rglob("*.html"))}


@pytest.mark.slow
def test_every_internal_link_and_anchor_leads_somewhere(site):
    _, pages = site
    missing = []
    for file, page in pages.items():
        if file.name == "404.html": continue   # its links count from the root of a server
        for link in page.links | page.loaded:
            address = urlsplit(link)
            if address.scheme or address.netloc: continue
            target = (file.parent / unquote(address.path)).resolve() if address.path else file
            anchor = unquote(address.fragment)
            if not target.is_file(): missing.append(f"{file.name}: {link}")
            elif anchor and target in pages and anchor not in pages[target].anchors:
                missing.append(f"{file.name}: no anchor {link}")
    assert not missing, "\n".join(missing[:30])


@pytest.mark.slow
def test_no_page_loads_anything_from_another_host(site):
    folder, pages = site
    loaded = {address for page in pages.values() for address in page.loaded}
    addresses = {address for address in loaded if urlsplit(address).netloc}
    for sheet in folder.rglob("*.css"):
        text = sheet.read_text(encoding="utf-8")
        addresses |= set(re.findall(r"(?:url\(|@import)\s*[\"']?((?:https?:)?//[^)\"' ]+)", text))
    assert not addresses


@pytest.mark.slow
def test_every_notebook_and_every_module_has_a_page_that_can_be_found(site):
    folder, _ = site
    index = json.loads((folder / "search" / "search_index.json").read_text(encoding="utf-8"))
    found = {entry["location"] for entry in index["docs"]}
    names = {f.stem for f in (ROOT / "nbs").glob("*.ipynb")} - {"index"}
    notebooks = {f"notebooks/{name}.html" for name in names}
    files = [f.relative_to(ROOT / "kdoct").with_suffix("") for f in (ROOT / "kdoct").rglob("*.py")]
    modules = {f"api/{'.'.join(f.parts)}.html" for f in files if not f.name.startswith("_")}
    assert notebooks and modules and not (notebooks | modules) - found


@pytest.mark.slow
def test_a_module_page_gives_type_default_and_meaning(site):
    folder, _ = site
    text = (folder / "api" / "deploy.predict.html").read_text(encoding="utf-8")
    cells = [f"<code>{text}</code>" for text in ("threads", "int", "0")]
    row = "".join(f"<td>{cell}</td>" for cell in [*cells, "of the engine; 0: its own choice"])
    assert 'id="predictor-predict"' in text and row in text


@pytest.mark.slow
def test_a_notebook_page_shows_stored_outputs_and_formulas(site):
    folder, _ = site
    text = (folder / "notebooks" / "06a_explain.cam.html").read_text(encoding="utf-8")
    assert "<math" in text and "arithmatex" not in text and "#| " not in text
    assert list((folder / "notebooks").glob("*_files/*.png")), "no figure"


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 480])
def test_pages_fit_the_window_and_ask_nobody(site, browser, width):
    folder, _ = site
    browser.set_window_size(width, 900)
    for name in ("index.html", "own_data.html", "api/core.recipe.html", "notebooks/01_data.html"):
        browser.get((folder / name).as_uri())
        over = browser.execute_script(
            "return document.scrollingElement.scrollWidth - document.documentElement.clientWidth")
        assert over <= 0, f"{name} is {over} px too wide"
    events = [json.loads(e["message"])["message"] for e in browser.get_log("performance")]
    sent = [e["params"] for e in events if e["method"] == "Network.requestWillBeSent"]
    addresses = [e["request"]["url"] for e in sent]
    assert addresses and not [
        a for a in addresses if a.startswith(("http:", "https:", "ws:", "wss:"))
    ]


@pytest.mark.slow
def test_the_search_works_without_a_server(site, browser):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait
    folder, _ = site
    browser.get((folder / "index.html").as_uri())
    browser.execute_script("document.getElementById('__search').click()")
    box = browser.find_element(By.CSS_SELECTOR, "input.md-search__input")
    WebDriverWait(browser, 20).until(lambda b: box.is_displayed())
    box.send_keys("deferral")
    link = (By.CSS_SELECTOR, "a.md-search-result__link")
    hits = WebDriverWait(browser, 30).until(lambda b: b.find_elements(*link))
    assert hits[0].get_attribute("href").startswith(folder.as_uri())


# --- what the guide says

def fenced(language, files=GUIDE):
    "Code blocks of a language in the guide: (file, text)."
    pattern = re.compile(rf"^```{language}\n(.*?)^```$", re.M | re.S)
    texts = {file: file.read_text(encoding="utf-8") for file in files}
    return [(file, block) for file, text in texts.items() for block in pattern.findall(text)]


def command_lines(program):
    "Lines of the guide that call a program, as words behind its name."
    for file, text in fenced("sh"):
        for line in text.replace('\\\n', ' ').splitlines():   # continued lines are one
            words = shlex.split(line, comments=True)
            starts = words[:1] in ([program], ["accelerate"]) and program in words
            if starts: yield f"{file.name}: {line}", words[words.index(program) + 1:]


def test_kdoct_commands_of_the_guide_have_these_options():
    from typer.main import get_command

    from kdoct.app.cli import app
    from kdoct.core.overrides import parse_overrides
    from kdoct.core.presets import preset
    commands, seen = get_command(app).commands, set()
    for where, (name, *arguments) in command_lines("kdoct"):
        assert name in commands, where
        given = commands[name].make_context(name, list(arguments)).params
        changes = {}
        for text in given.get("changes", ()): changes |= parse_overrides(text)
        if given.get("sources"):
            two = {"north": dict(root="north"), "south": dict(root="south")}
            changes |= {"data.source": "sites", "data.sources": two, "data.n_folds": 2}
        preset(given.get("preset_name") or "edge", **changes)
        seen.add(name)
    assert seen == set(commands), "commands that the guide does not name"


def test_papermill_commands_of_the_guide_name_notebooks_and_their_parameters():
    lines = list(command_lines("papermill"))
    for where, (notebook, _, *options) in lines:
        cells = json.loads((ROOT / notebook).read_text(encoding="utf-8"))["cells"]
        tagged = [c for c in cells if "parameters" in c["metadata"].get("tags", [])]
        statements = ast.parse("".join(tagged[0]["source"])).body
        known = {target.id for s in statements for target in getattr(s, "targets", [])}
        assert set(options[1::3]) <= known and set(options[::3]) <= {"-p", "-r"}, where
    assert len(lines) >= 8


def test_tables_of_the_guide_are_those_of_the_records():
    from readme import with_tables
    for file in GUIDE:
        text = file.read_text(encoding="utf-8")
        assert with_tables(text) == text, f"{file.name}: run `make docs`"


def test_the_readme_has_at_most_900_words():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 900


@pytest.fixture(scope="module")
def quick_start(tmp_path_factory):
    "The README's quick start for Python as it stands: what it prints, and its outputs folder."
    folder = tmp_path_factory.mktemp("quick")
    blocks = [text for _, text in fenced("python", [ROOT / "README.md"])]
    with pytest.MonkeyPatch.context() as env:
        env.setenv("KDOCT_OUTPUTS", str(folder / "outputs"))
        env.delenv("IN_TEST", raising=False)
        return run_python("\n".join(blocks), folder), folder / "outputs"


@pytest.mark.slow
def test_the_python_quick_start_runs_as_it_stands(quick_start):
    printed, outputs = quick_start
    assert "images/CNV/P" in printed and "split by group (patient)" in printed
    assert (outputs / "first" / "report.html").is_file()


@pytest.mark.slow
def test_its_run_is_finished_and_nothing_runs_again(quick_start, monkeypatch, capsys):
    import kdoct
    from kdoct.core.runs import Run, planned_stages
    monkeypatch.setenv("KDOCT_OUTPUTS", str(quick_start[1]))
    run = kdoct.open_run("first")
    stages = planned_stages(run, [0])
    assert len(stages) == 6 and all(run.is_finished(*stage) for stage in stages)
    other = Run(run.path, run.recipe.override(**{"decide.defer": "risk"}))
    assert not other.is_finished("decide", 0)
    monkeypatch.setattr("kdoct.app.crossval.run_stage", None)
    kdoct.crossval(run, [0])
    assert capsys.readouterr().out.count("finished before") == 6


# --- the public names

def test_import_kdoct_loads_neither_torch_nor_pandas(tmp_path):
    heavy = {"torch", "pandas", "fastai", "numpy"}
    code = f"import sys, kdoct; print(sorted({heavy} & set(sys.modules)))"
    assert run_python(code, tmp_path) == "[]\n"


def test_every_public_name_is_that_of_its_module():
    import importlib

    import kdoct
    assert 10 <= len(kdoct.__all__) <= 15
    for name in kdoct.__all__:
        obj = getattr(kdoct, name)
        assert obj is getattr(importlib.import_module(obj.__module__), name), name
    assert set(kdoct.__all__) <= set(dir(kdoct))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        kdoct.nothing  # noqa: B018


def test_no_public_name_is_also_a_package():
    import kdoct
    packages = {f.parent.name for f in (ROOT / "kdoct").glob("*/__init__.py")}
    assert not packages & set(kdoct.__all__), "an import of the package would replace the name"
