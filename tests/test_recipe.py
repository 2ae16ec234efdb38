"What is typed as a change of the recipe, or as the name of a run, is taken as meant or refused."
import pytest

from kdoct.app.cli import app
from kdoct.core.files import KdoctError
from kdoct.core.overrides import parse_overrides
from kdoct.core.presets import preset
from kdoct.core.recipe import Recipe
from kdoct.core.runs import check_run_name, create_run


@pytest.fixture(autouse=True)
def outputs(tmp_path, monkeypatch):
    monkeypatch.setenv("KDOCT_OUTPUTS", str(tmp_path))
    return tmp_path


REFUSED = {  # what is typed -> what is wrong with it, what to do
    "student=3": ("'student' is a part of the recipe", "student.FIELD=VALUE"),
    "data.phantom=3": ("'data.phantom' is a part", "data.phantom.patients"),
    "student.epochs=true": ("student.epochs: true is no number", "student.epochs=8"),
    "student.lr=false": ("student.lr: false is no number", "student.lr=0.001"),
    "decide.alpha=[true]": ("decide.alpha: [true] is no number", "shares of sets"),
    "student.size=true": ("student.size: true is no number", "student.size: side of"),
    "a,b": ("'a,b' is not of the form name=value", "data.classes=a,b"),
    "student.epochs": ("is not of the form name=value", "Write student.epochs=VALUE"),
    "student.epochs 3": ("is not of the form name=value", "Write student.epochs=3"),
    "student.epochs = 3": ("is not of the form name=value", "Write student.epochs=3"),
    "student.epochs:3": ("is not of the form name=value", "Write student.epochs=3"),
    "student.epochs=3, student.lr=1": ("student.epochs:", "blanks, not commas"),
    "student.epochs=3,student.lr=1": ("student.epochs:", "student.epochs=3 student.lr=1"),
    "student.learning_rate=0.1": ("no field 'student.learning_rate'", "student.lr"),
    "student.arch=no_such_net": ("no_such_net", "timm"),
}


@pytest.mark.parametrize("typed", [t for t in REFUSED if "arch" not in t])
def test_a_change_that_cannot_be_meant_is_refused_with_what_helps(typed):
    problem, fix = REFUSED[typed]
    with pytest.raises(KdoctError) as e: Recipe().override(**parse_overrides(typed))
    assert problem in e.value.problem
    assert fix in e.value.fix


TYPED = ["student=3", "student.epochs=true", "a,b", "student.arch=no_such_net"]


@pytest.mark.parametrize("command", ["recipe", "audit", "folds", "crossval"])
@pytest.mark.parametrize("typed", TYPED)
def test_every_command_refuses_the_same_changes(command, typed, outputs):
    with pytest.raises(KdoctError) as e:
        app([command, "--preset", "tiny", "--set", typed], standalone_mode=False)
    assert REFUSED[typed][0] in e.value.problem
    assert not list(outputs.iterdir())


NO_NAMES = ["con", "NUL", "aux.txt", "COM1", "lpt9.a.b", "a.", "Cache", "b" * 101]


@pytest.mark.parametrize("name", NO_NAMES)
def test_a_run_has_a_name_that_every_system_can_have(name, outputs):
    with pytest.raises(KdoctError, match="cannot be a run's name") as e:
        create_run(name, preset("tiny"))
    assert "Choose another name" in e.value.fix
    assert not list(outputs.iterdir())


@pytest.mark.parametrize("name", ["console", "com", "lpt10", "nullo", "a.b", "2026"])
def test_a_name_that_only_resembles_a_device_is_a_name(name): check_run_name(name)


def test_two_runs_do_not_differ_by_small_and_large_letters_alone():
    create_run("a", preset("tiny"))
    with pytest.raises(KdoctError, match="'a' is there") as e: create_run("A", preset("tiny"))
    assert "write it as it is: a" in e.value.fix
    create_run("a", preset("tiny"))   # the same name opens it


def test_a_run_made_with_overrides_is_continued_by_its_name_as_the_message_says():
    create_run("mine", preset("tiny", **{"student.epochs": 3})).folds_csv.write_text("")
    with pytest.raises(KdoctError, match="student.epochs: 3, not 2") as e:
        create_run("mine", preset("tiny"))
    assert "papermill: -p run mine, without preset, overrides" in e.value.fix
