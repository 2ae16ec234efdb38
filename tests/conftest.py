"What all tests share: outputs go to a temporary folder, threads are few, hypothesis repeats itself."
import os
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
