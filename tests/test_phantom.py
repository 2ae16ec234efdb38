"Simulated B-scans: the same pixels for the same question, masks that mean what labels say, folders that are resumed."
import hashlib

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sklearn.linear_model import RidgeClassifier
from sklearn.model_selection import StratifiedGroupKFold, cross_val_score

from kdoct.core.files import KdoctError, read_json, sha256_file
from kdoct.data import phantom, phantom_files
from kdoct.data.phantom import (
    BOUNDARIES,
    CLASSES,
    EYES,
    LAYERS,
    patient_device,
    patient_diagnosis,
    simulate_bscan,
    slice_severity,
)
from kdoct.data.phantom_devices import DEVICES, USUAL_DEVICES
from kdoct.data.phantom_files import phantom_table, write_phantom

SMALL = dict(height=96, width=96)

def same(a, b):
    "Are two B-scans equal in every field, bit by bit?"
    return all(np.array_equal(u, v) for u, v in zip(a, b, strict=True))

def hashes(root):
    "Digest of every file of a phantom but its lock."
    return {
        f.relative_to(root).as_posix(): sha256_file(f)
        for f in root.rglob('*')
        if f.is_file() and f.suffix != '.lock'
    }

def test_a_bscan_does_not_depend_on_what_came_before():
    todo = [(5, p, e, s) for p in range(4) for e in (0, 1) for s in range(2)]
    forward = {t: simulate_bscan(*t, **SMALL) for t in todo}
    backward = {t: simulate_bscan(*t, **SMALL) for t in reversed(todo)}
    assert all(same(forward[t], backward[t]) for t in todo)

def test_every_coordinate_of_a_bscan_matters():
    base = simulate_bscan(1, 1, 0, 0, **SMALL).image
    for other in ((2, 1, 0, 0), (1, 2, 0, 0), (1, 1, 1, 0), (1, 1, 0, 1)):
        assert not np.array_equal(base, simulate_bscan(*other, **SMALL).image), other

def test_the_global_random_state_is_neither_used_nor_changed():
    np.random.seed(1)
    state = np.random.get_state()[1].copy()
    a = simulate_bscan(0, 0, 0, 0, **SMALL)
    assert np.array_equal(state, np.random.get_state()[1])
    np.random.seed(2)
    assert same(a, simulate_bscan(0, 0, 0, 0, **SMALL))

def test_one_and_two_processes_write_the_same_bytes(tmp_path):
    one = write_phantom(tmp_path / 'one', seed=3, patients=6, slices=2, processes=1, **SMALL)
    two = write_phantom(tmp_path / 'two', seed=3, patients=6, slices=2, processes=2, **SMALL)
    pd.testing.assert_frame_equal(one, two)
    assert hashes(tmp_path / 'one') == hashes(tmp_path / 'two')
    assert len(hashes(tmp_path / 'one')) == 2 * 6 * 2 * 2 + 2

def test_files_hold_what_the_simulator_returns(tmp_path):
    df = write_phantom(tmp_path, seed=4, patients=4, slices=2, **SMALL)
    for row in df.iloc[::3].itertuples():
        s = simulate_bscan(4, int(row.patient[1:]), EYES.index(row.eye), row.slice, **SMALL)
        with Image.open(tmp_path / row.path) as im:
            assert im.mode == 'L'
            assert np.array_equal(np.asarray(im), s.image)
        with Image.open(tmp_path / row.mask) as im:
            assert np.array_equal(np.asarray(im), s.mask * np.uint8(255))
        assert row.label == s.label

@pytest.mark.parametrize('side', [64, 200])
def test_the_mask_is_empty_exactly_where_the_label_is_normal(side):
    for patient in range(60):
        for eye in (0, 1):
            for diagnosis in CLASSES:
                s = simulate_bscan(
                    11, patient, eye, patient % 5, diagnosis=diagnosis, height=side, width=side
                )
                assert s.mask.any() == (s.label != 'NORMAL'), (patient, eye, diagnosis)
                assert s.label in ('NORMAL', s.diagnosis) and s.diagnosis == diagnosis

def test_lesions_are_large_enough_to_be_seen():
    area = [
        simulate_bscan(0, p, e, 0).mask.sum()
        for p in range(16)
        for e in (0, 1)
        if slice_severity(0, p, e, 0) > 0
    ]
    assert min(area) > 60 and np.median(area) > 600 # pixels of 496x512

def test_layers_never_cross_and_the_mask_stays_within_the_retina():
    for p in range(24):
        s = simulate_bscan(0, p, 0, p % 3, diagnosis=CLASSES[p % 4], height=200, width=200)
        assert s.layers.shape == (len(LAYERS) + 1, 200)
        assert (np.diff(s.layers, axis=0) > -1e-3).all()
        row, col = np.nonzero(s.mask)
        assert (row >= s.layers[0][col] - 1).all() and (
            row <= s.layers[BOUNDARIES.index('BM')][col] + 1
        ).all()

def test_drusen_lie_between_rpe_and_bruchs_membrane():
    seen = 0
    for p in range(20):
        s = simulate_bscan(0, p, 0, 0, diagnosis='DRUSEN')
        row, col = np.nonzero(s.mask)
        assert (row >= s.layers[BOUNDARIES.index('RPE end')][col] - .01).all()
        assert (row <= s.layers[BOUNDARIES.index('BM')][col] + .01).all()
        seen += len(row) > 0
    assert seen > 10

def test_the_healthy_twin_differs_only_about_the_lesion():
    pick = next(p for p in range(100) if slice_severity(0, p, 0, 0, 'CNV') > .7)
    sick, healthy = (simulate_bscan(0, pick, 0, 0, diagnosis=c) for c in ('CNV', 'NORMAL'))
    equal = (sick.image == healthy.image).all(0)
    assert .05 < equal.mean() < .95 and not (equal & sick.mask.any(0)).any()
    assert sick.device == healthy.device

def test_fluid_is_darker_than_the_tissue_around_it():
    from scipy.ndimage import binary_dilation
    dark = []
    for p in range(12):
        s = simulate_bscan(0, p, 0, 0, diagnosis='DME')
        if s.mask.any():
            dark.append(
                s.image[s.mask].mean()
                / s.image[binary_dilation(s.mask, iterations=8) & ~s.mask].mean()
            )
    assert len(dark) > 6 and max(dark) < .7

def test_labels_are_known_without_rendering_and_balanced():
    df = phantom_table(0, 60, 3)
    share = df.label.value_counts(normalize=True)
    assert set(share.index) == set(CLASSES) and share.min() > .15 and share.max() < .45
    assert df.groupby('diagnosis').patient.nunique().nunique() == 1
    assert list(df.columns) == [
        'path',
        'label',
        'diagnosis',
        'patient',
        'eye',
        'volume',
        'slice',
        'device',
        'mask',
    ]
    assert df.path.is_unique and df.groupby('volume').size().eq(3).all()

def test_normal_slices_exist_inside_diseased_eyes():
    df = phantom_table(0, 60, 4)
    sick = df[df.diagnosis != 'NORMAL']
    mixed = sick.groupby('volume').label.nunique()
    assert (mixed == 2).sum() > 10
    assert df.label[df.diagnosis == 'NORMAL'].eq('NORMAL').all()

def test_a_longer_phantom_contains_the_shorter_one():
    long, short = phantom_table(7, 12, 5), phantom_table(7, 8, 3)
    both = short.merge(long, how='left', on=list(short.columns), indicator=True)
    assert both._merge.eq('both').all()

@pytest.mark.parametrize("devices", [USUAL_DEVICES, ("fine", "haze", "swept", "strip")])
def test_the_device_tells_nothing_about_the_diagnosis(devices):
    patients = range(16 * len(devices))
    of = [patient_device(9, p, devices) for p in patients]
    ct = pd.crosstab(of, [patient_diagnosis(9, p) for p in patients])
    assert ct.shape == (len(devices), 4) and ct.values.min() == ct.values.max()


def test_the_usual_phantom_has_the_pixels_it_always_had():
    digest = hashlib.sha256()
    for place in ((0, 0, 0), (5, 1, 1), (9, 0, 2), (14, 1, 0)):
        digest.update(simulate_bscan(0, *place).image.tobytes())
    assert digest.hexdigest().startswith("9f599cb703fcf846")


OTHER_DEVICES = [d for d in DEVICES if d not in USUAL_DEVICES]


@pytest.mark.parametrize("device", OTHER_DEVICES)
def test_what_a_device_exports_fits_together(device):
    s = simulate_bscan(3, 1, 0, 0, diagnosis="CNV", devices=(device,))
    assert s.device == device and s.image.shape == s.mask.shape and s.image.dtype == np.uint8
    assert s.layers.shape == (11, s.image.shape[1]) and (np.diff(s.layers, axis=0) > -1e-3).all()
    rows = np.arange(len(s.image))[:, None]
    inside = (rows >= s.layers[0] - 2) & (rows <= s.layers[9] + 2)
    assert s.mask.any() and not (s.mask & ~inside).any()   # the lesion moved with the retina


def test_a_strip_is_flat_and_about_the_retina():
    s = simulate_bscan(3, 1, 0, 0, devices=("strip",))
    assert np.ptp(s.layers[9]) <= 1 and 0.5 < s.layers[9].mean() / len(s.image) < 0.8
    assert (s.layers[0] > 0).mean() > 0.95


def test_the_lesion_is_there_whatever_the_device():
    for device in OTHER_DEVICES:
        ill, healthy = (simulate_bscan(3, 1, 0, 0, diagnosis=d, devices=(device,))
                        for d in ("CNV", "NORMAL"))
        twins = np.abs(ill.image.astype(float) - healthy.image)
        assert twins[ill.mask].mean() > 3 * twins[~ill.mask].mean()


def test_devices_write_the_files_and_sizes_that_their_table_says(tmp_path):
    devices = ("strip", "coarse", "fine")
    table = write_phantom(tmp_path, 1, 12, 1, 128, 128, devices=devices)
    sizes = {}
    for r in table.itertuples():
        im, mask = Image.open(tmp_path / r.path), Image.open(tmp_path / r.mask)
        assert im.size == mask.size and im.format == ("PNG" if r.device == "fine" else "JPEG")
        sizes.setdefault(r.device, set()).add(im.size)
    assert all(len(of) == 1 for of in sizes.values()) and len(set.union(*sizes.values())) == 3
    written = {f: f.stat().st_mtime_ns for f in tmp_path.rglob("*.*g")}
    write_phantom(tmp_path, 1, 12, 1, 128, 128, devices=devices)   # finds all complete
    assert written == {f: f.stat().st_mtime_ns for f in tmp_path.rglob("*.*g")}
    with pytest.raises(KdoctError, match="other parameters"):
        write_phantom(tmp_path, 1, 12, 1, 128, 128)


@pytest.mark.parametrize("devices, says", [
    (("fine", "haez"), "Did you mean haze"),
    (("fine", "fine"), "named twice"),
])
def test_a_device_that_cannot_be_meant_is_refused(devices, says):
    with pytest.raises(KdoctError, match=says): simulate_bscan(0, 0, 0, 0, devices=devices)

def test_a_ridge_on_pooled_greys_stays_under_60_percent():
    todo = [(p, e, k) for p in range(40) for e in (0, 1) for k in range(3)]
    scans = [simulate_bscan(21, *t, height=248, width=256) for t in todo]
    x = np.stack(
        [
            np.asarray(Image.fromarray(s.image).resize((16, 16), Image.BOX)).ravel() / 255.0
            for s in scans
        ]
    )
    folds = StratifiedGroupKFold(5, shuffle=True, random_state=0)
    for alpha in (.1, 1, 10):
        acc = cross_val_score(
            RidgeClassifier(alpha=alpha),
            x,
            [s.label for s in scans],
            groups=[t[0] for t in todo],
            cv=folds,
        )
        assert acc.mean() < .6

def test_an_interrupted_write_is_finished_by_the_same_call(tmp_path, monkeypatch):
    whole = write_phantom(tmp_path / 'whole', seed=5, patients=4, slices=2, **SMALL)
    simulate, calls = phantom_files.simulate_bscan, []
    def dies(*args, **kwargs):
        calls.append(args)
        if len(calls) == 6: raise KeyboardInterrupt
        return simulate(*args, **kwargs)
    monkeypatch.setattr(phantom_files, 'simulate_bscan', dies)
    with pytest.raises(KeyboardInterrupt):
        write_phantom(tmp_path / 'cut', seed=5, patients=4, slices=2, **SMALL)
    assert not (tmp_path / 'cut/table.csv').exists() and (tmp_path / 'cut/phantom.json').exists()
    again = write_phantom(tmp_path / 'cut', seed=5, patients=4, slices=2, **SMALL)
    assert len(calls) == 6 + len(whole) - 5 # the five images that were there are not made again
    pd.testing.assert_frame_equal(whole, again)
    assert hashes(tmp_path / 'whole') == hashes(tmp_path / 'cut')

def test_a_torn_image_is_made_again_and_a_whole_one_is_left_alone(tmp_path):
    df = write_phantom(tmp_path, seed=6, patients=2, slices=2, **SMALL)
    before = hashes(tmp_path)
    torn, kept = tmp_path / df.path[1], tmp_path / df.path[2]
    stamp = kept.stat().st_mtime_ns
    torn.write_bytes(torn.read_bytes()[:-20])
    write_phantom(tmp_path, seed=6, patients=2, slices=2, **SMALL)
    assert hashes(tmp_path) == before and kept.stat().st_mtime_ns == stamp

@pytest.mark.parametrize('other', [dict(seed=1), dict(patients=5), dict(slices=3), dict(height=128)])
def test_a_folder_with_another_phantom_is_refused(tmp_path, other):
    made = dict(seed=0, patients=2, slices=1, **SMALL)
    write_phantom(tmp_path, **made)
    before = hashes(tmp_path)
    with pytest.raises(KdoctError, match='other parameters'):
        write_phantom(tmp_path, **(made | other))
    assert hashes(tmp_path) == before

def test_another_version_of_the_simulator_is_refused(tmp_path, monkeypatch):
    write_phantom(tmp_path, patients=1, slices=1, **SMALL)
    assert read_json(tmp_path / 'phantom.json')['simulator'] == phantom.PHANTOM_VERSION
    monkeypatch.setattr(phantom_files, 'PHANTOM_VERSION', phantom.PHANTOM_VERSION + 1)
    with pytest.raises(KdoctError, match='simulator'):
        write_phantom(tmp_path, patients=1, slices=1, **SMALL)

def test_a_folder_of_other_images_is_refused(tmp_path):
    (tmp_path / 'images').mkdir()
    with pytest.raises(KdoctError, match='not a phantom'):
        write_phantom(tmp_path, patients=1, slices=1, **SMALL)
    assert not (tmp_path / 'phantom.json').exists()

@pytest.mark.parametrize('wrong', [dict(patients=0), dict(slices=0), dict(seed=-1), dict(height=32), dict(processes=0)])
def test_impossible_numbers_are_refused_with_a_remedy(tmp_path, wrong):
    with pytest.raises(KdoctError, match='->'):
        write_phantom(tmp_path / 'x', **(dict(patients=1, slices=1) | wrong))
    assert not (tmp_path / 'x').exists()
