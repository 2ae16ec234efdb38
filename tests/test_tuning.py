"A search for the student's recipe: validation scores only, resumable, every trial recorded."
import contextlib
import io
import math
import re
import shlex

import pandas as pd
import pytest

from kdoct.core.files import KdoctError
from kdoct.core.overrides import merged_overrides
from kdoct.core.presets import preset
from kdoct.core.runs import Run, create_run
from kdoct.distill.tuning import Search, TrialRun, found_text, parse_space, search_recipe, untouched_folds

pytest.importorskip("optuna", reason="optuna is not installed: pip install 'kdoct[tune]'")
FIELDS = ["student.lr=log:1e-4..1e-2", "distill.alpha=0..1", "distill.temperature=1,2,4"]


def formula(run, recipe, fold, folder):
    "Validation scores that are best at a rate of 3e-3 and alpha 0.5, a little worse in later folds."
    distance = (
        abs(math.log10(recipe.student.lr / 3e-3)) + abs(recipe.distill.alpha - 0.5) + 0.1 * fold
    )
    return dict(valid_loss=distance, accuracy=1 - distance / 4, balanced_accuracy=.5)


@pytest.fixture
def search(monkeypatch):
    "A search in a run whose data and teachers pass for made."
    run = create_run("searched", preset("tiny"))
    monkeypatch.setattr(Run, "is_finished", lambda *_: True)
    return Search(run, parse_space(FIELDS, run.recipe), monitor="loss")


def searched(search, n, scores=formula):
    return search_recipe(search, n, scores, lambda _: None)


def folds(n=3, fixed=False):
    "Two patients tested in each of n folds, or the same two in all."
    def role(fold, patient):
        place = (patient//2 - (0 if fixed else fold)) % n
        return ("test", "val", "train")[min(place, 2)]
    rows = [(k, f"P{p}", role(k, p)) for k in range(n) for p in range(2*n)]
    return pd.DataFrame(rows, columns=["fold", "group", "role"])


def record(search):
    return pd.read_csv(search.folder / "trials.csv", keep_default_na=False)


@pytest.mark.parametrize("field, problem", [
    ("data.size=64,128", "not its data or teachers"),
    ("teacher.lr=1e-4..1e-3", "not its data or teachers"),
    ("student.lr=1e-3..1e-4", "second end must be above"),
    ("student.lr=log:0..1", "has no 0"),
    ("distill.temperature=4", "one value"),
    ("student.epoch=1..3", "no field 'student.epoch'"),
    ("student.arch", "not its data or teachers"),
    ("student.drop_rate=0..2", "not valid"),
])
def test_what_cannot_be_searched_is_refused_before_a_trial(field, problem):
    with pytest.raises(KdoctError, match=problem): parse_space([field], preset("tiny"))


def test_a_field_that_counts_is_searched_in_whole_numbers():
    space = parse_space(["student.epochs=2..9", "distill.alpha=0..1"], preset("tiny"))
    assert space["student.epochs"].whole and not space["distill.alpha"].whole


def test_the_first_trial_has_the_values_of_the_run(search):
    first = searched(search, 1).trials[0].params
    own = search.run.recipe
    assert first == {"student.lr": own.student.lr, "distill.alpha": own.distill.alpha,
                     "distill.temperature": own.distill.temperature}


def test_a_search_finds_better_values_than_those_of_the_run(search):
    study = searched(search, 20)
    assert study.best_value < .6 * study.trials[0].value


def test_accuracy_is_searched_upwards(search):
    study = searched(search._replace(monitor="accuracy"), 12)
    assert study.best_value == max(t.value for t in study.trials)


def test_a_killed_search_goes_on_with_the_same_trials(search):
    whole = searched(search._replace(name="whole"), 8)

    def killed(run, recipe, fold, folder):
        if len(record(search)) == 5: raise KeyboardInterrupt
        return formula(run, recipe, fold, folder)

    searched(search, 2)
    with pytest.raises(KeyboardInterrupt): searched(search, 8, killed)
    study = searched(search, 8)
    ended = [t for t in study.trials if t.state.name == "COMPLETE"]
    assert [t.params for t in ended] == [t.params for t in whole.trials]
    assert record(search).state.tolist().count("broken off") == 1


def test_a_recipe_that_fails_is_recorded_with_its_reason_and_the_search_goes_on(search):
    def scores(run, recipe, fold, folder):
        out = formula(run, recipe, fold, folder)
        return out | dict(valid_loss=None) if recipe.distill.temperature == 2 else out
    study = searched(search, 12, scores)
    table = record(search)
    failed = table[table.state == "failed"]
    assert len(study.trials) == 12 and set(failed["distill.temperature"]) == {2}
    assert failed.error.str.contains("not finite").all()


def test_another_question_under_the_same_name_is_refused(search):
    searched(search, 1)
    with pytest.raises(KdoctError, match="other folds"): searched(search._replace(folds=(0, 1)), 2)


def test_a_trial_below_the_median_after_one_fold_is_pruned(search):
    study = searched(search._replace(folds=(0, 1), prune=True, name="pruned"), 15)
    states = [t.state.name for t in study.trials]
    assert "PRUNED" in states and states[0] == "COMPLETE"
    table = record(search._replace(name="pruned"))
    assert (table[table.state == "pruned"].valid_loss == "").all()


def test_pruning_needs_several_folds(search):
    with pytest.raises(KdoctError, match="after some of its folds"):
        searched(search._replace(prune=True), 2)


def test_a_search_without_teachers_names_the_command():
    run = create_run("bare", preset("tiny"))
    bare = Search(run, parse_space(FIELDS, run.recipe))
    with pytest.raises(KdoctError, match="data stage") as e: searched(bare, 1)
    assert "01_data" in e.value.fix


def test_the_options_at_the_end_make_the_best_recipe(search):
    study = searched(search, 10)
    text = found_text(study, search, folds())
    options = shlex.split(re.search(r"crossval --run searched --folds 0 (.*)", text)[1])
    recipe = search.run.recipe.override(**merged_overrides(options[1::2]))
    table = record(search)
    best = table.loc[table.valid_loss.astype(float).idxmin()]
    tuned = recipe.training("student-tuned"), recipe.distillation("student-tuned")
    assert (tuned[0].lr, tuned[1].alpha) == (best["student.lr"], best["distill.alpha"])
    assert tuned[1].temperature == best["distill.temperature"]
    assert "optimistic" in text and "untouched" in text


def test_where_the_values_of_the_run_are_the_best_nothing_is_recommended(search):
    def worse_elsewhere(run, recipe, fold, folder):
        return dict(valid_loss=float(recipe.distill != run.recipe.distill))
    text = found_text(searched(search, 4, worse_elsewhere), search, folds())
    assert "own values: they stay" in text and "--set" not in text


@pytest.mark.parametrize("of, searched_folds, left", [
    (folds(), (0,), [0]), (folds(), (0, 1), []), (folds(fixed=True), (0, 1), [0, 1, 2]),
])
def test_folds_whose_tested_patients_have_helped_to_choose_are_not_called_untouched(
    search, of, searched_folds, left
):
    assert untouched_folds(of, searched_folds) == left
    study = searched(search._replace(folds=searched_folds), 5)
    text = " ".join(found_text(study, search._replace(folds=searched_folds), of).split())
    words = {0: "every test part have helped to choose", 1: "test part of fold 0 is untouched",
             3: "The test folds are untouched."}
    assert words[len(left)] in text and ("--folds" in text) == (left == [0])


@pytest.mark.slow
def test_trials_train_on_the_folds_and_teachers_of_the_run_and_never_read_its_test_part(
    monkeypatch,
):
    from kdoct.data.batches import Batches
    from kdoct.data.fold_data import open_fold
    from kdoct.data.stage import prepare_data
    from kdoct.distill.student import train_student
    from kdoct.distill.teacher import train_teacher
    seen, plain_read = set(), Batches.read
    def read(batches, rows):
        seen.update(rows.tolist())
        return plain_read(batches, rows)
    run = create_run("two-trials", preset("tiny", **{"data.phantom.patients": 24}))
    with contextlib.redirect_stdout(io.StringIO()):
        prepare_data(run)
        train_teacher(run, 0)
        teacher = (run.stage_dir(0, "teacher") / "model.json").read_bytes()
        search = Search(run, parse_space(FIELDS, run.recipe), monitor="loss")
        monkeypatch.setattr(Batches, "read", read)
        study = search_recipe(search, 2)
        monkeypatch.setattr(Batches, "read", plain_read)
        parts = open_fold(run, 0).idx
        own = train_student(run, 0)
    assert set(parts["train"]) | set(parts["val"]) <= seen and not set(parts["test"]) & seen
    assert not list(search.folder.rglob("predictions.parquet"))
    assert not list(search.folder.rglob("variants.parquet"))
    assert (run.stage_dir(0, "teacher") / "model.json").read_bytes() == teacher
    # the first trial is the run's own student, which is trained to the same weights
    assert study.trials[0].value == own["metrics"]["validation"]["valid_loss"]
    trial = TrialRun(next(search.folder.glob("trials/*")), run.recipe, run)
    assert trial.is_finished("student", 0) and not trial.is_finished("baseline", 0)
