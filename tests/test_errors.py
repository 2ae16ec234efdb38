"Errors of the command line have one form and one exit status a kind; `kdoct doctor` and completion answer."
import errno
import json
import os
import subprocess
import sys

import pytest

from kdoct.app import cli, cli_errors
from kdoct.app.cli import main
from kdoct.core.files import KdoctError


@pytest.fixture
def failing(monkeypatch):
    "A function: `kdoct runs`, in which this error is raised."
    def make(error):
        def raised(*_, **__): raise error
        monkeypatch.setattr(cli, "outputs_root", raised)
        with pytest.raises(SystemExit) as e: main(["runs"])
        return e.value.code
    return make


@pytest.mark.parametrize(("error", "status", "problem", "remedy"), [
    (KdoctError("Fold 9 does not exist.", fix="Folds are 0 to 4."), 1, "Fold 9", "0 to 4"),
    (FileNotFoundError(errno.ENOENT, "No such file", "a.csv"), 1, "a.csv: No such file", "name"),
    (PermissionError(errno.EACCES, "Permission denied", "a.csv"), 1, "a.csv: Perm", "KDOCT_OUTPUTS"),
    (OSError(errno.ENOSPC, "No space left on device"), 1, "No space left", "Make room"),
    (MemoryError(), 1, "memory is used up", "smaller batches"),
    (KeyboardInterrupt(), 130, "interrupted", "same command"),
    (ZeroDivisionError("by zero"), 3, "fault of kdoct, not of yours: ZeroDivisionError", "kdoct doctor"),
])
def test_whatever_goes_wrong_is_said_in_one_form(error, status, problem, remedy, failing, capsys):
    assert failing(error) == status
    *before, said, what_to_do = capsys.readouterr().err.splitlines()
    assert said.startswith("kdoct: ") and problem in said
    assert what_to_do.startswith("  -> ") and remedy in what_to_do
    assert bool(before) == (status == 3), "a traceback is shown for a fault of kdoct alone"


@pytest.mark.parametrize(("typed", "says"), [
    ("crossval --fold 0", "No such option: --fold"),
    ("crosval", "No such command 'crosval'"),
    ("report", "Missing argument 'RUN'"),
    ("explore --port 80", "--port"),
])
def test_a_misspelt_command_is_said_in_the_same_form_with_status_2(typed, says, capsys):
    with pytest.raises(SystemExit) as e: main(typed.split())
    assert e.value.code == 2
    said, what_to_do = capsys.readouterr().err.splitlines()
    assert said.startswith("kdoct: ") and says in said
    assert what_to_do.startswith("  -> kdoct ") and "--help" in what_to_do


def test_a_command_that_ends_well_has_status_0(capsys):
    with pytest.raises(SystemExit) as e: main(["runs"])
    assert e.value.code == 0


def test_a_reader_that_closes_the_output_causes_no_message():
    code = "from kdoct.app.cli import main; main(['recipe', '--preset', 'demo'])"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True) as child:
        child.stdout.close()
        assert "Traceback" not in child.stderr.read()


_OTHERS = [pytest.param(shell, marks=pytest.mark.slow) for shell in ("zsh", "fish")]


@pytest.mark.parametrize("shell", ["bash", *_OTHERS])
def test_the_shell_completes_commands(shell):
    words = dict(bash=dict(COMP_WORDS="kdoct cross", COMP_CWORD="1"), fish={}, zsh={})[shell]
    words |= {} if shell == "bash" else dict(_TYPER_COMPLETE_ARGS="kdoct cross", _TYPER_COMPLETE_FISH_ACTION="get-args")
    code = "from kdoct.app.cli import main; main()"
    env = os.environ | words | dict(_KDOCT_COMPLETE=f"complete_{shell}")
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert "crossval" in done.stdout, done.stderr


# --- kdoct doctor

@pytest.fixture(scope="module")
def examined():
    from kdoct.app.doctor import examined
    return examined()


def test_doctor_shows_what_is_installed_and_what_would_be_used(examined, monkeypatch, capsys):
    monkeypatch.setattr("kdoct.app.doctor.examined", lambda: examined)
    with pytest.raises(SystemExit) as e: main(["doctor", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert e.value.code == 0 and not found["broken"]
    assert found["packages"][""]["torch"]["version"]
    assert {"device", "precision", "threads", "instructions", "gpus"} <= set(found["computing"])
    assert found["room"]["free_disk_gb"] > 0 and set(found["places"]) == {"outputs", "weights", "notebooks"}


def test_doctor_names_the_command_that_completes_an_extra(examined, monkeypatch):
    from kdoct.app.doctor import doctor_text
    lacking = examined["packages"] | {"deploy": {"onnx": {"version": None, "fault": "missing"}}}
    text = doctor_text(examined | {"packages": lacking})
    assert "lacks onnx: pip install 'kdoct[deploy]'" in text


def test_doctor_ends_with_1_where_something_is_broken(examined, monkeypatch, capsys):
    sick = examined | {"broken": ["torch 1.0 (not >=2)"]}
    monkeypatch.setattr("kdoct.app.doctor.examined", lambda: sick)
    with pytest.raises(SystemExit) as e: main(["doctor"])
    assert e.value.code == 1 and "BROKEN      torch 1.0" in capsys.readouterr().out


def test_an_outputs_folder_that_cannot_be_written_is_broken(examined):
    from kdoct.app.doctor import _broken
    room = examined["room"] | {"outputs_writable": False}
    assert "KDOCT_OUTPUTS" in _broken(examined | {"room": room})[0]


def test_a_gpu_that_torch_does_not_see_is_a_warning(examined, monkeypatch):
    from kdoct.app.doctor import _warnings
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/nvidia-smi")
    seen = _warnings(examined | {"computing": examined["computing"] | {"gpus": []}})
    assert any("torch sees no GPU" in w for w in seen)
    assert cli_errors.FAULT == 3
