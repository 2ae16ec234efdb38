"Thresholds reach their target where that is possible, at the smallest cost, and say where it is not."
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from simulated_decisions import features, fitted

from kdoct.core.result_sections import DecideRecipe
from kdoct.evaluate.metrics import log_softmax, logits_of, simulate_predictions, targets_of
from kdoct.evaluate.operating_points import deferral_threshold, operating_points


@given(st.integers(0, 500), st.sampled_from([.8, .9, .95, .99]))
def test_thresholds_reach_the_target_and_cost_no_more_than_needed(seed, target):
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.ones(3), 60).round(2)   # rounded: with equal values
    y = rng.integers(0, 3, 60)
    recipe = DecideRecipe(sensitivity=(target,), specificity=(target,))
    other = {'sensitivity': 'specificity', 'specificity': 'sensitivity'}
    for r in operating_points(p, y, list('abc'), recipe).itertuples():
        k = 'abc'.index(r[1])
        own, rest = p[y == k, k], p[y != k, k]
        if np.isnan(r.threshold):
            assert 'not reachable' in r.note
            continue
        def does(t, own=own, rest=rest):
            return {'sensitivity': (own >= t).mean(), 'specificity': (rest < t).mean()}
        done = does(r.threshold)
        assert done[r.kind] >= target
        assert (r.sensitivity, r.specificity) == tuple(done.values())
        every = [does(t) for t in [*np.unique(p[:, k]), 1.1]]
        assert done[other[r.kind]] == max(d[other[r.kind]] for d in every if d[r.kind] >= target)


def test_a_target_out_of_reach_is_a_note():
    y = np.array([0, 0, 1, 1])
    t = operating_points(np.array([[.5, .5]]*4), y, ['a', 'b'], DecideRecipe())
    extremes = {f'not reachable: only by predicting it {how}' for how in ('always', 'never')}
    assert t.threshold.isna().all() and set(t.note) == extremes
    y = np.array([0, 1, 0, 1])
    t = operating_points(np.eye(3)[y], y, list('abc'), DecideRecipe())
    t = t.set_index('class')
    assert set(t.loc['c', 'note']) == {'not reachable: no image of the class'}
    assert (t.loc['a', 'sensitivity'] == 1).all()


def test_deferral_keeps_the_target_share_or_risk():
    df = simulate_predictions(150, 1.5)
    p, y = np.exp(log_softmax(logits_of(df))), targets_of(df)
    c, right = p.max(1), p.argmax(1) == y
    for target in (.5, .9):
        t, _ = deferral_threshold(c, right, DecideRecipe(defer_target=target))
        assert (c >= t).mean() == pytest.approx(target, abs=1/len(c) + 1e-9)
    t, _ = deferral_threshold(c, right, DecideRecipe(defer='risk', defer_target=.1))
    wider = [x for x in np.unique(c) if (c >= x).mean() > (c >= t).mean()]
    assert (~right)[c >= t].mean() <= .1 < min((~right)[c >= x].mean() for x in wider)


def test_a_risk_out_of_reach_defers_everything():
    d = fitted(simulate_predictions(60, -2.), DecideRecipe(defer='risk', defer_target=.01))
    p = d.probabilities(features(9, d=4))
    assert d.judge(p, np.zeros(9)).deferred.all() and any('not reachable' in n for n in d.notes)
    p[0] = [1, 0, 0, 0]
    assert d.judge(p, np.zeros(9)).deferred.all()
