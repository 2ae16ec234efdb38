"The stage: what is fitted on held-out patients stays there, and is of the network beside it."
import os
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import copied_run
from simulated_decisions import QUICK, fitted, same

from kdoct.core.files import KdoctError, read_json, write_json
from kdoct.core.presets import preset
from kdoct.core.runs import Run, create_run, has_decision
from kdoct.data.fold_data import open_fold
from kdoct.data.stage import prepare_data
from kdoct.evaluate.decide import _check_same, decide_all, decide_fold
from kdoct.evaluate.decision_tables import DecidedPredictions, calibration_section, sets_section
from kdoct.evaluate.decisions import fitted_on
from kdoct.evaluate.features import fold_batches, fold_outputs
from kdoct.evaluate.fitting import caveat_of, fit_network
from kdoct.evaluate.metrics import logits_of, simulate_predictions
from kdoct.models.folders import load_model_folder
from kdoct.training.results import predict_logits, train_role


@pytest.fixture(scope='module')
def made(trained_outputs, tmp_path_factory):
    "A tiny run whose baseline is trained in fold 0, and its decision."
    run = copied_run(trained_outputs, tmp_path_factory.mktemp('outputs'))
    shutil.rmtree(run.stage_dir(0, 'teacher'))
    with pytest.MonkeyPatch.context() as env:
        env.setenv('KDOCT_OUTPUTS', str(run.path.parent))
        return run, decide_fold(run, 0, 'baseline')


@pytest.fixture
def run(made, monkeypatch):
    monkeypatch.setenv('KDOCT_OUTPUTS', str(made[0].path.parent))
    return made[0]


def poisoned(data, part):
    "The fold with noise and one label in place of the images of a part."
    images, labels = np.asarray(data.images).copy(), data.labels.copy()
    rows = data.idx[part]
    images[rows], labels[rows] = np.random.default_rng(0).integers(0, 256, images[rows].shape), 0
    label = data.table.label.where(data.table.role != part, data.classes[0])
    return replace(data, images=images, labels=labels, table=data.table.assign(label=label))


@pytest.mark.parametrize('part,changes', [('test', False), ('val', True), ('train', True)])
def test_the_decision_knows_training_and_validation_and_no_test_image(made, run, part, changes):
    folder = run.stage_dir(0, 'baseline')
    model, about = load_model_folder(folder)
    again = fit_network(run, poisoned(open_fold(run, 0), part), model, role='baseline')
    assert same(made[1], again) != changes


@pytest.fixture(scope='module')
def calibrated(tmp_path_factory):
    "A tiny run with a calibration part, whose baseline is trained in fold 0."
    changes = {'student.epochs': 1, 'data.calibration_fraction': .25}
    with pytest.MonkeyPatch.context() as m:
        m.setenv('KDOCT_OUTPUTS', str(tmp_path_factory.mktemp('outputs')))
        run = create_run('calib', preset('tiny', **changes))
        prepare_data(run)
        train_role(run, 0, 'baseline')
        yield run, decide_fold(run, 0, 'baseline')


PARTS = [('val', False), ('test', False), ('calib', True), ('train', True)]


@pytest.mark.parametrize('part,changes', PARTS)
def test_with_a_calibration_part_patients_who_chose_the_epoch_decide_nothing(
    calibrated, monkeypatch, part, changes
):
    run, decision = calibrated
    monkeypatch.setenv('KDOCT_OUTPUTS', str(run.path.parent))
    model, _ = load_model_folder(run.stage_dir(0, 'baseline'))
    again = fit_network(run, poisoned(open_fold(run, 0), part), model, role='baseline')
    assert same(decision, again) != changes and again.about['part'] == 'calibration'


def test_fitting_on_patients_who_chose_the_epoch_is_said_and_on_others_is_not(calibrated, made):
    test = simulate_predictions(30)
    for decision, biased in ((made[1], True), (calibrated[1], False)):
        assert bool(fitted_on(decision)[1]) == biased
        j = DecidedPredictions(replace(fitted(), about=decision.about), test, np.zeros(len(test)))
        for s in (sets_section, calibration_section):
            assert ('have also chosen the epoch' in s({'student': [j]}, QUICK).caption) == biased


def test_poisoned_test_predictions_are_refused_and_decide_nothing(made, run):
    folder = run.stage_dir(0, 'baseline')
    path, before = folder/'predictions.parquet', (folder/'decision.json').read_bytes()
    right = path.rename(path.with_suffix('.right'))
    try:
        df = pd.read_parquet(right)
        df.assign(logit_CNV=df.logit_CNV + 1).to_parquet(path)
        with pytest.raises(KdoctError, match='is not what the network beside it says'):
            decide_fold(run, 0, 'baseline')
    finally: right.rename(path)
    assert (folder/'decision.json').read_bytes() == before


def test_predictions_are_in_the_arithmetic_in_which_decisions_are_fitted(made, run):
    "A network trained in bfloat16 is predicted, decided about and shipped in float32."
    data, (model, _) = open_fold(run, 0), load_model_folder(run.stage_dir(0, 'baseline'))
    exact = fold_outputs(run, data, model, data.idx['test'])[1]
    model.precision = 'bf16'
    batches = fold_batches(run, data, model, data.idx['test'])
    with torch.inference_mode(): rounded = torch.cat([model(x) for x, _ in batches]).numpy()
    # so that the test has something to see
    assert not np.allclose(rounded, exact, atol=1e-5)
    np.testing.assert_allclose(predict_logits(model, batches), exact, atol=1e-5)
    assert model.precision == 'bf16'


def test_predictions_in_another_arithmetic_are_refused(made, run):
    folder, data = run.stage_dir(0, 'baseline'), open_fold(run, 0)
    df = pd.read_parquet(folder/'predictions.parquet')
    exact = logits_of(df)
    off = .03*max(1., np.abs(exact).max())
    with pytest.raises(KdoctError, match='in float32'):
        _check_same(folder, df, data.rows('test'), exact + off)


def test_validation_is_of_other_patients_than_test(made, run):
    data, about = open_fold(run, 0), made[1].about
    groups = {part: set(data.groups[data.idx[part]]) for part in data.idx}
    assert about['patients'] == len(groups['val'])
    assert not groups['val'] & (groups['test'] | groups['train'])


def test_a_stage_is_finished_while_the_targets_stay(made, run):
    assert run.is_finished('decide', 0) and not run.is_finished('decide', 1)
    by_risk = {'decide.defer': 'risk', 'decide.defer_target': .05}
    other = create_run('tiny', run.recipe.override(**by_risk))  # changes no network
    assert not other.is_finished('decide', 0) and other.recipe.key == run.recipe.key
    with pytest.raises(KdoctError, match='another recipe'):
        create_run('tiny', run.recipe.override(**{'decide.defer': 'risk', 'data.size': 96}))


def asking_for_views(run, n):
    "The run, whose decisions are to be fitted on training views too."
    decide = run.recipe.decide.model_copy(update=dict(views=n))
    return Run(run.path, run.recipe.model_copy(update=dict(decide=decide)))


@pytest.mark.parametrize('part,changes', [('test', False), ('val', True)])
def test_views_of_held_out_images_are_fitted_on_and_none_of_test_images(run, part, changes):
    viewing, data = asking_for_views(run, 2), open_fold(run, 0)
    model, _ = load_model_folder(run.stage_dir(0, 'baseline'))
    both = [fit_network(viewing, d, model, role='baseline') for d in (data, poisoned(data, part))]
    assert same(*both) != changes


def test_a_decision_with_views_says_so_and_counts_each_image_once(made, run):
    data, (model, _) = open_fold(run, 0), load_model_folder(run.stage_dir(0, 'baseline'))
    decision = fit_network(asking_for_views(run, 2), data, model, role='baseline')
    assert not same(decision, made[1])
    assert decision.about['images'] == made[1].about['images'] == len(data.idx['val'])
    assert 'on 2 random training views of each' in decision.about['caveat']


def test_other_views_ask_for_another_decision(made, run):
    assert has_decision(run, 0, 'baseline')
    assert not has_decision(asking_for_views(run, 1), 0, 'baseline')


def test_a_decision_of_before_there_were_views_is_kept(made, run):
    file = run.stage_dir(0, 'baseline')/'decision.json'
    before = file.read_text()
    record = read_json(file)
    del record['about']['recipe']['views']
    write_json(file, record)
    try: assert has_decision(run, 0, 'baseline')
    finally: file.write_text(before)


def test_predictions_made_later_need_a_new_decision(made, run):
    path = run.stage_dir(0, 'baseline')/'predictions.parquet'
    was = path.stat()
    os.utime(path, (was.st_atime, was.st_mtime + 3600))
    assert not run.is_finished('decide', 0)
    os.utime(path, (was.st_atime, was.st_mtime))


def test_a_network_that_is_missing_is_answered_with_its_command(run):
    with pytest.raises(KdoctError, match=r'04_distill.ipynb .*-p fold 0'):
        decide_fold(run, 0, 'student')
    with pytest.raises(KdoctError, match='no network yet'): decide_all(run, 1)


CAVEATS = {
    'same': ({}, ''),
    'worst case': ({'data.worst_case_train': True}, 'only slices that show'),
    'official': ({'data.protocol': 'official'}, 'official'),
    'both': ({'data.worst_case_train': True, 'data.worst_case_test': True}, ''),
}


@pytest.mark.parametrize('changes,says', CAVEATS.values(), ids=CAVEATS)
def test_a_test_part_that_is_drawn_otherwise_is_said(changes, says):
    caveat = caveat_of(create_run('caveat', preset('tiny', **changes)))
    test = simulate_predictions(20)
    j = DecidedPredictions(fitted(caveat=caveat), test, np.zeros(len(test)))
    assert says in sets_section({'student': [j]}, QUICK).caption and bool(caveat) == bool(says)


def test_outlier_pictures_are_counted(made):
    kinds = made[1].about['outlier_pictures']
    assert set(kinds) == {'white noise', 'smooth noise', 'flat grey', 'inverted', 'tiles'}
    assert all(0 <= v['outliers'] <= 1 and v['images'] > 1 for v in kinds.values())
