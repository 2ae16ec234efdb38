"Intervals resample patients, are left out where they would mislead, and compare models on the same images only."
import time

import numpy as np
import pandas as pd
import pytest

from kdoct.core.files import KdoctError
from kdoct.evaluate import intervals as N
from kdoct.evaluate import metrics as M


def test_a_class_that_is_never_predicted_has_no_interval_of_its_precision():
    df = M.simulate_predictions(60)
    df['logit_DME'] -= 100
    ci = N.bootstrap(df, 100)
    assert ci.n_used['precision'] == 0 and np.isnan(ci.low['precision'])


def test_resamples_that_lose_a_class_are_left_out_and_counted():
    df = M.simulate_predictions(60)
    rare = pd.concat([df[df.label != 'DME'], df[df.label == 'DME'].head(1)])
    ci = N.bootstrap(rare, n_boot=400)
    assert ci.n_used['accuracy'] == 400
    # one patient is in a resample with probability 1 - 1/e = 0.63
    assert 200 < ci.n_used['sensitivity'] < 300


@pytest.mark.slow
def test_interval_covers_the_truth_when_images_of_a_patient_agree():
    "Four equal images a patient: resampling patients covers at about 95 %, resampling images does not."
    rng, truth = np.random.default_rng(0), .85
    hits = {'patient': 0, 'image': 0}
    for _ in range(100):
        right = np.repeat(rng.random(100) < truth, 4)
        z = np.where(right, 1., -1.)
        df = pd.DataFrame(
            {
                'path': range(400),
                'patient': 0,
                'group': np.arange(400) // 4,
                'fold': 0,
                'label': np.where(np.arange(400) // 4 % 2, 'A', 'B'),
            }
        )
        df['logit_A'] = np.where(df.label == 'A', z, -z)
        df['logit_B'] = 0.
        for unit, t in (('patient', df), ('image', df.assign(group=df.path))):
            ci = N.bootstrap(t, n_boot=100).loc['accuracy']
            hits[unit] += ci.low <= truth <= ci.high
    assert hits['patient'] >= 88
    assert hits['image'] < 80


def test_bootstrap_repeats_with_its_seed_only():
    df = M.simulate_predictions(50)
    a, b, c = (
        N.bootstrap(df, seed=1),
        N.bootstrap(df.sample(frac=1, random_state=0), seed=1),
        N.bootstrap(df, seed=2),
    )
    pd.testing.assert_frame_equal(a, b)
    assert a.low['nll'] != c.low['nll']


def test_paired_difference_is_exactly_that_of_the_two_tables():
    a, b = (M.simulate_predictions(80, margin=m, model=m) for m in (2, 3))
    d = N.paired_difference(b, a.sample(frac=1, random_state=1))
    ea, eb = M.evaluate_predictions(a), M.evaluate_predictions(b)
    for m in M.HEADLINE:
        assert d.difference[m] == pytest.approx(eb[m] - ea[m])
        assert d.low[m] <= d.high[m]
    mirrored = N.paired_difference(a, b)
    assert mirrored.low['accuracy'] == pytest.approx(-d.high['accuracy'])
    assert mirrored.p['accuracy'] == pytest.approx(d.p['accuracy'])


def test_paired_difference_of_a_model_with_itself_is_nothing():
    a = M.simulate_predictions(40)
    d = N.paired_difference(a, a)
    assert (d.difference == 0).all() and (d.p == 1).all() and (d.share_below == 1).all()


@pytest.mark.parametrize('change,says', [
    (lambda t: t.iloc[2:], '2 only in the first'),
    (lambda t: t.assign(fold=1), 'only in the second'),
    (lambda t: t.assign(label='CNV'), 'label differs in'),
    (lambda t: t.assign(group=t.path), 'group differs in'),
    (lambda t: t.rename(columns={'logit_DME': 'logit_CNV2'}).assign(label='CNV'), 'classes differ'),
], ids=['fewer images', 'other fold', 'other labels', 'other groups', 'other classes'])
def test_models_on_different_images_are_not_compared(change, says):
    a = M.simulate_predictions(20)
    with pytest.raises(KdoctError, match=says): N.paired_difference(a, change(a.copy()))


def test_one_patient_has_no_interval():
    with pytest.raises(KdoctError, match='at least 2'): N.bootstrap(M.simulate_predictions(1))


def test_bootstrap_of_many_patients_stays_quick():
    "12,000 images of 427 patients took 0.1 s on one core; the limit leaves room for a loaded machine."
    df = pd.concat([M.simulate_predictions(1000, fold=f) for f in range(5)], ignore_index=True)
    df['group'] = np.random.default_rng(0).integers(0, 427, len(df)).astype(str)
    began = time.perf_counter()
    N.bootstrap(df, 1000)
    assert time.perf_counter() - began < 5


def test_intervals_of_a_class_are_those_of_its_images_alone():
    df = M.simulate_predictions(40, margin=1.5, seed=3)
    each, predicted = N.bootstrap_classes(df, n_boot=300, seed=5), M.logits_of(df).argmax(1)
    for k, c in enumerate(M.classes_of(df)):
        own = (df.label == c).to_numpy()
        for metric, hit, of in (
            ("sensitivity", predicted == k, own),
            ("specificity", predicted != k, ~own),
            ("precision", own, predicted == k),
        ):
            want = N.share_interval(hit, df.group, of, n_boot=300, seed=5)
            assert each.loc[(c, metric), ["estimate", "low", "high"]].tolist() == pytest.approx(
                [want[e] for e in ("estimate", "low", "high")]
            )
            assert each.loc[(c, metric), "n"] == own.sum()


def test_a_class_without_images_has_no_sensitivity_and_does_not_stop_the_others():
    df = M.simulate_predictions(40, seed=3)
    df = df[df.label != "CNV"]
    each = N.bootstrap_classes(df, n_boot=50)
    assert (
        each.loc[("CNV", "sensitivity"), ["estimate", "low", "high"]].isna().all()
        and each.loc[("CNV", "sensitivity"), "n_used"] == 0
    )
    assert each.drop("CNV", level="class").xs("sensitivity", level="metric").estimate.notna().all()


def one_of_dme():
    "One patient of 60 has the class: it is missing in 37 % of the resamples."
    df = M.simulate_predictions(60)
    return pd.concat([df[df.label != 'DME'], df[df.label == 'DME'].head(1)], ignore_index=True)


def test_no_interval_where_many_resamples_lack_a_class():
    ci = N.bootstrap(one_of_dme(), n_boot=400)
    assert (
        np.isfinite(ci.estimate['sensitivity'])
        and np.isnan(ci.low['sensitivity'])
        and np.isnan(ci.high['auc'])
    )
    assert ci.low['accuracy'] < ci.high['accuracy'] and 200 < ci.n_used['sensitivity'] < 300
    each = N.bootstrap_classes(one_of_dme(), n_boot=400)
    assert np.isnan(each.low['DME', 'sensitivity']) and np.isfinite(each.low['CNV', 'sensitivity'])


@pytest.mark.parametrize('undefined,shown', [(20, True), (21, False)])
def test_the_threshold_of_an_interval_is_a_fifth(undefined, shown):
    i = N.percentile_interval(np.r_[np.full(undefined, np.nan), np.linspace(0, 1, 100 - undefined)], .95)
    assert np.isfinite(i['low']) == shown and i['n_used'] == 100 - undefined


def test_a_difference_without_an_interval_has_no_p():
    a = one_of_dme()
    d = N.paired_difference(a, a.assign(logit_CNV=a.logit_CNV + 1), n_boot=400)
    assert (
        np.isfinite(d.difference['sensitivity'])
        and np.isnan(d.low['sensitivity'])
        and np.isnan(d.p['sensitivity'])
    )
    assert np.isfinite(d.p['accuracy'])


def test_a_share_of_one_patients_images_has_no_interval():
    groups = np.arange(40)
    r = N.share_interval(groups % 2 == 0, groups, groups == 4, n_boot=400)
    assert r['estimate'] == 1 and np.isnan(r['low']) and r['n_used'] < 320


def test_a_single_fold_has_no_standard_deviation():
    s = N.fold_summary([M.evaluate_predictions(M.simulate_predictions(40))])
    assert np.isfinite(s['mean']).all() and s.sd.isna().all()


@pytest.mark.parametrize("folds", [1, 3])
def test_one_pass_gives_what_two_give(folds):
    df = pd.concat(
        [M.simulate_predictions(30, seed=k).assign(fold=k) for k in range(folds)], ignore_index=True
    )
    headline, each_class = N.bootstrap_both(df, 200, .9, 7)
    pd.testing.assert_frame_equal(headline, N.bootstrap(df, 200, .9, 7))
    pd.testing.assert_frame_equal(each_class, N.bootstrap_classes(df, 200, .9, 7))


def test_a_resample_is_the_table_with_its_patients_repeated():
    df = pd.concat([M.simulate_predictions(30, fold=f) for f in range(2)], ignore_index=True)
    names, w = np.unique(df.group), N.group_weights(60, 8, seed=2)
    fast = M.weighted_metrics(M.GroupedSample(df), w)[0]
    for b in range(8):
        slow = pd.concat(
            [df[df.group == g] for g, n in zip(names, w[b], strict=True) for _ in range(n)]
        )
        for m, v in M.weighted_metrics(M.GroupedSample(slow))[0].items():
            assert fast[m][b] == pytest.approx(v[0], nan_ok=True), m
