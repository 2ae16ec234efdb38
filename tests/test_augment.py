"Every operation against torchvision image by image; views that follow the image; the earlier recipes' views."

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as tv
from PIL import Image, ImageOps

from kdoct.core.presets import preset
from kdoct.core.sections import AugmentRecipe
from kdoct.data import augment as A
from kdoct.data.augment import (
    DRAWS,
    N_DRAWS,
    apply_view,
    augment,
    draw_changes,
    uniforms,
    view_matrix,
    warp,
)
from kdoct.data.batches import Batches

NONE = AugmentRecipe(hflip=0, rotate=0, scale=0, shift=0, brightness=0, contrast=0)
BILINEAR = tv.InterpolationMode.BILINEAR
PIPELINES = {
    f"{name}-{who}": getattr(preset(name), who).augment
    for name in ("edge", "paper-neh")
    for who in ("teacher", "student")
}


def picture(n=4, channels=1, side=32, seed=0):
    "Independent pixels: no error hides in smoothness."
    return torch.from_numpy(
        uniforms(np.arange(n) + 100 * seed + 1, channels * side * side, 0, 0)
    ).view(n, channels, side, side)


def smooth(side):
    "A picture that hardly changes from pixel to pixel, without symmetry."
    y, x = torch.meshgrid(torch.linspace(0, 1, side), torch.linspace(0, 1, side), indexing="ij")
    return (0.5 + 0.2 * torch.sin(5 * x + 3 * y * y) + 0.2 * torch.cos(6 * y - 2 * x * x + 1))[
        None, None
    ]


def draws(n, seed=0):
    return torch.from_numpy(uniforms(np.arange(n) + 1000 * seed, N_DRAWS, 43, 0))


def one_by_one(x, f, amounts):
    return torch.stack([f(im, v) for im, v in zip(x, amounts.tolist(), strict=True)])


def close(a, b, atol=1e-6):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


FACTORS = torch.tensor([0.0, 0.7, 1.0, 1.9])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("ours, theirs", [
    (A.gain, tv.adjust_brightness), (A.contrast, tv.adjust_contrast), (A.sharpness, tv.adjust_sharpness)])
def test_factor_is_torchvisions(ours, theirs, channels):
    x = picture(4, channels)
    close(ours(x.clone(), FACTORS), one_by_one(x, theirs, FACTORS))


def test_saturation_and_hue_are_torchvisions():
    x, turns = picture(4, 3), torch.tensor([-0.5, -0.05, 0.0, 0.3])
    close(A.saturation(x.clone(), FACTORS), one_by_one(x, tv.adjust_saturation, FACTORS))
    close(A.hue(x.clone(), turns), one_by_one(x, tv.adjust_hue, turns), 1e-5)


@pytest.mark.parametrize("channels", [1, 3])
def test_blur_is_torchvisions(channels):
    x, sigma = picture(4, channels), torch.tensor([0.1, 0.5, 1.0, 2.0])
    close(
        A.blur(x, sigma), one_by_one(x, lambda im, s: tv.gaussian_blur(im, [3, 3], [s, s]), sigma)
    )


def test_posterize_is_that_of_8_bit_images():
    x = torch.arange(256).float().view(1, 1, 16, 16) / 255
    levels = (x[0, 0] * 255).round().byte()
    pil = np.asarray(ImageOps.posterize(Image.fromarray(levels.numpy()), 4))
    ours = A.posterize(x)[0, 0]
    close(ours, tv.posterize(levels[None], 4)[0] / 255)
    assert torch.equal((ours * 255).round().byte(), torch.from_numpy(pil.copy()))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("fill", ["mean", "black"])
def test_erase_is_torchvisions(fill, channels):
    x = picture(6, channels, 40)
    a = draw_changes(draws(6), NONE.model_copy(update=dict(erase=0.7, erase_area=0.15)))
    y = A.erase(x.clone(), a, fill)
    assert a["erase"].any() and not a["erase"].all()
    for i in range(6):
        changed = (y[i] != x[i]).any(0).nonzero()
        if not a["erase"][i]:
            assert len(changed) == 0
            continue
        (t, left), (h, w) = (
            changed.amin(0).tolist(),
            (changed.amax(0) - changed.amin(0) + 1).tolist(),
        )
        assert 0.01 < h * w / 1600 < 0.18 and 0.4 < h / w < 2.5
        close(
            y[i],
            tv.erase(x[i], t, left, h, w, torch.as_tensor(x[i].mean() if fill == "mean" else 0.0)),
        )


def test_flips_are_torchvisions():
    x, yes = picture(3), torch.ones(3, dtype=torch.bool)
    close(warp(x, view_matrix(dict(hflip=yes), 3, (32, 32)), (32, 32)), tv.horizontal_flip(x), 1e-5)
    close(warp(x, view_matrix(dict(vflip=yes), 3, (32, 32)), (32, 32)), tv.vertical_flip(x), 1e-5)


@pytest.mark.parametrize("name, value, theirs", [
    ("rotate", 20.0, lambda x, v: tv.rotate(x, v, BILINEAR)),
    ("ops_rotate", -9.0, lambda x, v: tv.rotate(x, v, BILINEAR)),
    ("shear", 15.0, lambda x, v: tv.affine(x, 0, [0, 0], 1, [v, 0], BILINEAR)),
    ("scale", 0.85, lambda x, v: tv.affine(x, 0, [0, 0], v, [0, 0], BILINEAR)),
    ("scale", 1.15, lambda x, v: tv.affine(x, 0, [0, 0], v, [0, 0], BILINEAR)),
    ("ops_shift_x", 0.09, lambda x, v: tv.affine(x, 0, [v * 32, 0], 1, [0, 0], BILINEAR)),
    ("ops_shift_y", -0.07, lambda x, v: tv.affine(x, 0, [0, v * 32], 1, [0, 0], BILINEAR)),
    # the window moves, not the picture
    ("shift_x", 0.08, lambda x, v: tv.affine(x, 0, [-v * 32, 0], 1, [0, 0], BILINEAR)),
])
@pytest.mark.parametrize("channels", [1, 3])
def test_geometry_has_torchvisions_signs_centre_and_black_fill(name, value, theirs, channels):
    x = picture(2, channels)
    m = view_matrix({name: torch.tensor([value, 0.0 if name != "scale" else 1.0])}, 2, (32, 32))
    y = warp(x, m, (32, 32), "black")
    close(y[:1], theirs(x[:1], value), 1e-4)
    close(y[1:], x[1:], 1e-5)


def steps(x, a, i, size):
    "The geometry of image `i` as torchvision calls, one after the other."
    def move(x, tx, ty): return tv.affine(x, 0, [tx * size, ty * size], 1, [0, 0], BILINEAR)
    x = move(
        tv.rotate(x, a["ops_rotate"][i].item(), BILINEAR),
        a["ops_shift_x"][i].item(),
        a["ops_shift_y"][i].item(),
    )
    x = move(x, -a["shift_x"][i].item(), -a["shift_y"][i].item())
    if a["hflip"][i]: x = tv.horizontal_flip(x)
    if a["vflip"][i]: x = tv.vertical_flip(x)
    x = tv.rotate(x, a["rotate"][i].item(), BILINEAR)
    return tv.affine(x, 0, [0, 0], a["scale"][i].item(), [a["shear"][i].item(), 0], BILINEAR)


def test_one_warp_is_the_steps_one_after_the_other():
    recipe = AugmentRecipe(
        hflip=0.5,
        vflip=0.5,
        rotate=20,
        shear=15,
        scale=0.15,
        shift=0.05,
        ops=2,
        ops_shift=0.09,
        ops_names=("rotate", "shift"),
        brightness=0,
        contrast=0,
        fill="black",
    )
    n, stored, size = 12, 180, 160
    x, u = smooth(stored), draws(n)
    a = draw_changes(u, recipe)
    assert all(len(set(v.tolist())) > 1 for v in a.values())
    views = augment(x.expand(n, 1, stored, stored), u, recipe, size)
    corner = (A.crop_offset(u, (stored, stored), (size, size)) + (stored - size) / 2).int()
    inner = slice(size // 2 - 30, size // 2 + 30)  # what no step has pushed out of the picture
    for i in range(n):
        crop = tv.crop(x, corner[i, 1].item(), corner[i, 0].item(), size, size)
        close(views[i:i + 1, :, inner, inner], steps(crop, a, i, size)[..., inner, inner], 2e-3)


def reference_values(im, a, i, erase_fill):
    "Grey values and colours of image `i` as torchvision calls, in the stated order."
    one = {k: v[i].item() for k, v in a.items()}
    for k, f in (
        ("ops_brightness", tv.adjust_brightness),
        ("ops_contrast", tv.adjust_contrast),
        ("ops_saturation", tv.adjust_saturation),
        ("ops_sharpness", tv.adjust_sharpness),
        ("gain", tv.adjust_brightness),
        ("contrast", tv.adjust_contrast),
        ("saturation", tv.adjust_saturation),
        ("hue", tv.adjust_hue),
    ):
        if k in one: im = f(im, one[k])
    if one.get("blur"): im = tv.gaussian_blur(im, [3, 3], [one["blur"]]*2)
    if one.get("posterize"): im = tv.posterize((im*255).round().byte(), 4).float()/255
    return (
        A.erase(im[None].clone(), {k: v[i : i + 1] for k, v in a.items()}, erase_fill)[0]
        if one.get("erase")
        else im
    )


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["paper-neh-teacher", "paper-neh-student"])
def test_pipeline_is_the_stated_sequence(name, channels):
    recipe, x, u = PIPELINES[name], picture(24, channels, 24), draws(24)
    a = draw_changes(u, recipe, channels)
    warped = warp(x, view_matrix(a, 24, (24, 24)), (24, 24), "black")
    y = augment(x, u, recipe)
    want = torch.stack([reference_values(im, a, i, "black") for i, im in enumerate(warped)])
    apart = (y - want).abs()
    if "posterize" in a:  # a rounding in the last place may move a pixel to the next of the 16 levels
        assert (apart > 1e-5).float().mean() < 1e-3
        apart[a["posterize"]] = 0
    assert apart.max() < 1e-5


def test_randaugment_shifts_by_pixels_and_each_image_by_its_own():
    recipe = NONE.model_copy(update=dict(ops=1, ops_names=("shift",), ops_shift=0.09, fill="black"))
    x = torch.zeros(1, 1, 384, 384)
    x[..., 190:194, 190:194] = 1.0
    seen = augment(x.expand(40, 1, 384, 384), draws(40), recipe)[:, 0]
    place = (seen.sum(1) * torch.arange(384)).sum(1) / seen.sum((1, 2)) - 191.5
    close(place, draw_changes(draws(40), recipe)["ops_shift_x"] * 384, 0.01)
    assert len(set(place.round(decimals=2).tolist())) > 35 and 30 < place.abs().max() <= 34.6


@pytest.mark.parametrize("channels, pool", [(1, 5), (3, 6)])
def test_randaugment_draws_without_repetition_and_each_as_often(channels, pool):
    a = draw_changes(draws(4000), NONE.model_copy(update=dict(ops=2)), channels)
    hit = torch.stack(
        [
            v != (0 if k in ("ops_rotate", "ops_shift_x") else 1)
            for k, v in a.items()
            if k != "ops_shift_y"
        ],
        1,
    )
    assert hit.shape[1] == pool and (hit.sum(1) == 2).all()
    close(hit.float().mean(0), torch.full((pool,), 2 / pool), 0.03)


def test_authors_shift_moved_nothing():
    "Facts B20: the fault that ops_shift mends is real."
    x = Image.fromarray(np.arange(400, dtype=np.uint8).reshape(20, 20))
    assert np.array_equal(np.asarray(tv.affine(x, 0, [0.09, 0.09], 1, [0, 0])), np.asarray(x))


def test_saturation_and_hue_leave_grey_alone():
    recipe = PIPELINES["paper-neh-teacher"]
    grey = draw_changes(draws(50), recipe, 1)
    assert not {"saturation", "hue", "ops_saturation"} & set(grey)
    x = picture(8, 1)
    no_colour = recipe.model_copy(
        update=dict(ops=2, ops_names=("brightness", "contrast", "sharpness", "rotate", "shift"))
    )
    three = augment(
        x.expand(-1, 3, -1, -1).contiguous(),
        draws(8),
        no_colour.model_copy(update=dict(posterize=0.0)),
    )
    close(three[:, :1], three[:, 1:2], 1e-5)
    close(
        three[:, :1], augment(x, draws(8), no_colour.model_copy(update=dict(posterize=0.0))), 1e-3
    )  # luminance weights sum to .9999


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", PIPELINES)
def test_values_stay_in_range_and_the_input_as_it_is(name, channels):
    x = picture(16, channels, 20)
    # half of them at the ends of every range
    before, u = x.clone(), torch.cat([draws(8), (draws(8, 1) < 0.5) * (1 - 2**-24)])
    for y in (
        augment(x, u, PIPELINES[name]),
        augment(x, u, PIPELINES[name], 16),
        augment(x, u, NONE.model_copy(update=dict(erase=1.0))),
    ):
        assert torch.isfinite(y).all() and y.min() >= 0 and y.max() <= 1 and y.shape[1] == channels
    assert torch.equal(x, before)


def test_what_is_off_is_not_computed(monkeypatch):
    for name in (
        "warp",
        "gain",
        "contrast",
        "saturation",
        "hue",
        "sharpness",
        "blur",
        "posterize",
        "erase",
        "draw_ops",
    ):
        monkeypatch.setattr(A, name, lambda *a, name=name, **k: pytest.fail(f"{name} was called"))
    x = picture(2)
    assert torch.equal(augment(x, draws(2), NONE), x)


def test_default_recipe_gives_the_views_it_always_gave():
    "Numbers from the code that made the committed results (version of 2026-11, 14 draws)."
    x, u = (
        torch.from_numpy(uniforms([1, 2, 3], 1024, 0, 0)).view(3, 1, 32, 32),
        torch.from_numpy(uniforms([1, 2, 3], N_DRAWS, 43, 5)),
    )
    for recipe, pixels, means in (
        (
            AugmentRecipe(),
            [
                [0.70598, 0.80014, 0.68555, 0.82252],
                [0.49548, 0.77834, 0.6625, 0.59658],
                [0.67349, 0.54239, 0.56716, 0.53647],
            ],
            [0.64198, 0.6003, 0.41174],
        ),
        (
            AugmentRecipe(erase=1.0, shear=10.0),
            [
                [0.68386, 0.64244, 0.688, 0.86231],
                [0.85789, 0.78747, 0.65339, 0.69887],
                [0.04379, 0.41024, 0.60953, 0.07246],
            ],
            [0.64379, 0.59973, 0.4106],
        ),
    ):
        y = augment(x, u, recipe)
        close(y[:, 0, [3, 16, 16, 29], [5, 4, 20, 11]], torch.tensor(pixels), 2e-5)
        close(y.mean((1, 2, 3)), torch.tensor(means), 2e-5)


def test_order_of_an_epoch_is_what_it_always_was():
    b = batches(AugmentRecipe(), 4, n=12, size=None)
    b.epoch = 2
    assert b.order().tolist() == [1, 8, 0, 6, 11, 3, 4, 7, 10, 2, 5, 9]
    assert DRAWS.index("order") == 13


def batches(recipe, batch_size, n=12, size=16, rows=None, **kwargs):
    images = (picture(n, 1, 20, seed=7)[:, 0] * 255).byte().numpy()
    rows = np.arange(n) if rows is None else rows
    return Batches(
        images,
        np.arange(n),
        np.arange(50, 50 + n, dtype=np.uint64),
        rows,
        batch_size,
        recipe,
        seed=43,
        size=size,
        **kwargs,
    )


def by_label(b):
    return {int(label): im for x, y in b for im, label in zip(x, y, strict=True)}


@pytest.mark.parametrize("name", PIPELINES)
def test_view_depends_on_image_and_epoch_alone(name):
    recipe, torch_state = PIPELINES[name], torch.get_rng_state()
    whole = by_label(batches(recipe, 12))
    threads = torch.get_num_threads()
    try:
        torch.manual_seed(1)
        torch.set_num_threads(1)
        for other in (
            batches(recipe, 1),
            batches(recipe, 5),
            batches(recipe, 4, rows=np.arange(12)[::-1].copy()),
            batches(recipe, 4, rows=np.array([3, 8])),
        ):
            for label, im in by_label(other).items(): close(im, whole[label], 1e-5)
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(torch_state)
    later = batches(recipe, 12)
    later.epoch = 1
    assert all(not torch.equal(im, whole[label]) for label, im in by_label(later).items())


def test_crop_takes_stored_pixels():
    recipe = NONE.model_copy(update=dict(fill="black"))
    b = batches(recipe, 12)
    stored = torch.from_numpy(b.images).float() / 255
    corners = set()
    for label, im in by_label(b).items():
        found = [
            (i, j)
            for i in range(5)
            for j in range(5)
            if torch.allclose(im[0], stored[label, i : i + 16, j : j + 16], atol=1e-4)
        ]
        assert len(found) == 1
        corners |= set(found)
    assert len(corners) > 6


@pytest.mark.parametrize("channels", [1, 3])
def test_fixed_views_are_torchvisions(channels):
    x = F.avg_pool2d(picture(2, channels, 52), 3)  # 17 px, less rough
    x = F.interpolate(x, (52, 52), mode="bilinear")
    small = tv.resize(x, [48, 48], tv.InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
    close(apply_view(x, "identity", 48), small)
    close(apply_view(x, "hflip", 48), tv.horizontal_flip(small))
    close(apply_view(x, "vflip", 48), tv.vertical_flip(small))
    # int(52.8): the stored pixels
    close(apply_view(x, "crop1.1", 48), tv.center_crop(tv.resize(x, [52, 52]), [48, 48]))
    inner = (..., slice(8, -8), slice(8, -8))
    for angle in (5, -5, 12.5):
        close(
            apply_view(x, f"rotate{angle:+}", 48)[inner],
            tv.rotate(small, angle, BILINEAR)[inner],
            1e-5,
        )


def test_crop_of_the_paper_is_422_pixels():
    x = smooth(416)
    want = tv.center_crop(
        tv.resize(x, [422, 422], tv.InterpolationMode.BICUBIC, antialias=True), [384, 384]
    )
    close(apply_view(x, "crop1.1", 384), want)


def test_rotated_view_shows_no_black():
    x = torch.ones(1, 1, 24, 24)
    close(apply_view(x, "rotate+30", 24), x, 1e-5)


def test_batches_hand_out_the_fixed_view():
    for view in ("identity", "vflip", "crop1.2", "rotate-5"):
        b = batches(None, 5, view=view)
        want = apply_view(torch.from_numpy(b.images)[:, None].float() / 255, view, 16)
        got = torch.cat([x for x, _ in b])
        close(got, want, 1e-6)
        assert torch.equal(got, torch.cat([x for x, _ in b]))


def test_colour_images_pass_through_batches():
    images = (picture(6, 3, 20) * 255).byte().permute(0, 2, 3, 1).contiguous().numpy()
    args = (images, np.arange(6), np.arange(6, dtype=np.uint64), np.arange(6), 3)
    x, _ = next(iter(Batches(*args, PIPELINES["paper-neh-teacher"], size=16)))
    assert x.shape == (3, 3, 16, 16) and 0 <= x.min() and x.max() <= 1
    plain, _ = next(iter(Batches(*args)))
    assert torch.equal(
        (plain * 255).round().byte().permute(0, 2, 3, 1), torch.from_numpy(images[:3])
    )


@pytest.mark.gpu
def test_gpu_gives_the_same_views():
    for channels in (1, 3):
        for recipe in PIPELINES.values():
            x, u = picture(16, channels, 40), draws(16)
            recipe = recipe.model_copy(update=dict(posterize=0.0))  # a last-place rounding may change a level
            close(augment(x.cuda(), u, recipe, 32).cpu(), augment(x, u, recipe, 32), 1e-4)
        for view in preset("paper-neh").evaluate.views:
            close(apply_view(x.cuda(), view, 32).cpu(), apply_view(x, view, 32), 1e-4)
