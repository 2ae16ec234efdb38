"From B-scans to volumes and patients, as predict decides them."
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from simulated_models import QUICK, log_probs

from kdoct.core.files import KdoctError
from kdoct.core.result_sections import DecideRecipe
from kdoct.deploy.rows import Volumes, with_decision
from kdoct.evaluate import patients as P
from kdoct.evaluate import volume_tables as W
from kdoct.evaluate.decision_tables import DecidedPredictions
from kdoct.evaluate.decisions import fit_decision
from kdoct.evaluate.intervals import bootstrap
from kdoct.evaluate.metrics import simulate_predictions


def test_mean_of_slices_is_one_row_a_patient_with_the_mean_probability():
    df = simulate_predictions(40, 1.)
    p, lost = P.decide_all_volumes(df, P.VolumeRule(), level='patient')
    want = pd.DataFrame(np.exp(log_probs(df))).groupby(df.patient.to_numpy()).mean()
    np.testing.assert_allclose(np.exp(log_probs(p)), want.loc[p.patient], rtol=1e-9)
    assert lost == [] and p.n_slices.sum() == len(df) and bootstrap(p, 100).n_groups.iloc[0] == 40


@pytest.mark.parametrize('n', [1, 2])
def test_the_worst_rule_takes_the_most_severe_class_that_so_many_slices_reach(n):
    df, order = simulate_predictions(60, 1.), ('NORMAL', 'DRUSEN', 'DME', 'CNV')
    w, _ = P.decide_all_volumes(
        df.sample(frac=1, random_state=0), P.VolumeRule('worst', n, severity=order), level='patient'
    )
    shown = np.array(['CNV', 'DME', 'DRUSEN', 'NORMAL'])[log_probs(df).argmax(1)]
    ranks = pd.Series([order.index(c) for c in shown]).groupby(df.patient.to_numpy())
    want = ranks.apply(lambda r: sorted(r, reverse=True)[min(n, len(r)) - 1]).loc[w.patient]
    assert w.predicted.tolist() == [order[i] for i in want]
    assert (
        np.array(['CNV', 'DME', 'DRUSEN', 'NORMAL'])[log_probs(w).argmax(1)].tolist()
        == w.predicted.tolist()
    )


def decided(df, rule, outliers=()):
    "A decision with this rule about these predictions, `outliers` being far from the training images."
    f = np.random.default_rng(0).normal(size=(300, 8)).astype(np.float32)
    d = fit_decision(val := simulate_predictions(60, seed=5), f[:len(val)], f, DecideRecipe())
    far = np.isin(df.path, outliers)
    return DecidedPredictions(
        replace(d, volume=rule), df, np.where(far, d.outlier.threshold + 1, 0.0)
    )


ORDER = ('NORMAL', 'DRUSEN', 'DME', 'CNV')
RULES = {
    'mean': P.VolumeRule(),
    'worst': P.VolumeRule('worst', 2, severity=ORDER),
    'worst of 1, all': P.VolumeRule('worst', 1, False, ORDER),
}


@pytest.mark.parametrize('rule', RULES.values(), ids=RULES)
def test_evaluation_decides_every_volume_as_predict_does(rule):
    "The rows that predict writes, and the table of evaluation, of the same B-scans."
    df = simulate_predictions(40, 1.)
    j = decided(df, rule, df.path[::3])
    volumes = Volumes(j.decision.classes, rule)
    for row, about in zip(
        with_decision(j.decision, j.probs, j.distance, 0.1), df.to_dict('records'), strict=True
    ):
        volumes.add(
            row
            | {k: about[k] for k in ('path', 'patient', 'eye', 'volume', 'slice')}
            | dict(n_slices=None, error='')
        )
    shipped = pd.DataFrame(volumes.rows()).set_index('volume')
    table, _ = W._decided_units(df, [j], None, 'volume')
    table = table.set_index(table.path.str.split(' | ', regex=False).str[1]).loc[shipped.index]
    for c in ('predicted', 'deferred', 'why'): assert table[c].tolist() == shipped[c].tolist()
    assert (
        table.n_used.tolist() == shipped.used.tolist()
        and (shipped.used < shipped.slices).any() == rule.drop_outliers
    )
    s = W.volumes_section({'student': df}, {'student': [j]}, P.VolumeRule(), QUICK)
    n = (shipped.predicted != '')
    assert s.table.accuracy['student, volumes'] == pytest.approx(
        (shipped.predicted == df.groupby('volume').label.first()[shipped.index])[n].mean()
    )
    assert (
        s.table.deferred['student, volumes'] == pytest.approx(shipped.deferred.mean())
        and rule.text in s.caption
    )
    assert s.table.without['student, volumes'] == (~n).sum()


def test_volumes_of_a_patient_are_decided_apart_and_together():
    df = simulate_predictions(40, 1.).assign(eye=lambda d: np.where(d.slice % 2, 'OD', 'OS'))
    s = W.volumes_section({'student': df}, {}, P.VolumeRule(), QUICK)
    assert list(s.table.index) == ['student, volumes', 'student, patients']
    assert (
        s.table.n_images['student, volumes']
        == df.groupby(['patient', 'eye']).ngroups
        > s.table.n_images['student, patients']
        == 40
    )
    assert 'Without a decision' in s.caption
    alone = W.volumes_section({'student': df.assign(volume='')}, {}, P.VolumeRule(), QUICK)
    assert list(alone.table.index) == ['student, patients']


def test_a_table_without_a_usable_volume_is_not_made():
    df = simulate_predictions(10)
    assert (
        W.volumes_section(
            {'student': df},
            {'student': [decided(df, P.VolumeRule(), df.path)]},
            P.VolumeRule(),
            QUICK,
        )
        is None
    )


def test_patients_with_contradicting_slices_are_named_or_take_the_worst():
    df = simulate_predictions(30)
    df.loc[df.index[df.patient == df.patient.value_counts().index[0]][0], 'label'] = 'DME'
    name = df.groupby('patient').label.nunique().idxmax()
    p, lost = P.decide_all_volumes(df, P.VolumeRule(), level='patient')
    assert lost == [name] and name not in set(p.patient)
    s = W.volumes_section({'student': df.drop(columns='volume')}, {}, P.VolumeRule(), QUICK)
    assert f'1 patients ({name})' in s.caption
    ordered = P.VolumeRule(severity=('NORMAL', 'DRUSEN', 'DME', 'CNV'))
    assert name in set(P.decide_all_volumes(df, ordered, level='patient')[0].patient)
    known, lost = P.decide_all_volumes(
        df.assign(patient_label='CNV'), P.VolumeRule(), level='patient'
    )
    assert lost == [] and set(known.label) == {'CNV'}


def test_a_patient_in_two_groups_is_refused():
    df = simulate_predictions(20)
    df['group'] = df.path
    with pytest.raises(KdoctError, match='in several groups'):
        P.decide_all_volumes(df, P.VolumeRule(), level='patient')
