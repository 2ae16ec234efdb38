"Figures of maps: the same scale everywhere, tissue stays visible, every text has its place."
import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image

from kdoct.core.files import KdoctError
from kdoct.core.result_sections import EvaluateRecipe
from kdoct.explain.comparison import agreement_numbers, correctness
from kdoct.explain.faithfulness import random_maps
from kdoct.explain.figures import (
    Explained,
    agreement_figure,
    curves_figure,
    map_figure,
    overlay,
    save_maps,
)
from kdoct.explain.tables import agreement_table

FAST = EvaluateRecipe(n_boot=100)
# Machado et al. 2009: what a deuteranope sees, in linear RGB
DEUTERANOPIA = np.array(
    [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ]
)


def lightness(rgb):
    "CIE L* of sRGB colours."
    y = linear(rgb) @ np.array([.2126, .7152, .0722])
    return np.where(y > .008856, 116*np.cbrt(y) - 16, 903.3*y)


def linear(rgb): return np.where(rgb <= .04045, rgb/12.92, ((rgb + .055)/1.055)**2.4)


def row(label="CNV", image=None, **kw):
    maps = random_maps(2, 48, 64)
    image = np.full((48, 64), 90, np.uint8) if image is None else image
    return Explained(
        image,
        dict(teacher=maps[0], student=maps[1]),
        dict(teacher=(label, 0.93), student=("NORMAL", 0.5)),
        label,
        **kw,
    )


def texts(fig): return [t.get_text() for t in fig.findobj(mpl.text.Text) if t.get_text()]


@pytest.mark.parametrize("grey", [0., .3, 1.])
def test_higher_values_are_lighter_on_dark_tissue_and_always_more_opaque(grey):
    image, ramp = np.full((1, 50), grey), np.linspace(0, 1, 50)[None]
    painted = overlay(image, ramp)
    far = np.abs(painted - painted[:, :1]).sum(-1)[0]
    assert far[-1] > .5 and (far[25:] > far[12]).all()
    if grey < .5: assert (np.diff(lightness(painted)[0])[10:] > 0).all()


def test_without_importance_the_tissue_is_what_it_was():
    image = np.random.default_rng(0).integers(0, 256, (20, 30), dtype=np.uint8)
    painted = overlay(image, np.zeros((20, 30)))
    np.testing.assert_allclose(painted, np.repeat(.7*image[..., None]/255, 3, 2), atol=1e-6)
    assert np.ptp(overlay(image, np.ones((20, 30)))[..., 0]) > .1


@pytest.mark.parametrize("grey", [.1, .5, .9])
def test_less_and_more_stay_apart_without_green_cones(grey):
    sides = overlay(np.full((1, 2), grey), np.array([[-.7, .7]]), difference=True)
    seen = np.clip(linear(sides) @ DEUTERANOPIA.T, 0, 1)[0]
    assert seen[0, 2] > 1.5*seen[1, 2] and seen[1, 0] > 1.2*seen[0, 0]


def test_histology_is_grey_below_its_maps():
    pink = np.zeros((48, 64, 3), np.uint8) + np.array([230, 120, 180], np.uint8)
    painted = overlay(pink, np.zeros((48, 64)))
    assert np.ptp(painted, axis=2).max() < 1e-6


def test_a_page_says_label_call_probability_and_whether_it_was_right():
    fig = map_figure([row(mask=np.eye(48, 64)), row("DME")])
    t = texts(fig)
    assert {
        "label\nCNV",
        "teacher\nCNV\n0.93, right",
        "student\nNORMAL\n0.50, wrong",
        "student minus teacher",
        "white line: mask",
        "importance",
        "difference",
    } <= set(t)
    assert sum(len(a.images) for a in fig.axes) >= 8


def test_no_mask_no_line():
    assert "white line: mask" not in texts(map_figure([row(mask=np.zeros((48, 64)))]))


def test_long_names_do_not_overlap():
    name = "lung_squamous_cell_carcinoma_of_the_left_lower_lobe"
    fig = map_figure([row(name, name="a/very/long/folder/of/images/and/a/file.jpeg"), row(name)])
    fig.set_dpi(100)
    fig.draw_without_rendering()
    boxes = [a.title.get_window_extent() for a in fig.axes if a.get_title()]
    pictures = [a.get_window_extent() for a in fig.axes if a.get_title()]
    for i, b in enumerate(boxes):
        assert not any(b.overlaps(o) for o in boxes[i + 1:] + pictures[:i] + pictures[i + 1:])
        assert b.x0 >= 0 and b.x1 <= fig.bbox.x1 and b.y1 <= fig.bbox.y1


def test_three_roles_have_a_panel_each():
    r = row()
    r = r._replace(
        maps=dict(
            teacher=r.maps["teacher"],
            **{"teacher-visformer": r.maps["teacher"]},
            student=r.maps["student"],
        ),
        predicted=r.predicted | {"teacher-visformer": ("CNV", 0.7)},
    )
    assert {"teacher-visformer\nCNV\n0.70, right", "student minus teacher"} <= set(
        texts(map_figure([r]))
    )


@pytest.mark.parametrize(
    "rows, text",
    [([], "0 images"), ([row()] * 13, "13 images"), ([row(), row()._replace(maps={})], "not the same two roles")],
)
def test_impossible_pages_are_refused(rows, text):
    with pytest.raises(KdoctError, match=text): map_figure(rows)


def test_values_outside_the_scale_are_refused():
    for v, difference in ((-.5, False), (1.2, False), (-1.2, True), (np.nan, False)):
        with pytest.raises(KdoctError, match="values outside"):
            overlay(np.zeros((2, 2)), np.full((2, 2), v), difference)


def test_a_saved_page_is_small_and_keeps_the_highest_colour(tmp_path):
    rng, r = np.random.default_rng(0), row()
    peak = np.zeros((48, 64))
    peak[20:26, 30:36] = 1
    rows = [
        r._replace(
            image=rng.integers(0, 256, (48, 64), dtype=np.uint8),
            maps=dict(teacher=peak, student=peak),
        )
    ] * 4
    file = save_maps(map_figure(rows), tmp_path/"page.png", dpi=100)
    assert file.stat().st_size < 300_000
    a = np.asarray(Image.open(file).convert("RGB")).astype(int)
    assert ((a[..., 0] > 170) & (a[..., 1] > 170) & (a[..., 2] < 110)).sum() > 50  # yellow


def curves():
    rise = np.linspace(0, 1, 9)
    parts = [
        pd.DataFrame(
            dict(
                method="m",
                role=r,
                group=[0, 0, 1, 2],
                insertion=0.5,
                deletion=0.5,
                insertion_curve=[(rise**k).tolist()] * 4,
                deletion_curve=[(1 - rise**k).tolist()] * 4,
            )
        )
        for r, k in (("teacher", 0.5), ("student", 2))
    ]
    return pd.concat(parts, ignore_index=True)


def test_curves_are_the_means_of_their_role():
    fig = curves_figure(curves(), evaluate=FAST)
    lines = {li.get_label(): li.get_ydata() for li in fig.axes[0].lines}
    np.testing.assert_allclose(lines["student, AUC 0.500"], np.linspace(0, 1, 9)**2)
    with pytest.raises(KdoctError, match="no curves"):
        curves_figure(curves().assign(insertion=np.nan))


def test_the_band_resamples_groups():
    c = curves()
    c.loc[:3, "insertion_curve"] = pd.Series([[0.]*9]*2 + [[1.]*9]*2)
    band = curves_figure(
        c.iloc[:2]
        .assign(group=[0, 1])
        .pipe(lambda d: pd.concat([d, c.iloc[2:4].assign(group=[0, 1])])),
        evaluate=FAST,
    )
    low, high = (
        f(band.axes[0].collections[0].get_paths()[0].vertices[:, 1]) for f in (np.min, np.max)
    )
    assert low == high == .5  # each group holds one 0 and one 1, so every resample has the same mean


def test_agreement_shows_the_parts_that_have_images_and_marks_few_groups():
    a, right = random_maps(40, 21, 21), np.arange(40) > 2
    n = agreement_numbers(a, a[::-1], np.arange(40)).assign(
        path=np.arange(40).astype(str),
        group=np.arange(40),
        method="m",
        correctness=correctness(np.ones(40), right),
    )
    fig = agreement_figure(agreement_table(n, FAST))
    labels = [t.get_text() for t in fig.axes[0].get_yticklabels()]
    assert isinstance(fig, Figure) and labels == [
        "all\n40 images, 40 groups",
        "both right\n37 images, 37 groups",
        "student wrong*\n3 images, 3 groups",
    ]
    with pytest.raises(KdoctError, match="no agreement of"):
        agreement_figure(agreement_table(n, FAST), "other")
