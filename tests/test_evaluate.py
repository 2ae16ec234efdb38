"""Tables, figures, records and the report, from predictions of simulated models."""
import contextlib
import io
import json
import re

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from kdoct import evaluate as E
from kdoct import report as R
from kdoct.core import ROLES, KdoctError, create_run, preset, read_json
from kdoct.metrics import HEADLINE, bootstrap, evaluate_predictions, read_predictions, simulate_predictions


def quiet(f, *args, **kw):
    "Call `f`; return its result and what it printed."
    with contextlib.redirect_stdout(io.StringIO()) as out: return f(*args, **kw), out.getvalue()


def models(n=60, classes=('CNV', 'DME', 'DRUSEN', 'NORMAL'), fold=0):
    return {r: simulate_predictions(n, m, classes, model=i, fold=fold) for i, (r, m) in enumerate(zip(ROLES, (5, 4.5, 3.5), strict=True))}


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "A tiny run, two of its three folds with models, the first evaluated; and what that printed."
    with pytest.MonkeyPatch.context() as m:
        m.setenv('KDOCT_OUTPUTS', str(tmp_path_factory.mktemp('outputs')))
        run = create_run('toy', preset('tiny'))
        for k in (0, 1): E._simulated_stages(run, k)
        return run, *quiet(E.evaluate_fold, run, 0)


@pytest.fixture
def run(made, monkeypatch):
    monkeypatch.setenv('KDOCT_OUTPUTS', str(made[0].path.parent))
    return made[0]


def test_table_holds_the_numbers_of_metrics():
    m = models()
    t, ci = E.table_of(m, dict.fromkeys(ROLES, 7_700_000)), bootstrap(m['student'])
    assert list(t.index) == list(ROLES)
    assert t.loc['student', 'auc_low'] == ci.low['auc'] and t.loc['student', 'nll'] == ci.estimate['nll']
    low, high = (100*ci.loc['accuracy', c] for c in ('low', 'high'))
    assert t.loc['student', 'accuracy %'] == f"{100*ci.estimate['accuracy']:.1f} [{low:.1f}, {high:.1f}]"
    assert t.loc['student', 'parameters'] == '7.70 M'


def test_table_says_what_a_reader_must_know():
    df = models()['student']
    df = df[df.label != 'DME'].reset_index(drop=True)
    note = E.table_of({'student': df}, {'student': 1}).note['student']
    assert 'macro over 3 classes: no image of DME' in note
    rare = pd.concat([df, models()['student'].query('label == "DME"').head(1)], ignore_index=True)
    assert re.search(r'\d+ of 1000 resamples lacked a class', E.table_of({'student': rare}, {'student': 1}).note['student'])


def test_differences_need_the_same_images():
    m = models()
    with pytest.raises(KdoctError, match='not the same images'): E.differences_of(m | {'baseline': m['baseline'].iloc[1:]})


@pytest.mark.parametrize('classes', [('A', 'B'), ('COVID-19', 'Viral pneumonia', 'Lung opacity', 'Normal', 'E', 'F', 'G')], ids=['two', 'seven'])
def test_figures_for_few_and_many_classes(tmp_path, classes):
    m = models(80, classes)
    for name, fig in {'confusion': E.confusion_figure(m), 'roc': E.roc_figure(m), 'reliability': E.reliability_figure(m)}.items():
        with Image.open(E.save_figure(fig, tmp_path/f'{name}.png', dpi=999)) as im:
            assert im.width > 400 and im.width <= 150*fig.get_figwidth() + 1
    assert len([a for a in E.roc_figure(m).axes if a.get_visible()]) == len(classes)


def test_figures_with_an_absent_class():
    m = {r: df[df.label != 'DME'].reset_index(drop=True) for r, df in models().items()}
    assert 'no image of this class' in E.roc_figure(m).axes[1].texts[0].get_text()
    assert len(E.confusion_figure(m).axes[0].texts) == 12  # the row of the absent class stays empty


def test_no_pyplot_figure_is_left_open():
    import matplotlib.pyplot as plt
    before = plt.get_fignums()
    E.confusion_figure(models()), E.counts_figure(pd.DataFrame({'label': ['A'], 'role': ['train'], 'images': [3], 'groups': [2]}))
    assert plt.get_fignums() == before


def test_worst_mistakes_are_errors_surest_first_and_repeatable():
    df = simulate_predictions(80, 2.)
    w = E.worst_mistakes(df, 10)
    assert (w.label != w.predicted).all() and w.confidence.is_monotonic_decreasing
    pd.testing.assert_frame_equal(w, E.worst_mistakes(df.sample(frac=1, random_state=0), 10))


def test_an_unreadable_picture_says_so_in_its_place():
    def gone(path): raise KdoctError(f'{path} is truncated', fix='copy it again')
    fig = E.mistakes_figure(simulate_predictions(40, 2.), gone, n=3)
    assert all('is truncated' in ' '.join(a.texts[0].get_text().split()) for a in fig.axes[:3])


def test_a_model_without_mistakes_has_a_figure(tmp_path):
    df = simulate_predictions(10)
    for c in ('CNV', 'DME', 'DRUSEN', 'NORMAL'): df[f'logit_{c}'] = 9.*(df.label == c)
    E.save_figure(E.mistakes_figure(df, lambda p: np.zeros((8, 8), np.uint8)), tmp_path/'m.png')
    assert (tmp_path/'m.png').stat().st_size > 0


def test_counts_refuse_an_image_without_label():
    folds = pd.DataFrame({'path': ['a', 'b'], 'group': ['1', '2'], 'fold': 0, 'role': ['train', 'test']})
    assert E.counts_of(folds, pd.Series({'a': 'X', 'b': 'X'})).images.tolist() == [1, 1]
    with pytest.raises(KdoctError, match='no label'): E.counts_of(folds, pd.Series({'a': 'X'}))


def test_fold_writes_every_number_and_figure(made):
    run, result, said = made
    saved = read_json(run.fold_dir(0)/'evaluation.json')
    df = read_predictions(run.stage_dir(0, 'student')/'predictions.parquet')
    for m in HEADLINE: assert saved['estimates']['student'][m] == pytest.approx(evaluate_predictions(df)[m])
    assert set(saved['figures']) == {'confusion', 'roc', 'reliability', 'training', 'mistakes', 'counts'}
    assert all((run.path/p).is_file() for p in saved['figures'].values())
    assert saved['parameters'] == {'teacher': 300_000, 'student': 100_000, 'baseline': 100_000}
    assert {'student - baseline', 'student - teacher'} == {k.split(' | ')[0] for k in saved['differences']}
    assert 'macro sensitivity %' in said and 'test-time views: none' in said and 'fold_0/evaluation.json' in said
    assert run.stage('fold_0/evaluate')['status'] == 'done'
    assert result['table'].index.tolist() == list(ROLES)


def test_fold_is_evaluated_the_same_twice(run):
    before = (run.fold_dir(0)/'evaluation.json').read_text()
    quiet(E.evaluate_fold, 'toy', 0)
    assert (run.fold_dir(0)/'evaluation.json').read_text() == before


@pytest.mark.parametrize('missing', ['predictions.parquet', 'model.json'])
@pytest.mark.parametrize('role,notebook,option', [('teacher', '03_teacher.ipynb', ''), ('student', '04_distill.ipynb', ''),
                                                  ('baseline', '04_distill.ipynb', ' -p role baseline')])
def test_a_missing_model_is_answered_with_its_command(run, role, notebook, option, missing):
    path = run.stage_dir(1, role)/missing
    hidden = path.rename(path.with_suffix('.hidden'))
    try:
        with pytest.raises(KdoctError, match=f'no predictions of the {role}') as e: E.evaluate_fold(run, 1)
        assert re.search(rf'papermill \S*{notebook} \S+\.ipynb -p run toy -p fold 1{option}$', str(e.value))
        assert E.complete_folds(run) == [0]
    finally: hidden.rename(path)


def test_predictions_of_another_fold_are_refused(run):
    path = run.stage_dir(1, 'student')/'predictions.parquet'
    right = path.read_bytes()
    try:
        pd.read_parquet(path).assign(fold=2).to_parquet(path)
        with pytest.raises(KdoctError, match='fold'): E.fold_models(run, 1)
    finally: path.write_bytes(right)


def test_run_pools_folds_and_keeps_their_spread(run):
    r, said = quiet(E.evaluate_run, run)
    each = [evaluate_predictions(E.fold_models(run, k)['student']) for k in (0, 1)]
    assert r['folds'].loc[('student', 'accuracy'), 'sd'] == pytest.approx(np.std([e['accuracy'] for e in each]))
    n = [e['n_images'] for e in each]
    assert r['table'].accuracy['student'] == pytest.approx(np.average([e['accuracy'] for e in each], weights=n))
    summary = read_json(run.path/'summary.json')
    assert summary['folds'] == [0, 1] and len(summary['per_fold']) == 6
    assert 'mean ± sd over 2 folds' in said and 'same fold only' in said


def test_a_patient_tested_in_two_folds_is_refused():
    m = models()
    with pytest.raises(KdoctError, match='more than one fold'): E._pool({0: m, 1: {r: df.assign(fold=1) for r, df in m.items()}})


def test_simulated_models_never_enter_a_real_run(run, monkeypatch):
    other = create_run('real', preset('edge', **{'data.source': 'phantom'}))
    with pytest.raises(KdoctError, match='not a test'): E._simulated_stages(other, 0)


def test_report_is_one_file_without_a_network(run):
    run.record('fold_2/teacher', status='failed', error='term <soft> is not finite', notebook='fold_2/notebooks/teacher.ipynb')
    (run.path/'audit.json').write_text(json.dumps({'images': 48, 'problems': {'truncated': 1}}))
    path, said = quiet(R.report_html, run, [0, 1, 2])
    assert said == ''
    html = path.read_text()
    assert path == run.path/'report.html'
    assert not re.search(r'(?:src|href)="(?!data:|#)', html) and 'url(' not in html and '<script' not in html
    images = re.findall(r'<img [^>]*>', html)
    assert len(images) == 3 + 6 + 6 and all(re.search(r' alt="[^"]{20,}"', i) for i in images)
    assert 'term &lt;soft&gt; is not finite' in html and 'Fold 2 has no predictions of the teacher' in html
    assert 'problems.truncated' in html and 'distill.temperature' in html and 'test-time views: none' in html
    assert html.count('<h1>') == 1 and '<html lang="en">' in html


def test_report_before_any_model(run):
    path, _ = quiet(R.report_html, create_run('new', preset('tiny')))
    assert 'nothing to compare' in path.read_text()
