"Choosing among models: the same images, differences on the same resamples, p corrected for their number."
import json

import numpy as np
import pandas as pd
import pytest
from simulated_models import quiet

from kdoct.app.cli import main
from kdoct.app.report import report_html
from kdoct.core.files import KdoctError, read_json, write_json
from kdoct.core.presets import preset
from kdoct.core.runs import create_run
from kdoct.evaluate.all_folds import evaluate_run
from kdoct.evaluate.compared_runs import ComparedModel, read_models
from kdoct.evaluate.comparison import (
    AGAINST,
    BETTER,
    NOT_SHOWN,
    compare_models,
    comparison_markdown,
    comparison_protocol,
    holm,
)
from kdoct.evaluate.comparison_figures import forest_figure, write_comparison
from kdoct.evaluate.intervals import paired_difference
from kdoct.evaluate.metrics import simulate_predictions
from kdoct.evaluate.simulated import write_simulated_stages


def simulated(name, folds=(0, 1, 2), **changes):
    "A run with simulated models."
    run = create_run(name, preset("tiny", **changes))
    for k in folds: quiet(write_simulated_stages, run, k)
    return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "Two seeds of one data set, with other folds; and the place of the runs."
    with pytest.MonkeyPatch.context() as m:
        folder = tmp_path_factory.mktemp("outputs")
        m.setenv("KDOCT_OUTPUTS", str(folder))
        yield simulated("one"), simulated("two", seed=7)


def models(margins, n=150):
    "role -> model with this margin, all on the same patients."
    return {
        role: ComparedModel(role, {"run": simulate_predictions(n, margin, model=i)})
        for i, (role, margin) in enumerate(margins.items())
    }


def test_holm_is_that_of_the_hand_worked_numbers():
    assert holm([.01, .04, .03, .005]) == pytest.approx([.03, .06, .06, .02])


def test_holm_is_that_of_statsmodels():
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    p = np.random.default_rng(0).uniform(size=50)**3
    assert holm(p) == pytest.approx(multitest.multipletests(p, method="holm")[1])


def test_a_comparison_that_could_not_be_tested_does_not_count_in_the_correction():
    corrected = holm([.01, np.nan, .02])
    assert corrected[[0, 2]] == pytest.approx([.02, .02]) and np.isnan(corrected[1])


def test_differences_are_those_of_the_paired_bootstrap():
    both = models(dict(student=3.4, baseline=3.))
    made = compare_models(both, n_boot=400, seed=5, scores=("accuracy",)).differences.iloc[0]
    a, b = (m.predictions["run"] for m in both.values())
    alone = paired_difference(a, b, 400, seed=5, metrics=("accuracy",)).loc["accuracy"]
    columns = ["difference", "low", "high", "p"]
    assert made[columns].tolist() == pytest.approx(alone[columns].tolist())


def test_chance_among_many_equal_students_is_not_taken_for_a_difference():
    margins = {f"student-{i}": 3. for i in range(12)} | dict(baseline=3.)
    d = compare_models(models(margins, 60), n_boot=4000).differences
    assert (d.p < .05).any() and set(d.verdict) == {NOT_SHOWN}


def test_a_student_that_is_better_stands_after_the_correction():
    d = compare_models(models({"student": 5., "student-at": 3., "baseline": 3.})).differences
    shown = d[(d.family == AGAINST) & (d.score == "accuracy")].set_index("a").verdict
    assert shown.to_dict() == {"student": BETTER, "student-at": NOT_SHOWN}


def test_too_few_resamples_for_any_result_are_named():
    many = models({f"student-{i}": 3. for i in range(12)} | dict(baseline=3.), 30)
    assert "nothing can be shown" in comparison_protocol(compare_models(many, n_boot=300))
    assert "nothing can be shown" not in comparison_protocol(compare_models(many))


def test_runs_of_other_seeds_are_compared_patient_by_patient(runs):
    apart, _ = read_models(list(runs))
    assert len(apart) == 6
    d = compare_models(apart, n_boot=200).differences
    assert "one: student" in set(d.a) and "two: student" in set(d.b)


def test_a_method_is_the_mean_of_its_runs(runs):
    methods, _ = read_models(list(runs), by_role=True)
    scores = compare_models(methods, n_boot=200).scores
    each = [compare_models(read_models([run])[0], n_boot=200).scores for run in runs]
    mean = np.mean([s.accuracy["student"] for s in each])
    assert scores.accuracy["student"] == pytest.approx(mean) and scores.runs["student"] == 2


def test_runs_of_other_images_are_refused_with_an_example(runs):
    other = simulated("other", **{"data.phantom.patients": 48})
    with pytest.raises(KdoctError, match=r"one.*other.*not tested alike: \d+ only in the first"):
        read_models([runs[0], other])


def test_copies_of_the_same_images_in_another_place_are_the_same_images(runs):
    moved = simulated("moved")
    files = [moved.path / "table.parquet", *moved.path.glob("fold_*/*/predictions.parquet")]
    for file in files:
        pd.read_parquet(file).assign(path=lambda t: "copy/" + t.path).to_parquet(file)
    assert len(read_models([runs[0], moved])[0]) == 6


def test_runs_that_group_the_same_images_otherwise_are_refused(runs):
    grouped = simulated("grouped")
    for k in range(3):
        for role in grouped.recipe.roles:
            file = grouped.stage_dir(k, role) / "predictions.parquet"
            pd.read_parquet(file).assign(group=lambda t: t.path).to_parquet(file)
    with pytest.raises(KdoctError, match="the group of"): read_models([runs[0], grouped])


def test_a_model_of_other_folds_is_refused():
    run = simulated("folds", (0,))
    about = run.stage_dir(0, "student") / "model.json"
    write_json(about, read_json(about) | dict(folds_sha256="0" * 64, fold=0))
    with pytest.raises(KdoctError, match="student of fold 0 was trained on other folds"):
        read_models([run])


def test_a_model_that_a_fold_lacks_is_left_out_and_named():
    run = simulated("lacks", (0, 1))
    (run.stage_dir(1, "teacher") / "predictions.parquet").unlink()
    found, notes = read_models([run])
    assert list(found) == ["student", "baseline"]
    assert notes == ["teacher of run 'lacks' is not trained in fold 1 and is left out"]


def test_hollow_marks_are_those_that_show_no_difference():
    made = compare_models(models({"student": 5., "student-at": 3., "baseline": 3.}))
    marks = [line for line in forest_figure(made).axes[0].lines if line.get_marker() == "o"]
    assert [mark.get_mfc() == "white" for mark in marks] == [False, True]


def test_the_record_has_protocol_and_numbers(tmp_path):
    made = compare_models(models(dict(student=4., baseline=3.)), n_boot=500, seed=3)
    write_comparison(made, tmp_path, runs=["run"])
    record = json.loads((tmp_path / "comparison.json").read_text())
    said = {k: record["protocol"][k] for k in ("level", "resamples", "seed", "correction")}
    assert said == dict(level=.95, resamples=500, seed=3, correction="Holm")
    assert record["protocol"]["families"] == {AGAINST: 3}
    assert pd.read_csv(tmp_path / "comparison.csv").p_holm.notna().all()


def test_markdown_has_a_row_a_pair():
    made = compare_models(models({"student": 4., "student-at": 3., "baseline": 3.}), n_boot=500)
    rows = [r for r in comparison_markdown(made).splitlines() if r.startswith("| student")]
    assert len([r for r in rows if " - " in r.split("|")[1]]) == 3


@pytest.fixture
def at_runs(runs, monkeypatch):
    "The outputs folder of the two runs, for commands."
    monkeypatch.setenv("KDOCT_OUTPUTS", str(runs[0].path.parent))


@pytest.mark.usefixtures("at_runs")
def test_the_command_prints_tables_and_writes_files(capsys, tmp_path):
    with pytest.raises(SystemExit) as e:
        main(["compare", "one", "two", "--by-role", "--resamples", "300", "--score", "accuracy",
              "--out", str(tmp_path / "made")])
    printed = capsys.readouterr().out
    assert not e.value.code and "student - baseline" in printed and "Holm" in printed
    assert "differs from 'one' in seed: 7, not 43" in " ".join(printed.split())
    assert (tmp_path / "made" / "forest.png").exists()


@pytest.mark.usefixtures("at_runs")
def test_a_run_named_twice_is_compared_once(capsys):
    with pytest.raises(SystemExit): main(["compare", "one", "one", "--resamples", "200"])
    printed = capsys.readouterr().out
    assert "student - baseline" in printed and "one: student" not in printed


def test_the_evaluation_of_several_students_has_the_corrected_comparison():
    run = simulated("many", (0, 1), students={"at": {}, "soft": {}})
    result = quiet(evaluate_run, run)[0]
    section = result["sections"]["comparison_against"]
    assert list(section.texts.index) == [
        f"{a} - baseline" for a in ("student", "student-at", "student-soft", "teacher")
    ]
    assert section.table.p_holm.tolist() == pytest.approx(holm(section.table.p))
    assert (run.path / "figures" / "comparison.png").exists()


@pytest.mark.slow
def test_the_report_of_one_fold_shows_the_comparison_of_students():
    page = quiet(report_html, simulated("page", (0,), students={"at": {}}))[0].read_text()
    assert "Every model against the baseline" in page and "Students compared" in page
    assert "p is not corrected" in page


def test_the_evaluation_of_one_student_has_no_comparison_of_many(runs, monkeypatch):
    monkeypatch.setenv("KDOCT_OUTPUTS", str(runs[0].path.parent))
    result = quiet(evaluate_run, runs[0])[0]
    assert not [name for name in result["sections"] if name.startswith("comparison")]
