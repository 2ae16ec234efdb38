"What is fitted on validation stays there; what cannot be fitted is said; what is on disk is checked."
import json
import os
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from kdoct.core.files import KdoctError, read_json, write_json
from kdoct.core.presets import preset
from kdoct.core.runs import create_run
from kdoct.core.sections import DecideRecipe, EvaluateRecipe
from kdoct.data.stage import open_fold, prepare_data
from kdoct.evaluate import decision_tables as J
from kdoct.evaluate import decisions as D
from kdoct.evaluate.metrics import (
    aurc,
    log_softmax,
    logits_of,
    risk_coverage,
    share_interval,
    simulate_predictions,
    targets_of,
)
from kdoct.evaluate.patients import VolumeRule
from kdoct.models.backbones import load_model_folder
from kdoct.training.results import predict_logits, train_role

QUICK = EvaluateRecipe(n_boot=100)


def features(n, seed=0, d=32):
    return np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)


def fitted(val=None, recipe=None, seed=1, **about):
    val = simulate_predictions(80, 2., seed=seed) if val is None else val
    return D.fit_decision(
        val, features(len(val), 1), features(300), recipe or DecideRecipe(), **about
    )


def same(a, b):
    "Whether two decisions are the same to the last bit."
    def numbers(d):
        return d.temperature, d.defer_below, d.set_minimum, d.outlier.threshold, d.notes, d.volume
    return (
        numbers(a) == numbers(b)
        and a.operating_points.equals(b.operating_points)
        and all(np.array_equal(v, b.outlier.arrays()[k]) for k, v in a.outlier.arrays().items())
    )


# --- temperature

@pytest.mark.parametrize('factor', [.3, 1., 4.])
def test_temperature_undoes_a_scale(factor):
    df = simulate_predictions(200, 2.)
    one, many = (D.fit_temperature(f*logits_of(df), targets_of(df))[0] for f in (1, factor))
    assert many == pytest.approx(factor*one, rel=1e-3)


def test_temperature_is_the_minimum_of_the_nll_of_many_images():
    df = simulate_predictions(4000, 1.5)
    z, y = logits_of(df), targets_of(df)
    def nll(t): return -log_softmax(z/t)[np.arange(len(y)), y].mean()
    t, note = D.fit_temperature(z, y)
    assert note == '' and all(nll(t) <= nll(t*f) for f in (.95, .98, 1.02, 1.05))


@pytest.mark.parametrize('n', [4, 40, 400])
def test_temperature_without_a_mistake_is_as_sure_as_so_many_images_allow(n):
    y = np.arange(n) % 3
    t, note = D.fit_temperature(20*np.eye(3)[y], y)
    p = np.exp(log_softmax(np.array([20, 0, 0])/t))[0]
    assert p == pytest.approx((n + 1)/(n + 2), abs=1e-4) and f'no mistake in {n} images' in note


@pytest.mark.parametrize('scale,bound', [(1e-4, D.BOUNDS[0]), (1e4, D.BOUNDS[1])])
def test_temperature_says_when_it_is_at_a_bound(scale, bound):
    df = simulate_predictions(100, 1.5)
    t, note = D.fit_temperature(scale*logits_of(df), targets_of(df))
    assert t == bound and 'at its bound' in note


# --- quantile over patients

@given(st.integers(1, 60), st.floats(.5, .99), st.integers(0, 99))
def test_quantile_of_single_images_is_split_conformal(n, level, seed):
    s = np.random.default_rng(seed).permutation(n).astype(float)
    k = int(np.ceil((n + 1)*level - 1e-9))
    assert D.patient_quantile(s, np.arange(n), level) == (np.sort(s)[k - 1] if k <= n else np.inf)


def test_quantile_gives_a_patient_one_vote():
    s, g = np.arange(30.), np.arange(30)
    again = np.r_[s, np.repeat(s, 50)], np.r_[g, np.repeat(g, 50)]
    assert D.patient_quantile(s, g, .9) == D.patient_quantile(*again, .9)
    one_loud = np.r_[s, np.full(5000, 99.)], np.r_[g, np.full(5000, 30)]
    assert D.patient_quantile(*one_loud, .9) < 99


# --- operating points, deferral, sets

@given(st.integers(0, 500), st.sampled_from([.8, .9, .95, .99]))
def test_thresholds_keep_the_wish_on_validation_and_cost_no_more_than_needed(seed, wish):
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.ones(3), 60).round(2)   # rounded: with equal values
    y = rng.integers(0, 3, 60)
    for r in D.operating_points(
        p, y, list('abc'), DecideRecipe(sensitivity=(wish,), specificity=(wish,))
    ).itertuples():
        k = 'abc'.index(r[1])
        own, rest = p[y == k, k], p[y != k, k]
        if np.isnan(r.threshold):
            assert 'not reachable' in r.note
            continue
        def does(t, own=own, rest=rest):
            return {'sensitivity': (own >= t).mean(), 'specificity': (rest < t).mean()}
        other = {'sensitivity': 'specificity', 'specificity': 'sensitivity'}[r.kind]
        assert does(r.threshold)[r.kind] >= wish and (r.sensitivity, r.specificity) == tuple(
            does(r.threshold).values()
        )
        better = [does(t)[other] for t in [*np.unique(p[:, k]), 1.1] if does(t)[r.kind] >= wish]
        assert does(r.threshold)[other] == max(better)


def test_a_wish_that_is_out_of_reach_is_said():
    y = np.array([0, 0, 1, 1])
    t = D.operating_points(np.array([[.5, .5]]*4), y, ['a', 'b'], DecideRecipe())
    assert t.threshold.isna().all() and set(t.note) == {
        'not reachable: only by predicting it always',
        'not reachable: only by predicting it never',
    }
    t = D.operating_points(
        np.eye(3)[[0, 1, 0, 1]], np.array([0, 1, 0, 1]), ['a', 'b', 'c'], DecideRecipe()
    ).set_index('class')
    assert (
        set(t.loc['c', 'note']) == {'not reachable: no image of the class'}
        and (t.loc['a', 'sensitivity'] == 1).all()
    )


def test_deferral_keeps_the_wished_share_or_risk():
    df = simulate_predictions(150, 1.5)
    p, y = np.exp(log_softmax(logits_of(df))), targets_of(df)
    c, right = p.max(1), p.argmax(1) == y
    for wish in (.5, .9):
        assert (
            c >= D.deferral_threshold(c, right, DecideRecipe(defer_target=wish))[0]
        ).mean() == pytest.approx(wish, abs=1 / len(c) + 1e-9)
    t, _ = D.deferral_threshold(c, right, DecideRecipe(defer='risk', defer_target=.1))
    wider = [x for x in np.unique(c) if (c >= x).mean() > (c >= t).mean()]
    assert (~right)[c >= t].mean() <= .1 < min((~right)[c >= x].mean() for x in wider)


def test_a_risk_out_of_reach_defers_everything():
    d = fitted(simulate_predictions(60, -2.), DecideRecipe(defer='risk', defer_target=.01))
    p = d.probabilities(features(9, d=4))
    assert d.judge(p, np.zeros(9)).deferred.all() and any('not reachable' in n for n in d.notes)
    p[0] = [1, 0, 0, 0]
    assert d.judge(p, np.zeros(9)).deferred.all()


def test_sets_cover_new_patients_as_wished():
    kept = []
    for seed in range(60):
        d, test = (
            fitted(simulate_predictions(40, 1.0, seed=seed), DecideRecipe(alpha=(0.1,))),
            simulate_predictions(40, 1.0, seed=1000 + seed),
        )
        hit = d.sets(d.probabilities(logits_of(test)), .1)[np.arange(len(test)), targets_of(test)]
        kept.append(pd.Series(hit).groupby(test.group.to_numpy()).mean().mean())
    assert .88 < np.mean(kept) < .96


def test_sets_are_never_empty_and_grow_with_the_wish():
    d = fitted(recipe=DecideRecipe(alpha=(.05, .3)))
    p = d.probabilities(features(200, d=4))
    small, large = d.sets(p, .3), d.sets(p, .05)
    assert (
        small.any(1).all() and (small <= large).all() and small[np.arange(200), p.argmax(1)].all()
    )


# --- what is said of a picture

@given(st.floats(0, 1), st.floats(0, 1))
def test_numbers_that_are_compared_are_told_apart(a, b):
    x, y = D.told_apart(100*a, 100*b)
    assert (x == y) == (100*a == 100*b) and (float(x) < float(y)) == (100*a < 100*b)


@pytest.mark.parametrize('step', [1e-9, 1e-6, 1e-4, .1])
def test_a_confidence_is_never_said_to_be_below_itself(step):
    d = fitted()
    for p, word in ((d.defer_below - step, 'is below'), (d.defer_below + step, 'is at least')):
        rest = (1 - p)/3
        sentence = next(
            s
            for s in D.explained(d, np.array([p, rest, rest, rest]), 0.5)
            if s.startswith('Confidence')
        )
        a, b = (
            float(s.split()[-1])
            for s in sentence.replace(word, '|').replace('%', '').rstrip('. ').split('|')
        )
        assert word in sentence and (a < b) == (word == 'is below') and a != b


def test_an_outlier_is_deferred_and_every_word_of_it_is_of_one_function():
    d = fitted()
    sure = np.array([.97, .01, .01, .01])
    far, near = d.outlier.threshold*(1 + 1e-9), d.outlier.threshold
    assert d.judge(sure[None], [far]).iloc[0][['deferred', 'why', 'outlier']].tolist() == [
        True,
        'outlier',
        True,
    ]
    assert d.judge(sure[None], [near]).iloc[0][['deferred', 'why', 'outlier']].tolist() == [
        False,
        '',
        False,
    ]
    assert (
        D.explained(d, sure, far)[0] == 'Deferred to a person (outlier).'
        and D.explained(d, sure, near)[0] == 'Not deferred.'
    )
    assert 'was not measured' in ' '.join(D.explained(d, sure, None))


# --- outliers

def written_out(o, x, i):
    "One of the two distances, with its covariance as a matrix."
    used = o.axes[i].any(1)
    cov = o.axes[i][used].T.astype(float) @ np.diag(o.scale[i][used] - o.residual[i]) @ o.axes[i][
        used
    ] + o.residual[i] * np.eye(x.shape[1])
    return np.sqrt(
        np.einsum(
            'nd,de,ne->n',
            x - o.mean[i].astype(float),
            np.linalg.inv(cov),
            x - o.mean[i].astype(float),
        )
        / x.shape[1]
    )


def test_distance_is_the_larger_of_two_written_out():
    o, x = D.fit_outlier(features(200)@features(32, 2) + 3), 9*features(9, 3)
    want = np.maximum(
        written_out(o, x, 0), written_out(o, x / np.linalg.norm(x, axis=1, keepdims=True), 1)
    )
    np.testing.assert_allclose(o.score(x), want, rtol=1e-3)
    t = D.distance(torch.from_numpy(x), **{k: torch.from_numpy(v) for k, v in o.arrays().items()})
    np.testing.assert_allclose(t.numpy(), o.score(x), rtol=1e-5)


def test_axes_are_the_principal_ones_and_the_rest_has_their_mean_variance():
    x = features(400) * np.r_[[9, 8, 7], np.ones(29)].astype(np.float32)
    o, cov = D.fit_outlier(x, .8), np.cov(x, rowvar=False)
    v = np.sort(np.linalg.eigvalsh(cov))[::-1]
    np.testing.assert_allclose(o.scale[0][:3], v[:3], rtol=1e-4)
    k = int(o.axes[0].any(1).sum())
    assert k == 3 and o.residual[0] == pytest.approx(v[3:].mean(), rel=1e-4)


def test_short_and_long_features_of_the_usual_direction_and_other_directions_are_far():
    x = features(300) + 4
    o, usual = D.fit_outlier(x), features(50, 9) + 4
    for far in (.01*features(50, 8), 3*usual, usual*np.sign(features(1, 7))):
        assert o.score(far).min() > o.score(usual).max()


def test_many_images_are_summed_in_pieces():
    x = features(100) + 5
    mean, cov = D._covariance(x, 7)
    np.testing.assert_allclose(mean, x.mean(0), rtol=1e-6)
    np.testing.assert_allclose(cov, np.cov(x, rowvar=False), rtol=1e-4, atol=1e-6)


def test_few_images_and_dead_features_still_have_a_distance():
    f = features(20, d=64)
    f[:, 10:30] = 0
    o = D.fit_outlier(f)
    assert np.isfinite(o.score(f)).all() and (o.residual > 0).all()
    far = f.copy()
    far[:, 12] = 9
    assert o.score(far).min() > o.score(f).max()


def test_the_flag_keeps_its_share_of_new_patients():
    shares = []
    for seed in range(40):
        val, d = simulate_predictions(60, seed=seed), None
        f = features(len(val), seed)
        d = D.fit_decision(val, f, features(200, 99), DecideRecipe())
        shares.append((d.outlier.score(features(200, 500 + seed)) > d.outlier.threshold).mean())
    assert .01 < np.mean(shares) <= .05


# --- files

@pytest.fixture
def folder(tmp_path):
    D.save_decision(tmp_path, fitted(weights_sha256='w'))
    write_json(tmp_path/'model.json', dict(weights_sha256='w'))
    return tmp_path


def test_a_decision_of_an_earlier_version_is_refused_by_name(folder):
    change(folder, lambda s: (s.pop('volume'), s.update(conformal=s.pop('prediction_sets'))))
    with pytest.raises(KdoctError, match='earlier version(.|\n)*05g_decide'):
        D.load_decision(folder)


def test_the_volume_rule_is_a_part_of_the_decision(tmp_path):
    order = ('NORMAL', 'DRUSEN', 'DME', 'CNV')
    val = simulate_predictions(60)
    a = D.fit_decision(
        val,
        features(len(val)),
        features(99),
        DecideRecipe(min_slices=3, drop_outliers=False),
        order,
    )
    D.save_decision(tmp_path, a)
    assert D.load_decision(tmp_path).volume == a.volume == VolumeRule('worst', 3, False, order)
    change(tmp_path, lambda s: s['volume'].update(severity=['NORMAL', 'CNV']))
    with pytest.raises(KdoctError, match='order of severity of other classes'):
        D.load_decision(tmp_path)


def test_a_decision_is_read_as_it_was_written(tmp_path):
    a = fitted(simulate_predictions(12, 2.))
    D.save_decision(tmp_path, a)
    assert a.notes and same(a, D.load_decision(tmp_path))


def change(folder, f):
    said = read_json(folder/'decision.json')
    f(said)
    (folder/'decision.json').write_text(json.dumps(said))


@pytest.mark.parametrize('harm,says', [
    (lambda d: change(d, lambda s: s.pop('temperature')), 'is no decision'),
    (lambda d: change(d, lambda s: s.update(temperature=-1)), 'out of range'),
    (lambda d: change(d, lambda s: s.update(temperature=None)), 'is no decision'),
    (lambda d: change(d, lambda s: s['outlier'].update(threshold='high')), 'is no decision'),
    (lambda d: change(d, lambda s: s.update(operating_points=[1])), 'is no decision'),
    (lambda d: change(d, lambda s: s.update(classes=['a', 'b'])), 'other classes'),
    (lambda d: (d/'decision.json').write_text('[1, 2]'), 'is no decision'),
    (lambda d: (d/'decision.safetensors').unlink(), 'not the file'),
    (lambda d: (d/'decision.safetensors').write_bytes(b'x'*99), 'not the file'),
    (lambda d: write_json(d/'model.json', dict(weights_sha256='new')), 'other weights'),
], ids=['no '
        'temperature', 'negative', 'null', 'text', 'points', 'classes', 'list', 'no tensors', 'damaged', 'trained again'])
def test_a_decision_that_was_changed_is_refused(folder, harm, says):
    harm(folder)
    with pytest.raises(KdoctError, match=says): D.load_decision(folder)


@pytest.mark.parametrize('arrays', [dict(mean=np.zeros(3, np.float32)), 'nan', 'shape'])
def test_statistics_of_another_shape_are_refused(folder, arrays):
    from kdoct.core.files import sha256_file
    a = D.load_decision(folder).outlier.arrays()
    if arrays == 'nan': a['mean'] = a['mean']*np.nan
    if arrays == 'shape': a['axes'] = a['axes'][:, :, :5].copy()
    save_file(arrays if isinstance(arrays, dict) else a, folder/'decision.safetensors')
    change(folder, lambda s: s['outlier'].update(sha256=sha256_file(folder/'decision.safetensors')))
    with pytest.raises(KdoctError, match='does not hold the statistics'): D.load_decision(folder)


# --- the stage

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "A tiny run whose baseline is trained in fold 0."
    with pytest.MonkeyPatch.context() as m:
        m.setenv('KDOCT_OUTPUTS', str(tmp_path_factory.mktemp('outputs')))
        run = create_run('toy', preset('tiny', **{'student.epochs': 1}))
        prepare_data(run)
        train_role(run, 0, 'baseline')
        return run, D.decide_fold(run, 0, 'baseline')


@pytest.fixture
def run(made, monkeypatch):
    monkeypatch.setenv('KDOCT_OUTPUTS', str(made[0].path.parent))
    return made[0]


def poisoned(data, part):
    "The fold with noise and one label in place of the images of a part."
    images, labels = np.asarray(data.images).copy(), data.labels.copy()
    rows = data.idx[part]
    images[rows], labels[rows] = np.random.default_rng(0).integers(0, 256, images[rows].shape), 0
    table = data.table.assign(
        label=data.table.label.where(data.table.role != part, data.classes[0])
    )
    return replace(data, images=images, labels=labels, table=table)


@pytest.mark.parametrize('part,changes', [('test', False), ('val', True), ('train', True)])
def test_the_decision_knows_training_and_validation_and_no_test_image(made, run, part, changes):
    folder = run.stage_dir(0, 'baseline')
    model, about = load_model_folder(folder)
    again = D._fitted(run, poisoned(open_fold(run, 0), part), model, role='baseline')
    assert same(made[1], again) != changes


@pytest.fixture(scope='module')
def calibrated(tmp_path_factory):
    "A tiny run with a calibration part, whose baseline is trained in fold 0."
    with pytest.MonkeyPatch.context() as m:
        m.setenv('KDOCT_OUTPUTS', str(tmp_path_factory.mktemp('outputs')))
        run = create_run(
            'calib', preset('tiny', **{'student.epochs': 1, 'data.calibration_fraction': 0.25})
        )
        prepare_data(run)
        train_role(run, 0, 'baseline')
        yield run, D.decide_fold(run, 0, 'baseline')


@pytest.mark.parametrize('part,changes', [('val', False), ('test', False), ('calib', True), ('train', True)])
def test_with_a_calibration_part_patients_who_chose_the_epoch_decide_nothing(
    calibrated, monkeypatch, part, changes
):
    run, decision = calibrated
    monkeypatch.setenv('KDOCT_OUTPUTS', str(run.path.parent))
    model, _ = load_model_folder(run.stage_dir(0, 'baseline'))
    again = D._fitted(run, poisoned(open_fold(run, 0), part), model, role='baseline')
    assert same(decision, again) != changes and again.about['part'] == 'calibration'


def test_fitting_on_patients_who_chose_the_epoch_is_said_and_on_others_is_not(calibrated, made):
    test = simulate_predictions(30)
    for decision, said in ((made[1], True), (calibrated[1], False)):
        assert bool(D.fitted_on(decision)[1]) == said
        j = J.DecidedPredictions(replace(fitted(), about=decision.about), test, np.zeros(len(test)))
        for s in (J.sets_section, J.calibration_section):
            assert ('have also chosen the epoch' in s({'student': [j]}, QUICK).caption) == said


def test_poisoned_test_predictions_are_refused_and_decide_nothing(made, run):
    folder = run.stage_dir(0, 'baseline')
    path, before = folder/'predictions.parquet', (folder/'decision.json').read_bytes()
    right = path.rename(path.with_suffix('.right'))
    try:
        df = pd.read_parquet(right)
        df.assign(logit_CNV=df.logit_CNV + 1).to_parquet(path)
        with pytest.raises(KdoctError, match='is not what the network beside it says'):
            D.decide_fold(run, 0, 'baseline')
    finally: right.rename(path)
    assert (folder/'decision.json').read_bytes() == before


def test_predictions_are_in_the_arithmetic_in_which_decisions_are_fitted(made, run):
    "A network trained in bfloat16 is predicted, decided about and shipped in float32."
    data, (model, _) = open_fold(run, 0), load_model_folder(run.stage_dir(0, 'baseline'))
    exact = D._pass(run, data, model, data.idx['test'])[1]
    model.precision = 'bf16'
    batches = D._batches(run, data, model, data.idx['test'])
    with torch.inference_mode(): rounded = torch.cat([model(x) for x, _ in batches]).numpy()
    # so that the test has something to see
    assert not np.allclose(rounded, exact, atol=1e-5)
    np.testing.assert_allclose(predict_logits(model, batches), exact, atol=1e-5)
    assert model.precision == 'bf16'


def test_predictions_in_another_arithmetic_are_refused(made, run):
    folder, data = run.stage_dir(0, 'baseline'), open_fold(run, 0)
    exact = D.logits_of(pd.read_parquet(folder/'predictions.parquet'))
    df, off = pd.read_parquet(folder/'predictions.parquet'), .03*max(1., np.abs(exact).max())
    with pytest.raises(KdoctError, match='in float32'):
        D._check_same(folder, df, data.rows('test'), exact + off)


def test_validation_is_of_other_patients_than_test(made, run):
    data, about = open_fold(run, 0), made[1].about
    groups = {part: set(data.groups[data.idx[part]]) for part in data.idx}
    assert about['patients'] == len(groups['val']) and not groups['val'] & (
        groups['test'] | groups['train']
    )


def test_a_stage_is_finished_while_the_wishes_stay(made, run):
    assert run.is_finished('decide', 0) and not run.is_finished('decide', 1)
    other = create_run(
        'toy', run.recipe.override(**{'decide.defer': 'risk', 'decide.defer_target': 0.05})
    )  # changes no network
    assert not other.is_finished('decide', 0) and other.recipe.key == run.recipe.key
    with pytest.raises(KdoctError, match='another recipe'):
        create_run('toy', run.recipe.override(**{'decide.defer': 'risk', 'data.size': 96}))


def test_predictions_made_later_need_a_new_decision(made, run):
    path = run.stage_dir(0, 'baseline')/'predictions.parquet'
    was = path.stat()
    os.utime(path, (was.st_atime, was.st_mtime + 3600))
    assert not run.is_finished('decide', 0)
    os.utime(path, (was.st_atime, was.st_mtime))


def test_a_network_that_is_missing_is_answered_with_its_command(run):
    with pytest.raises(KdoctError, match=r'04_distill.ipynb .*-p fold 0'):
        D.decide_fold(run, 0, 'student')
    with pytest.raises(KdoctError, match='no network yet'): D.decide_all(run, 1)


@pytest.mark.parametrize('changes,says', [({}, ''), ({'data.worst_case_train': True}, 'only '
                                                                                      'slices that show'), ({'data.protocol': 'official'}, 'official'),
                                         ({'data.worst_case_train': True, 'data.worst_case_test': True}, '')], ids=['same', 'worst case', 'official', 'both'])
def test_a_test_part_that_is_drawn_otherwise_is_said(changes, says):
    run = create_run('caveat', preset('tiny', **changes))
    j = J.DecidedPredictions(
        fitted(caveat=D._caveat(run)),
        simulate_predictions(20),
        np.zeros(len(simulate_predictions(20))),
    )
    assert says in J.sets_section({'student': [j]}, QUICK).caption and bool(D._caveat(run)) == bool(
        says
    )


def test_outlier_pictures_are_counted(made):
    kinds = made[1].about['outlier_pictures']
    assert set(kinds) == {'white noise', 'smooth noise', 'flat grey', 'inverted', 'tiles'}
    assert all(0 <= v['outliers'] <= 1 and v['images'] > 1 for v in kinds.values())


@pytest.mark.parametrize('shape', [(6, 50, 50), (6, 50, 50, 3)])
def test_outlier_pictures_keep_size_and_colours(shape):
    x = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
    for kind, v in D.outlier_pictures(x).items():
        assert v.shape == shape and v.dtype == np.uint8 and (v != x).any(), kind


# --- numbers

def test_aurc_and_curve_agree_with_their_definition():
    df = simulate_predictions(60, 1.5)
    p, y = np.exp(log_softmax(logits_of(df))).round(1), targets_of(df)   # rounded: with equal confidences
    c, right = p.max(1), p.argmax(1) == y
    assert aurc(c, right, df.group)['estimate'] == pytest.approx(
        np.mean([(~right)[c >= x].mean() for x in c])
    )
    for r in risk_coverage(c, right).itertuples():
        assert r.coverage == pytest.approx((c >= r.threshold).mean()) and r.risk == pytest.approx(
            (~right)[c >= r.threshold].mean()
        )


def test_intervals_of_shares_resample_patients():
    hit = np.repeat(np.random.default_rng(0).random(40) < .3, 25)      # all images of a patient alike
    by_patient, by_image = (
        share_interval(hit, g) for g in (np.repeat(np.arange(40), 25), np.arange(1000))
    )
    assert by_patient['high'] - by_patient['low'] > 3*(by_image['high'] - by_image['low'])


def test_sections_count_what_the_decision_does():
    test = simulate_predictions(60, 2., seed=5)
    d = fitted()
    j = J.DecidedPredictions(d, test, features(len(test), 7)[:, 0] + d.outlier.threshold)
    s, p = J.decision_sections({'student': [j]}, QUICK), d.probabilities(logits_of(test))
    # as predict ships it: an outlier is deferred too
    kept = (p.max(1) >= d.defer_below) & (j.distance <= d.outlier.threshold)
    assert (
        s['deferral'].table.coverage['student'] == pytest.approx(kept.mean())
        and not (j.distance <= d.outlier.threshold).all()
    )
    assert s['outliers'].table.outliers['student'] == pytest.approx(
        (j.distance > d.outlier.threshold).mean()
    )
    hit = d.sets(p, .1)[np.arange(len(test)), targets_of(test)]
    assert s['sets'].table.covered['student, wished 90 %'] == pytest.approx(hit.mean())
    r, k = d.operating_points.iloc[0], targets_of(test) == 0
    assert s['operating'].table.sensitivity.iloc[0] == pytest.approx(
        (p[k, 0] >= r.threshold).mean()
    )


def test_a_fold_without_a_decision_is_named():
    from kdoct.evaluate.pooling import pool_decisions
    d, test = fitted(), simulate_predictions(30)
    j = J.DecidedPredictions(d, test, np.zeros(len(test)))
    pooled, notes = pool_decisions({0: {'student': j, 'teacher': j}, 1: {'student': j}})
    assert list(pooled) == ['student'] and notes == [
        'teacher: no decision in fold 1, not in the tables about decisions'
    ]


def test_evaluation_shows_decisions_where_they_are(monkeypatch):
    from kdoct.evaluate import simulated
    from kdoct.evaluate import stage as evaluate_stage
    run = create_run('shown', preset('tiny'))
    simulated.write_simulated_stages(run, 0)
    before = evaluate_stage.evaluate_fold(run, 0, verbose=False)
    df = pd.read_parquet(run.stage_dir(0, 'student')/'predictions.parquet')
    D.save_decision(
        run.stage_dir(0, 'student'),
        d := fitted(simulate_predictions(30, classes=tuple(sorted(df.label.unique())))),
    )
    df[['path', 'fold']].assign(distance=d.outlier.score(features(len(df)))).to_parquet(
        run.stage_dir(0, 'student') / 'outliers.parquet'
    )
    assert not run.is_finished('evaluate', 0)                      # the evaluation does not know of it yet
    after = evaluate_stage.evaluate_fold(run, 0, verbose=False)
    assert 'calibration' not in before['sections'] and run.is_finished('evaluate', 0)
    saved = read_json(run.fold_dir(0)/'evaluation.json')
    assert {'calibration', 'operating', 'deferral', 'sets', 'outliers'} <= set(saved['sections'])
    assert {'calibration', 'coverage_risk'} <= set(saved['figures']) and (
        run.figures_dir(0) / 'coverage_risk.png'
    ).exists()
    assert list(saved['sections']['deferral']['table']) == ['student'] and after['table'].equals(
        before['table']
    )
    change(
        run.stage_dir(0, 'student'),
        lambda s: s['about'].update(weights_sha256='of another network'),
    )
    with pytest.raises(KdoctError, match=r'other weights(.|\n)*05g_decide.ipynb .*-p run shown'):
        evaluate_stage.evaluate_fold(run, 0)
