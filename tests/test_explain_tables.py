"Tables of explanations: what is drawn anew, what is paired, what is left out and marked."
import numpy as np
import pandas as pd
import pytest

from kdoct.core.files import KdoctError
from kdoct.core.result_sections import EvaluateRecipe
from kdoct.explain.comparison import agreement_numbers, correctness
from kdoct.explain.faithfulness import random_maps
from kdoct.explain.tables import (
    agreement_table,
    explanation_table,
    mean_interval,
    sanity_verdict,
)

FAST = EvaluateRecipe(n_boot=200)


def test_images_without_a_number_are_counted():
    nan = np.nan
    frame = pd.DataFrame(dict(
        path=list("abcde"), group=list("vwxyz"), role="student", method="m",
        insertion=[.5, nan, .5, .5, .5], energy=[nan, nan, 100, 100, 100],
        area=[nan, nan, 6.25, 6.25, 6.25],
    ))
    t = explanation_table(frame, FAST).table
    note = t.note.iloc[0]
    assert "without insertion AUC: 1 of 5 images" in note
    assert "without energy in mask %, area of mask %, energy / area: 2 of 5 images" in note
    assert t.energy.iloc[0] == 100 and t.energy_ratio.iloc[0] == pytest.approx(16)


def test_the_verdict_follows_the_interval():
    groups = np.arange(40)
    assert "depend on the weights" in sanity_verdict(np.linspace(-.2, .2, 40), groups, FAST)
    assert "do NOT depend" in sanity_verdict(np.linspace(.8, 1, 40), groups, FAST)
    assert "may or may not" in sanity_verdict(np.linspace(0, 1, 40), groups, FAST)


def test_intervals_resample_groups_and_not_images():
    e = EvaluateRecipe(n_boot=4000)
    r = mean_interval([1]*3 + [0]*9, list("aaabbbbbbbbb"), e)  # draws: aa, ab, ba, bb; means 1, .25, .25, 0
    assert (r["estimate"], r["low"], r["high"]) == (.25, 0, 1)
    values, images = np.repeat([0., 1.], 20), np.arange(40)
    wide, narrow = mean_interval(values, images//10, e), mean_interval(values, images, e)
    assert wide["high"] - wide["low"] > 2*(narrow["high"] - narrow["low"])


def role(name, values, n):
    "n images of a role, each of its own patient."
    rows = np.arange(n)
    return pd.DataFrame(
        dict(path=rows.astype(str), group=rows, role=name, method="m", insertion=values)
    )


def test_differences_are_paired():
    hard = np.random.default_rng(0).random(30)
    teacher, student = role("teacher", hard, 30), role("student", hard - .1, 30)
    frame = pd.concat([teacher, student.sample(frac=1, random_state=0)])
    t = explanation_table(frame, FAST).table.loc["m, student minus teacher"]
    assert t[["insertion", "insertion_low", "insertion_high"]].tolist() == pytest.approx([-.1]*3)


def test_other_images_for_the_student_are_refused():
    student = role("student", .5, 2).assign(path=["0", "other"])
    frame = pd.concat([role("teacher", .5, 2), student])
    with pytest.raises(KdoctError, match="not explained on the same images"):
        explanation_table(frame, FAST)


def test_agreement_is_divided_by_who_was_right_and_few_groups_are_marked():
    maps = random_maps(60, 21, 21)
    teacher_right, student_right = np.arange(60) > 1, np.arange(60) % 3 > 0
    student = np.where(student_right[:, None, None], maps, maps[::-1])
    frame = agreement_numbers(maps, student, np.arange(60)).assign(
        path=np.arange(60).astype(str),
        group=np.arange(60),
        method="m",
        correctness=correctness(teacher_right, student_right),
    )
    t = agreement_table(frame, FAST).table
    assert t.loc["m: both right", "rank"] == pytest.approx(1)
    assert t.loc["m: student wrong", "rank"] < .5
    assert t.loc["m: both right minus student wrong", "rank_low"] > .5
    assert "too few groups (1)" in t.loc["m: both wrong", "note"]
    assert t.n_images.sum() == 60 + 60 + (60 - 2)
