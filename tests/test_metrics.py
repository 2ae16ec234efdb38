"""Numbers from predictions: equal to scikit-learn's and to published tables, honest about what is undefined."""
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as skm

from kdoct.core.files import KdoctError
from kdoct.evaluate import metrics as M

# Confusion matrices of every fold as counts in the figures of the KD-OCT repository's README (arXiv:2512.09069);
# rows true, columns predicted; NEH: normal, drusen, CNV; UCSD: CNV, DME, DRUSEN, NORMAL.
NEH_TEACHER = '''986 75 1 36 749 11 0 17 628 | 1049 59 0 50 660 8 2 32 585 | 1087 142 0 77 553 11 2 32 615 |
                 1102 43 0 45 752 25 2 13 610 | 948 173 2 57 704 4 1 21 680'''
NEH_STUDENT = '''1107 24 0 103 651 54 1 32 632 | 1067 18 0 76 593 3 6 63 587 | 1057 40 0 30 631 32 2 22 627 |
                 1030 133 3 64 701 8 1 17 606 | 1127 61 0 115 676 5 7 38 599'''
UCSD_TEACHER = '''248 2 0 0 0 250 0 0 14 0 236 0 0 1 7 242 | 247 2 1 0 0 250 0 0 11 0 239 0 0 1 5 244 |
                  249 1 0 0 2 248 0 0 7 0 243 0 0 2 11 237 | 248 2 0 0 1 249 0 0 10 0 240 0 0 2 10 238 |
                  248 1 1 0 0 250 0 0 10 0 240 0 0 1 9 240'''
UCSD_STUDENT = '''248 2 0 0 0 250 0 0 18 0 232 0 0 0 4 246 | 249 1 0 0 0 250 0 0 19 0 229 2 0 1 1 248 |
                  250 0 0 0 2 248 0 0 13 0 237 0 0 0 5 245 | 249 0 1 0 1 249 0 0 14 0 236 0 0 0 3 247 |
                  249 0 1 0 1 249 0 0 21 0 228 1 0 0 2 248'''


def matrices(text):
    folds = [np.array(f.split(), dtype=int) for f in text.split('|')]
    k = int(np.sqrt(len(folds[0])))
    return np.stack([f.reshape(k, k) for f in folds])


def as_predictions(cm, fold):
    "A predictions table with exactly this confusion matrix, one image a group."
    y, yhat = (np.repeat(i.ravel(), cm.ravel()) for i in np.indices(cm.shape))
    names = [f'C{k}' for k in range(len(cm))]
    df = pd.DataFrame(np.eye(len(cm))[yhat], columns=['logit_' + c for c in names])
    ids = [f'{fold}-{i}' for i in range(len(y))]
    return df.assign(path=ids, patient=ids, group=ids, fold=fold, label=[names[k] for k in y])


# accuracy, sensitivity, specificity, precision, F1: percent, mean and standard deviation (ddof 0) over folds
PUBLISHED = {
    'NEH student': (NEH_STUDENT, ['92.46 ± 1.36', '92.15 ± 1.29', '96.04 ± 0.78'], [92.70, 92.34]),
    # the README says 98.1 ± 0.8 for the teacher's specificity; its own matrices say 96.22
    'NEH teacher': (NEH_TEACHER, ['92.57 ± 2.32', '92.90 ± 2.08', '96.22 ± 1.14'], [92.65, 92.68]),
    'UCSD teacher': (
        UCSD_TEACHER,
        ['97.72 ± 0.17', '97.72 ± 0.17', '99.24 ± 0.06'],
        [97.76, 97.72],
    ),
    'UCSD student': (
        UCSD_STUDENT,
        ['97.74 ± 0.27', '97.74 ± 0.27', '99.25 ± 0.09'],
        [97.84, 97.74],
    ),
}


@pytest.mark.parametrize('text,expected,means', PUBLISHED.values(), ids=PUBLISHED)
@pytest.mark.parametrize('way', ['matrix', 'predictions'])
def test_published_tables_follow_from_their_confusion_matrices(text, expected, means, way):
    make = (
        M.from_confusion
        if way == 'matrix'
        else lambda cm: M.evaluate_predictions(as_predictions(cm, 0))
    )
    s = M.fold_summary([make(cm.tolist() if way == 'matrix' else cm) for cm in matrices(text)])
    assert [
        f"{100 * s['mean'][m]:.2f} ± {100 * s['sd'][m]:.2f}" for m in M.LABEL_METRICS[:3]
    ] == expected
    assert [100*s['mean'][m] for m in M.LABEL_METRICS[3:]] == pytest.approx(means, abs=.01)


def test_published_test_parts_of_teacher_and_student_differ():
    sizes = [matrices(t).sum((1, 2)) for t in (NEH_TEACHER, NEH_STUDENT)]
    assert sizes[0].sum() == sizes[1].sum() == 12649 and (sizes[0] != sizes[1]).all()
    assert all((matrices(t).sum(2) == 250).all() for t in (UCSD_TEACHER, UCSD_STUDENT))


@pytest.mark.parametrize('bad', [[], [[5]], [[1, 2, 3], [4, 5, 6]], [1, 2], [[1, -1], [0, 3]], [[np.nan, 1], [1, 1]], [[.5, .5], [0, 1]],
                                 [[0, 0], [0, 0]], [['a', 'b'], ['c', 'd']], [[[1, 0], [0, 1]]]])
def test_what_is_no_matrix_of_counts_is_refused(bad):
    with pytest.raises(KdoctError, match='->'): M.from_confusion(bad)


@settings(max_examples=25)
@given(st.lists(st.lists(st.integers(0, 30), min_size=3, max_size=3), min_size=3, max_size=3))
def test_a_matrix_and_its_predictions_say_the_same(rows):
    cm = np.array(rows)
    if cm.sum() == 0: return
    e, p = M.from_confusion(rows), M.evaluate_predictions(as_predictions(cm, 0))
    for m in M.LABEL_METRICS: assert e[m] == pytest.approx(p[m], nan_ok=True), m
    assert e['n_images'] == cm.sum()


def test_precision_of_a_class_that_is_never_called_is_undefined_and_its_f1_is_0():
    df = M.simulate_predictions(60)
    df['logit_DME'] -= 100
    e = M.evaluate_predictions(df)
    assert np.isnan(e['per_class']['DME']['precision']) and e['per_class']['DME']['f1'] == 0
    assert np.isnan(e['precision']) and np.isfinite(e['f1'])
    assert np.isfinite(e['per_class']['CNV']['precision'])
    assert M.bootstrap(df, 100).n_used['precision'] == 0


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.integers(2, 6), st.integers(0, 2))
def test_point_estimates_equal_scikit_learn(seed, k, digits):
    "Coarsely rounded logits make ties, which count one half."
    df = M.simulate_predictions(40, margin=1.5, classes=tuple('ABCDEF'[:k]), seed=seed)
    z = M.logits_of(df).round(digits)
    df[[f'logit_{c}' for c in M.classes_of(df)]] = z
    y, p, e = M.targets_of(df), np.exp(M.log_softmax(z)), M.evaluate_predictions(df)
    present = np.unique(y)
    assert e['n_present'] == len(present)
    assert e['accuracy'] == pytest.approx(skm.accuracy_score(y, p.argmax(1)))
    assert e['sensitivity'] == pytest.approx(
        skm.recall_score(y, p.argmax(1), labels=present, average='macro')
    )
    assert e['f1'] == pytest.approx(skm.f1_score(y, p.argmax(1), labels=present, average='macro'))
    predicted = np.isin(present, p.argmax(1)).all()
    assert e['precision'] == pytest.approx(
        skm.precision_score(y, p.argmax(1), labels=present, average='macro')
        if predicted
        else np.nan,
        nan_ok=True,
    )
    assert e['nll'] == pytest.approx(skm.log_loss(y, p, labels=range(k)))
    assert e['auc'] == pytest.approx(np.mean([skm.roc_auc_score(y == c, p[:, c]) for c in present]))
    assert e['specificity'] == pytest.approx(
        np.mean([skm.recall_score(y != c, p.argmax(1) != c) for c in present])
    )


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 5), st.booleans(), st.integers(0, 3)), min_size=2, max_size=40))
def test_weighted_auc_equals_scikit_learn(rows):
    score, pos, w = (np.array(c) for c in zip(*rows, strict=True))
    num, den = M.weighted_auc(score.astype(float), pos, w[None].astype(float))
    if w[pos].sum() == 0 or w[~pos].sum() == 0: assert den[0] == 0
    else: assert num[0] / den[0] == pytest.approx(skm.roc_auc_score(pos, score, sample_weight=w))


@settings(max_examples=20)
@given(st.integers(0, 10**6))
def test_auc_by_group_weights_is_that_of_the_images(seed):
    rng = np.random.default_rng(seed)
    score, pos, groups = rng.normal(size=60).round(1), rng.random(60) < .4, rng.integers(0, 9, 60)
    w = rng.integers(0, 3, (5, 9)).astype(float)
    for a, b in zip(
        M.weighted_auc(score, pos, w, groups, chunk=2),
        M.weighted_auc(score, pos, w[:, groups]),
        strict=True,
    ):
        assert a == pytest.approx(b)


def test_a_resample_is_the_table_with_its_patients_repeated():
    df = pd.concat([M.simulate_predictions(30, fold=f) for f in range(2)], ignore_index=True)
    names, w = np.unique(df.group), M.group_weights(60, 8, seed=2)
    fast = M._metrics(M._Sample(df), w)[0]
    for b in range(8):
        slow = pd.concat(
            [df[df.group == g] for g, n in zip(names, w[b], strict=True) for _ in range(n)]
        )
        for m, v in M._metrics(M._Sample(slow))[0].items():
            assert fast[m][b] == pytest.approx(v[0], nan_ok=True), m


def test_an_absent_class_is_nan_and_is_counted():
    df = M.simulate_predictions(60)
    e = M.evaluate_predictions(df[df.label != 'DME'])
    assert e['n_present'] == 3 and e['classes'] == ['CNV', 'DME', 'DRUSEN', 'NORMAL']
    assert all(np.isnan(e['per_class']['DME'][m]) for m in ('sensitivity', 'f1', 'auc'))
    assert np.isfinite(e['per_class']['DME']['specificity'])
    assert e['sensitivity'] == pytest.approx(
        np.mean([e['per_class'][c]['sensitivity'] for c in ('CNV', 'DRUSEN', 'NORMAL')])
    )
    assert np.shape(e['confusion']) == (4, 4)


def test_one_class_alone_has_neither_specificity_nor_auc():
    df = M.simulate_predictions(60)
    e = M.evaluate_predictions(df[df.label == 'DME'])
    assert np.isnan(e['specificity']) and np.isnan(e['auc']) and np.isfinite(e['sensitivity'])


def test_resamples_that_lose_a_class_are_left_out_and_counted():
    df = M.simulate_predictions(60)
    rare = pd.concat([df[df.label != 'DME'], df[df.label == 'DME'].head(1)])
    ci = M.bootstrap(rare, n_boot=400)
    assert ci.n_used['accuracy'] == 400
    assert 200 < ci.n_used['sensitivity'] < 300  # one patient is in a resample with probability 1 - 1/e = 0.63


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
            ci = M.bootstrap(t, n_boot=100).loc['accuracy']
            hits[unit] += ci.low <= truth <= ci.high
    assert hits['patient'] >= 88
    assert hits['image'] < 80


def test_bootstrap_repeats_with_its_seed_only():
    df = M.simulate_predictions(50)
    a, b, c = (
        M.bootstrap(df, seed=1),
        M.bootstrap(df.sample(frac=1, random_state=0), seed=1),
        M.bootstrap(df, seed=2),
    )
    pd.testing.assert_frame_equal(a, b)
    assert a.low['nll'] != c.low['nll']


def test_auc_compares_only_images_of_one_model():
    df = pd.concat([M.simulate_predictions(60, fold=f) for f in range(2)], ignore_index=True)
    before = M.evaluate_predictions(df)['auc']
    z = [f'logit_{c}' for c in M.classes_of(df)]
    # a less confident model of the same quality: ranks within the fold stay nearly as they are
    df.loc[df.fold == 1, z] *= .2
    y, p = M.targets_of(df), np.exp(M.log_softmax(M.logits_of(df)))
    naive = skm.roc_auc_score(y, p, multi_class='ovr')
    within = M.evaluate_predictions(df)['auc']
    assert naive < within - .01
    assert within == pytest.approx(before, abs=.02)


def test_paired_difference_is_exactly_that_of_the_two_tables():
    a, b = (M.simulate_predictions(80, margin=m, model=m) for m in (2, 3))
    d = M.paired_difference(b, a.sample(frac=1, random_state=1))
    ea, eb = M.evaluate_predictions(a), M.evaluate_predictions(b)
    for m in M.HEADLINE:
        assert d.difference[m] == pytest.approx(eb[m] - ea[m])
        assert d.low[m] <= d.high[m]
    mirrored = M.paired_difference(a, b)
    assert mirrored.low['accuracy'] == pytest.approx(-d.high['accuracy'])
    assert mirrored.p['accuracy'] == pytest.approx(d.p['accuracy'])


def test_paired_difference_of_a_model_with_itself_is_nothing():
    a = M.simulate_predictions(40)
    d = M.paired_difference(a, a)
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
    with pytest.raises(KdoctError, match=says): M.paired_difference(a, change(a.copy()))


@pytest.mark.parametrize('change,says', [
    (lambda t: t.drop(columns='group'), 'group missing'),
    (lambda t: t.drop(columns=[c for c in t if c.startswith('logit_')]), 'at least 2'),
    (lambda t: t.iloc[:0], 'no rows'),
    (lambda t: t.assign(label='ERM'), 'none of the classes'),
    (lambda t: t.assign(label=None), 'without a label'),
    (lambda t: t.assign(group=None), 'without a group'),
    (lambda t: t.assign(logit_DME=np.nan), 'not finite'),
    (lambda t: pd.concat([t, t]), 'twice in one fold'),
], ids=['column', 'logits', 'empty', 'unknown label', 'no label', 'no group', 'nan', 'duplicates'])
def test_a_broken_table_is_refused_with_a_remedy(tmp_path, change, says):
    change(M.simulate_predictions(10)).to_parquet(tmp_path/'predictions.parquet')
    with pytest.raises(KdoctError, match=says) as e:
        M.read_predictions(tmp_path/'predictions.parquet')
    assert 'predictions.parquet' in str(e.value) and '->' in str(e.value)


def test_a_file_that_is_no_parquet_is_refused(tmp_path):
    (tmp_path/'predictions.parquet').write_text('text')
    with pytest.raises(KdoctError, match='not a readable parquet'):
        M.read_predictions(tmp_path/'predictions.parquet')


def test_one_patient_has_no_interval():
    with pytest.raises(KdoctError, match='at least 2'): M.bootstrap(M.simulate_predictions(1))


def test_extreme_logits_stay_finite():
    df = M.simulate_predictions(30)
    z = [f'logit_{c}' for c in M.classes_of(df)]
    df[z] = df[z].astype('float64') * 1e4
    e = M.evaluate_predictions(df)
    assert all(np.isfinite(e[m]) for m in M.HEADLINE)


def test_bootstrap_of_the_neh_test_images_stays_quick():
    "12,649 images of 427 patients took 0.1 s on one core; the limit leaves room for a loaded machine."
    import time
    cm = matrices(NEH_STUDENT)
    df = pd.concat([as_predictions(c, f) for f, c in enumerate(cm)], ignore_index=True)
    df['group'] = np.random.default_rng(0).integers(0, 427, len(df)).astype(str)
    began = time.perf_counter()
    M.bootstrap(df, 1000)
    assert time.perf_counter() - began < 5


def test_intervals_of_a_class_are_those_of_its_images_alone():
    df = M.simulate_predictions(40, margin=1.5, seed=3)
    each, predicted = M.bootstrap_classes(df, n_boot=300, seed=5), M.logits_of(df).argmax(1)
    for k, c in enumerate(M.classes_of(df)):
        own = (df.label == c).to_numpy()
        for metric, hit, of in (
            ("sensitivity", predicted == k, own),
            ("specificity", predicted != k, ~own),
            ("precision", own, predicted == k),
        ):
            want = M.share_interval(hit, df.group, of, n_boot=300, seed=5)
            assert each.loc[(c, metric), ["estimate", "low", "high"]].tolist() == pytest.approx(
                [want[e] for e in ("estimate", "low", "high")]
            )
            assert each.loc[(c, metric), "n"] == own.sum()


def test_a_class_without_images_has_no_sensitivity_and_does_not_stop_the_others():
    df = M.simulate_predictions(40, seed=3)
    df = df[df.label != "CNV"]
    each = M.bootstrap_classes(df, n_boot=50)
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
    ci = M.bootstrap(one_of_dme(), n_boot=400)
    assert (
        np.isfinite(ci.estimate['sensitivity'])
        and np.isnan(ci.low['sensitivity'])
        and np.isnan(ci.high['auc'])
    )
    assert ci.low['accuracy'] < ci.high['accuracy'] and 200 < ci.n_used['sensitivity'] < 300
    each = M.bootstrap_classes(one_of_dme(), n_boot=400)
    assert np.isnan(each.low['DME', 'sensitivity']) and np.isfinite(each.low['CNV', 'sensitivity'])


@pytest.mark.parametrize('undefined,shown', [(20, True), (21, False)])
def test_the_threshold_of_an_interval_is_a_fifth(undefined, shown):
    i = M._interval(np.r_[np.full(undefined, np.nan), np.linspace(0, 1, 100 - undefined)], .95)
    assert np.isfinite(i['low']) == shown and i['n_used'] == 100 - undefined


def test_a_difference_without_an_interval_has_no_p():
    a = one_of_dme()
    d = M.paired_difference(a, a.assign(logit_CNV=a.logit_CNV + 1), n_boot=400)
    assert (
        np.isfinite(d.difference['sensitivity'])
        and np.isnan(d.low['sensitivity'])
        and np.isnan(d.p['sensitivity'])
    )
    assert np.isfinite(d.p['accuracy'])


def test_a_share_of_one_patients_images_has_no_interval():
    groups = np.arange(40)
    r = M.share_interval(groups % 2 == 0, groups, groups == 4, n_boot=400)
    assert r['estimate'] == 1 and np.isnan(r['low']) and r['n_used'] < 320


def test_a_single_fold_has_no_standard_deviation():
    s = M.fold_summary([M.evaluate_predictions(M.simulate_predictions(40))])
    assert np.isfinite(s['mean']).all() and s.sd.isna().all()


@pytest.mark.parametrize("folds", [1, 3])
def test_one_pass_gives_what_two_give(folds):
    df = pd.concat(
        [M.simulate_predictions(30, seed=k).assign(fold=k) for k in range(folds)], ignore_index=True
    )
    headline, each_class = M.bootstrap_both(df, 200, .9, 7)
    pd.testing.assert_frame_equal(headline, M.bootstrap(df, 200, .9, 7))
    pd.testing.assert_frame_equal(each_class, M.bootstrap_classes(df, 200, .9, 7))
