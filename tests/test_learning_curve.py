"Scores against the share of labelled patients."
from types import SimpleNamespace

import pytest

from kdoct.core.files import KdoctError
from kdoct.evaluate import learning_curve as L
from kdoct.evaluate.compared_runs import ComparedModel
from kdoct.evaluate.comparison import holm
from kdoct.evaluate.metrics import simulate_predictions


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


def run_of(share):
    return SimpleNamespace(recipe=SimpleNamespace(data=SimpleNamespace(labelled=share)))


def test_a_run_of_before_uses_all_labels():
    assert L.labelled_share(SimpleNamespace(recipe=SimpleNamespace(data=object()))) == 1


def test_runs_of_one_share_are_no_curve():
    with pytest.raises(KdoctError, match=r"labels of 10 %"): L.models_by_share([run_of(.1)] * 2)


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
    assert len(right.lines) == 2   # the student, and 0
