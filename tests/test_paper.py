"The published recipe from end to end, with small networks put in by name and every option on at least once."
import shutil

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageOps

from kdoct.app.report import report_html
from kdoct.core.files import KdoctError, read_json
from kdoct.core.presets import PRESETS, preset
from kdoct.core.runs import create_run
from kdoct.data.fold_data import open_fold
from kdoct.data.folds import read_folds
from kdoct.data.phantom_files import write_phantom
from kdoct.data.stage import prepare_data
from kdoct.distill.student import train_baseline, train_student
from kdoct.distill.teacher import train_teacher
from kdoct.evaluate.all_folds import evaluate_run
from kdoct.evaluate.stage import evaluate_fold

pytestmark = pytest.mark.slow

ROLES = ('teacher', 'student', 'baseline')
SMALL = {
    'data.size': 64,
    'data.margin': 6,
    'data.n_folds': 2,
    'evaluate.n_boot': 100,
    'teacher.arch': 'test_convnext2',
    'student.arch': 'test_efficientnet',
    **{
        f'{who}.{k}': v
        for who in ('teacher', 'student')
        for k, v in dict(weights='none', epochs=2, batch_size=8, warmup=0.5).items()
    },
}


@pytest.fixture(scope='module')
def phantom(tmp_path_factory):
    "Simulated B-scans and their table."
    root = tmp_path_factory.mktemp('phantom')
    return root, write_phantom(root, patients=40, slices=1, height=96, width=120, seed=0)


@pytest.fixture(scope='module')
def ucsd(phantom, tmp_path_factory):
    "The phantom under UCSD's names: a train and a test folder; one patient is in both parts."
    source, table = phantom
    root = tmp_path_factory.mktemp('ucsd')
    numbers = {p: i for i, p in enumerate(table.patient.unique())}
    for i, r in enumerate(table.itertuples()):
        n = numbers[r.patient]
        part = 'test' if n < 8 and not (n == 0 and i % 2) else 'train'
        to = root/part/r.label/f'{r.label}-{n}-{i}.png'
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source/r.path, to)
    return root


@pytest.fixture(scope='module')
def run(ucsd, tmp_path_factory):
    "Both members of `paper-ucsd`, official protocol, all stages."
    with pytest.MonkeyPatch.context() as m:
        m.setenv('KDOCT_OUTPUTS', str(tmp_path_factory.mktemp('outputs')))
        the_run = create_run(
            'paper',
            preset(
                'paper-ucsd',
                **SMALL,
                **{
                    'data.root': str(ucsd),
                    'data.fill_white': True,
                    'data.resize': 'pad',
                    'teacher.freeze_epochs': 1,
                    'teacher.swa_start': 1,
                    'teacher.swa_anneal': 1,
                    'teacher.patience': 1,
                    'student.class_weights': 'balanced',
                    'student.label_smoothing': 0.1,
                    'student.mix_prob': 0.5,
                    'student.average': 'ema',
                },
            ),
        )
        prepare_data(the_run)
        for fold in (0, 1):
            for stage in (train_teacher, train_student, train_baseline): stage(the_run, fold)
            evaluate_fold(the_run, fold, verbose=False)
        evaluate_run(the_run, verbose=False)
        report_html(the_run)
    return the_run


def test_the_official_test_part_is_tested_by_both_members_and_its_patients_train_none(run):
    folds = read_folds(run.folds_csv)
    tested = [set(folds.path[(folds.fold == k) & (folds.role == 'test')]) for k in (0, 1)]
    assert tested[0] == tested[1] and all(p.startswith('test/') for p in tested[0])
    groups = {r: set(folds.group[folds.role == r]) for r in ('train', 'val', 'test', 'out')}
    assert (
        not groups['test'] & (groups['train'] | groups['val'])
        and groups['out'] <= groups['test']
        and groups['out']
    )


def test_every_model_has_both_weights_and_both_views(run):
    for role in ROLES:
        v = pd.read_parquet(run.stage_dir(0, role)/'variants.parquet')
        average = ['swa'] if role == 'teacher' else ['ema', 'ema-augmented']   # ConvNeXtV2 has no BatchNorm
        names = {'checkpoint', *average}
        assert set(v.weights) == names and set(v['view']) == {
            'identity',
            'averaged',
            'retina blanked',
        }
        assert set(read_json(run.stage_dir(0, role)/'model.json')['metrics']['candidates']) == names


def test_the_backbone_was_frozen_and_both_rates_ended_together(run):
    history = pd.read_csv(run.stage_dir(0, 'teacher')/'history.csv')
    assert (
        len(history) == 2
        and history.lr.iloc[-1] == pytest.approx(2e-6)
        and history.lr_head.iloc[-1] == pytest.approx(1e-5)
    )


def test_a_second_run_starts_from_the_first_ones_teacher_with_another_head(
    run, phantom, tmp_path, monkeypatch
):
    source, table = phantom
    rows = []
    for i, r in enumerate(table[table.label != 'DME'].itertuples()):   # NEH's three classes, in NEH's layout
        n, label = (
            int(np.flatnonzero(table.patient.unique() == r.patient)[0]),
            r.label if i % 7 else 'NORMAL',
        )
        path = f'{r.label}/{n}/{i:03d}_{label.lower()}.png'
        (tmp_path/'neh'/path).parent.mkdir(parents=True, exist_ok=True)
        mirrored = ImageOps.mirror(Image.open(source/r.path))   # no image that the teacher has seen
        mirrored.save(tmp_path/'neh'/path)
        rows.append(
            {
                'Patient ID': n,
                'Class': r.label,
                'Eye': 'OD',
                'B-scan': i,
                'Label': label,
                'Directory': path,
            }
        )
    pd.DataFrame(rows).to_csv(tmp_path/'neh'/'data_information.csv', index=False)
    monkeypatch.setenv('KDOCT_OUTPUTS', str(tmp_path/'outputs'))
    bundle = run.stage_dir(0, 'teacher')
    second = create_run(
        'neh',
        preset(
            'paper-neh',
            **{
                **SMALL,
                'teacher.weights': str(bundle),
                'data.root': str(tmp_path / 'neh'),
                'teacher.swa_start': 1,
                'teacher.freeze_epochs': 1,
                'data.mask_scale_bar': True,
                'data.resize': 'crop',
            },
        ),
    )
    prepare_data(second)
    about = train_teacher(second, 0)
    assert (
        about['classes'] == ['NORMAL', 'DRUSEN', 'CNV']
        and about['weights_from']['weights_sha256']
        == read_json(bundle / 'model.json')['weights_sha256']
    )
    data = open_fold(second, 0)
    assert (
        data.table.label[data.table.role == 'train']
        == data.table.patient_label[data.table.role == 'train']
    ).all()
    assert (
        data.table.label[data.table.role == 'test']
        != data.table.patient_label[data.table.role == 'test']
    ).any()


@pytest.mark.parametrize('name', ['paper-neh', 'paper-ucsd'])
def test_the_published_figures_are_in_the_recipe(name):
    r = preset(name)
    t, s = r.teacher, r.student
    assert (t.arch, s.arch, r.data.size, r.data.n_folds) == (
        'convnextv2_large.fcmae_ft_in22k_in1k',
        'efficientnet_b2.ra_in1k',
        384,
        5,
    )
    assert (t.epochs, t.patience, t.lr_head, t.lr, t.weight_decay, t.warmup, t.freeze_epochs) == (
        150,
        25,
        1e-4,
        2e-5,
        0.05,
        10,
        5,
    )
    assert (t.drop_rate, t.drop_path_rate, t.loss, t.focal_gamma, t.class_weights) == (
        0.3,
        0.3,
        'focal',
        2,
        'balanced',
    )
    assert (t.average, t.swa_start, t.swa_lr, t.swa_anneal, t.lr_floor) == (
        'swa',
        100,
        1e-5,
        10,
        1e-7,
    )
    assert (
        s.epochs,
        s.patience,
        s.lr,
        s.weight_decay,
        s.warmup,
        s.lr_floor,
        s.drop_rate,
        s.drop_path_rate,
    ) == (100, 20, 1e-3, 0.01, 5, 1e-6, 0.3, 0)
    assert (r.distill.alpha, r.distill.beta, r.distill.temperature, r.seed) == (.7, .3, 4, 43)
    assert t.batch_size*t.accumulate == s.batch_size*s.accumulate == 16
    a = t.augment
    assert (
        a.rotate,
        a.shear,
        a.scale,
        a.hflip,
        a.vflip,
        a.blur,
        a.posterize,
        a.erase,
        a.erase_area,
    ) == (20, 15, 0.15, 0.5, 0.3, 0.2, 0.2, 0.25, 0.15)
    assert (
        a.ops,
        a.ops_factor,
        a.ops_rotate,
        a.ops_shift,
        a.gain,
        a.contrast,
        a.saturation,
        a.hue,
    ) == (2, 0.3, 9, 0.09, 0.3, 0.3, 0.2, 0.05)


def test_a_preset_needs_only_the_place_of_its_images():
    for name in ('paper-neh', 'paper-ucsd', 'small-neh', 'small-ucsd'):
        with pytest.raises(KdoctError, match='--data-root'):
            prepare_data(create_run(name, preset(name)))
    assert {'paper-neh', 'paper-ucsd', 'small-neh', 'small-ucsd'} <= set(PRESETS)
