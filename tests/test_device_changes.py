"Views as other devices would take them: off by default, the same wherever they are made, and what each change does."
import io

import numpy as np
import pytest
import torch
from PIL import Image

from kdoct.core.device_section import DeviceRecipe
from kdoct.core.presets import preset
from kdoct.core.sections import AugmentRecipe
from kdoct.data.augment import N_DRAWS, augment, uniforms
from kdoct.data.batches import Batches
from kdoct.data.device_changes import jpeg_blocks
from kdoct.data.device_geometry import reframe
from kdoct.data.device_style import Styles, singular_vectors
from kdoct.data.device_views import DEVICE_CHANGES, change_device, device_uniforms, drawn_changes
from kdoct.data.phantom import simulate_bscan
from kdoct.data.unlabelled_batches import UnlabelledBatches

# of recipes before there were changes of devices
KEYS = {
    "tiny": "3e836833710948c1",
    "paper-neh": "d31c07d0778ee9cf",
    "explainable-lc25000": "02a169a922bfeb2c",
}
NETWORKS = {
    "teacher": "02c3c1985311bdd3",
    "student": "3ae4f440b5439f37",
    "baseline": "2ceb1fdcd37cd932",
}


@pytest.mark.parametrize("name", KEYS)
def test_a_recipe_that_names_no_device_has_the_key_it_always_had(name):
    assert preset(name).key == KEYS[name]


def test_networks_that_know_of_no_device_have_the_keys_they_always_had():
    plain = preset("edge")
    assert {role: plain.network_key(role) for role in plain.roles} == NETWORKS
    changed = plain.override(**{"student.augment.device.prob": 0.5})
    assert {r for r in plain.roles if changed.network_key(r) != NETWORKS[r]} == {"student", "baseline"}
    clean = plain.override(**{"distill.teacher_view": "clean"})
    assert {r for r in plain.roles if clean.network_key(r) != NETWORKS[r]} == {"student"}


def test_a_further_student_changes_one_field_of_a_section_within_a_section():
    both = preset("edge").override(**{
        "student.augment.device.speckle": 0.1, "students.soft.augment.device.prob": 0.5,
    })
    device = both.training("student-soft").augment.device
    assert (device.prob, device.speckle) == (0.5, 0.1)
    assert both.training("student").augment.device.prob == 0


SIDE = 64
OFF = dict(strip=1, flatten=False, bend=0, amplitude=0, svd=0, blur=0, resample=1, speckle=0,
           gamma=1, contrast=0, floor=0, marks=0, jpeg=100)
FIELDS = dict(tone=("gamma", "contrast"))   # of a change; else the field of its name


@pytest.fixture(scope="module")
def images():
    "Simulated B-scans, uint8."
    def small(patient):
        return Image.fromarray(simulate_bscan(1, patient, 0, 0).image).resize((SIDE, SIDE))
    return np.stack([np.asarray(small(patient)) for patient in range(16)])


def batches(images, device, batch_size=16, rows=range(12), **how):
    "The first twelve images train, each labelled by its number."
    ids = np.arange(len(images), dtype=np.uint64) + 900
    recipe = AugmentRecipe(device=device)
    rows, labels = np.array(rows), np.arange(len(images))
    return Batches(images, labels, ids, rows, batch_size, recipe, 43, **how)


def by_label(made):
    return {int(label): im for x, y in made for im, label in zip(x, y, strict=True)}


def only(name, **changes):
    "One change alone, in every view."
    kept = {k: DeviceRecipe().model_dump()[k] for k in FIELDS.get(name, (name,))}
    return DeviceRecipe(**(dict(prob=1, each=1) | OFF | kept | changes))


def unit(images): return torch.from_numpy(images)[:, None].float() / 255


def test_views_are_the_plain_ones_where_devices_are_off(images):
    made = batches(images, DeviceRecipe(speckle=0.9, svd=3))
    x, y = next(iter(made))
    u = torch.from_numpy(uniforms(made.ids[y.numpy()], N_DRAWS, 43, 0))
    assert torch.equal(x, augment(unit(images)[y], u, AugmentRecipe()))
    assert made.styles is None


def test_the_clean_view_is_the_view_of_a_recipe_without_devices(images):
    plain, changed = batches(images, DeviceRecipe()), batches(images, DeviceRecipe(prob=1.0))
    rows = np.array([3, 7, 1])
    expected = plain.batch(rows)[0]
    assert torch.equal(changed.batch(rows, clean=True)[0], expected)
    assert not torch.equal(changed.batch(rows)[0], expected)


def test_a_changed_view_depends_on_image_and_epoch_alone(images):
    device = DeviceRecipe(prob=1.0, each=0.6)
    whole, threads = by_label(batches(images, device)), torch.get_num_threads()
    try:
        torch.manual_seed(1)
        torch.set_num_threads(1)
        for other in (
            batches(images, device, 1),
            batches(images, device, 5),
            batches(images, device, 4, rows=range(11, -1, -1)),
            *(batches(images, device, 3, share=(k, 3)) for k in range(3)),
        ):
            for label, im in by_label(other).items():
                torch.testing.assert_close(im, whole[label], atol=1e-5, rtol=0)
    finally:
        torch.set_num_threads(threads)
    later = batches(images, device)
    later.epoch = 1
    assert all(not torch.equal(im, whole[label]) for label, im in by_label(later).items())


def test_styles_come_from_the_training_part_alone_and_are_the_same_in_every_process(images):
    device = DeviceRecipe(prob=1.0)
    each = [batches(images, device, share=(k, 2)).styles_of().rows for k in range(2)]
    assert each[0].tolist() == each[1].tolist() and set(each[0]) == set(range(12))
    train = batches(images, device)
    beside = UnlabelledBatches(train, np.array([12, 13]), train.ids[[12, 13]])
    beside.batch(0)
    assert beside.source.styles is train.styles


def test_images_that_are_not_for_training_change_no_view(images):
    other = images.copy()
    other[12:] = 255 - other[12:]
    device = DeviceRecipe(prob=1.0, each=1.0)
    a, b = (by_label(batches(x, device)) for x in (images, other))
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("channels", [1, 3])
def test_values_stay_in_range_and_the_input_as_it_is(channels):
    x = torch.rand(6, channels, 40, 40, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    before, ids = x.clone(), np.arange(6, dtype=np.uint64)
    stored = (x.permute(0, 2, 3, 1).squeeze(-1)*255).byte().numpy()
    device = DeviceRecipe(prob=1.0, each=1.0, speckle=1, floor=0.9, bend=0.5, amplitude=1, jpeg=1)
    y = change_device(x, ids, device, Styles(stored, ids, np.arange(6), 40, 1), 1, 0)
    assert torch.equal(x, before)
    assert y.shape == x.shape and y.isfinite().all() and y.min() >= 0 and y.max() <= 1


@pytest.mark.parametrize("black", [0, 255])
def test_an_empty_picture_passes_every_change(black):
    ids, stored = np.arange(2, dtype=np.uint64), np.full((2, 40, 40), black, np.uint8)
    device = DeviceRecipe(prob=1.0, each=1.0)
    styles = Styles(stored, ids, np.arange(2), 40, 1)
    assert change_device(unit(stored), ids, device, styles, 1, 0).isfinite().all()


@pytest.mark.parametrize("name", DEVICE_CHANGES)
def test_a_change_is_made_to_the_views_that_draw_it_and_to_no_other(images, name):
    x, ids = unit(images), np.arange(len(images), dtype=np.uint64)
    recipe = only(name, each=0.5)
    styles = Styles(255 - images, ids, np.arange(16), SIDE, 1)
    changed = (change_device(x, ids, recipe, styles, 1, 0) != x).flatten(1).any(1)
    hits = drawn_changes(device_uniforms(ids, 1, 0), recipe)
    assert hits.keys() == {name} and torch.equal(changed, hits[name]) and 0 < changed.sum() < 16


def test_a_new_change_leaves_the_views_of_the_others_as_they_are():
    u = device_uniforms(np.array([5]), 43, 3)[0]
    expected = [0.12383, 0.16595, 0.54943]
    assert u[[0, 1, -1]].tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("quality", [15, 50, 90])
def test_blocks_are_those_of_jpeg(quality):
    picture = np.asarray(Image.fromarray(simulate_bscan(1, 3, 0, 0).image).resize((128, 128)))
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=quality)
    theirs = np.asarray(Image.open(file)).astype(float)
    ours = jpeg_blocks(unit(picture[None]), torch.tensor([float(quality)]))[0, 0].numpy() * 255
    assert np.abs(ours.round() - theirs).mean() < 0.35


def band(slope, curve=0.0, side=96, at=0.6):
    "A dark picture with one bright band, and the row of its centre in each column."
    t = (np.arange(side) + 0.5) / side * 2 - 1
    centre = side * (at + slope * t + curve * (t**2 - 1 / 3))
    away = (np.arange(side)[:, None] + 0.5 - centre) / 3
    return torch.from_numpy(0.05 + 0.8 * np.exp(-(away**2))).float()[None, None], centre


def centres(x):
    light = (x[0, 0] - 0.3).clamp_min(0)
    rows = torch.arange(len(light))[:, None] + 0.5
    return ((light * rows).sum(0) / light.sum(0)).numpy()


def moved(x, **changes):
    amounts = dict(strip=1.0, flatten=0.0, tilt=0.0, arc=0.0, place=0.5) | changes
    return reframe(x, *(torch.tensor([float(v)]) for v in amounts.values()))


@pytest.mark.parametrize("slope, curve", [(0.15, 0), (-0.1, 0), (0, 0.15), (0.1, -0.1)])
def test_flattening_makes_a_tilted_band_straight_and_level(slope, curve):
    x, before = band(slope, curve)
    after = centres(moved(x, flatten=1))
    assert np.ptp(before) > 12
    assert np.ptp(after) < 2.5 and abs(after.mean() - before.mean()) < 2


def test_a_tilt_that_is_added_has_the_slope_that_was_asked_for():
    x, before = band(0.0)
    slope = np.polyfit(np.linspace(-1, 1, 96), centres(moved(x, tilt=0.1)), 1)[0]
    assert slope == pytest.approx(9.6, abs=0.7)


@pytest.mark.parametrize("place", [0.0, 1.0])
@pytest.mark.parametrize("at", [0.15, 0.5, 0.9])
def test_a_strip_keeps_the_band_wherever_it_is(place, at):
    x, _ = band(0.03, at=at)
    y = moved(x, strip=0.4, place=place)
    assert (y[0, 0].amax(0) > 0.7).all()
    assert (y > 0.4).float().mean() > 2 * (x > 0.4).float().mean()   # enlarged


@pytest.mark.gpu
def test_gpu_gives_the_same_changed_views(images):
    device = DeviceRecipe(prob=1.0, each=0.4)
    a, b = (by_label(batches(images, device, device=d)) for d in ("cpu", "cuda"))
    assert all((a[k] - b[k].cpu()).abs().mean() < 2e-3 for k in a)


def test_singular_vectors_are_sought_in_float64(monkeypatch):
    seen, eigh = [], torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda m: seen.append(m.dtype) or eigh(m))
    images = torch.zeros(2, 1, 32, 32)
    images[:, :, 8:16] = torch.rand(2, 1, 8, 32)   # LAPACK's float32 has given NaN for such
    vectors = singular_vectors(images, 8)
    assert seen == [torch.float64]*2 and vectors.dtype == torch.float32
    assert vectors.isfinite().all()
