"Tables count on test patients what a decision does."
import numpy as np
import pandas as pd
import pytest
from simulated_decisions import QUICK, change, features, fitted

from kdoct.core.files import KdoctError, read_json
from kdoct.core.presets import preset
from kdoct.core.runs import create_run
from kdoct.evaluate import simulated
from kdoct.evaluate.decision_tables import DecidedPredictions, decision_sections
from kdoct.evaluate.decisions import save_decision
from kdoct.evaluate.intervals import aurc, risk_coverage, share_interval
from kdoct.evaluate.metrics import log_softmax, logits_of, simulate_predictions, targets_of
from kdoct.evaluate.pooling import pool_decisions
from kdoct.evaluate.stage import evaluate_fold


def test_aurc_and_curve_agree_with_their_definition():
    df = simulate_predictions(60, 1.5)
    # rounded: with equal confidences
    p, y = np.exp(log_softmax(logits_of(df))).round(1), targets_of(df)
    c, right = p.max(1), p.argmax(1) == y
    def risk(least): return (~right)[c >= least].mean()
    assert aurc(c, right, df.group)['estimate'] == pytest.approx(np.mean([risk(x) for x in c]))
    for r in risk_coverage(c, right).itertuples():
        assert r.coverage == pytest.approx((c >= r.threshold).mean())
        assert r.risk == pytest.approx(risk(r.threshold))


def test_intervals_of_shares_resample_patients():
    patients = np.random.default_rng(0).random(40) < .3
    hit = np.repeat(patients, 25)   # all images of a patient alike
    by_patient, by_image = (
        share_interval(hit, g) for g in (np.repeat(np.arange(40), 25), np.arange(1000))
    )
    assert by_patient['high'] - by_patient['low'] > 3*(by_image['high'] - by_image['low'])


def test_sections_count_what_the_decision_does():
    test, d = simulate_predictions(60, 2., seed=5), fitted()
    j = DecidedPredictions(d, test, features(len(test), 7)[:, 0] + d.outlier.threshold)
    s, p = decision_sections({'student': [j]}, QUICK), d.probabilities(logits_of(test))
    usual = j.distance <= d.outlier.threshold
    kept = (p.max(1) >= d.defer_below) & usual   # as predict ships it: an outlier is deferred too
    assert not usual.all()
    assert s['deferral'].table.coverage['student'] == pytest.approx(kept.mean())
    assert s['outliers'].table.outliers['student'] == pytest.approx((~usual).mean())
    hit = d.sets(p, .1)[np.arange(len(test)), targets_of(test)]
    assert s['sets'].table.covered['student, target 90 %'] == pytest.approx(hit.mean())
    threshold, own = d.operating_points.threshold[0], targets_of(test) == 0
    found = (p[own, 0] >= threshold).mean()
    assert s['operating'].table.sensitivity.iloc[0] == pytest.approx(found)


def test_a_fold_without_a_decision_is_named():
    d, test = fitted(), simulate_predictions(30)
    j = DecidedPredictions(d, test, np.zeros(len(test)))
    pooled, notes = pool_decisions({0: {'student': j, 'teacher': j}, 1: {'student': j}})
    assert list(pooled) == ['student']
    assert notes == ['teacher: no decision in fold 1, not in the tables about decisions']


@pytest.mark.slow
def test_evaluation_shows_decisions_where_they_are():
    run = create_run('shown', preset('tiny'))
    simulated.write_simulated_stages(run, 0)
    folder, before = run.stage_dir(0, 'student'), evaluate_fold(run, 0, verbose=False)
    df = pd.read_parquet(folder/'predictions.parquet')
    d = fitted(simulate_predictions(30, classes=tuple(sorted(df.label.unique()))))
    distances = df[['path', 'fold']].assign(distance=d.outlier.score(features(len(df))))
    save_decision(folder, d)
    distances.to_parquet(folder/'outliers.parquet')
    assert not run.is_finished('evaluate', 0)   # the evaluation does not know of it yet
    after = evaluate_fold(run, 0, verbose=False)
    assert 'calibration' not in before['sections'] and run.is_finished('evaluate', 0)
    saved = read_json(run.fold_dir(0)/'evaluation.json')
    assert {'calibration', 'operating', 'deferral', 'sets', 'outliers'} <= set(saved['sections'])
    assert {'calibration', 'coverage_risk'} <= set(saved['figures'])
    assert (run.figures_dir(0)/'coverage_risk.png').exists()
    assert list(saved['sections']['deferral']['table']) == ['student']
    assert after['table'].equals(before['table'])
    change(folder, lambda s: s['about'].update(weights_sha256='of another network'))
    with pytest.raises(KdoctError, match=r'other weights(.|\n)*05g_decide.ipynb .*-p run shown'):
        evaluate_fold(run, 0)
