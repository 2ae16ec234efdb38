"One table says what the stages are; everything that runs or names a stage reads it."
import ast
import json
from pathlib import Path

import pytest

from kdoct.app import crossval as C
from kdoct.core.files import KdoctError
from kdoct.core.presets import preset
from kdoct.core.runs import STAGES, Stage, create_run, planned_stages, stage_command, stage_of

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("KDOCT_OUTPUTS", str(tmp_path))
    return create_run("r", preset("tiny", teachers={"swin": {}}))


def stage_section(notebook):
    "Code cells of a stage notebook."
    cells = json.loads((ROOT / "nbs" / f"{notebook}.ipynb").read_text(encoding="utf-8"))["cells"]
    return [c for c in cells if c["cell_type"] == "code"]


def test_a_stage_that_is_added_to_the_table_is_run_by_the_cross_validation(run, monkeypatch):
    stages = []
    monkeypatch.setattr(C, "run_stage", lambda run, stage, fold, *_: stages.append((stage, fold)))
    monkeypatch.setattr(C, "require_weights", lambda recipe: None)
    monkeypatch.setitem(
        STAGES, "prune", Stage("prune", "04_distill", lambda run, fold, stage: False, ("student",))
    )
    C.crossval(run, [1])
    assert ("prune", 1) in stages and stages[0] == ("data", 1)


def test_a_finished_stage_is_passed_over(run, monkeypatch):
    stages = []
    monkeypatch.setattr(C, "run_stage", lambda run, stage, fold, *_: stages.append(stage))
    monkeypatch.setattr(C, "require_weights", lambda recipe: None)
    monkeypatch.setitem(
        STAGES, "prune", Stage("prune", "04_distill", lambda run, fold, stage: True)
    )
    C.crossval(run, [0])
    assert "prune" not in stages and "student" in stages


def test_what_a_stage_needs_is_planned_before_it(run):
    names = [name for name, fold in planned_stages(run, [0])]
    for name in names:
        before = {n.partition("-")[0] for n in names[:names.index(name)]}
        assert set(stage_of(name).needs) <= before, name


@pytest.mark.parametrize("stage", STAGES.values(), ids=lambda s: s.name)
def test_the_notebook_of_a_stage_takes_what_the_table_gives_it(stage):
    (tagged,) = [
        c for c in stage_section(stage.notebook) if "parameters" in c["metadata"].get("tags", [])
    ]
    known = {
        t.id
        for n in ast.parse("".join(tagged["source"])).body
        if isinstance(n, ast.Assign)
        for t in n.targets
    }
    assert {
        "run",
        "fold",
        *stage.parameters(f"{stage.name}-x" if stage.name == "teacher" else stage.name),
    } <= known


@pytest.mark.parametrize("notebook", sorted({s.notebook for s in STAGES.values()} - {"01_data"}))
def test_what_a_notebook_makes_by_hand_is_what_its_stages_need(notebook):
    code = "\n".join(
        "".join(c["source"]) for c in stage_section(notebook) if not c["source"][0].startswith("#|")
    )
    calls = [
        n
        for n in ast.walk(ast.parse(code))
        if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "open_stage"
    ]
    (before,) = [k.value for c in calls for k in c.keywords if k.arg == "before"]
    made = {k.arg for k in before.keywords}
    needed = set().union(*(set(s.needs) for s in STAGES.values() if s.notebook == notebook))
    assert made == needed


def test_the_command_of_a_stage_has_its_parameters(run):
    assert stage_command("teacher-swin", run, 2).endswith("-p run r -p fold 2 -p name swin")
    assert stage_command("baseline", run, 2).endswith("-p fold 2 -p role baseline")
    assert "fold" not in stage_command("data", run, 2).split()


def test_an_unknown_stage_is_refused_with_those_there_are(run):
    with pytest.raises(KdoctError, match="no stage 'teach'") as e: stage_command("teach", run)
    assert "teacher-NAME" in e.value.fix


def test_the_folder_that_a_command_writes_to_is_there(run):
    words = stage_command("teacher", run, 2).split()
    assert Path(words[2]).parent.is_dir()
    assert not run.fold_dir(2).exists()   # naming a command makes nothing
