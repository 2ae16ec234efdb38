"A quantile with one vote a patient, and sets that cover new patients."
import numpy as np
import pandas as pd
from hypothesis import given
from hypothesis import strategies as st
from simulated_decisions import features, fitted

from kdoct.core.result_sections import DecideRecipe
from kdoct.evaluate.metrics import logits_of, simulate_predictions, targets_of
from kdoct.evaluate.prediction_sets import patient_quantile


@given(st.integers(1, 60), st.floats(.5, .99), st.integers(0, 99))
def test_quantile_of_single_images_is_split_conformal(n, level, seed):
    s = np.random.default_rng(seed).permutation(n).astype(float)
    k = int(np.ceil((n + 1)*level - 1e-9))
    assert patient_quantile(s, np.arange(n), level) == (np.sort(s)[k - 1] if k <= n else np.inf)


def test_quantile_gives_a_patient_one_vote():
    s, g = np.arange(30.), np.arange(30)
    again = np.r_[s, np.repeat(s, 50)], np.r_[g, np.repeat(g, 50)]
    assert patient_quantile(s, g, .9) == patient_quantile(*again, .9)
    one_loud = np.r_[s, np.full(5000, 99.)], np.r_[g, np.full(5000, 30)]
    assert patient_quantile(*one_loud, .9) < 99


def test_sets_cover_new_patients_at_their_target():
    kept = []
    for seed in range(60):
        d = fitted(simulate_predictions(40, 1., seed=seed), DecideRecipe(alpha=(.1,)))
        test = simulate_predictions(40, 1., seed=1000 + seed)
        sets = d.sets(d.probabilities(logits_of(test)), .1)
        hit = pd.Series(sets[np.arange(len(test)), targets_of(test)])
        kept.append(hit.groupby(test.group.to_numpy()).mean().mean())
    assert .88 < np.mean(kept) < .96


def test_sets_are_never_empty_and_grow_with_the_target():
    d = fitted(recipe=DecideRecipe(alpha=(.05, .3)))
    p = d.probabilities(features(200, d=4))
    small, large = d.sets(p, .3), d.sets(p, .05)
    assert small.any(1).all() and (small <= large).all()
    assert small[np.arange(200), p.argmax(1)].all()
