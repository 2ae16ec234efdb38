"Pictures cropped to the retina, and grey values that do not depend on the scanner."
import hashlib
import json

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from kdoct.app.networks import lay_back
from kdoct.core.files import KdoctError, read_json
from kdoct.core.presets import preset
from kdoct.core.runs import create_run
from kdoct.core.sections import DataRecipe
from kdoct.data.cache import cache_facts, decode_cache
from kdoct.data.fold_data import open_fold
from kdoct.data.framing import FRAMING, check_framing, frame_in, framed, framing_of, to_square
from kdoct.data.phantom import simulate_bscan
from kdoct.data.retina_frame import FRAMES, find_retina
from kdoct.data.stage import prepare_data
from kdoct.evaluate.run_warnings import warnings_of
from kdoct.explain.images import explained_images

SIZE = dict(height=496, width=512)


def scan(patient=0, seed=0):
    return simulate_bscan(seed, patient, 0, 0, **SIZE).image


def alike(a, b):
    return np.corrcoef(np.ravel(a), np.ravel(b))[0, 1]


def test_recipes_of_before_these_fields_keep_their_keys():
    tiny = preset("tiny")
    assert tiny.key == "3e836833710948c1"
    assert tiny.network_key("student") == "8ce5c26a5ae32537"
    others = {preset("tiny", **{"data.frame": f}).key for f in FRAMES}
    assert len(others) == 3 and tiny.key in others


def test_caches_of_before_these_fields_keep_their_names():
    facts = cache_facts(["a" * 64], 64, 1, **framing_of(DataRecipe()))
    assert facts["framing"] == FRAMING and facts["key"] == "0d0f71415854caeb3e1d91a2"
    ways = [DataRecipe(frame="retina"), DataRecipe(frame="retina-flat"),
            DataRecipe(intensity="range"), DataRecipe(intensity="matched")]
    keys = {cache_facts(["a" * 64], 64, 1, **framing_of(way))["key"] for way in ways}
    assert len(keys) == 4 and facts["key"] not in keys


@pytest.mark.parametrize("field, value", [("frame", "retina"), ("intensity", "matched")])
@pytest.mark.parametrize("source", ["lc25000", "covid_qu_ex", "folder"])
def test_pictures_that_are_no_oct_are_not_searched_for_a_retina(source, field, value):
    changes = {"data.source": source, "data.modality": "radiograph", f"data.{field}": value}
    with pytest.raises(KdoctError, match=f"{field} is {value}.*leave it at"):
        preset("tiny", **changes)


@pytest.mark.parametrize("patient", range(6))
def test_both_boundaries_lie_where_the_simulation_put_them(patient):
    b = simulate_bscan(3, patient, 0, 0, **SIZE)
    retina = find_retina(b.image)
    assert np.median(np.abs(retina.ilm - b.layers[0])) < .01*496
    assert np.median(np.abs(retina.bruch - b.layers[9])) < .03*496


@pytest.mark.parametrize("patient", range(4))
def test_a_strip_gives_the_picture_of_the_whole_bscan(patient):
    "40 to 60 % of the height, another size, a raised noise floor."
    image = scan(patient)
    rows = find_retina(image)
    top = int(rows.bruch.max()) - 150
    strip = Image.fromarray(image[top:top + 240]).resize((640, 200))
    strip = Image.fromarray((25 + .85*np.asarray(strip, float)).astype(np.uint8))
    way = dict(frame="retina-flat", intensity="matched")
    whole, cut = (to_square(im, 96, 1, **way) for im in (Image.fromarray(image), strip))
    before = alike(to_square(Image.fromarray(image), 96, 1), to_square(strip, 96, 1))
    assert alike(whole, cut) > max(.75, before + .3)


@pytest.mark.parametrize("change", ["tilted", "touching", "padded", "small", "columns"])
def test_the_retina_is_found_where_the_picture_is_hard(change):
    image, top = scan(1), 0
    if change == "tilted": image = np.stack([np.roll(c, i//4) for i, c in enumerate(image.T)], 1)
    if change == "touching": top, image = 170, image[170:]
    if change == "padded": image = np.concatenate([np.full((90, 512), 255, np.uint8), image[90:]])
    if change == "small": image = np.asarray(Image.fromarray(image).resize((128, 96)))
    if change == "columns": image = np.pad(image[:, 60:-60], ((0, 0), (60, 60)))
    truth = simulate_bscan(0, 1, 0, 0, **SIZE).layers
    found, middle = find_retina(image), image.shape[1]//2
    shift = {"tilted": middle//4, "touching": -top}.get(change, 0)
    scale = len(image)/(496 - top)
    for line, layer in ((found.ilm, truth[0]), (found.bruch, truth[9])):
        assert line[middle] == pytest.approx((layer[256] + shift)*scale, abs=.04*len(image))


def test_where_no_retina_is_found_the_whole_image_is_taken_and_named(tmp_path):
    rng = np.random.default_rng(0)
    noise = rng.normal(60, 20, (200, 300)).clip(0, 255).astype(np.uint8)
    rows = []
    for name, image in dict(scan=scan(), noise=noise).items():
        Image.fromarray(image).save(tmp_path/f"{name}.png")
        sha = hashlib.sha256((tmp_path/f"{name}.png").read_bytes()).hexdigest()
        rows.append(dict(path=f"{name}.png", sha256=sha))
    table, way = pd.DataFrame(rows), framing_of(DataRecipe(frame="retina"))
    for _ in range(2):   # made, and opened again
        cache = decode_cache(table, tmp_path, 48, **way)
        assert cache.whole == {rows[1]["sha256"]}
    there = cache.images[cache.rows([rows[1]["sha256"]])[0]]
    assert (there == to_square(Image.fromarray(noise), 48, 1)).all()
    cache.path.with_suffix(".whole.json").unlink()   # without it the cache is not complete
    assert decode_cache(table, tmp_path, 48, **way).whole == {rows[1]["sha256"]}


def test_a_bundle_carries_the_reference_and_its_finder():
    data = DataRecipe(frame="retina-flat", intensity="matched")
    way = json.loads(json.dumps(framing_of(data)))
    check_framing(way)
    image = Image.fromarray(scan())
    assert (framed(image, 1, **way) == framed(image, 1, **framing_of(data))).all()
    other = way | dict(reference=[0, *range(100, 132)])
    assert (framed(image, 1, **other) != framed(image, 1, **way)).any()
    with pytest.raises(KdoctError, match="finder 0"): check_framing(way | dict(finder=0))


def test_colour_pictures_are_cropped_like_grey_ones():
    grey = Image.fromarray(scan(2))
    way = dict(frame="retina-flat", intensity="range")
    assert (framed(grey.convert("RGB"), 3, **way)[..., 1] == framed(grey, 1, **way)).all()


@pytest.mark.parametrize("resize", ["squash", "crop", "pad"])
@pytest.mark.parametrize("frame", FRAMES)
def test_every_frame_goes_with_every_way_to_a_square(frame, resize):
    a = framed(Image.fromarray(scan(2)), 1, resize, frame=frame, fill_white=True,
               mask_scale_bar=True)
    assert resize == "squash" or a.shape[0] == a.shape[1]
    assert a.dtype == np.uint8 and np.isfinite(a).all() and a.std() > 5


@pytest.mark.parametrize("frame", FRAMES[1:])
def test_a_map_of_a_cropped_picture_lies_where_the_network_saw_it(frame):
    image = scan(1)
    at = frame_in(Image.fromarray(image), frame)
    marked, row = np.zeros_like(image), int(find_retina(image).ilm[300]) + 20
    marked[row - 6:row + 6, 290:310] = 255
    seen = to_square(Image.fromarray(marked), 64, 1, at=at)/255
    place = np.argwhere(lay_back(seen, image.shape, at=at) > .5*seen.max()).mean(0)
    assert np.abs(place - (row - .5, 299.5)).max() < 6


@pytest.fixture
def framed_run():
    small = {"data.phantom.height": 240, "data.phantom.width": 256, "explain.images": 6}
    return create_run("framed", preset("tiny", **{"data.frame": "retina-flat", **small}))


def test_the_data_stage_records_and_says_what_is_not_cropped(framed_run, capsys, monkeypatch):
    monkeypatch.setattr("kdoct.data.framing.find_retina", lambda grey: None)
    facts = prepare_data(framed_run)["frame"]
    assert facts["whole"] == facts["images"] == sum(facts["per_class"].values()) > 0
    assert f"none was found in {facts['whole']} of" in capsys.readouterr().out
    assert any("which are taken whole" in words for words in warnings_of(framed_run))
    assert read_json(framed_run.json)["stages"]["data"]["frame"] == facts


def test_lesion_masks_are_cropped_like_their_images(framed_run):
    assert prepare_data(framed_run)["frame"]["whole"] == 0
    images = explained_images(framed_run, open_fold(framed_run, 0))
    for row, mask in zip(images.rows.itertuples(), images.masks, strict=True):
        assert mask.any() == (row.label != "NORMAL")
        assert mask.mean() < .4


def test_the_retina_of_real_bscans_is_found_alike_in_a_strip(shared_data):
    files = sorted((shared_data/"ucsd_oct").glob("*/*.jpeg"))[::40]
    assert len(files) == 20
    for f in files:
        image = np.asarray(Image.open(f).convert("L"))
        whole = find_retina(image)
        low, high = int(whole.ilm.min()) - 30, int(whole.bruch.max()) + 50
        top = max(low, 0)
        part = find_retina(image[top:high])
        for name in ("ilm", "bruch"):
            away = np.abs(getattr(whole, name) - top - getattr(part, name))
            assert np.median(away) < .02*len(image), f.name
