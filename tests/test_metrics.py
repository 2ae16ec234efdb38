"Numbers from predictions: equal to scikit-learn's and to published tables, honest about what is undefined."
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
NEH_TEACHER = '''
    986 75 1 36 749 11 0 17 628 |
    1049 59 0 50 660 8 2 32 585 |
    1087 142 0 77 553 11 2 32 615 |
    1102 43 0 45 752 25 2 13 610 |
    948 173 2 57 704 4 1 21 680'''


NEH_STUDENT = '''
    1107 24 0 103 651 54 1 32 632 |
    1067 18 0 76 593 3 6 63 587 |
    1057 40 0 30 631 32 2 22 627 |
    1030 133 3 64 701 8 1 17 606 |
    1127 61 0 115 676 5 7 38 599'''


UCSD_TEACHER = '''
    248 2 0 0 0 250 0 0 14 0 236 0 0 1 7 242 |
    247 2 1 0 0 250 0 0 11 0 239 0 0 1 5 244 |
    249 1 0 0 2 248 0 0 7 0 243 0 0 2 11 237 |
    248 2 0 0 1 249 0 0 10 0 240 0 0 2 10 238 |
    248 1 1 0 0 250 0 0 10 0 240 0 0 1 9 240'''


UCSD_STUDENT = '''
    248 2 0 0 0 250 0 0 18 0 232 0 0 0 4 246 |
    249 1 0 0 0 250 0 0 19 0 229 2 0 1 1 248 |
    250 0 0 0 2 248 0 0 13 0 237 0 0 0 5 245 |
    249 0 1 0 1 249 0 0 14 0 236 0 0 0 3 247 |
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
    'NEH student': (
        NEH_STUDENT,
        ['92.46 ± 1.36', '92.15 ± 1.29', '96.04 ± 0.78'],
        [92.70, 92.34],
    ),
    # the README says 98.1 ± 0.8 for the teacher's specificity; its own matrices say 96.22
    'NEH teacher': (
        NEH_TEACHER,
        ['92.57 ± 2.32', '92.90 ± 2.08', '96.22 ± 1.14'],
        [92.65, 92.68],
    ),
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
    def from_matrix(cm): return M.from_confusion(cm.tolist())
    def from_predictions(cm): return M.evaluate_predictions(as_predictions(cm, 0))
    make = from_matrix if way == 'matrix' else from_predictions
    t = 100*pd.DataFrame([make(cm) for cm in matrices(text)])[list(M.LABEL_METRICS)]
    shown = [f'{t[m].mean():.2f} ± {t[m].std(ddof=0):.2f}' for m in M.LABEL_METRICS[:3]]
    assert shown == expected
    assert t.mean()[list(M.LABEL_METRICS[3:])].tolist() == pytest.approx(means, abs=.01)


def test_published_test_parts_of_teacher_and_student_differ():
    sizes = [matrices(t).sum((1, 2)) for t in (NEH_TEACHER, NEH_STUDENT)]
    assert sizes[0].sum() == sizes[1].sum() == 12649 and (sizes[0] != sizes[1]).all()
    assert all((matrices(t).sum(2) == 250).all() for t in (UCSD_TEACHER, UCSD_STUDENT))


@pytest.mark.parametrize('bad', [
    [],
    [[5]],
    [[1, 2, 3], [4, 5, 6]],
    [1, 2],
    [[1, -1], [0, 3]],
    [[np.nan, 1], [1, 1]],
    [[.5, .5], [0, 1]],
    [[0, 0], [0, 0]],
    [['a', 'b'], ['c', 'd']],
    [[[1, 0], [0, 1]]],
])
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


def test_precision_of_a_class_that_is_never_predicted_is_undefined_and_its_f1_is_0():
    df = M.simulate_predictions(60)
    df['logit_DME'] -= 100
    e = M.evaluate_predictions(df)
    assert np.isnan(e['per_class']['DME']['precision']) and e['per_class']['DME']['f1'] == 0
    assert np.isnan(e['precision']) and np.isfinite(e['f1'])
    assert np.isfinite(e['per_class']['CNV']['precision'])


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


IMAGES = st.tuples(st.integers(0, 5), st.booleans(), st.integers(0, 3))  # score, positive, weight


@settings(max_examples=30)
@given(st.lists(IMAGES, min_size=2, max_size=40))
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


def test_extreme_logits_stay_finite():
    df = M.simulate_predictions(30)
    z = [f'logit_{c}' for c in M.classes_of(df)]
    df[z] = df[z].astype('float64') * 1e4
    e = M.evaluate_predictions(df)
    assert all(np.isfinite(e[m]) for m in M.HEADLINE)
