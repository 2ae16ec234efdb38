"Near-duplicates: turned, flipped and cropped copies are one group, pictures that only look alike are not."
import hashlib
import math

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageOps

from kdoct.core.files import KdoctError
from kdoct.core.presets import preset
from kdoct.core.runs import create_run
from kdoct.core.sections import DataRecipe
from kdoct.data.audit import audit
from kdoct.data.fold_data import open_fold
from kdoct.data.near_duplicates import (
    PROFILES,
    agreement,
    find_near_duplicates,
    linked_groups,
    neighbours,
    polar_map,
)
from kdoct.data.sources import load_table, wants_near_duplicates
from kdoct.data.stage import prepare_data


def texture(seed, cells=18, side=128, colour=True):
    "A smooth random picture."
    a = (
        np.random.default_rng(seed)
        .integers(0, 256, (cells, cells, 3) if colour else (cells, cells))
        .astype(np.uint8)
    )
    return Image.fromarray(a).resize((side, side), Image.Resampling.BICUBIC)


def turned(im, degrees):
    "Rotate about the middle, cut out the largest square, enlarge it to the old size: Augmentor's rotation."
    w, t = im.width, math.radians(abs(degrees))
    edge = (w - w / (math.cos(t) + math.sin(t))) / 2
    return im.rotate(degrees, Image.Resampling.BICUBIC).resize(
        (w, w), Image.Resampling.BICUBIC, (edge, edge, w - edge, w - edge)
    )


def copies(im): return [im, turned(im, 22), ImageOps.mirror(turned(im, -13)), ImageOps.flip(im)]


def write_tiles(folder, tiles=3):
    "LC25000 in small: copies of each tile beside each other, with names that do not tell the tile."
    for c, label in enumerate(("lung_aca", "lung_n")):
        (folder / label).mkdir(parents=True)
        for k in range(tiles):
            for i, im in enumerate(copies(texture(100 * c + k))):
                im.save(folder / label / f"{label}{k + tiles * i}.jpeg", quality=92)
    return folder


def tile(path, tiles=3):
    return int("".join(c for c in path.rpartition("/")[2] if c.isdigit())) % tiles


def table_of(folder):
    paths = sorted(str(p.relative_to(folder)) for p in folder.rglob("*.*g"))
    return pd.DataFrame(
        dict(
            path=paths,
            sha256=[hashlib.sha256((folder / p).read_bytes()).hexdigest() for p in paths],
        )
    )


@pytest.mark.parametrize(
    "change",
    [lambda im: turned(im, 40), lambda im: turned(im, -25), ImageOps.mirror, ImageOps.flip, lambda im: im.rotate(90)],
)
def test_agreement_survives_what_histology_allows_and_tells_other_pictures(change):
    a, b = texture(1), texture(2)
    maps = np.stack([polar_map(im) for im in (a, change(a), change(b))])
    same, other = agreement(maps[[0, 0]], maps[[1, 2]], PROFILES["histology"])
    assert same > 0.7 > 0.5 > other


def test_radiographs_may_be_flipped_and_tilted_but_not_turned_by_a_quarter():
    a = texture(3, colour=False)
    maps = np.stack([polar_map(im) for im in (a, ImageOps.mirror(a), a.rotate(5), a.rotate(90))])
    mirrored, tilted, quarter = agreement(maps[[0, 0, 0]], maps[1:], PROFILES["radiograph"])
    assert mirrored > 0.95 and tilted > 0.8 and quarter < 0.6


def test_one_wrong_link_does_not_join_two_sets_and_two_links_do():
    full = [[i, j] for s in (0, 4) for i in range(s, s + 4) for j in range(i + 1, s + 4)]
    assert list(linked_groups(8, np.array([*full, [3, 4]]))) == [0] * 4 + [4] * 4
    assert list(linked_groups(8, np.array([*full, [3, 4], [0, 7]]))) == [0] * 8


def test_no_links_and_two_images_are_groups_too():
    assert list(linked_groups(3, np.empty((0, 2), int))) == [0, 1, 2] and list(
        linked_groups(2, np.array([[0, 1]]))
    ) == [0, 0]


def test_proposals_do_not_depend_on_the_size_of_the_chunks():
    f = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32)
    assert np.array_equal(neighbours(f, 5, chunk=7), neighbours(f, 5, chunk=50))


def test_the_copies_of_a_tile_are_found_and_kept_for_the_next_call(tmp_path, monkeypatch):
    t = table_of(write_tiles(tmp_path / "lc"))
    found = find_near_duplicates(t, tmp_path / "lc", PROFILES["histology"])
    assert len(found) == 24 and found.groupby("set").path.count().eq(4).all()
    assert all(
        rows.path.str[:6].nunique() == 1 and len({tile(p) for p in rows.path}) == 1
        for _, rows in found.groupby("set")
    )
    monkeypatch.setattr(
        "kdoct.data.near_duplicates._backbone", lambda: pytest.fail("the backbone was loaded again")
    )
    assert find_near_duplicates(
        t.sample(frac=1, random_state=0), tmp_path / "lc", PROFILES["histology"]
    ).equals(found)


def test_without_the_backbones_package_the_error_names_it(tmp_path, monkeypatch):
    t = table_of(write_tiles(tmp_path / "lc", tiles=1))
    monkeypatch.setattr("kdoct.data.packaged_weights.importlib.util.find_spec", lambda name: None)
    with pytest.raises(KdoctError, match=r"kdoct\[offline\]"):
        find_near_duplicates(t, tmp_path / "lc", PROFILES["histology"])


def lc_recipe(folder, **data):
    changes = {
        "data.source": "lc25000",
        "data.root": str(folder),
        "data.n_folds": 2,
        "data.size": 32,
    }
    return preset("demo", **changes | {f"data.{k}": v for k, v in data.items()})


def test_the_stage_keeps_tiles_together_and_says_what_is_a_copy_of_what(tmp_path, capsys):
    run = create_run("tiles", lc_recipe(write_tiles(tmp_path / "lc", tiles=6)))
    facts, rows = prepare_data(run), open_fold(run, 0).table
    assert (
        facts["groups"] == 12
        and facts["problems"] == {"near-duplicate": 36}
        and facts["merged_groups"] == 12
    )
    where = rows.assign(tile=[f"{p[:6]}{tile(p, 6)}" for p in rows.path])
    assert where.groupby("tile").role.nunique().eq(1).all()
    found = pd.read_csv(run.path / "audit.csv")
    assert (
        found.path.is_unique
        and found.detail.str.contains("agreement").all()
        and found.action.str.endswith("merged").all()
    )
    assert "36 near-duplicate" in capsys.readouterr().out


def test_separate_leaves_the_groups_alone_and_warns(tmp_path, capsys):
    facts = prepare_data(
        create_run("apart", lc_recipe(write_tiles(tmp_path / "lc"), near_duplicates="separate"))
    )
    assert facts["groups"] == 24 and "WARNING: lc25000" in capsys.readouterr().out


def test_copies_of_official_test_images_are_overlap(tmp_path):
    base = tmp_path / "covid"
    for part, label, seed, change in [
        ("Train", "Normal", 1, None),
        ("Test", "Normal", 2, None),
        ("Train", "Normal", 2, ImageOps.mirror),
        ("Val", "COVID-19", 3, None),
    ]:
        f = base / part / label / "images" / f"{seed}{'m' if change else ''}.png"
        f.parent.mkdir(parents=True, exist_ok=True)
        im = texture(seed, colour=False)
        (change(im) if change else im).save(f)
    data = DataRecipe(source="covid_qu_ex", root=str(base))
    f = audit(load_table(data), near_duplicates=wants_near_duplicates(data)).findings
    assert list(f.path[f.problem == "official-overlap"]) == ["Train/Normal/images/2m.png"]
    assert list(f.path[f.problem == "near-duplicate"]) == ["Train/Normal/images/2m.png"]


def test_tables_are_read_without_torch(root):
    import subprocess
    import sys
    code = (
        "import sys, kdoct.data.stage, kdoct.data.near_duplicates; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0


@pytest.mark.slow
def test_tiles_of_lc25000_are_found_again(shared_data, tmp_path):
    root = shared_data / "lc25000_lung"
    given = pd.read_csv(root / "manifest.csv")
    some = given[
        given.tile_group.isin(
            given.groupby("class").tile_group.unique().map(lambda t: t[:3]).explode()
        )
    ]
    table = some.assign(
        sha256=[hashlib.sha256((root / p).read_bytes()).hexdigest() for p in some.path]
    ).drop_duplicates("sha256")
    found = table.path.map(
        find_near_duplicates(table, root, PROFILES["histology"]).set_index("path").set
    ).fillna(table.path)
    cells = pd.crosstab(found, table.tile_group).to_numpy()
    def pairs(n): return (n * (n - 1) / 2).sum()
    assert pairs(cells) / pairs(cells.sum(1)) >= 0.95 and pairs(cells) / pairs(cells.sum(0)) >= 0.95
