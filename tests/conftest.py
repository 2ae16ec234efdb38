"What all tests share: a trained run, a temporary folder for outputs, few threads, hypothesis that repeats itself."
import functools
import gc
import os
import shutil
import sys
from collections import Counter
from hashlib import sha256
from pathlib import Path

# Set before torch is imported, here and in the processes that tests start. The workers of pytest share the cores:
# with more threads than cores, those of OpenMP mostly wait for each other.
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis  # noqa: E402
import pytest  # noqa: E402
from filelock import FileLock  # noqa: E402

import kdoct  # noqa: E402, F401 (before timm and torchvision, which then load no compiler)

ROOT = Path(__file__).resolve().parent.parent

hypothesis.settings.register_profile("kdoct", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("kdoct")


# What these make takes long, whichever test asks first: a browser, a network in every format, a served page, the site
# of the guide, the server of stage kernels, the wheel.
SLOW_FIXTURES = {"browser", "exported_outputs", "page", "site", "stage_server", "wheel"}


@pytest.hookimpl(tryfirst=True)   # before `-m "not slow"` is looked at
def pytest_collection_modifyitems(items):
    "Mark what needs a slow fixture; files with many slow tests first, so that the last ones to begin are short."
    def file(item): return item.nodeid.partition("::")[0]
    for item in items:
        if SLOW_FIXTURES & set(item.fixturenames): item.add_marker("slow")
    tests = Counter(map(file, items))
    slow = Counter(file(item) for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: (-slow[file(item)], -tests[file(item)], file(item)))


def pytest_runtest_setup(item):
    "A test of a GPU is skipped where there is none."
    if item.get_closest_marker("gpu") is None: return
    import torch  # here: most workers collect without it
    if not torch.cuda.is_available(): pytest.skip("no GPU here")


def pytest_collection_finish():
    "What was imported stays: the garbage collector need not look through it again and again."
    gc.collect()
    gc.freeze()


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


def folder_run(folder, pattern, name="r", of="tiny", **changes):
    "A run on folders of classes, small and not yet prepared; `changes` are of its data part."
    from kdoct.core.presets import preset
    from kdoct.core.runs import create_run
    data = dict(source="folder", root=str(folder), group_pattern=pattern, n_folds=3, size=32) | changes
    return create_run(name, preset(of, **{f"data.{k}": v for k, v in data.items()}))


def imported_network(folder, n_pictures):
    "A network of 64 px as `kdoct import` writes it, `mine`, and random pictures of several sizes, in a folder."
    import numpy as np
    import timm
    import torch
    from PIL import Image

    from kdoct.models.folders import import_model_folder
    torch.manual_seed(0)
    net = timm.create_model("test_efficientnet", num_classes=3)
    torch.nn.init.normal_(net.classifier.weight)
    torch.save(net.state_dict(), folder / "their-own.pth")
    classes = ["CNV", "DRUSEN", "NORMAL"]
    import_model_folder(folder / "their-own.pth", "test_efficientnet", classes, folder / "mine", 64)
    (folder / "pictures").mkdir()
    for i in range(n_pictures):
        pixels = np.random.default_rng(i).integers(0, 256, (70 + i, 90), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "pictures" / f"{i}.png")


def problems(listing):
    "Path -> problem of a listing's findings."
    return dict(zip(listing.findings.path, listing.findings.problem, strict=True))


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    "One thread for torch, also where OMP_NUM_THREADS was set to more; torch is imported only by tests that need it."
    if "torch" in sys.modules: sys.modules["torch"].set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def phantoms_made_once(tmp_path_factory):
    "Simulate each data set of a recipe once a session; a run that asks for the same gets a copy of the files."
    from kdoct.data import phantom_files
    write_phantom = phantom_files.write_phantom
    @functools.wraps(write_phantom)
    def copied(root, processes=1, **made):
        if not Path(root).exists():
            facts = repr(sorted(made.items())).encode()
            name = f"phantom-{sha256(facts).hexdigest()[:16]}"
            def make(folder): write_phantom(folder, processes=processes, **made)
            shutil.copytree(made_once(tmp_path_factory, name, make), root)
        return write_phantom(root, **made)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(phantom_files, "write_phantom", copied)
        yield


@pytest.fixture(autouse=True, scope="session")
def no_wait_for_the_disk():
    "No test cuts the power, so none waits until what it wrote is on the disk: milliseconds for each file."
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        yield


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


# --- the trained run

TRAINED = {   # a teacher with an average beside its checkpoint, a margin, two B-scans of every eye
    "data.margin": 8,
    "data.phantom.slices": 2,
    "teacher.average": "swa",
    "teacher.swa_start": 1,
    "evaluate.views": ["identity", "hflip"],
}


def made_once(tmp_path_factory, name, make):
    "A folder that the first worker who asks makes, and all read."
    place = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ: place = place.parent
    folder, done = place / name, place / f"{name}.done"
    with FileLock(place / f"{name}.lock"):
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            make(folder)
            done.touch()
    return folder


def copied_run(outputs, to):
    "The run `tiny` in a copy of its outputs folder: for tests that change it."
    from kdoct.core.files import read_json
    from kdoct.core.recipe import validated_recipe
    from kdoct.core.runs import Run
    shutil.copytree(outputs, to, dirs_exist_ok=True)
    facts = to / "tiny" / "run.json"
    facts.write_text(facts.read_text().replace(str(outputs), str(to)))
    return Run(to / "tiny", validated_recipe(read_json(facts)["recipe"]))


@pytest.fixture(scope="session")
def trained_outputs(tmp_path_factory):
    "An outputs folder with the run `tiny`, whose teacher and baseline of fold 0 are trained. To be copied."
    def make(folder):
        from kdoct.core.presets import preset
        from kdoct.core.runs import create_run
        from kdoct.data.stage import prepare_data
        from kdoct.distill.student import train_baseline
        from kdoct.distill.teacher import train_teacher
        with pytest.MonkeyPatch.context() as env:
            env.setenv("KDOCT_OUTPUTS", str(folder))
            run = create_run("tiny", preset("tiny", **TRAINED))
            prepare_data(run)
            train_teacher(run, 0)
            train_baseline(run, 0)
    return made_once(tmp_path_factory, "trained", make)


@pytest.fixture(scope="session")
def exported_outputs(trained_outputs, tmp_path_factory):
    "The same with the bundle of the baseline, in every format. To be copied."
    pytest.importorskip("openvino", reason="the extra deploy is not installed")
    def make(folder):
        from kdoct.deploy import engines
        from kdoct.deploy.stage import export_fold
        with pytest.MonkeyPatch.context() as env:
            env.setenv("KDOCT_OUTPUTS", str(folder))
            # how fast INT8 is on this machine today is not tested, nor whether a network of two epochs is sure
            for name, limit in dict(speed=0., points=20., labels=.9, flags=.9).items():
                env.setitem(engines.LIMITS, name, limit)
            export_fold(copied_run(trained_outputs, folder), 0, "baseline")
    return made_once(tmp_path_factory, "exported", make)


@pytest.fixture(scope="session")
def stage_server():
    "The process whose forks are the kernels of stages, for this whole session."
    from kdoct.app import kernels
    with kernels.prepared_kernels(): yield kernels.SERVERS[0] if kernels.SERVERS else None


# --- a browser

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
    "The browser at a laptop's size, all empty; `get_log`: 'browser' is the console, 'performance' the requests."
    chromium.get("about:blank")
    chromium.set_window_size(1280, 800)
    for log in ("browser", "performance"): chromium.get_log(log)
    return chromium
