"Folds, decode cache and the data stage: no patient on both sides, one cache whoever builds it, nothing half-written."
import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from kdoct.core import KdoctError, create_run, preset, sha256_file
from kdoct.data import (
    check_folds,
    decode_cache,
    make_folds,
    open_fold,
    prepare_data,
    read_folds,
    to_square,
    write_folds,
)
from kdoct.sources import image_table


def table_of(patients):
    "An image table from (label, number of images) a patient; a second label may follow."
    return image_table([dict(path=f"{label}/{p:03d}-{i}.png", label=label, patient=f"{p:03d}")
                        for p, visits in enumerate(patients) for label, n in visits for i in range(n)])


visit = st.tuples(st.sampled_from("AB"), st.integers(1, 6))
patients = st.lists(st.lists(visit, min_size=1, max_size=2, unique_by=lambda v: v[0]), min_size=12, max_size=40)


@settings(max_examples=40)
@given(patients, st.integers(2, 5), st.sampled_from([0.2, 0.25, 0.4]), st.integers(0, 2**32 - 1))
def test_no_group_has_two_roles_whatever_the_table(patients, n_folds, val_fraction, seed):
    t = table_of(patients)
    try: folds = make_folds(t, n_folds, val_fraction, seed)
    except KdoctError: assume(False)  # too few patients of a class: refused, as another test shows
    for _, f in folds.groupby("fold"):
        roles = {r: set(f.group[f.role == r]) for r in ("train", "val", "test")}
        assert not roles["train"] & roles["val"] and not roles["train"] & roles["test"] and not roles["val"] & roles["test"]
        assert all(roles.values()) and sorted(f.path) == sorted(t.path)
    assert sorted(folds.path[folds.role == "test"]) == sorted(t.path)


@settings(max_examples=10)
@given(st.randoms(use_true_random=False))
def test_folds_do_not_depend_on_the_order_of_the_rows(random):
    t = table_of([[("AB"[p % 2], p % 4 + 1)] for p in range(24)])
    order = list(range(len(t)))
    random.shuffle(order)
    assert make_folds(t.iloc[order], 4).equals(make_folds(t, 4))


def test_folds_are_the_ones_that_they_always_were():
    "The same table gives the same folds on every machine and version; a change here breaks comparisons between runs."
    folds = make_folds(table_of([[("ABC"[p % 3], p % 4 + 1)] for p in range(36)]), 3, 0.2, 43)
    tested = folds[folds.role == "test"].groupby("fold").group.unique().map(sorted)
    again = make_folds(table_of([[("ABC"[p % 3], p % 4 + 1)] for p in range(36)]), 3, 0.2, 44)
    assert [len(g) for g in tested] == [12, 12, 12] and not again.equals(folds)
    assert [" ".join(g) for g in tested] == [
        "006 009 015 016 020 023 024 025 026 029 031 034",
        "002 004 007 008 010 011 012 013 017 018 027 033",
        "000 001 003 005 014 019 021 022 028 030 032 035",
    ]


@pytest.mark.parametrize(("patients", "n_folds", "says"), [
    ([[("A", 9)], [("B", 9)]] * 4, 5, "4 of A"), ([[("A", 1)]] * 20, 3, "All images are of class A"), ([], 3, "no images"),
    ([[("A", 1)]] * 20 + [[("B", 5)]] * 5, 5, "5 of B")])
def test_too_few_patients_are_refused_with_numbers(patients, n_folds, says):
    with pytest.raises(KdoctError) as e: make_folds(table_of(patients), n_folds)
    assert says in str(e.value)


GOOD = make_folds(table_of([[("AB"[p % 2], 2)] for p in range(20)]), 3)


def spoil(folds, what):
    f = folds.copy()
    if what == "leak": f.loc[f.index[f.role == "train"][0], "role"] = "val"
    elif what == "never tested": f.loc[f.group.isin(f.group[f.role == "test"].iloc[:1]) & (f.role == "test"), "role"] = "train"
    elif what == "row lost": f = f.iloc[1:]
    elif what == "fold lost": f = f[f.fold != 1]
    elif what == "row twice": f = pd.concat([f, f.iloc[:1]])
    elif what == "strange role": f.loc[0, "role"] = "train2"
    elif what == "column lost": f = f.drop(columns="group")
    elif what == "gap": f.loc[0, "group"] = ""
    elif what == "two groups": f.loc[f.index[f.path == f.path[0]][0], "group"] = "another"
    return f


@pytest.mark.parametrize("what", ["leak", "never tested", "row lost", "fold lost", "row twice", "strange role", "column lost", "gap", "two groups"])
def test_reading_refuses_spoiled_folds(tmp_path, what):
    spoil(GOOD, what).to_csv(tmp_path / "folds.csv", index=False)
    with pytest.raises(KdoctError): read_folds(tmp_path / "folds.csv")


def test_folds_come_back_as_written_even_with_patients_called_na_and_0012(tmp_path):
    t = table_of([[("AB"[p % 2], 2)] for p in range(20)])
    t["group"] = t.group.replace({"000": "NA", "001": "0012", "002": "1e5", "003": "ü, \"x\""})
    folds = make_folds(t, 3)
    write_folds(folds, tmp_path / "folds.csv")
    assert read_folds(tmp_path / "folds.csv").equals(folds)


def test_a_broken_folds_file_is_an_error_with_a_remedy(tmp_path):
    for text in ("", "path,group,fold,role\na,b,one,train\n", '"'):
        (tmp_path / "folds.csv").write_text(text)
        with pytest.raises(KdoctError, match="01_data"): read_folds(tmp_path / "folds.csv")
    with pytest.raises(KdoctError, match="does not exist"): read_folds(tmp_path / "none.csv")


def test_check_folds_returns_what_it_proved(): assert check_folds(GOOD) is GOOD


@pytest.fixture
def images(tmp_path):
    "Forty images and their table."
    rng, folder = np.random.default_rng(0), tmp_path / "images"
    folder.mkdir()
    for i in range(40): Image.fromarray(rng.integers(0, 255, (60, 90), np.uint8)).save(folder / f"{i:02d}.png")
    names = sorted(p.name for p in folder.iterdir())
    return folder, pd.DataFrame(dict(path=names, sha256=[sha256_file(folder / n) for n in names]))


def right(cache, folder, table):
    return all((cache.images[cache.rows([s])[0]] == to_square(Image.open(folder / p), 48, 1)).all()
               for p, s in zip(table.path, table.sha256, strict=True))


CHILD = """
    import sys, pandas as pd, kdoct.data as D
    def pause(word): print(word, flush=True); sys.stdin.readline()
    {patch}
    table = pd.read_json({table!r}, dtype=str)
    print('begins', flush=True)
    cache = D.decode_cache(table, {folder!r}, 48)
    print('done', int(cache.images.sum()), flush=True)
"""
PAUSE_IN_ROWS = """
    n, real = [0], D._square_of
    def slow(*a):
        n[0] += 1
        if n[0] == 35: pause('building')
        return real(*a)
    D._square_of = slow
"""
PAUSE_BEFORE_JSON = """
    real = D.write_json
    def late(*a): pause('building'); real(*a)
    D.write_json = late
"""
NOTE_BUILD = """
    real = D._write_cache
    def noted(*a): print('builds too', flush=True); real(*a)
    D._write_cache = noted
"""


def child(root, tmp_path, images, patch):
    "A process that opens the cache, patched to stop at a certain point until it is sent a line."
    folder, table = images
    table.to_json(tmp_path / "table.json")
    code = textwrap.dedent(CHILD).format(patch=textwrap.dedent(patch), table=str(tmp_path / "table.json"), folder=str(folder))
    return subprocess.Popen([sys.executable, "-c", code], cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_two_processes_build_one_cache_once(root, tmp_path, images, outputs):
    a = child(root, tmp_path, images, PAUSE_IN_ROWS)
    assert [a.stdout.readline().strip() for _ in "12"] == ["begins", "building"]
    b = child(root, tmp_path, images, NOTE_BUILD)
    assert b.stdout.readline().strip() == "begins"  # and now waits for the lock, or will
    said_a, said_b = a.communicate("go\n", timeout=60)[0], b.communicate(timeout=60)[0]
    assert said_a == said_b and said_b.startswith("done")
    assert sorted(p.suffix for p in (outputs / "cache").glob("[!.]*") if p.suffix != ".lock") == [".json", ".npy"]
    assert right(decode_cache(images[1], images[0], 48), *images)


@pytest.mark.parametrize("where", [PAUSE_IN_ROWS, PAUSE_BEFORE_JSON], ids=["among the rows", "before the json"])
def test_a_killed_builder_leaves_nothing_that_looks_like_a_cache(root, tmp_path, images, outputs, where):
    a = child(root, tmp_path, images, where)
    assert [a.stdout.readline().strip() for _ in "12"] == ["begins", "building"]
    os.kill(a.pid, signal.SIGKILL)
    a.communicate(timeout=60)
    assert not list((outputs / "cache").glob("*.json"))
    assert right(decode_cache(images[1], images[0], 48), *images)
    assert not list((outputs / "cache").glob(".*.tmp*"))  # what the killed one left is cleared away


def test_a_cache_that_was_cut_is_built_again(images):
    folder, table = images
    path = decode_cache(table, folder, 48).path
    with open(path, "rb+") as f: f.truncate(5000)
    assert right(decode_cache(table, folder, 48), folder, table)


def test_images_that_changed_since_the_audit_are_not_cached(images, outputs):
    folder, table = images
    (folder / "07.png").write_bytes((folder / "08.png").read_bytes())
    with pytest.raises(KdoctError, match="07.png has changed since the audit"): decode_cache(table, folder, 48)
    assert not list((outputs / "cache").glob("*.npy"))


def test_other_size_or_channels_are_another_cache_and_no_row_is_found_by_position(images):
    folder, table = images
    grey, small, colour = decode_cache(table, folder, 48), decode_cache(table, folder, 32), decode_cache(table, folder, 48, channels=3)
    assert len({grey.path, small.path, colour.path}) == 3 and colour.images.shape == (40, 48, 48, 3)
    part = table[::-2]
    assert right(decode_cache(part, folder, 48), folder, part)
    with pytest.raises(KdoctError, match="does not hold"): decode_cache(part, folder, 48).rows(table.sha256)


def make_images(folder, patients=16, seed=0):
    rng = np.random.default_rng(seed)
    for p in range(patients):
        sub = folder / ("CNV", "NORMAL")[p % 2]
        sub.mkdir(parents=True, exist_ok=True)
        for i in range(2): Image.fromarray(rng.integers(0, 255, (50, 60), np.uint8)).save(sub / f"{p:02d}-{i}.png")
    return folder


def a_run(folder, name="r", **changes):
    data = {"data.source": "folder", "data.root": str(folder), "data.group_pattern": r"/(\d+)-", "data.n_folds": 3, "data.size": 32}
    return create_run(name, preset("edge", **data, **{"data." + k: v for k, v in changes.items()}))


def test_stage_writes_its_files_and_a_second_call_changes_none(tmp_path):
    run = a_run(make_images(tmp_path / "d"))
    first = prepare_data(run)
    before = {p.name: p.read_bytes() for p in run.path.iterdir() if p.suffix in (".csv", ".parquet") or p.name == "audit.json"}
    assert set(before) == {"audit.csv", "audit.json", "folds.csv", "table.parquet"}
    again = prepare_data(run)
    assert {**first, "seconds": 0} == {**again, "seconds": 0}
    assert all((run.path / n).read_bytes() == b for n, b in before.items())
    assert first["images"] == 32 and first["groups"] == 16 and first["per_class"] == {"CNV": 16, "NORMAL": 16}


def test_open_fold_gives_each_image_its_own_pixels_label_and_role(tmp_path):
    folder = make_images(tmp_path / "d")
    run = a_run(folder, classes=["NORMAL", "CNV"])
    prepare_data(run)
    for k in range(3):
        data, folds = open_fold(run, k), read_folds(run.folds_csv)
        assert data.classes == ["NORMAL", "CNV"] and sum(map(len, data.idx.values())) == 32
        for role, idx in data.idx.items():
            rows = data.rows(role)
            assert set(rows.path) == set(folds.path[(folds.fold == k) & (folds.role == role)])
            for i, r in zip(idx, rows.itertuples(), strict=True):
                assert (data.images[i] == to_square(Image.open(folder / r.path), 32, 1)).all()
                assert data.classes[data.labels[i]] == r.label == r.path.split("/")[0] and data.groups[i] == r.group


def test_open_fold_before_the_stage_names_the_command(tmp_path):
    with pytest.raises(KdoctError, match="papermill .*01_data.ipynb .*-p run r"): open_fold(a_run(make_images(tmp_path / "d")), 0)


def test_open_fold_refuses_a_fold_that_is_not_there_and_folds_that_were_edited(tmp_path):
    run = a_run(make_images(tmp_path / "d"))
    prepare_data(run)
    with pytest.raises(KdoctError, match="0 to 2"): open_fold(run, 3)
    run.folds_csv.write_text(run.folds_csv.read_text().replace(",val\n", ",train\n"))
    with pytest.raises(KdoctError, match="was changed"): open_fold(run, 0)


def test_a_lost_cache_is_made_again_from_the_images(tmp_path, outputs):
    run = a_run(make_images(tmp_path / "d"))
    prepare_data(run)
    before = np.array(open_fold(run, 0).images)
    for p in (outputs / "cache").iterdir(): p.unlink()
    assert (open_fold(run, 0).images == before).all()


def test_a_run_does_not_change_its_data(tmp_path):
    folder = make_images(tmp_path / "d")
    run = a_run(folder)
    prepare_data(run)
    Image.fromarray(np.random.default_rng(9).integers(0, 255, (50, 60), np.uint8)).save(folder / "CNV" / "00-0.png")
    with pytest.raises(KdoctError, match="made with other data"): prepare_data(run)
    assert len(open_fold(run, 0).table) == 32  # what was prepared stays usable


def test_an_audit_that_stops_leaves_its_table_and_the_next_run_can_leave_out(tmp_path):
    folder = make_images(tmp_path / "d")
    (folder / "CNV" / "99-0.png").write_bytes(b"")
    run = a_run(folder)
    with pytest.raises(KdoctError, match="1 empty"): prepare_data(run)
    assert "CNV/99-0.png,empty,error" in (run.path / "audit.csv").read_text() and not run.folds_csv.exists()
    assert prepare_data(a_run(folder, "r2", leave_out=["empty"]))["images"] == 32


def test_a_class_of_the_recipe_without_images_is_refused(tmp_path):
    with pytest.raises(KdoctError, match="no image of class DME"): prepare_data(a_run(make_images(tmp_path / "d"), classes=["CNV", "DME", "NORMAL"]))


def test_colour_data_are_cached_in_colour(tmp_path):
    folder = make_images(tmp_path / "d")
    Image.fromarray(np.random.default_rng(5).integers(0, 255, (50, 60, 3), np.uint8)).save(folder / "CNV" / "00-5.png")
    run = a_run(folder)
    assert prepare_data(run)["channels"] == 3 and open_fold(run, 0).images.shape == (33, 32, 32, 3)


def test_identical_files_share_a_row_and_keep_their_own_lines(tmp_path):
    folder = make_images(tmp_path / "d")
    (folder / "CNV" / "00-copy.png").write_bytes((folder / "CNV" / "00-0.png").read_bytes())
    run = a_run(folder)
    prepare_data(run)
    data = open_fold(run, 0)
    assert len(data.images) == 32 and sum(len(data.rows(r)) for r in data.idx) == sum(map(len, data.idx.values())) == 33


def test_real_images_patients_under_two_classes_stay_together(shared_data):
    run = create_run("real", preset("edge", **{"data.root": str(shared_data / "ucsd_oct"), "data.size": 64}))
    facts = prepare_data(run)
    assert facts["images"] == 800 and facts["groups"] == 508 and facts["channels"] == 1
    assert facts["per_class"] == dict.fromkeys(("CNV", "DME", "DRUSEN", "NORMAL"), 200)
    for k in range(5):
        table = open_fold(run, k).table
        two = table[table.groupby("group").label.transform("nunique") > 1]
        assert two.group.nunique() == 19 and (two.groupby("group").role.nunique() == 1).all()
        assert table.role.value_counts().to_dict() == {"train": 512, "val": 128, "test": 160}
