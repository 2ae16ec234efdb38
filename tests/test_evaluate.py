"The stage and the report: records, printed tables and warnings, from predictions of simulated models."
import json
import re

import numpy as np
import pandas as pd
import pytest
from simulated_models import models, quiet

from kdoct.app import report as R
from kdoct.app import report_parts
from kdoct.core.files import KdoctError, read_json, write_json
from kdoct.core.presets import preset
from kdoct.core.runs import ROLES, create_run
from kdoct.evaluate import all_folds, pooling, run_warnings, simulated, stage
from kdoct.evaluate import tables as T
from kdoct.evaluate.metrics import HEADLINE, evaluate_predictions, read_predictions


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "A tiny run, two of its three folds with models, the first evaluated; and what that printed."
    with pytest.MonkeyPatch.context() as m:
        m.setenv('KDOCT_OUTPUTS', str(tmp_path_factory.mktemp('outputs')))
        run = create_run('toy', preset('tiny'))
        for k in (0, 1): simulated.write_simulated_stages(run, k)
        return run, *quiet(stage.evaluate_fold, run, 0)


@pytest.fixture
def run(made, monkeypatch):
    monkeypatch.setenv('KDOCT_OUTPUTS', str(made[0].path.parent))
    return made[0]


def test_fold_writes_every_number_and_figure(made):
    run, result, printed = made
    saved = read_json(run.fold_dir(0)/'evaluation.json')
    df = read_predictions(run.stage_dir(0, 'student')/'predictions.parquet')
    for m in HEADLINE:
        assert saved['estimates']['student'][m] == pytest.approx(evaluate_predictions(df)[m])
    # one view, one set of weights, no diagnosis of the patient
    assert list(saved['sections']) == ['places', 'classes', 'volumes', 'blanked', 'costs']
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
        'macro sensitivity %' in printed
        and 'test-time views: none' in printed
        and 'fold_0/evaluation.json' in printed
    )
    assert run.stage('fold_0/evaluate')['status'] == 'done'
    assert result['table'].index.tolist() == list(ROLES)


def test_fold_is_evaluated_the_same_twice(run):
    before = (run.fold_dir(0)/'evaluation.json').read_text()
    quiet(stage.evaluate_fold, 'toy', 0)
    assert (run.fold_dir(0)/'evaluation.json').read_text() == before


MAKES = [
    ('teacher', '03_teacher.ipynb', ''),
    ('student', '04_distill.ipynb', ''),
    ('baseline', '04_distill.ipynb', ' -p role baseline'),
]


@pytest.mark.parametrize('missing', ['predictions.parquet', 'model.json'])
@pytest.mark.parametrize('role,notebook,option', MAKES)
def test_a_missing_model_is_answered_with_its_command(run, role, notebook, option, missing):
    path = run.stage_dir(1, role)/missing
    hidden = path.rename(path.with_suffix('.hidden'))
    try:
        with pytest.raises(KdoctError, match=f'no predictions of the {role}') as e:
            stage.evaluate_fold(run, 1)
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
    r, printed = quiet(all_folds.evaluate_run, run)
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
    assert 'standard deviation over 2 folds' in ' '.join(printed.split())
    assert 'same fold only' in printed


def test_a_patient_tested_in_two_folds_is_refused():
    m = models()
    with pytest.raises(KdoctError, match='more than one fold'):
        all_folds._pool({0: m, 1: {r: df.assign(fold=1) for r, df in m.items()}})


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
    path, printed = quiet(R.report_html, run, [0, 1, 2])
    assert printed == ''
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
    # in words, not by the names in the file
    assert 'truncated: 1' in html and 'problems.truncated' not in html
    assert 'distill.temperature' in html and 'test-time views: none' in html
    assert html.count('<h1>') == 1 and '<html lang="en">' in html


def test_report_before_any_model(run):
    path, _ = quiet(R.report_html, create_run('new', preset('tiny')))
    assert 'nothing to compare' in path.read_text()


def shortcut(above=True):
    "What shortcuts.json says."
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
def checked(run):
    yield run
    (run.path/'shortcuts.json').unlink()


def test_a_shortcut_stands_at_the_top_of_report_and_summary(checked):
    write_json(checked.path/'shortcuts.json', shortcut())
    _, printed = quiet(all_folds.evaluate_run, checked)
    words = 'predicts the class with 78.0 % balanced accuracy [70.0, 85.0] where chance is 25.0 %'
    assert printed.startswith('WARNING: Shortcut') and words in ' '.join(printed.split())
    assert words in read_json(checked.path/'summary.json')['warnings'][0]
    html = R.report_html(checked, [0, 1]).read_text()
    assert (
        html.index(words) < html.index('<h2>Results')
        and 'Nothing: no stage failed' not in html
        and 'What to do' in html
    )


def test_shortcuts_at_chance_are_no_warning(checked):
    write_json(checked.path/'shortcuts.json', shortcut(False))
    assert not [w for w in run_warnings.warnings_of(checked) if w.startswith('Shortcut')]


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
    blanked = T.Section('', blank, blank, '')
    try: printed = run_warnings.warnings_of(run, dict(operating=section, blanked=blanked))
    finally: (run.path/'audit.csv').unlink()
    assert any('above chance (25.0 %): student 60.0 [50.0, 70.0] %' in w for w in printed)
    assert any('1 near-duplicates have another class' in w for w in printed)
    assert any(
        'For CNV (sensitivity 95 %): not reachable: no image.' in w and 'DME' not in w
        for w in printed
    )


def test_the_main_table_and_that_of_every_class_share_one_pass(run, monkeypatch):
    both, sizes = T.bootstrap_both, []
    monkeypatch.setattr(
        T, 'bootstrap_both', lambda df, *how: sizes.append(len(df)) or both(df, *how)
    )
    made = quiet(stage.evaluate_fold, run, 0)[0]
    assert len(sizes) == len(made['models'])


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
        index=['teacher, target 95 %', 'student, target 95 %', 'baseline, target 95 %'],
    )
    printed = run_warnings.warnings_of(
        run,
        dict(
            sets=T.Section('Prediction sets', sets, sets, ''),
            blanked=T.Section('', blank, blank, ''),
        ),
    )
    covered = [w for w in printed if 'retina is covered' in w]
    assert (
        len(covered) == 1
        and 'teacher 60.0 [50.0, 70.0] %, student 62.5 [50.0, 70.0] %' in covered[0]
        and 'baseline' not in covered[0]
    )
    about = f'For teacher, student (target 95 %): {few}. See Decisions.'
    assert f'Prediction sets: not every target was reached. {about}' in printed


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


@pytest.mark.slow
def test_a_single_fold_has_no_summary_over_folds_in_the_report(run):
    one, two = (R.report_html(run, folds).read_text() for folds in ([0], [0, 1]))
    assert '<h3>Mean and standard deviation over folds</h3>' in two and 'One fold only' not in two
    assert (
        '<h3>Mean and standard deviation over folds</h3>' not in one
        and 'One fold only (fold 0)' in one
    )


def test_the_report_has_words_where_files_have_names(checked):
    write_json(
        checked.path / 'shortcuts.json',
        shortcut()
        | dict(
            features=[dict(name='white_top', meaning='white above', balanced_accuracy=0.7, mean={})]
        ),
    )
    html = R.report_html(checked, [0, 1]).read_text()
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
    rows, read = report_parts._recipe_rows, []
    monkeypatch.setattr(report_parts, '_recipe_rows', lambda r: read.append(r) or rows(r))
    html = R.report_html(run, [0]).read_text()
    assert (
        len(read) == 1
        and 'teacher: passes over the training part' in html
        and html.count('<td>teacher.epochs</td>') == 2
    )
