"""Tables, figures, records and the report, from predictions of simulated models."""
import contextlib
import io
import json
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from kdoct.app import report as R
from kdoct.core.files import KdoctError, read_json, write_json
from kdoct.core.presets import preset
from kdoct.core.runs import ROLES, create_run
from kdoct.core.sections import DecideRecipe, EvaluateRecipe
from kdoct.deploy.predict import Volumes, judged
from kdoct.evaluate import decision_tables as J
from kdoct.evaluate import (
    figures as evaluate_figures,
)
from kdoct.evaluate import patients as P
from kdoct.evaluate import (
    pooling,
    simulated,
)
from kdoct.evaluate import (
    stage as evaluate_stage,
)
from kdoct.evaluate import tables as T
from kdoct.evaluate.decisions import fit_decision
from kdoct.evaluate.intervals import bootstrap
from kdoct.evaluate.metrics import (
    HEADLINE,
    evaluate_predictions,
    log_softmax,
    logits_of,
    read_predictions,
    simulate_predictions,
)

QUICK = EvaluateRecipe(n_boot=100)


def quiet(f, *args, **kw):
    "Call `f`; return its result and what it printed."
    with contextlib.redirect_stdout(io.StringIO()) as out: return f(*args, **kw), out.getvalue()


def log_probs(df): return log_softmax(logits_of(df))


def models(n=60, classes=('CNV', 'DME', 'DRUSEN', 'NORMAL'), fold=0):
    return {
        r: simulate_predictions(n, m, classes, model=i, fold=fold)
        for i, (r, m) in enumerate(zip(ROLES, (5, 4.5, 3.5), strict=True))
    }


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "A tiny run, two of its three folds with models, the first evaluated; and what that printed."
    with pytest.MonkeyPatch.context() as m:
        m.setenv('KDOCT_OUTPUTS', str(tmp_path_factory.mktemp('outputs')))
        run = create_run('toy', preset('tiny'))
        for k in (0, 1): simulated.write_simulated_stages(run, k)
        return run, *quiet(evaluate_stage.evaluate_fold, run, 0)


@pytest.fixture
def run(made, monkeypatch):
    monkeypatch.setenv('KDOCT_OUTPUTS', str(made[0].path.parent))
    return made[0]


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


@pytest.mark.parametrize('classes', [('A', 'B'), ('COVID-19', 'Viral pneumonia', 'Lung opacity', 'Normal', 'E', 'F', 'G')], ids=['two', 'seven'])
def test_figures_for_few_and_many_classes(tmp_path, classes):
    m = models(80, classes)
    made = {
        'confusion': evaluate_figures.confusion_figure(m),
        'roc': evaluate_figures.roc_figure(m),
        'reliability': evaluate_figures.reliability_figure(m)}
    for name, fig in made.items():
        with Image.open(evaluate_figures.save_figure(fig, tmp_path/f'{name}.png', dpi=999)) as im:
            assert im.width > 400 and im.width <= 150*fig.get_figwidth() + 1
    assert len([a for a in evaluate_figures.roc_figure(m).axes if a.get_visible()]) == len(classes)


def test_figures_with_an_absent_class():
    m = {r: df[df.label != 'DME'].reset_index(drop=True) for r, df in models().items()}
    assert 'no image of this class' in evaluate_figures.roc_figure(m).axes[1].texts[0].get_text()
    assert len(evaluate_figures.confusion_figure(m).axes[0].texts) == 12  # the row of the absent class stays empty


def test_no_pyplot_figure_is_left_open():
    import matplotlib.pyplot as plt
    before = plt.get_fignums()
    (
        evaluate_figures.confusion_figure(models()),
        evaluate_figures.counts_figure(
            pd.DataFrame({'label': ['A'], 'role': ['train'], 'images': [3], 'groups': [2]})
        ),
    )
    assert plt.get_fignums() == before


def test_worst_mistakes_are_errors_surest_first_and_repeatable():
    df = simulate_predictions(80, 2.)
    w = evaluate_figures.worst_mistakes(df, 10)
    assert (w.label != w.predicted).all() and w.confidence.is_monotonic_decreasing
    pd.testing.assert_frame_equal(
        w, evaluate_figures.worst_mistakes(df.sample(frac=1, random_state=0), 10)
    )


def test_an_unreadable_picture_says_so_in_its_place():
    def gone(path): raise KdoctError(f'{path} is truncated', fix='copy it again')
    fig = evaluate_figures.mistakes_figure(simulate_predictions(40, 2.), gone, n=3)
    assert all('is truncated' in ' '.join(a.texts[0].get_text().split()) for a in fig.axes[:3])


def test_a_model_without_mistakes_has_a_figure(tmp_path):
    df = simulate_predictions(10)
    for c in ('CNV', 'DME', 'DRUSEN', 'NORMAL'): df[f'logit_{c}'] = 9.*(df.label == c)
    evaluate_figures.save_figure(
        evaluate_figures.mistakes_figure(df, lambda p: np.zeros((8, 8), np.uint8)),
        tmp_path / 'm.png',
    )
    assert (tmp_path/'m.png').stat().st_size > 0


def test_counts_refuse_an_image_without_label():
    folds = pd.DataFrame(
        {'path': ['a', 'b'], 'group': ['1', '2'], 'fold': 0, 'role': ['train', 'test']}
    )
    assert evaluate_figures.counts_of(folds, pd.Series({'a': 'X', 'b': 'X'})).images.tolist() == [
        1,
        1,
    ]
    with pytest.raises(KdoctError, match='no label'):
        evaluate_figures.counts_of(folds, pd.Series({'a': 'X'}))


def test_fold_writes_every_number_and_figure(made):
    run, result, said = made
    saved = read_json(run.fold_dir(0)/'evaluation.json')
    df = read_predictions(run.stage_dir(0, 'student')/'predictions.parquet')
    for m in HEADLINE:
        assert saved['estimates']['student'][m] == pytest.approx(evaluate_predictions(df)[m])
    # one view, one set of weights, no diagnosis of the patient
    assert list(saved['sections']) == ['classes', 'volumes', 'blanked', 'costs']
    assert set(saved['figures']) == {
        'confusion',
        'roc',
        'reliability',
        'training',
        'mistakes',
        'counts',
    }
    assert all((run.path/p).is_file() for p in saved['figures'].values())
    assert saved['parameters'] == {'teacher': 300_000, 'student': 100_000, 'baseline': 100_000}
    assert {'student - baseline', 'student - teacher'} == {
        k.split(' | ')[0] for k in saved['differences']
    }
    assert (
        'macro sensitivity %' in said
        and 'test-time views: none' in said
        and 'fold_0/evaluation.json' in said
    )
    assert run.stage('fold_0/evaluate')['status'] == 'done'
    assert result['table'].index.tolist() == list(ROLES)


def test_fold_is_evaluated_the_same_twice(run):
    before = (run.fold_dir(0)/'evaluation.json').read_text()
    quiet(evaluate_stage.evaluate_fold, 'toy', 0)
    assert (run.fold_dir(0)/'evaluation.json').read_text() == before


@pytest.mark.parametrize('missing', ['predictions.parquet', 'model.json'])
@pytest.mark.parametrize('role,notebook,option', [('teacher', '03_teacher.ipynb', ''), ('student', '04_distill.ipynb', ''),
                                                  ('baseline', '04_distill.ipynb', ' -p '
                                                                                   'role baseline')])
def test_a_missing_model_is_answered_with_its_command(run, role, notebook, option, missing):
    path = run.stage_dir(1, role)/missing
    hidden = path.rename(path.with_suffix('.hidden'))
    try:
        with pytest.raises(KdoctError, match=f'no predictions of the {role}') as e:
            evaluate_stage.evaluate_fold(run, 1)
        assert re.search(
            rf'papermill \S*{notebook} \S+\.ipynb -p run toy -p fold 1{option}$', str(e.value)
        )
        assert pooling.complete_folds(run) == [0]
    finally: hidden.rename(path)


def test_predictions_of_another_fold_are_refused(run):
    path = run.stage_dir(1, 'student')/'predictions.parquet'
    right = path.read_bytes()
    try:
        pd.read_parquet(path).assign(fold=2).to_parquet(path)
        with pytest.raises(KdoctError, match='fold'): pooling.fold_models(run, 1)
    finally: path.write_bytes(right)


def test_run_pools_folds_and_keeps_their_spread(run):
    r, said = quiet(evaluate_stage.evaluate_run, run)
    each = [evaluate_predictions(pooling.fold_models(run, k)['student']) for k in (0, 1)]
    assert r['folds'].loc[('student', 'accuracy'), 'sd'] == pytest.approx(
        np.std([e['accuracy'] for e in each])
    )
    n = [e['n_images'] for e in each]
    assert r['table'].accuracy['student'] == pytest.approx(
        np.average([e['accuracy'] for e in each], weights=n)
    )
    summary = read_json(run.path/'summary.json')
    assert summary['folds'] == [0, 1] and len(summary['per_fold']) == 6
    assert 'standard deviation over 2 folds' in ' '.join(said.split()) and 'same fold only' in said


def test_a_patient_tested_in_two_folds_is_refused():
    m = models()
    with pytest.raises(KdoctError, match='more than one fold'):
        evaluate_stage._pool({0: m, 1: {r: df.assign(fold=1) for r, df in m.items()}})


VIEWS = {
    'teacher.average': 'swa',
    'teacher.swa_start': 1,
    'evaluate.views': ['identity', 'hflip'],
    'data.severity': ['NORMAL', 'DRUSEN', 'DME', 'CNV'],
}


@pytest.fixture(scope='module')
def viewed(tmp_path_factory):
    "Two folds whose models have two views, the teacher averaged weights too; a classical model in fold 0."
    with pytest.MonkeyPatch.context() as m:
        m.setenv('KDOCT_OUTPUTS', str(tmp_path_factory.mktemp('outputs')))
        run = create_run('views', preset('tiny', **VIEWS))
        for k in (0, 1): simulated.write_simulated_stages(run, k)
        folder = run.stage_dir(0, 'hog_svm')
        folder.mkdir()
        read_predictions(run.stage_dir(0, 'baseline') / 'predictions.parquet').to_parquet(
            folder / 'predictions.parquet'
        )
        write_json(folder/'model.json', dict(parameters=None, calibrated=False))
        return (
            run,
            quiet(evaluate_stage.evaluate_fold, run, 0)[0],
            quiet(evaluate_stage.evaluate_run, run)[0],
        )


def test_views_and_weights_are_those_of_variants_parquet(viewed):
    run, fold, _ = viewed
    t = fold['sections']['views'].table
    weights = dict(teacher=('checkpoint', 'swa'), student=('checkpoint',), baseline=('checkpoint',))
    assert t.index.tolist() == [
        f'{m}, {w}, {v}'
        for m, ws in weights.items()
        for w in ws
        for v in ('one view', 'averaged views')
    ]
    assert (
        t.kept['teacher, swa, one view'] == 'yes' and t.kept['teacher, checkpoint, one view'] == ''
    )
    v = pd.read_parquet(run.stage_dir(0, 'teacher') / 'variants.parquet').query(
        'weights == "swa" and view == "averaged"'
    )
    assert t.accuracy['teacher, swa, averaged views'] == evaluate_predictions(v)['accuracy']
    d, a = fold['sections']['views_differences'].table.difference, t.accuracy
    assert d['teacher, one view: swa - checkpoint', 'accuracy'] == pytest.approx(
        a['teacher, swa, one view'] - a['teacher, checkpoint, one view']
    )
    assert 'views identity, hflip' in fold['protocol'] and (run.figures_dir(0)/'views.png').exists()


def test_each_architecture_is_measured_once_and_noted(monkeypatch):
    from kdoct.core.sections import TrainRecipe
    from kdoct.models.backbones import create_classifier
    from kdoct.models.folders import save_model_folder
    run, net = (
        create_run('cost', preset('tiny')),
        create_classifier(TrainRecipe(arch='test_efficientnet', weights='none'), 4, 64),
    )
    for role in ('student', 'baseline'):
        save_model_folder(run.stage_dir(0, role), net, role, run.recipe, list('abcd'))
    write_json(run.stage_dir(0, 'hog_svm')/'model.json', dict(parameters=None))
    c = pooling.costs_of(run, 0, ('student', 'baseline', 'HOG + SVM'), repeats=5)
    assert c['student'] == c['baseline'] and c['student']['parameters'] == sum(
        p.numel() for p in net.parameters()
    )
    assert c['student']['bytes'] == (run.stage_dir(0, 'student')/'model.safetensors').stat().st_size
    assert c['HOG + SVM'] == dict(parameters=None, not_measured='no model.safetensors')
    s = T.costs_section(c)
    assert (
        'HOG + SVM was not measured: no model.safetensors' in s.caption
        and s.texts.loc['student', 'weights on disk'] == '0.4 MB'
    )
    monkeypatch.setattr(
        'kdoct.evaluate.pooling._measured', lambda *a: pytest.fail('measured twice')
    )
    assert (
        pooling.costs_of(run, 0, ('student',))['student']
        == read_json(run.path / 'efficiency.json')['test_efficientnet, 4 classes, 64 px']
    )


def test_main_table_is_of_the_kept_weights_in_one_view(viewed):
    t, main = viewed[1]['sections']['views'].table, viewed[1]['table']
    assert (
        main.accuracy['teacher'] == t.accuracy['teacher, swa, one view']
        and main.nll['student'] == t.nll['student, checkpoint, one view']
    )


def test_a_further_model_is_a_row_of_its_fold_and_named_where_it_cannot_be_pooled(viewed):
    run, fold, pooled = viewed
    assert (
        fold['table'].index.tolist() == [*ROLES, 'HOG + SVM']
        and fold['table'].parameters['HOG + SVM'] == '–'
    )
    assert 'HOG + SVM, patients' in fold['sections']['volumes'].table.index
    assert 'HOG + SVM gives margins, no probabilities' in fold[
        'protocol'
    ] and evaluate_stage.is_evaluated(run, 0)
    assert (
        'HOG + SVM' not in pooled['table'].index
        and 'HOG + SVM is not in every fold' in pooled['protocol']
    )


def test_an_evaluation_without_a_further_model_is_out_of_date(viewed):
    run = viewed[0]
    path = run.fold_dir(0)/'evaluation.json'
    text = path.read_text()
    try:
        saved = json.loads(text)
        del saved['predictions']['HOG + SVM']
        path.write_text(json.dumps(saved))
        assert run.is_finished('evaluate', 0) and not evaluate_stage.is_evaluated(run, 0)
    finally: path.write_text(text)


def test_a_further_model_on_other_images_is_refused(viewed, monkeypatch):
    run = viewed[0]
    path = run.stage_dir(0, 'hog_svm')/'predictions.parquet'
    right = path.read_bytes()
    try:
        pd.read_parquet(path).iloc[1:].to_parquet(path)
        with pytest.raises(KdoctError, match='other images than the student'):
            pooling.fold_models(run, 0)
    finally: path.write_bytes(right)


@pytest.mark.parametrize('change,says', [
    (lambda t: t.iloc[1:], 'not about the images'),
    (lambda t: t.drop(columns='view'), 'view missing'),
    (lambda t: t.assign(logit_CNV=t.logit_CNV + 1), 'not those of predictions.parquet'),
    (lambda t: t[t.weights != 'swa'], r'kept weights \(swa\) are missing'),
], ids=['other images', 'no view', 'other logits', 'kept weights missing'])
def test_variants_that_do_not_belong_are_refused(viewed, tmp_path, change, says):
    run = viewed[0]
    change(pd.read_parquet(run.stage_dir(0, 'teacher') / 'variants.parquet')).to_parquet(
        tmp_path / 'variants.parquet'
    )
    with pytest.raises(KdoctError, match=says):
        T.read_variants(tmp_path/'variants.parquet', pooling.fold_models(run, 0)['teacher'], 'swa')


def test_a_model_without_variants_is_named(viewed):
    run = viewed[0]
    models = pooling.fold_models(run, 0)
    variants, kept = pooling.fold_variants(run, 0, models)
    del variants['baseline']
    pooled, _, notes = pooling.pool_variants({0: (variants, kept)})
    assert notes == ['baseline: no variants.parquet'] and 'baseline' not in pooled


def test_blanked_retina_stands_beside_chance(viewed):
    run, _, pooled = viewed
    t = pooled['sections']['blanked'].table
    df = pd.concat(pooling.fold_models(run, k)['student'] for k in (0, 1))
    assert (
        t.largest_class['student'] == df.label.value_counts(normalize=True).max()
        and t.balanced_chance['student'] == 1 / 4
    )
    assert (t.chance == 'not above').all() and t.n_images['student'] == len(df)


def test_no_ensemble_over_the_folds_of_a_cross_validation(viewed):
    run, _, pooled = viewed
    with pytest.raises(KdoctError, match='no image is left') as e: pooling.ensemble(run, 'student')
    n, g = (pooled['table'][c]['student'] for c in ('n_images', 'n_groups'))
    assert (
        f'{n} of {n} test images ({g} of {g} groups)' in str(e.value)
        and 'No ensemble over folds' in pooled['protocol']
    )


def official_run(name, seen_groups=0):
    "A run of the official protocol: 3 models on the same 40 groups; `seen_groups` of them are trained on too."
    keep = {'data.official_overlap': 'keep'} if seen_groups else {}
    run = create_run(
        name,
        preset(
            'tiny', **{'data.protocol': 'official', 'data.severity': VIEWS['data.severity'], **keep}
        ),
    )
    test, other = simulate_predictions(40), [f'other-{i}' for i in range(9)]
    seen = test.group.unique()[:seen_groups]
    rows = [(p, g, k, 'test') for k in range(3) for p, g in zip(test.path, test.group, strict=True)]
    rows += [
        (o, o, k, 'val' if i % 3 == k else 'train') for k in range(3) for i, o in enumerate(other)
    ]
    rows += [
        (f'train-{g}', g, k, 'val' if i % 3 == k else 'train')
        for k in range(3)
        for i, g in enumerate(seen)
    ]
    pd.DataFrame(rows, columns=['path', 'group', 'fold', 'role']).to_csv(run.folds_csv, index=False)
    for k in range(3):
        for i, role in enumerate(ROLES):
            df = simulate_predictions(40, 3 - i/2, model=10*k + i).assign(fold=k)
            run.stage_dir(k, role).mkdir(parents=True)
            df.to_parquet(run.stage_dir(k, role)/'predictions.parquet')
            write_json(run.stage_dir(k, role)/'model.json', dict(arch='simulated', parameters=1000))
    return run


def official_tables(run):
    "What `evaluate_run` computes, without its figures."
    each = {k: pooling.fold_models(run, k) for k in range(3)}
    return evaluate_stage._tables(run, each, evaluate_stage._pool(each, 'official'))


def test_official_models_are_pooled_on_the_same_test_images():
    run = official_run('official')
    r, _ = quiet(evaluate_stage.evaluate_run, run)
    assert (
        '3 models on the same test images' in r['protocol']
        and 'test-time views: none' in r['protocol']
    )
    n = len(simulate_predictions(40))
    assert r['table'].n_images['student'] == 3*n and r['table'].n_groups['student'] == 40
    volumes = r['sections']['volumes']
    assert (
        volumes.table.n_images['student, volumes'] == 120
        and '40 volumes' in volumes.caption
        and 'decided by 3 models' in volumes.caption
    )


def test_official_ensemble_is_the_mean_of_the_members_probabilities():
    run = official_run('official')
    e = pooling.ensemble(run, 'student')
    each = [
        read_predictions(run.stage_dir(k, 'student') / 'predictions.parquet').sort_values('path')
        for k in range(3)
    ]
    mean = np.mean([np.exp(log_probs(t)) for t in each], axis=0)
    np.testing.assert_allclose(np.exp(log_probs(e)), mean, rtol=1e-9)
    assert e.path.tolist() == each[0].path.tolist() and set(e.fold) == {-1}
    r = official_tables(run)
    assert (
        r['sections']['ensemble'].table.accuracy['student, ensemble of 3']
        == evaluate_predictions(e)['accuracy']
        > r['table'].accuracy['student']
    )
    assert 'No ensemble' not in r['protocol']


def test_ensemble_leaves_out_patients_that_a_member_was_trained_on():
    run = official_run('leaky', seen_groups=15)
    e, test = pooling.ensemble(run, 'student'), simulate_predictions(40)
    assert set(e.group) == set(test.group.unique()[15:])
    r = official_tables(run)
    assert f'{len(e)} of {len(test)} test images' in r['sections']['ensemble'].caption


def test_ensemble_is_refused_where_every_patient_is_known():
    with pytest.raises(KdoctError, match='40 of 40 groups'):
        pooling.ensemble(official_run('all-seen', seen_groups=40), 'student')


def test_official_folds_must_test_the_same_images():
    m = models()
    with pytest.raises(KdoctError, match='not tested in every fold'):
        evaluate_stage._pool(
            {0: m, 1: {r: df.iloc[1:].assign(fold=1) for r, df in m.items()}}, 'official'
        )


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
    return J.DecidedPredictions(
        replace(d, volume=rule), df, np.where(far, d.outlier.threshold + 1, 0.0)
    )


@pytest.mark.parametrize('rule', [P.VolumeRule(), P.VolumeRule('worst', 2, severity=('NORMAL', 'DRUSEN', 'DME', 'CNV')),
                                  P.VolumeRule('worst', 1, False, ('NORMAL', 'DRUSEN', 'DME', 'CNV'))], ids=['mean', 'worst', 'worst of 1, all'])
def test_evaluation_decides_every_volume_as_predict_does(rule):
    "The rows that predict writes, and the table of evaluation, of the same B-scans."
    df = simulate_predictions(40, 1.)
    j = decided(df, rule, df.path[::3])
    volumes = Volumes(j.decision.classes, rule)
    for row, about in zip(
        judged(j.decision, j.probs, j.distance, 0.1), df.to_dict('records'), strict=True
    ):
        volumes.add(
            row
            | {k: about[k] for k in ('path', 'patient', 'eye', 'volume', 'slice')}
            | dict(n_slices=None, error='')
        )
    shipped = pd.DataFrame(volumes.rows()).set_index('volume')
    table, _ = J._decided_units(df, [j], None, 'volume')
    table = table.set_index(table.path.str.split(' | ', regex=False).str[1]).loc[shipped.index]
    for c in ('predicted', 'deferred', 'why'): assert table[c].tolist() == shipped[c].tolist()
    assert (
        table.n_used.tolist() == shipped.used.tolist()
        and (shipped.used < shipped.slices).any() == rule.drop_outliers
    )
    s = J.volumes_section({'student': df}, {'student': [j]}, P.VolumeRule(), QUICK)
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
    s = J.volumes_section({'student': df}, {}, P.VolumeRule(), QUICK)
    assert list(s.table.index) == ['student, volumes', 'student, patients']
    assert (
        s.table.n_images['student, volumes']
        == df.groupby(['patient', 'eye']).ngroups
        > s.table.n_images['student, patients']
        == 40
    )
    assert 'Without a decision' in s.caption
    alone = J.volumes_section({'student': df.assign(volume='')}, {}, P.VolumeRule(), QUICK)
    assert list(alone.table.index) == ['student, patients']


def test_a_table_without_a_usable_volume_is_not_made():
    df = simulate_predictions(10)
    assert (
        J.volumes_section(
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
    s = J.volumes_section({'student': df.drop(columns='volume')}, {}, P.VolumeRule(), QUICK)
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


def test_the_published_selection_stands_beside_all_slices(tmp_path):
    df = simulate_predictions(60).assign(patient_label=lambda t: t.label)
    assert T.selection_section({'student': df}, preset('tiny').evaluate) is None  # every slice shows the diagnosis
    df.loc[df.slice == 0, 'label'] = 'NORMAL'
    s = T.selection_section({'student': df}, preset('tiny').evaluate)
    kept = df[df.label == df.patient_label]
    assert (
        s.table.accuracy['student, published selection'] == evaluate_predictions(kept)['accuracy']
    )
    assert s.table.accuracy['student, all slices'] == evaluate_predictions(df)['accuracy']
    assert f'{len(kept)} of {len(df)}' in s.caption


@pytest.mark.parametrize('overrides,says', [
    ({'data.fill_white': True, 'data.mask_scale_bar': True}, 'white padding replaced by '
                                                             'background; scale bar covered'),
    ({'data.resize': 'pad'}, 'made square by pad'),
    ({'data.worst_case_train': True}, "training on only slices that show the patient's diagnosis, "
                                      "test on all slices"),
    ({'evaluate.views': ['identity', 'vflip']}, 'the mean of logits over the views '
                                                'identity, vflip'),
    ({}, 'test-time views: none'),
])
def test_protocol_names_what_is_not_default(overrides, says):
    run = create_run('p', preset('tiny', **overrides))
    assert says in T.protocol_of(run, simulate_predictions(20).assign(patient_label='CNV'))


def test_protocol_tells_of_a_kept_leak():
    run = official_run('leaky', seen_groups=5)
    run.record('data', leak=dict(groups=5, images=7), overlap=7)
    assert 'leak is kept: 5 tested groups were trained on too, with 7 images' in T.protocol_of(
        run, simulate_predictions(20)
    )
    clean = official_run('clean')
    clean.record('data', leak=None, overlap=7)
    assert '7 images of tested groups outside the test part were left out' in T.protocol_of(
        clean, simulate_predictions(20)
    )


def test_simulated_models_never_enter_a_real_run(run, monkeypatch):
    other = create_run('real', preset('edge', **{'data.source': 'phantom'}))
    with pytest.raises(KdoctError, match='not a test'): simulated.write_simulated_stages(other, 0)


def test_report_is_one_file_without_a_network(run):
    run.record(
        'fold_2/teacher',
        status='failed',
        error='term <soft> is not finite',
        notebook='fold_2/notebooks/teacher.ipynb',
    )
    (run.path/'audit.json').write_text(json.dumps({'images': 48, 'problems': {'truncated': 1}}))
    path, said = quiet(R.report_html, run, [0, 1, 2])
    assert said == ''
    html = path.read_text()
    assert path == run.path/'report.html'
    assert (
        not re.search(r'(?:src|href)="(?!data:|#)', html)
        and 'url(' not in html
        and '<script' not in html
    )
    images = re.findall(r'<img [^>]*>', html)
    assert len(images) == 3 + 6 + 6 and all(re.search(r' alt="[^"]{20,}"', i) for i in images)
    assert (
        'term &lt;soft&gt; is not finite' in html
        and 'Fold 2 has no predictions of the teacher' in html
    )
    assert 'truncated: 1' in html and 'problems.truncated' not in html   # in words, not by the names in the file
    assert 'distill.temperature' in html and 'test-time views: none' in html
    assert html.count('<h1>') == 1 and '<html lang="en">' in html


def test_report_takes_a_result_that_is_there(viewed, monkeypatch):
    run, _, result = viewed
    monkeypatch.setattr(R, 'evaluate_run', lambda *a, **k: pytest.fail('evaluated again'))
    monkeypatch.setattr(R, 'is_evaluated', lambda run, fold: True)
    html = R.report_html(run, [0, 1], result=result).read_text()
    for s in result['sections'].values(): assert f'<h3>{s.title}</h3>' in html
    with pytest.raises(KdoctError, match='the report of'): R.report_html(run, [0], result=result)


def test_report_before_any_model(run):
    path, _ = quiet(R.report_html, create_run('new', preset('tiny')))
    assert 'nothing to compare' in path.read_text()


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


def test_an_unknown_interval_is_not_read_as_at_chance():
    df = models()['student']
    rare = pd.concat([df[df.label != 'DME'], df[df.label == 'DME'].head(1)], ignore_index=True)
    s = T.blanked_section({'student': {('swa', T.BLANKED): rare}}, preset('tiny').evaluate)
    assert s.table.chance['student'].startswith('not known')


def neh_like(df):
    return df.assign(patient_label=df.label, label=df.label.where(df.slice != 1, 'NORMAL'))


def neh_fold(k, kept='swa'):
    own = {r: neh_like(df) for r, df in models(fold=k).items()}
    other = {r: neh_like(df) for r, df in models(70, fold=k).items()}   # same kind of images, other logits
    variants = {
        r: {('swa', T.ONE): df, ('swa', T.MANY): other[r], ('checkpoint', T.ONE): other[r]}
        for r, df in own.items()
    }
    return own, variants, dict.fromkeys(ROLES, kept)


def test_the_published_quantity_is_mean_and_population_deviation_of_the_chosen_slices():
    each = {k: neh_fold(k) for k in range(3)}
    s = T.folds_section(each, 3, ('identity', 'hflip'))
    row = s.table.loc['teacher, published selection, kept weights, averaged views']
    chosen = [
        t[t.label == t.patient_label]
        for t in (variants['teacher']['swa', T.MANY] for _, variants, _ in each.values())
    ]
    values = pd.DataFrame([evaluate_predictions(t) for t in chosen])
    for m in ('accuracy', 'sensitivity', 'specificity', 'precision', 'f1', 'auc'):
        assert row[m] == pytest.approx(values[m].mean()) and row[f'{m}_sd'] == pytest.approx(
            values[m].std(ddof=0)
        )
    assert row['is'] == 'published quantity' and 'ddof 0' in s.caption
    assert s.table['is']['teacher, all slices, kept weights, one view'] == 'main table'
    assert (
        'teacher, all slices, checkpoint, one view' in s.table.index
        and 'teacher, all slices, swa, one view' not in s.table.index
    )


def test_missing_folds_and_rows_of_the_summary_are_said():
    each = {k: neh_fold(k) for k in (0, 2)}
    del each[2][1]['teacher']['checkpoint', T.ONE]
    s = T.folds_section(each, 3, ('identity', 'hflip'))
    name = 'teacher, all slices, checkpoint, one view'
    assert 'not in this table: 1' in s.caption and s.table.note[name] == 'fold 2 has none'
    assert s.texts.folds[name] == '1' and '±' not in s.texts.loc[name, 'accuracy %']
    alone = T.folds_section({0: each[0]}, 3, ())
    assert (
        'One fold only' in alone.caption
        and not alone.texts.astype(str).apply(lambda c: c.str.contains('±')).any().any()
    )


def test_without_a_diagnosis_no_row_is_called_published():
    each = {k: (models(fold=k), {}, {}) for k in range(2)}
    s = T.folds_section(each, 2, ())
    assert (
        'published selection of slices is not known' in s.caption
        and not s.table['is'].str.contains('published').any()
    )


def test_the_summary_over_folds_needs_files_only(viewed):
    run, _, pooled = viewed
    (run.path/'summary.json').unlink()
    again, s = evaluate_stage.folds_summary(run), pooled['sections']['folds']
    pd.testing.assert_frame_equal(again.table, s.table)
    (_, said) = quiet(evaluate_stage.evaluate_run, run)
    saved, row = (
        read_json(run.path / 'summary.json')['sections']['folds'],
        'teacher, all slices, kept weights, averaged views',
    )
    assert saved['table'][row]['accuracy'] == s.table.accuracy[row]
    assert (
        s.title in said
        and 'ddof 0' in said
        and f'<h3>{s.title}</h3>' in R.report_html(run).read_text()
    )


def shortcut(above=True):
    "What probe.json says."
    worst = dict(name='white_top', meaning='white above', balanced_accuracy=.7, mean={})
    return dict(
        images=60,
        of=60,
        images_a_group=1,
        groups=30,
        classes=['CNV', 'DME', 'DRUSEN', 'NORMAL'],
        balanced_accuracy=0.78,
        interval=[0.7, 0.85] if above else [0.2, 0.4],
        chance=0.25,
        above_chance=above,
        worst=worst,
        features=[],
        equal=[],
        sentence='an old sentence',
    )


@pytest.fixture
def probed(run):
    yield run
    (run.path/'probe.json').unlink()


def test_a_shortcut_stands_at_the_top_of_report_and_summary(probed):
    write_json(probed.path/'probe.json', shortcut())
    _, said = quiet(evaluate_stage.evaluate_run, probed)
    words = 'predicts the class with 78.0 % balanced accuracy [70.0, 85.0] where chance is 25.0 %'
    assert said.startswith('WARNING: Shortcut') and words in ' '.join(said.split())
    assert words in read_json(probed.path/'summary.json')['warnings'][0]
    html = R.report_html(probed, [0, 1]).read_text()
    assert (
        html.index(words) < html.index('<h2>Results')
        and 'Nothing: no stage failed' not in html
        and 'What to do' in html
    )


def test_a_probe_at_chance_is_no_warning(probed):
    write_json(probed.path/'probe.json', shortcut(False))
    assert not [w for w in evaluate_stage.warnings_of(probed) if w.startswith('Shortcut')]


def test_findings_of_data_and_decisions_are_warnings(run):
    table = pd.DataFrame(
        dict(note=['not reachable: no image', '']),
        index=['CNV, sensitivity 95 %', 'DME, sensitivity 95 %'],
    )
    section = T.Section('Operating points of the student', table, table, '')
    blank = pd.DataFrame(
        [
            dict(
                chance='above',
                sensitivity=0.6,
                sensitivity_low=0.5,
                sensitivity_high=0.7,
                balanced_chance=0.25,
            )
        ],
        index=['student'],
    )
    (run.path / 'audit.csv').write_text(
        'path,problem,detail\na.png,near-duplicate,"of b.png, which is CNV, not DME; '
        'agreement 0.99"\n'
    )
    try: said = evaluate_stage.warnings_of(run, dict(operating=section, blanked=T.Section('', blank, blank, '')))
    finally: (run.path/'audit.csv').unlink()
    assert any('above chance (25.0 %): student 60.0 [50.0, 70.0] %' in w for w in said)
    assert any('1 near-duplicates have another class' in w for w in said)
    assert any(
        'For CNV (sensitivity 95 %): not reachable: no image.' in w and 'DME' not in w for w in said
    )


def test_the_main_table_and_that_of_every_class_share_one_pass(run, monkeypatch):
    both, asked = T.bootstrap_both, []
    monkeypatch.setattr(
        T, 'bootstrap_both', lambda df, *how: asked.append(len(df)) or both(df, *how)
    )
    made = quiet(evaluate_stage.evaluate_fold, run, 0)[0]
    assert len(asked) == len(made['models'])


def test_what_is_true_of_several_networks_is_said_once(run):
    above = dict(
        chance='above',
        sensitivity=0.6,
        sensitivity_low=0.5,
        sensitivity_high=0.7,
        balanced_chance=0.25,
    )
    blank = pd.DataFrame(
        [above, above | dict(sensitivity=0.625), above | dict(chance='not above')],
        index=['teacher', 'student', 'baseline'],
    )
    few = '9 patients are too few for sets with 5 % errors: every class is in every set'
    sets = pd.DataFrame(
        dict(note=[few, few, '']),
        index=['teacher, wished 95 %', 'student, wished 95 %', 'baseline, wished 95 %'],
    )
    said = evaluate_stage.warnings_of(
        run,
        dict(
            sets=T.Section('Prediction sets', sets, sets, ''),
            blanked=T.Section('', blank, blank, ''),
        ),
    )
    covered = [w for w in said if 'retina is covered' in w]
    assert (
        len(covered) == 1
        and 'teacher 60.0 [50.0, 70.0] %, student 62.5 [50.0, 70.0] %' in covered[0]
        and 'baseline' not in covered[0]
    )
    assert (
        f'Prediction sets, not fitted as wished. For teacher, student (wished 95 %): {few}. '
        f'See Decisions.'
        in said
    )


def test_a_class_that_validation_or_calibration_lacks_stands_at_the_top_of_the_report(run):
    before = run.json.read_bytes()
    try:
        run.record(
            'data', val_lacks={'0': ['CNV'], '2': ['CNV', 'DME']}, calib_lacks={'1': ['DRUSEN']}
        )
        html = R.report_html(run, [0]).read_text()
    finally: run.json.write_bytes(before)
    for words in (
        'The validation part has no image of CNV in folds 0, 2, and none of DME in fold 2.',
        'The calibration part has no image of DRUSEN in fold 1. The temperature, thresholds and '
        'prediction sets know nothing of it.',
    ):
        assert html.count(words) == 1 and html.index(words) < html.index('<h2>Results')


def test_a_single_fold_has_no_summary_over_folds_in_the_report(run):
    one, two = (R.report_html(run, folds).read_text() for folds in ([0], [0, 1]))
    assert '<h3>Mean and standard deviation over folds</h3>' in two and 'One fold only' not in two
    assert (
        '<h3>Mean and standard deviation over folds</h3>' not in one
        and 'One fold only (fold 0)' in one
    )


def test_the_report_has_words_where_files_have_names(probed):
    write_json(
        probed.path / 'probe.json',
        shortcut()
        | dict(
            features=[dict(name='white_top', meaning='white above', balanced_accuracy=0.7, mean={})]
        ),
    )
    html = R.report_html(probed, [0, 1]).read_text()
    page = (
        html[html.index('<section id="results">') : html.index('<section id="recipe">')]
        + html[html.index('<section id="machine">') :]
    )
    for raw in (
        'patient_label',
        'data.severity',
        'data.calibration_fraction',
        'recipe_key',
        'folds_sha256',
        'memory_gb',
        'packages.',
        'fold_0',
        'val</th>',
        'train</th>',
        '`',
    ):
        assert raw not in page, raw
    assert 'validation</th>' in page and '<th scope="row">white above</th>' in page


def test_the_recipe_is_read_once_for_both_of_its_tables(run, monkeypatch):
    rows, asked = R._recipe_rows, []
    monkeypatch.setattr(R, '_recipe_rows', lambda r: asked.append(r) or rows(r))
    html = R.report_html(run, [0]).read_text()
    assert (
        len(asked) == 1
        and 'teacher: passes over the training part' in html
        and html.count('<td>teacher.epochs</td>') == 2
    )
