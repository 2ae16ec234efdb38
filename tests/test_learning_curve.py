"Scores against the share of labelled patients."
import pytest
from simulated_models import quiet

from kdoct.app.cli import main
from kdoct.core.files import KdoctError, read_json
from kdoct.core.presets import preset
from kdoct.core.runs import Run, create_run
from kdoct.evaluate import learning_curve as L
from kdoct.evaluate.compared_runs import ComparedModel
from kdoct.evaluate.comparison import holm
from kdoct.evaluate.metrics import simulate_predictions
from kdoct.evaluate.simulated import write_simulated_stages


def methods(shares=(.05, .25, 1.)):
    "Students that gain most where labels are few."
    def model(role, margin, i):
        return ComparedModel(role, {"run": simulate_predictions(100, margin, model=i)})
    return {
        s: {
            "student": model("student", 3.5, 2 * i),
            "baseline": model("baseline", 2 + 1.5 * s, 2 * i + 1),
        }
        for i, s in enumerate(shares)
    }


def test_runs_of_one_share_are_no_curve():
    runs = [Run(name, preset("tiny", **{"data.labelled": .1})) for name in "ab"]
    with pytest.raises(KdoctError, match=r"labels of 10 %"): L.models_by_share(runs)


def test_every_share_has_its_own_baseline_and_all_are_one_family():
    curve = L.learning_curve(methods(), n_boot=500)
    d = curve.differences
    assert d.share.tolist() == [.05, .25, 1.]
    assert d.p_holm.tolist() == pytest.approx(holm(d.p)) and curve.how["comparisons"] == 3


def test_the_table_has_a_row_a_share_and_method():
    texts = L.curve_texts(L.learning_curve(methods(), n_boot=300), "accuracy")
    assert texts.labelled.tolist() == ["5 %", "5 %", "25 %", "25 %", "100 %", "100 %"]
    assert (texts["minus the baseline"] == "").tolist() == [False, True] * 3


def test_the_figure_has_a_line_a_method_over_the_shares():
    figure = L.learning_curve_figure(L.learning_curve(methods(), n_boot=300))
    left, right = figure.axes
    assert left.get_xscale() == "log" and len(left.lines) == 2
    assert [t.get_text() for t in left.get_xticklabels()] == ["5 %", "25 %", "100 %"]
    assert len([line for line in right.lines if line.get_linestyle() == "-"]) == 2   # the student, and 0


def test_the_command_averages_the_runs_of_a_share_and_writes_the_curve(capsys, tmp_path):
    for name, share, seed in (("few", .5, 43), ("few-2", .5, 7), ("all", 1, 43)):
        run = create_run(name, preset("tiny", seed=seed, **{"data.labelled": share}))
        for k in range(3): quiet(write_simulated_stages, run, k)
    with pytest.raises(SystemExit) as e:
        main(["learning-curve", "few", "few-2", "all", "--roles", "student", "--resamples", "200",
              "--out", str(tmp_path / "made")])
    assert not e.value.code, capsys.readouterr().err
    rows = read_json(tmp_path / "made" / "learning_curve.json")["learning_curve"]
    assert [(r["share"], r["role"], r["runs"]) for r in rows] == [
        (.5, "student", 2), (.5, "baseline", 2), (1, "student", 1), (1, "baseline", 1)
    ]
    assert (tmp_path / "made" / "learning_curve.png").exists()
