"Tables hold the numbers of the metrics, and what a reader must know to read them."
import re

import pandas as pd
import pytest
from simulated_models import models

from kdoct.core.files import KdoctError
from kdoct.core.presets import preset
from kdoct.core.runs import ROLES
from kdoct.evaluate import tables as T
from kdoct.evaluate.intervals import bootstrap
from kdoct.evaluate.metrics import evaluate_predictions, simulate_predictions


def test_table_holds_the_numbers_of_metrics():
    m = models()
    t, ci = T.table_of(m, dict.fromkeys(ROLES, 7_700_000)), bootstrap(m['student'])
    assert list(t.index) == list(ROLES)
    assert (
        t.loc['student', 'auc_low'] == ci.low['auc']
        and t.loc['student', 'nll'] == ci.estimate['nll']
    )
    low, high = (100*ci.loc['accuracy', c] for c in ('low', 'high'))
    assert (
        t.loc['student', 'accuracy %']
        == f"{100 * ci.estimate['accuracy']:.1f} [{low:.1f}, {high:.1f}]"
    )
    assert t.loc['student', 'parameters'] == '7.70 M'


def test_table_says_what_a_reader_must_know():
    df = models()['student']
    df = df[df.label != 'DME'].reset_index(drop=True)
    note = T.table_of({'student': df}, {'student': 1}).note['student']
    assert 'macro over 3 classes: no image of DME' in note
    rare = pd.concat([df, models()['student'].query('label == "DME"').head(1)], ignore_index=True)
    assert re.search(
        r'\d+ of 1000 resamples lacked a class',
        T.table_of({'student': rare}, {'student': 1}).note['student'],
    )


def test_differences_need_the_same_images():
    m = models()
    with pytest.raises(KdoctError, match='not the same images'):
        T.differences_of(m | {'baseline': m['baseline'].iloc[1:]})


def test_the_published_selection_stands_beside_all_slices(tmp_path):
    df = simulate_predictions(60).assign(patient_label=lambda t: t.label)
    # every slice shows the diagnosis
    assert T.selection_section({'student': df}, preset('tiny').evaluate) is None
    df.loc[df.slice == 0, 'label'] = 'NORMAL'
    s = T.selection_section({'student': df}, preset('tiny').evaluate)
    kept = df[df.label == df.patient_label]
    assert (
        s.table.accuracy['student, published selection'] == evaluate_predictions(kept)['accuracy']
    )
    assert s.table.accuracy['student, all slices'] == evaluate_predictions(df)['accuracy']
    assert f'{len(kept)} of {len(df)}' in s.caption


def test_a_point_is_not_shown_as_an_interval():
    df = models()['student']
    rare = pd.concat([df[df.label != 'DME'], df[df.label == 'DME'].head(1)], ignore_index=True)
    t = T.table_of({'student': rare}, {'student': 1})
    assert (
        t.loc['student', 'macro sensitivity %'].endswith('(no interval)')
        and '[' in t.loc['student', 'accuracy %']
    )
    assert re.search(r'\d+ of 1000 resamples lacked a class: no interval', t.note['student'])
    each = T.classes_section({'student': rare}, preset('tiny').evaluate)
    assert (
        each.texts.loc['student, DME', 'sensitivity %'].endswith('(no interval)')
        and 'no interval of sensitivity' in each.table.note['student, DME']
    )
    d = T.shown_differences(T.differences_of(dict(teacher=rare, student=rare, baseline=rare)))
    assert d.loc['student - baseline', 'macro sensitivity (points)'] == '+0.0 (no interval)'
