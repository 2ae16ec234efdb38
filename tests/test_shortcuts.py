"Shortcut detection: planted shortcuts are found and named, the retina is covered, everything else stays."
import io
import json

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from typer.testing import CliRunner

from kdoct.core.files import KdoctError
from kdoct.core.presets import preset
from kdoct.core.runs import create_run
from kdoct.core.sections import DataRecipe
from kdoct.data.phantom import patient_diagnosis, simulate_bscan
from kdoct.data.phantom_files import write_phantom
from kdoct.data.retina_mask import blank_retina, retina_mask
from kdoct.data.shortcuts import (
    FEATURES,
    detect_run_shortcuts,
    detect_shortcuts,
    features_table,
    jpeg_quality,
    pixel_features,
    shortcut_features,
    shortcut_figure,
    shortcut_table,
)
from kdoct.data.sources import load_table
from kdoct.data.stage import prepare_data


def phantom(n, size, seed=0):
    "Scans of n patients, and the true extent of their retinas (ILM to Bruch's membrane)."
    scans = [simulate_bscan(seed, p, p % 2, p % 3, height=size, width=size) for p in range(n)]
    y = np.arange(size)[:, None]
    return np.stack([s.image for s in scans]), np.stack(
        [(y >= s.layers[0]) & (y < s.layers[9]) for s in scans]
    )


def coded(array, format="PNG", **options):
    f = io.BytesIO()
    Image.fromarray(array).save(f, format, **options)
    return f.getvalue()


def features(rng, n=160, groups=40, **columns):
    "A table and made-up features: noise, and those given as f(class number)."
    g = np.arange(n) % groups
    y = g % 4
    table = pd.DataFrame(
        dict(
            path=[f"{i}.png" for i in range(n)],
            label=np.array(list("ABCD"))[y],
            group=[f"P{k}" for k in g],
        )
    )
    made = {"vitreous_grey": rng.normal(size=n), "width": np.full(n, 512.)}
    return table, pd.DataFrame(made | {k: f(y) for k, f in columns.items()})


# blanking

@pytest.mark.parametrize("size", [64, 128, 224, 416])
def test_the_phantoms_retina_is_covered(size):
    images, retina = phantom(20, size)
    found = retina_mask(images)
    assert (found & retina).sum() > .995*retina.sum()
    assert ((found & retina).sum((1, 2)) > .98*retina.sum((1, 2))).all()
    assert (~found & ~retina).sum() > .5*(~retina).sum()


@pytest.mark.parametrize("size", [96, 224])
def test_a_blanked_retina_looks_like_background(size):
    images, retina = phantom(16, size)
    blank = blank_retina(images)
    for before, after, where in zip(images, blank, retina, strict=True):
        vitreous = before[:where.argmax(0).min() - size//20]
        assert abs(after[where].mean() - vitreous.mean()) < 0.15 * (
            before[where].mean() - vitreous.mean()
        )
        assert after[where].std() > .5*vitreous.std()


def test_nothing_outside_the_band_is_touched():
    images, _ = phantom(8, 128)
    assert (blank_retina(images) == images)[~retina_mask(images)].all()


def test_white_padding_is_neither_retina_nor_background():
    images, retina = phantom(8, 224)
    r, c = np.mgrid[:224, :224]
    pad = np.broadcast_to(r + c/5 < 30, images.shape)
    padded = np.where(pad, 255, images).astype(np.uint8)
    blank = blank_retina(padded)
    assert (blank[pad] == 255).all()
    inner = retina & (np.broadcast_to(r + c/5, images.shape) > 36)
    assert (retina_mask(padded) & inner).sum() > .99*inner.sum()
    assert (blank[inner] > 230).mean() < .01  # no padding is copied into the retina


def test_a_border_line_stays():
    images, _ = phantom(4, 224)
    images[:, :, -1] = 150
    assert (blank_retina(images)[:, :, -1] == 150).mean() > .95


def test_the_scale_bar_stays():
    images, _ = phantom(6, 224)
    colour = np.repeat(images[..., None], 3, 3)
    colour[:, 212:216, 3:20] = (255, 255, 0)
    untouched = ~retina_mask(colour)[:, 212:216, 3:20]
    assert (blank_retina(colour)[:, 212:216, 3:20] == (255, 255, 0))[untouched].all()


def test_blanking_depends_on_the_image_alone():
    images, _ = phantom(6, 96)
    assert (blank_retina(images)[3] == blank_retina(images[3:4])[0]).all()
    assert (blank_retina(images[::-1])[::-1] == blank_retina(images)).all()


def test_colour_and_grey_find_the_same_retina():
    images, _ = phantom(4, 96)
    colour = np.repeat(images[..., None], 3, 3)
    assert (retina_mask(colour) == retina_mask(images)).all()
    blank = blank_retina(colour)
    assert blank.shape == colour.shape and (blank == blank[..., :1]).all()


@pytest.mark.parametrize("image", [np.zeros((64, 64)), np.full((64, 64), 255), np.full((64, 96), 90)])
def test_an_image_without_a_retina_stays(image):
    image = image.astype(np.uint8)[None]
    assert not retina_mask(image).any() and (blank_retina(image) == image).all()


def test_an_image_full_of_tissue_is_covered_without_a_background():
    images, _ = phantom(1, 64)
    full = np.ascontiguousarray(images[:, 28:60])
    assert blank_retina(full).shape == full.shape


def test_no_images_are_no_error():
    assert blank_retina(np.zeros((0, 64, 64), np.uint8)).shape == (0, 64, 64)


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((2, 64, 64)),
        np.zeros((64, 64), np.uint8),
        np.zeros((2, 16, 16), np.uint8),
        np.zeros((2, 64, 64, 4), np.uint8),
    ],
)
def test_what_is_no_image_is_refused(images):
    with pytest.raises(KdoctError, match="cannot be searched"): blank_retina(images)


# features

def test_every_feature_has_a_meaning_and_a_number():
    image = phantom(1, 96)[0][0]
    facts = shortcut_features(coded(image))
    assert list(facts) == list(FEATURES) and all(FEATURES.values())
    assert (
        np.isnan(facts["jpeg_quality"])
        and np.isfinite([v for k, v in facts.items() if k != "jpeg_quality"]).all()
    )


@pytest.mark.parametrize("side, name", [(0, "white_top"), (1, "white_right"), (2, "white_bottom"), (3, "white_left")])
def test_padding_is_told_by_its_side(side, name):
    image = np.rot90(phantom(1, 128)[0][0], -side).copy()
    turned = np.rot90(image, side)
    turned[:16] = 255
    facts = pixel_features(np.rot90(turned, -side).copy())
    depths = {k: v for k, v in facts.items() if k.startswith("white_")}
    assert max(depths, key=depths.get) == name and facts[name] == pytest.approx(16/128, abs=.01)


def test_a_coloured_scale_bar_is_seen():
    image = np.repeat(phantom(1, 224)[0][0][..., None], 3, 2)
    plain = pixel_features(image)
    image[212:216, 3:20] = (0, 200, 0)
    assert plain["bar_colour"] == 0 and plain["grey_as_colour"] == 1
    assert pixel_features(image)["bar_colour"] > .1 and pixel_features(image)["grey_as_colour"] == 0


def test_a_black_canvas_is_seen():
    image = np.zeros((256, 256), np.uint8)
    image[:128, :200] = phantom(1, 224)[0][0][40:168, :200]
    facts = pixel_features(image)
    assert facts["black_rows"] == .5 and facts["black_columns"] == pytest.approx(56/256)


@pytest.mark.parametrize("quality", [25, 40, 75, 95])
def test_jpeg_quality_is_read_from_the_file(quality):
    data = coded(phantom(1, 64)[0][0], "JPEG", quality=quality)
    assert jpeg_quality(Image.open(io.BytesIO(data))) == pytest.approx(quality, abs=2)


def test_the_retina_itself_is_not_a_feature():
    image = phantom(1, 128)[0][0]
    where = retina_mask(image[None])[0]
    other = image.copy()
    rows = np.flatnonzero(where.all(1))[5:-5]  # rows well inside the band, turned around
    other[rows] = image[rows][:, ::-1]
    before, after = pixel_features(image), pixel_features(other)
    assert {k for k in before if not np.isclose(before[k], after[k], rtol=.05, atol=.02)} == set()


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(KdoctError, match="lost.png: missing"): features_table([tmp_path/"lost.png"])


# detection

@pytest.mark.slow
def test_noise_alone_is_at_chance():
    verdicts = [
        detect_shortcuts(t, features=f)["above_chance"]
        for t, f in (features(np.random.default_rng(s)) for s in range(6))
    ]
    assert sum(verdicts) <= 1


def test_a_planted_shortcut_is_found_and_named():
    rng = np.random.default_rng(0)
    table, f = features(
        rng, white_top=lambda y: np.where(y == 2, 0.2, 0) + rng.normal(0, 0.02, len(y))
    )
    r = detect_shortcuts(table, features=f)
    assert r["above_chance"] and r["worst"]["name"] == "white_top" and "white_top" in r["sentence"]
    assert r["worst"]["mean"]["C"] > .15 > r["worst"]["mean"]["A"] and r["recall"]["C"] > .9


def test_groups_are_not_torn():
    "A feature that names the patient does not help with other patients."
    table, f = features(np.random.default_rng(0), n=400, groups=40)
    order = np.random.default_rng(1).permutation(40)
    f["width"] = [float(order[int(g[1:])]) for g in table.group]
    assert not detect_shortcuts(table, features=f)["above_chance"]


def test_class_sizes_are_no_shortcut():
    rng = np.random.default_rng(0)
    table, f = features(rng, n=400, groups=100)
    table["label"] = np.where(table.group.str[1:].astype(int) < 85, "A", "B")
    r = detect_shortcuts(table, features=f)
    assert r["chance"] == .5 and r["largest_class"] == .85 and not r["above_chance"]


def test_gaps_tell_the_class_too():
    table, f = features(
        np.random.default_rng(0), jpeg_quality=lambda y: np.where(y < 2, np.nan, 75.0)
    )
    r = detect_shortcuts(table, features=f)
    assert r["worst"]["name"] == "jpeg_quality" and r["worst"]["mean"]["A"] is None
    json.dumps(r, allow_nan=False)


def test_equal_features_are_listed_not_scored():
    table, f = features(np.random.default_rng(0))
    r = detect_shortcuts(table, features=f)
    assert r["equal"] == ["width"] and [a["name"] for a in r["features"]] == ["vitreous_grey"]


def test_the_same_seed_gives_the_same_result():
    table, f = features(np.random.default_rng(0))
    assert detect_shortcuts(table, features=f, seed=1) | dict(seconds=0) == detect_shortcuts(
        table, features=f, seed=1
    ) | dict(seconds=0)


def test_large_tables_are_sampled_by_group():
    table, f = features(np.random.default_rng(0), n=1200, groups=40)
    r = detect_shortcuts(table, features=f, limit=200)
    assert (r["images"], r["of"], r["images_a_group"], r["groups"]) == (200, 1200, 5, 40)
    assert "5 a group" in r["sentence"]


def test_one_class_and_few_groups_say_what_to_do():
    table, f = features(np.random.default_rng(0))
    with pytest.raises(KdoctError, match="two classes"):
        detect_shortcuts(table.assign(label="A"), features=f)
    with pytest.raises(KdoctError, match="40 groups .* 10 of A"):
        detect_shortcuts(table, features=f, n_folds=40)
    with pytest.raises(KdoctError, match="1 of A"):
        detect_shortcuts(table[table.group.isin(["P0", "P1", "P5", "P2", "P6"])], features=f)


def test_table_and_figure_agree_with_the_result():
    table, f = features(np.random.default_rng(0), white=lambda y: y*1.)
    r = detect_shortcuts(table, features=f)
    shown = shortcut_table(r)
    assert (
        list(shown.columns) == ["feature", "meaning", "alone", "A", "B", "C", "D"]
        and shown.feature[0] == "white"
    )
    ax = shortcut_figure(r).axes[0]
    assert [t.get_text() for t in ax.get_yticklabels()][:2] == ["all features", "white"]


# runs and the command

def test_shortcuts_of_a_run_are_looked_for_once(outputs):
    run = create_run("t", preset("tiny"))
    with pytest.raises(KdoctError, match="not prepared"): detect_run_shortcuts(run)
    prepare_data(run)
    first = detect_run_shortcuts(run)
    assert first["of"] == run.stage("data")["images"] and first["seen"]["images"] == first["images"]
    written = (run.path/"shortcuts.json").stat().st_mtime_ns
    assert (
        detect_run_shortcuts(run) == first
        and (run.path / "shortcuts.json").stat().st_mtime_ns == written
    )


def test_padding_planted_in_files_is_found_in_the_run(tmp_path):
    table = write_phantom(tmp_path, seed=3, patients=32, slices=1, height=96, width=96)
    for r in table[table.diagnosis == "DRUSEN"].itertuples():
        image = np.array(Image.open(tmp_path/r.path))
        image[:10] = 255
        Image.fromarray(image).save(tmp_path/r.path)
    table.assign(label=[patient_diagnosis(3, int(p[1:])) for p in table.patient]).to_csv(
        tmp_path / "table.csv", index=False
    )
    run = create_run("padded", preset("tiny", **{"data.source": "csv", "data.root": str(tmp_path)}))
    prepare_data(run)
    r = detect_run_shortcuts(run)
    assert r["worst"]["name"].startswith("white") and r["recall"]["DRUSEN"] > .9
    assert r["seen"]["worst"]["name"].startswith("white")


def test_audit_prints_the_sentence():
    from kdoct.app.cli import app
    arguments = ["audit", "--preset", "tiny"]
    assert "never sees the retina" in CliRunner().invoke(app, arguments).output
    assert (
        "never sees the retina"
        not in CliRunner().invoke(app, [*arguments, "--no-shortcuts"]).output
    )


# real images

@pytest.fixture(scope="module")
def ucsd(shared_data):
    listing = load_table(DataRecipe(source="ucsd", root=str(shared_data/"ucsd_oct")))
    rows = listing.table.groupby("label").sample(12, random_state=0)
    return np.stack(
        [
            np.asarray(Image.open(listing.root / p).convert("L").resize((224, 224), Image.BICUBIC))
            for p in rows.path
        ]
    )


def test_real_retinas_are_gone(ucsd):
    "Hardly anything as bright as a retinal layer is left, and most of the image is as it was."
    blank, found = blank_retina(ucsd), retina_mask(ucsd)
    assert found.any((1, 2)).all() and .25 < found.mean() < .6
    for before, after, where in zip(ucsd, blank, found, strict=True):
        bright = np.percentile(before[where], 80)
        assert (after[where] > bright).mean() < .03


def test_folds_warns_of_a_shortcut(monkeypatch):
    from kdoct.app.cli import app
    from kdoct.data import shortcuts
    rng = np.random.default_rng(0)
    table, f = features(
        rng, white_top=lambda y: np.where(y == 2, 0.2, 0) + rng.normal(0, 0.02, len(y))
    )
    monkeypatch.setattr(
        shortcuts, "detect_run_shortcuts", lambda run: detect_shortcuts(table, features=f)
    )
    output = CliRunner().invoke(app, ["folds", "--preset", "tiny", "--run", "warned"]).output
    assert (
        "WARNING: A classifier that never sees the retina" in output
        and "where chance is 25.0 %" in output
    )
    assert output.index("WARNING") < output.index("Images of each class")
