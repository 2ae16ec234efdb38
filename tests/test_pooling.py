"Reading and pooling folds: what belongs together, and the legal ensembles."
import json

import numpy as np
import pandas as pd
import pytest
from simulated_models import VIEWS, log_probs, models, official_run, quiet

from kdoct.app import report as R
from kdoct.core.files import KdoctError, read_json, write_json
from kdoct.core.presets import preset
from kdoct.core.runs import ROLES, create_run
from kdoct.evaluate import all_folds, pooling, run_tables, simulated, stage
from kdoct.evaluate import tables as T
from kdoct.evaluate import variants as V
from kdoct.evaluate.metrics import evaluate_predictions, read_predictions, simulate_predictions


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
            quiet(stage.evaluate_fold, run, 0)[0],
            quiet(all_folds.evaluate_run, run)[0],
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
    ] and stage.is_evaluated(run, 0)
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
        assert run.is_finished('evaluate', 0) and not stage.is_evaluated(run, 0)
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
        V.read_variants(tmp_path/'variants.parquet', pooling.fold_models(run, 0)['teacher'], 'swa')


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


def test_an_unknown_interval_is_not_read_as_at_chance():
    df = models()['student']
    rare = pd.concat([df[df.label != 'DME'], df[df.label == 'DME'].head(1)], ignore_index=True)
    s = V.blanked_section({'student': {('swa', V.BLANKED): rare}}, preset('tiny').evaluate)
    assert s.table.chance['student'].startswith('not known')


def test_no_ensemble_over_the_folds_of_a_cross_validation(viewed):
    run, _, pooled = viewed
    with pytest.raises(KdoctError, match='no image is left') as e: pooling.ensemble(run, 'student')
    n, g = (pooled['table'][c]['student'] for c in ('n_images', 'n_groups'))
    assert (
        f'{n} of {n} test images ({g} of {g} groups)' in str(e.value)
        and 'No ensemble over folds' in pooled['protocol']
    )


def official_tables(run):
    "What `evaluate_run` computes, without its figures."
    each = {k: pooling.fold_models(run, k) for k in range(3)}
    return run_tables.run_tables(run, each, all_folds._pool(each, 'official'))


def test_official_models_are_pooled_on_the_same_test_images():
    run = official_run('official')
    r, _ = quiet(all_folds.evaluate_run, run)
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
        all_folds._pool(
            {0: m, 1: {r: df.iloc[1:].assign(fold=1) for r, df in m.items()}}, 'official'
        )


@pytest.mark.slow
def test_the_summary_over_folds_needs_files_only(viewed):
    run, _, pooled = viewed
    (run.path/'summary.json').unlink()
    again, s = all_folds.folds_summary(run), pooled['sections']['folds']
    pd.testing.assert_frame_equal(again.table, s.table)
    (_, printed) = quiet(all_folds.evaluate_run, run)
    saved, row = (
        read_json(run.path / 'summary.json')['sections']['folds'],
        'teacher, all slices, kept weights, averaged views',
    )
    assert saved['table'][row]['accuracy'] == s.table.accuracy[row]
    assert (
        s.title in printed
        and 'ddof 0' in printed
        and f'<h3>{s.title}</h3>' in R.report_html(run).read_text()
    )


def test_report_takes_a_result_that_is_there(viewed, monkeypatch):
    run, _, result = viewed
    monkeypatch.setattr(R, 'evaluate_run', lambda *a, **k: pytest.fail('evaluated again'))
    monkeypatch.setattr(R, 'is_evaluated', lambda run, fold: True)
    html = R.report_html(run, [0, 1], result=result).read_text()
    for s in result['sections'].values(): assert f'<h3>{s.title}</h3>' in html
    with pytest.raises(KdoctError, match='the report of'): R.report_html(run, [0], result=result)
