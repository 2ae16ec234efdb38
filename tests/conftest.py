"What all tests share: outputs go to a temporary folder, threads are few, hypothesis repeats itself."
import os
import shutil
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("OMP_NUM_THREADS", "2")  # before torch is imported, here and in the processes that tests start

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent

torch.set_num_threads(min(2, os.cpu_count() or 1))
hypothesis.settings.register_profile("kdoct", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("kdoct")


def lay_out(folder, *names):
    "Make empty files with these names; the folder, as text."
    for n in names:
        (folder / n).parent.mkdir(parents=True, exist_ok=True)
        (folder / n).touch()
    return str(folder)


def table_recipe(folder, text, encoding="utf-8", name="table.csv"):
    "Write a table; the part of a recipe that reads it."
    from kdoct.core.sections import DataRecipe
    data = text if isinstance(text, bytes) else text.encode(encoding)
    (folder / name).write_bytes(data)
    return DataRecipe(source="csv", root=str(folder / name))


def problems(listing):
    "Path -> problem of a listing's findings."
    return dict(zip(listing.findings.path, listing.findings.problem, strict=True))


@pytest.fixture(autouse=True)
def outputs(tmp_path, monkeypatch):
    "A test's own outputs folder, for the processes it starts too."
    monkeypatch.setenv("KDOCT_OUTPUTS", str(tmp_path / "outputs"))
    monkeypatch.delenv("IN_TEST", raising=False)  # set while nbdev tests a notebook; a test here means the real thing
    return tmp_path / "outputs"


@pytest.fixture(scope="session")
def root():
    "The checkout."
    return ROOT


@pytest.fixture(scope="session")
def shared_data():
    "Folder of the real images, which a user's machine may lack: $KDOCT_DATA, else ../shared/data beside the checkout."
    named = os.environ.get("KDOCT_DATA")
    folder = Path(named) if named else ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        if named: pytest.fail(f"KDOCT_DATA names {named}, which is no folder")
        pytest.skip("no real images here: KDOCT_DATA is not set and there is no ../shared/data")
    return folder


_CHROMIUM_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
)


@pytest.fixture(scope="session")
def chromium(tmp_path_factory):
    "One headless Chromium for the session, driven by selenium, without a network of its own accord."
    places = (
        shutil.which("chromium") or shutil.which("chromium-browser"),
        shutil.which("chromedriver"),
    )
    if not all(places):
        pytest.skip(
            "no browser here: chromium and chromedriver (Debian packages chromium, "
            "chromium-driver) are not installed"
        )
    webdriver = pytest.importorskip(
        "selenium.webdriver", reason="selenium is not installed: pip install 'kdoct[dev]'"
    )
    options = webdriver.ChromeOptions()
    options.binary_location = places[0]
    for flag in (*_CHROMIUM_FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with pytest.MonkeyPatch.context() as env:
        for name in ("NO_PROXY", "no_proxy"): env.setenv(name, "localhost,127.0.0.1")   # the driver is on this machine
        driver = webdriver.Chrome(options, webdriver.ChromeService(places[1]))
        yield driver
        driver.quit()


@pytest.fixture
def browser(chromium):
    "The browser at a laptop's size with an empty page and empty logs; `get_log('browser')`: console, `get_log('performance')`: requests."
    chromium.get("about:blank")
    chromium.set_window_size(1280, 800)
    for log in ("browser", "performance"): chromium.get_log(log)
    return chromium
