"A map of labels says everything or is refused, and the refusal says what to write."
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdoct.core.files import KdoctError
from kdoct.data.class_map import class_map

OURS = ("CNV", "DME", "DRUSEN", "NORMAL")


def refusal(text, theirs, ours=OURS):
    with pytest.raises(KdoctError) as e: class_map(text, theirs, ours)
    return e.value


def test_the_entries_that_a_refusal_proposes_are_the_ones_that_are_missing():
    first = refusal("amd=CNV|DRUSEN", ["amd", "Normal", "dme"])
    proposed = re.search(r"--map: (\S+)", first.fix)[1]
    m = class_map(f"amd=CNV|DRUSEN,{proposed}", ["amd", "Normal", "dme"], OURS)
    assert m.labels == {"amd": ("CNV", "DRUSEN"), "Normal": ("NORMAL",), "dme": ("DME",)}


@pytest.mark.parametrize(("text", "problem", "fix"), [
    ("amd=CVN", "amd is CVN", "Did you mean CNV?"),
    ("amd=cnv", "amd is cnv", "Did you mean CNV?"),
    ("amdd=CNV,amd=CNV", "label amdd", "Did you mean amd?"),
    ("AMD=CNV,amd=CNV", "label AMD", "Did you mean amd?"),
    ("amd=CNV DRUSEN", "amd is 'CNV DRUSEN'", "amd=CNV|DRUSEN"),
    ("amd=CNV;dme=DME", "no entry", "commas"),
])
def test_a_slip_of_the_pen_is_named_with_what_was_meant(text, problem, fix):
    e = refusal(text, ["amd"])
    assert problem in e.problem and fix in e.fix


def test_two_labels_that_share_a_part_of_their_classes_are_refused_until_both_join_the_same():
    labels = ["amd", "wet"]
    e = refusal("amd=CNV|DRUSEN,wet=CNV", labels)
    m = class_map(e.fix.removeprefix("Map both to the same: "), labels, OURS)
    assert m.joined == {"CNV|DRUSEN": ("CNV", "DRUSEN"), "DME": ("DME",), "NORMAL": ("NORMAL",)}
    assert m.without_label == ("DME", "NORMAL")


def test_a_label_that_is_a_class_may_be_said_to_be_unknown_all_the_same():
    assert class_map("DME=?", OURS, OURS).unknown == ("DME",)


@given(st.lists(st.floats(0, 1), min_size=4, max_size=4).filter(lambda v: sum(v) > .1))
def test_joined_probabilities_are_a_distribution_and_keep_the_classes_that_stay_alone(values):
    p = np.array([values])/sum(values)
    q = class_map("amd=CNV|DRUSEN", ["amd"], OURS).joined_probabilities(p)
    assert q.sum() == pytest.approx(1) and q[0, 0] == pytest.approx(p[0, 0] + p[0, 2])
    assert q[0, 1:].tolist() == p[0, [1, 3]].tolist()
