"Folds, decode cache and the data stage: no patient on both sides, one cache whoever builds it, nothing half-written."
import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pandas as pd
import pytest
from conftest import folder_run
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from kdoct.core.files import KdoctError, read_json, sha256_file
from kdoct.core.presets import preset
from kdoct.core.runs import create_run
from kdoct.data import stage
from kdoct.data.cache import decode_cache
from kdoct.data.fold_data import folds_of, open_fold
from kdoct.data.folds import check_folds, make_folds, read_folds, write_folds
from kdoct.data.framing import cover, scale_bar, to_square, white_padding
from kdoct.data.listing import image_table
from kdoct.data.plan import leak_of
from kdoct.data.stage import prepare_data


def table_of(patients):
    "An image table from (label, number of images) a patient; a second label may follow."
    return image_table(
        [
            dict(path=f"{label}/{p:03d}-{i}.png", label=label, patient=f"{p:03d}")
            for p, visits in enumerate(patients)
            for label, n in visits
            for i in range(n)
        ]
    )


visit = st.tuples(st.sampled_from("AB"), st.integers(1, 6))
patients = st.lists(
    st.lists(visit, min_size=1, max_size=2, unique_by=lambda v: v[0]), min_size=12, max_size=40
)


@settings(max_examples=40)
@given(patients, st.integers(2, 5), st.sampled_from([0.2, 0.25, 0.4]), st.integers(0, 2**32 - 1))
def test_no_group_has_two_roles_whatever_the_table(patients, n_folds, val_fraction, seed):
    t = table_of(patients)
    try: folds = make_folds(t, n_folds, val_fraction, seed)
    except KdoctError: assume(False)  # too few patients of a class: refused, as another test shows
    for _, f in folds.groupby("fold"):
        roles = {r: set(f.group[f.role == r]) for r in ("train", "val", "test")}
        assert (
            not roles["train"] & roles["val"]
            and not roles["train"] & roles["test"]
            and not roles["val"] & roles["test"]
        )
        assert all(roles.values()) and sorted(f.path) == sorted(t.path)
    assert sorted(folds.path[folds.role == "test"]) == sorted(t.path)


rules = st.sampled_from([(False, False), (True, True), (True, False), (False, True)])


@settings(max_examples=40)
@given(patients, rules, st.integers(2, 4), st.sampled_from([0.1, 0.2, 0.3]), st.booleans(), st.data())
def test_calibration_patients_are_in_no_other_part_whatever_the_protocol_and_rule(
    patients, rule, n_folds, share, official, data
):
    t = table_of(patients)
    ill = {p: data.draw(st.sampled_from("AB")) for p in sorted(set(t.patient))}
    tested = {p for i, p in enumerate(sorted(ill)) if i % 3 == 0}
    t = t.assign(
        patient_label=t.patient.map(ill),
        split=np.where(t.patient.isin(tested), "test", "train") if official else "",
    )
    protocol = "official" if official else "grouped-cv"
    how = dict(protocol=protocol, worst_case=rule, calibration_fraction=share)
    try: folds = make_folds(t, n_folds, 0.25, **how)
    except KdoctError as e:
        assert "are not valid" not in str(e)
        assume(False)                                               # too few patients of a class: refused
    for _, f in folds.groupby("fold"):
        of = {r: set(f.group[f.role == r]) for r in ("train", "val", "calib", "test")}
        assert sum(map(len, of.values())) == len(set().union(*of.values())) and all(of.values())
    shows = folds.path.map(t.set_index("path").eval("label == patient_label"))
    assert shows[(folds.role == "calib")].all() or not all(rule)      # calibrated on slices as they are tested


def test_a_calibration_part_is_taken_from_training_and_changes_nothing_else():
    t = table_of([[("AB"[p % 2], 2)] for p in range(60)])
    without, folds = make_folds(t, 3), make_folds(t, 3, calibration_fraction=0.2)
    same = folds.role.where(folds.role != "calib", "train")
    assert same.equals(without.role)
    n = folds[folds.role.isin(["train", "val", "calib"])].groupby(["fold", "role"]).group.nunique()
    assert (n.xs("calib", level="role") == 8).all()   # of 40
    labels = (
        folds.assign(label=folds.path.str[0])[folds.role == "calib"]
        .groupby(["fold", "label"])
        .group.nunique()
    )
    assert (labels == 4).all()                        # stratified


def test_a_patient_who_calibrates_and_trains_is_refused(tmp_path):
    folds = make_folds(
        table_of([[("AB"[p % 2], 2)] for p in range(40)]), 3, calibration_fraction=0.2
    )
    assert check_folds(folds) is folds
    leak, lost = folds.copy(), folds.copy()
    leak.loc[leak.index[leak.role == "calib"][0], "role"] = "train"
    lost.loc[(lost.role == "calib") & (lost.fold == 1), "role"] = "train"
    for f, says in ((leak, "two roles"), (lost, "2 of 3 folds have a part calib")):
        f.to_csv(tmp_path / "folds.csv", index=False)
        with pytest.raises(KdoctError, match=says): read_folds(tmp_path / "folds.csv")


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
    ([[("A", 9)], [("B", 9)]] * 4, 5, "4 of A"), ([[("A", 1)]] * 20, 3, "All images "
                                                                        "are of class A"), ([], 3, "no images"),
    ([[("A", 1)]] * 20 + [[("B", 5)]] * 5, 5, "5 of B")])
def test_too_few_patients_are_refused_with_numbers(patients, n_folds, says):
    with pytest.raises(KdoctError) as e: make_folds(table_of(patients), n_folds)
    assert says in str(e.value)


@pytest.mark.parametrize(("n_folds", "helps"), [(2, "-> "
                                                    "Add patients."), (5, "--set data.n_folds=2")])
def test_fewer_folds_are_proposed_only_where_they_are_fewer_and_enough(n_folds, helps):
    few = table_of([[("A", 1)]] * 9 + [[("B", 1)]] * (2 if n_folds == 2 else 3))
    with pytest.raises(KdoctError) as e: make_folds(few, n_folds)
    assert helps in str(e.value) and ("fewer" in e.value.fix) == (n_folds > 2)


def test_groups_that_are_no_patients_are_shown():
    names = ("CNV", "NORMAL")
    table = table_of([[("A", 4), ("B", 4)]] * 2)
    table["group"] = [names[i % 2] for i in range(len(table))]
    with pytest.raises(KdoctError) as e: make_folds(table, 5)
    assert "The groups are 'CNV', 'NORMAL'." in e.value.problem
    assert "--group-pattern" in e.value.fix and "data.columns.patient" in e.value.fix


def test_a_class_that_the_official_test_part_lacks_is_not_mended_by_fewer_folds():
    table = table_of([[("A", 2)]] * 12 + [[("B", 2)]] * 12)
    table["split"] = ["test" if i < 8 else "train" for i in range(len(table))]
    with pytest.raises(KdoctError, match="the test part has no image of B") as e:
        make_folds(table, 3, protocol="official")
    assert "n_folds" not in e.value.fix and "data.protocol=grouped-cv" in e.value.fix


def test_the_official_protocol_says_that_every_patient_is_in_both_parts():
    both = table_of([[("AB"[p % 2], 2)] for p in range(20)])
    both["split"] = ["train", "test"] * 20
    with pytest.raises(KdoctError, match="every group .* has images in the test part") as e:
        make_folds(both, 3, protocol="official")
    assert "grouped-cv" in e.value.fix
    alone = [group for _, groups in both.groupby("label").group for group in groups.unique()[:2]]
    both.loc[both.group.isin(alone), "split"] = "train"
    with pytest.raises(
        KdoctError,
        match="2 of A, 2 of B. Left out are 16 images of patients who are in the test part",
    ):
        make_folds(both, 3, protocol="official")


def test_the_data_stage_says_that_official_parts_are_mixed(tmp_path, capsys):
    facts = prepare_data(ucsd_run(write_ucsd(tmp_path / "d"), "r", protocol="grouped-cv"))
    assert (
        facts["mixed_parts"] in capsys.readouterr().out
        and "--set data.protocol=official" in facts["mixed_parts"]
    )
    assert prepare_data(ucsd_run(tmp_path / "d", "o"))["mixed_parts"] == ""


GOOD = make_folds(table_of([[("AB"[p % 2], 2)] for p in range(20)]), 3)


def spoil(folds, what):
    f = folds.copy()
    if what == "leak": f.loc[f.index[f.role == "train"][0], "role"] = "val"
    elif what == "never tested":
        f.loc[f.group.isin(f.group[f.role == "test"].iloc[:1]) & (f.role == "test"), "role"] = (
            "train"
        )
    elif what == "row lost": f = f.iloc[1:]
    elif what == "fold lost": f = f[f.fold != 1]
    elif what == "row twice": f = pd.concat([f, f.iloc[:1]])
    elif what == "unknown role": f.loc[0, "role"] = "train2"
    elif what == "column lost": f = f.drop(columns="group")
    elif what == "gap": f.loc[0, "group"] = ""
    elif what == "two groups": f.loc[f.index[f.path == f.path[0]][0], "group"] = "another"
    return f


@pytest.mark.parametrize(
    "what",
    ["leak", "never tested", "row lost", "fold lost", "row twice", "unknown role", "column lost", "gap", "two groups"],
)
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
    for i in range(40):
        Image.fromarray(rng.integers(0, 255, (60, 90), np.uint8)).save(folder / f"{i:02d}.png")
    names = sorted(p.name for p in folder.iterdir())
    return folder, pd.DataFrame(dict(path=names, sha256=[sha256_file(folder / n) for n in names]))


def right(cache, folder, table):
    return all((cache.images[cache.rows([s])[0]] == to_square(Image.open(folder / p), 48, 1)).all()
               for p, s in zip(table.path, table.sha256, strict=True))


CHILD = """
    import sys, pandas as pd, kdoct.data.cache as D
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
    code = textwrap.dedent(CHILD).format(
        patch=textwrap.dedent(patch), table=str(tmp_path / "table.json"), folder=str(folder)
    )
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=root,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_two_processes_build_one_cache_once(root, tmp_path, images, outputs):
    a = child(root, tmp_path, images, PAUSE_IN_ROWS)
    assert [a.stdout.readline().strip() for _ in "12"] == ["begins", "building"]
    b = child(root, tmp_path, images, NOTE_BUILD)
    assert b.stdout.readline().strip() == "begins"  # and now waits for the lock, or will
    said_a, said_b = a.communicate("go\n", timeout=60)[0], b.communicate(timeout=60)[0]
    assert said_a == said_b and said_b.startswith("done")
    assert sorted(p.suffix for p in (outputs / "cache").glob("[!.]*") if p.suffix != ".lock") == [
        ".json",
        ".npy",
    ]
    assert right(decode_cache(images[1], images[0], 48), *images)


@pytest.mark.parametrize("where", [PAUSE_IN_ROWS, PAUSE_BEFORE_JSON], ids=["among the rows", "before the json"])
def test_a_killed_builder_leaves_nothing_that_looks_like_a_cache(
    root, tmp_path, images, outputs, where
):
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
    with pytest.raises(KdoctError, match="07.png has changed since the audit"):
        decode_cache(table, folder, 48)
    assert not list((outputs / "cache").glob("*.npy"))


def test_other_size_or_channels_are_another_cache_and_no_row_is_found_by_position(images):
    folder, table = images
    grey, small, colour = (
        decode_cache(table, folder, 48),
        decode_cache(table, folder, 32),
        decode_cache(table, folder, 48, channels=3),
    )
    assert len({grey.path, small.path, colour.path}) == 3 and colour.images.shape == (40, 48, 48, 3)
    part = table[::-2]
    assert right(decode_cache(part, folder, 48), folder, part)
    with pytest.raises(KdoctError, match="does not hold"):
        decode_cache(part, folder, 48).rows(table.sha256)


def make_images(folder, patients=16, seed=0):
    rng = np.random.default_rng(seed)
    for p in range(patients):
        sub = folder / ("CNV", "NORMAL")[p % 2]
        sub.mkdir(parents=True, exist_ok=True)
        for i in range(2):
            Image.fromarray(rng.integers(0, 255, (50, 60), np.uint8)).save(sub / f"{p:02d}-{i}.png")
    return folder


def a_run(folder, name="r", **changes):
    return folder_run(folder, r"/(\d+)-", name, "edge", **changes)


def test_stage_writes_its_files_and_a_second_call_changes_none(tmp_path):
    run = a_run(make_images(tmp_path / "d"))
    first = prepare_data(run)
    before = {
        p.name: p.read_bytes()
        for p in run.path.iterdir()
        if p.suffix in (".csv", ".parquet") or p.name == "audit.json"
    }
    assert set(before) == {"audit.csv", "audit.json", "folds.csv", "table.parquet"}
    again = prepare_data(run)
    assert {**first, "seconds": 0} == {**again, "seconds": 0}
    assert all((run.path / n).read_bytes() == b for n, b in before.items())
    assert (
        first["images"] == 32
        and first["groups"] == 16
        and first["per_class"] == {"CNV": 16, "NORMAL": 16}
    )


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
                assert (
                    data.classes[data.labels[i]] == r.label == r.path.split("/")[0]
                    and data.groups[i] == r.group
                )


def test_open_fold_before_the_stage_names_the_command(tmp_path):
    with pytest.raises(KdoctError, match="papermill .*01_data.ipynb .*-p run r"):
        open_fold(a_run(make_images(tmp_path / "d")), 0)


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
    Image.fromarray(np.random.default_rng(9).integers(0, 255, (50, 60), np.uint8)).save(
        folder / "CNV" / "00-0.png"
    )
    with pytest.raises(KdoctError, match="made with other data"): prepare_data(run)
    assert len(open_fold(run, 0).table) == 32  # what was prepared stays usable


def test_an_audit_that_stops_leaves_its_table_and_the_next_run_can_leave_out(tmp_path):
    folder = make_images(tmp_path / "d")
    (folder / "CNV" / "99-0.png").write_bytes(b"")
    run = a_run(folder)
    with pytest.raises(KdoctError, match="1 empty"): prepare_data(run)
    assert (
        "CNV/99-0.png,empty,error" in (run.path / "audit.csv").read_text()
        and not run.folds_csv.exists()
    )
    assert prepare_data(a_run(folder, "r2", leave_out=["empty"]))["images"] == 32


def test_a_class_of_the_recipe_without_images_is_refused(tmp_path):
    with pytest.raises(KdoctError, match="no image of class DME"):
        prepare_data(a_run(make_images(tmp_path / "d"), classes=["CNV", "DME", "NORMAL"]))


def test_colour_data_are_cached_in_colour(tmp_path):
    folder = make_images(tmp_path / "d")
    Image.fromarray(np.random.default_rng(5).integers(0, 255, (50, 60, 3), np.uint8)).save(
        folder / "CNV" / "00-5.png"
    )
    run = a_run(folder)
    assert prepare_data(run)["channels"] == 3 and open_fold(run, 0).images.shape == (33, 32, 32, 3)


def test_identical_files_share_a_row_and_keep_their_own_lines(tmp_path):
    folder = make_images(tmp_path / "d")
    (folder / "CNV" / "00-copy.png").write_bytes((folder / "CNV" / "00-0.png").read_bytes())
    run = a_run(folder)
    prepare_data(run)
    data = open_fold(run, 0)
    assert (
        len(data.images) == 32
        and sum(len(data.rows(r)) for r in data.idx) == sum(map(len, data.idx.values())) == 33
    )


@pytest.mark.slow
def test_real_images_patients_under_two_classes_stay_together(shared_data):
    run = create_run(
        "real", preset("edge", **{"data.root": str(shared_data / "ucsd_oct"), "data.size": 64})
    )
    facts = prepare_data(run)
    assert facts["images"] == 800 and facts["groups"] == 508 and facts["channels"] == 1
    assert facts["per_class"] == dict.fromkeys(("CNV", "DME", "DRUSEN", "NORMAL"), 200)
    for k in range(5):
        table = open_fold(run, k).table
        two = table[table.groupby("group").label.transform("nunique") > 1]
        assert two.group.nunique() == 19 and (two.groupby("group").role.nunique() == 1).all()
        assert table.role.value_counts().to_dict() == {"train": 512, "val": 128, "test": 160}


ROLES = ("train", "val", "test")


def official_table(patients):
    "An image table from (label, official part, number of images) a patient; several of these may follow."
    return image_table(
        [
            dict(
                path=f"{part}/{label}/{p:03d}-{k}-{i}.png",
                label=label,
                patient=f"{p:03d}",
                split=part,
            )
            for p, visits in enumerate(patients)
            for k, (label, part, n) in enumerate(visits)
            for i in range(n)
        ]
    )


visit_of = st.tuples(
    st.sampled_from("AB"), st.sampled_from(["train", "train", "val", "test"]), st.integers(1, 4)
)


@settings(max_examples=25)
@given(
    st.lists(st.lists(visit_of, min_size=1, max_size=3), min_size=16, max_size=40),
    st.integers(2, 4),
    st.integers(0, 99),
)
def test_official_folds_test_the_same_images_and_train_on_nobody_of_them(patients, n_folds, seed):
    t = official_table(patients)
    try: folds = make_folds(t, n_folds, seed=seed, protocol="official")
    except KdoctError: assume(False)
    tested, groups = set(t.path[t.split == "test"]), set(t.group[t.split == "test"])
    rest = set(t.path[(t.split != "test") & ~t.group.isin(groups)])
    for _, f in folds.groupby("fold"):
        assert set(f.path[f.role == "test"]) == tested and not groups & set(
            f.group[f.role.isin(["train", "val"])]
        )
        assert set(f.path[f.role.isin(["train", "val"])]) == rest and not set(
            f.group[f.role == "train"]
        ) & set(f.group[f.role == "val"])
    assert sorted(folds.path[folds.role == "val"]) == sorted(rest)


@settings(max_examples=25)
@given(patients, st.sampled_from([(True, True), (True, False), (False, True)]), st.integers(2, 4), st.data())
def test_the_worst_case_rule_takes_slices_out_where_it_holds_and_nowhere_else(
    patients, rule, n_folds, data
):
    t = table_of(patients).assign(
        patient_label=lambda d: d.patient.map(
            {p: data.draw(st.sampled_from("AB")) for p in d.patient.unique()}
        )
    )
    try: folds = make_folds(t, n_folds, worst_case=rule)
    except KdoctError: assume(False)
    shows = t.set_index("path").eval("label == patient_label")
    f = folds.assign(shows=folds.path.map(shows))
    learns, out = f[f.role.isin(["train", "val"])], f[f.role == "out"]
    assert (
        not out.shows.any()
        and (learns.shows.all() or not rule[0])
        and (f.shows[f.role == "test"].all() or not rule[1])
    )
    assert set(f.path[f.role == "test"]) == set(t.path if not rule[1] else shows.index[shows])
    used = f[f.role != "out"]
    assert (used.groupby(["fold", "group"]).role.nunique() == 1).all() and len(f) == n_folds * len(
        t
    )


def test_without_the_rule_folds_are_the_same_whether_or_not_the_diagnosis_is_known():
    t = table_of([[("AB"[p % 2], p % 4 + 1)] for p in range(24)])
    assert make_folds(t, 3).equals(make_folds(t.assign(patient_label="A"), 3))


def test_the_rule_without_a_known_diagnosis_and_official_without_parts_are_refused_with_a_remedy():
    t = table_of([[("AB"[p % 2], 2)] for p in range(20)])
    with pytest.raises(KdoctError, match="patient_label"):
        make_folds(t, 3, worst_case=(True, False))
    with pytest.raises(KdoctError, match="(?s)40 of 40 images .*data.protocol=grouped-cv"):
        make_folds(t, 3, protocol="official")
    for part in ("test", "train"):
        with pytest.raises(KdoctError, match=f"all images are in part {part}"):
            make_folds(t.assign(split=part), 3, protocol="official")
    half = t.assign(split=["test" if i % 4 else "elsewhere" for i in range(len(t))])
    with pytest.raises(KdoctError, match="10 of 40 images are in none"):
        make_folds(half, 3, protocol="official")


OFFICIAL = official_table(
    [[("AB"[p % 2], "train", 2), *([("AB"[p % 2], "test", 1)] if p < 6 else [])] for p in range(30)]
)


def test_groups_merged_by_pixels_count_as_overlap_too():
    "A patient whose picture is in the test part under another number is not trained on."
    merged = OFFICIAL.assign(group=OFFICIAL.group.replace({"020": "000"}))
    folds = make_folds(merged, 3, protocol="official")
    assert set(folds.role[folds.path.str.contains("/020-")]) == {"out"} and set(
        folds.role[folds.path.str.contains("/021-")]
    ) == {"train", "val"}


def test_a_leak_is_accepted_only_where_it_is_declared(tmp_path):
    leaky = make_folds(OFFICIAL, 3, protocol="official", overlap="keep")
    assert (
        leak_of(leaky) == dict(groups=6, images=12)
        and leak_of(make_folds(OFFICIAL, 3, protocol="official")) is None
    )
    write_folds(leaky, tmp_path / "folds.csv", "official", leak=True)
    assert read_folds(tmp_path / "folds.csv", "official", leak=True).equals(leaky)
    for declared in (
        {},
        dict(protocol="official"),
        dict(protocol="grouped-cv"),
        dict(protocol="grouped-cv", leak=True),
    ):
        with pytest.raises(KdoctError, match="two roles"):
            read_folds(tmp_path / "folds.csv", **declared)
    f = leaky.copy()
    f.loc[
        f.index[(f.fold == 0) & (f.role == "train") & f.path.str.contains("/020-")][:1], "role"
    ] = "val"
    # between training and validation nothing may leak
    with pytest.raises(KdoctError): check_folds(f, "official", leak=True)


def spoil_official(f, what):
    f, tested = f.copy(), f.path[f.role == "test"].iloc[0]
    if what == "a test image missing in one fold":
        f.loc[(f.path == tested) & (f.fold == 1), "role"] = "out"
    elif what == "a training image tested once":
        f.loc[f.index[(f.role == "train") & (f.fold == 0)][0], "role"] = "test"
    elif what == "out in one fold only":
        f.loc[f.index[(f.role == "train") & (f.fold == 2)][0], "role"] = "out"
    elif what == "a fold without validation":
        f.loc[(f.fold == 1) & (f.role == "val"), "role"] = "train"
    elif what == "an overlap trained on":
        f.loc[f.index[(f.role == "out") & (f.fold == 0)][0], "role"] = "train"
    return f


@pytest.mark.parametrize("what", ["a test image missing "
                                  "in one fold", "a training image "
                                                 "tested once", "out in one fold only",
                                  "a fold without validation", "an overlap trained on"])
@pytest.mark.parametrize("protocol", ["official", ""])
def test_spoiled_official_folds_are_refused(what, protocol):
    good = make_folds(OFFICIAL, 3, protocol="official")
    assert check_folds(good, protocol) is good
    with pytest.raises(KdoctError): check_folds(spoil_official(good, what), protocol)


def test_grouped_folds_are_not_official_ones_nor_the_other_way_round():
    with pytest.raises(KdoctError): check_folds(GOOD, "official")
    with pytest.raises(KdoctError):
        check_folds(make_folds(OFFICIAL, 3, protocol="official"), "grouped-cv")


WORST = table_of([[("AB"[p % 2], 2), ("AB"[(p + 1) % 2], 2)] for p in range(20)]).assign(
    patient_label=lambda d: d.patient.map(lambda p: "AB"[int(p) % 2])
)


@pytest.mark.parametrize("what", ["out in one "
                                  "training fold only", "a group "
                                                        "never tested", "one image never tested"])
def test_out_cannot_hide_an_image_from_the_test(what):
    f = make_folds(WORST, 3, worst_case=(False, True))
    assert check_folds(f, "grouped-cv") is f
    group = f.group[(f.role == "test") & (f.fold == 0)].iloc[0]
    mine, test = f.group == group, f.role == "test"
    if what == "out in one training fold only":
        f.loc[f.index[mine & (f.fold == 1)][0], "role"] = "out"
    elif what == "a group never tested": f.loc[mine & (f.fold == 0), "role"] = "train"
    else:
        path = f.path[mine & test].iloc[0]
        (
            f.loc[(f.path == path) & (f.fold == 0), "role"],
            f.loc[(f.path == path) & (f.fold == 1), "role"],
        ) = "out", "out"
    with pytest.raises(KdoctError): check_folds(f, "grouped-cv")


def write_ucsd(folder, n=24):
    "A small UCSD: every fourth patient of training is tested too, and patient 3 under another number."
    rng = np.random.default_rng(0)
    def put(part, p, i, a):
        path = folder / part / "AB"[p % 2] / f"{'AB'[p % 2]}-{p}-{i}.jpeg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(a).save(path, "PNG")
    scans = rng.integers(0, 200, (n + 8, 3, 40, 60)).astype(np.uint8)
    for p in range(n):
        for i in (1, 2): put("train", p, i, scans[p, i])
        if p % 4 == 0: put("test", p, 3, scans[p, 0])
    for p in range(n, n + 8): put("test", p, 1, scans[p, 0] if p != n + 1 else scans[3, 1])
    return folder


def ucsd_run(folder, name, **changes):
    data = {
        "data.root": str(folder),
        "data.n_folds": 3,
        "data.size": 32,
        "data.margin": 0,
        "data.classes": None,
        "data.severity": None,
    }
    return create_run(
        name, preset("small-ucsd", **data | {"data." + k: v for k, v in changes.items()})
    )


def test_a_run_records_how_many_of_its_pictures_are_coloured_throughout(tmp_path):
    "One coloured line makes a run take three channels, and none of its pictures a photograph of the fundus."
    rng = np.random.default_rng(0)
    for p in range(40):
        grey = np.repeat(rng.integers(0, 200, (40, 60, 1)), 3, 2).astype(np.uint8)
        if p < 2: grey[:4] = (255, 0, 0)
        if p == 2: grey = grey//(1, 2, 4) + np.array((55, 20, 0))
        path = tmp_path / "d" / "AB"[p % 2] / f"{p}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(grey.astype(np.uint8)).save(path)
    data = dict(
        source="folder",
        root=str(tmp_path / "d"),
        group_pattern=r"/(\d+)",
        classes=None,
        size=32,
        margin=0,
        n_folds=2,
    )
    facts = prepare_data(
        create_run("coloured", preset("edge", **{f"data.{k}": v for k, v in data.items()}))
    )
    assert (facts["channels"], facts["coloured"]) == (3, 1)


def test_the_official_protocol_runs_reports_the_overlap_and_leaves_it_out(tmp_path, capsys):
    run = ucsd_run(write_ucsd(tmp_path / "d"), "r")
    facts = prepare_data(run)
    assert (
        facts["protocol"] == "official"
        and facts["leak"] is None
        and facts["overlap"] == 14
        and facts["merged_groups"] == 1
    )
    assert (
        facts["per_fold"]["0"]["out"] == {"images": 14, "groups": 7}
        and facts["per_fold"]["0"]["test"]["images"] == 14
    )
    printed = capsys.readouterr().out
    assert (
        "14 images are outside the official test part" in printed
        and "out 14 images / 7 groups" in printed
        and "leak" not in printed
    )
    audit = pd.read_csv(run.path / "audit.csv")
    assert (audit.problem == "official-overlap").sum() == 14
    data = open_fold(run, 1)
    assert (
        set(data.idx) == set(ROLES)
        and len(data.rows("out")) == 14
        and not set(data.groups[data.idx["train"]]) & set(data.groups[data.idx["test"]])
    )
    assert prepare_data(run)["folds_sha256"] == facts["folds_sha256"]


def test_the_published_leak_is_kept_only_on_demand_and_said_loudly(tmp_path, capsys):
    run = ucsd_run(write_ucsd(tmp_path / "d"), "r", official_overlap="keep")
    facts = prepare_data(run)
    assert facts["leak"] == {"groups": 7, "images": 14} and "out" not in facts["per_fold"]["0"]
    assert "WARNING: the published leak is kept: 7 patients" in capsys.readouterr().out
    assert leak_of(folds_of(run)) == facts["leak"] and len(open_fold(run, 0).rows("train"))
    with pytest.raises(KdoctError, match="two roles"): read_folds(run.folds_csv)


def test_grouped_cv_uses_both_official_folders_and_tests_every_image_once(tmp_path):
    run = ucsd_run(write_ucsd(tmp_path / "d"), "r", protocol="grouped-cv")
    facts, folds = prepare_data(run), folds_of(run)
    assert (
        facts["images"] == 62
        and sorted(folds.path[folds.role == "test"]) == sorted(folds.path[folds.fold == 0])
        and facts["leak"] is None
    )


@pytest.mark.parametrize(
    "change", [dict(protocol="grouped-cv"), dict(official_overlap="keep"), dict(calibration_fraction=0.2)]
)
def test_folds_of_another_rule_are_not_taken_over(tmp_path, change):
    folder = write_ucsd(tmp_path / "d")
    theirs, mine = ucsd_run(folder, "theirs"), ucsd_run(folder, "mine", **change)
    prepare_data(theirs)
    mine.folds_csv.write_bytes(theirs.folds_csv.read_bytes())
    with pytest.raises(KdoctError): prepare_data(mine)
    back = ucsd_run(folder, "back")
    prepare_data(ucsd_run(folder, "other", **change))
    back.folds_csv.write_bytes((back.path.parent / "other" / "folds.csv").read_bytes())
    with pytest.raises(KdoctError): prepare_data(back)


def write_neh(folder):
    "A small NEH: 8 patients a class with slices of several labels; CNV/1 and DRUSEN/1 hold the same pictures."
    rng, rows = np.random.default_rng(0), []
    for c, other in (("NORMAL", "DRUSEN"), ("DRUSEN", "NORMAL"), ("CNV", "DRUSEN")):
        for n in range(1, 9):
            for i, y in enumerate([c, c, other, "NORMAL"]):
                a, name = (
                    rng.integers(0, 200, (40, 60), np.uint8),
                    f"{c}/{n}/{i:03d}_{y.title() if y != 'CNV' else y}.{'tif' if n % 2 else 'jpg'}",
                )
                (folder / c / str(n)).mkdir(parents=True, exist_ok=True)
                if (c, n) == ("CNV", 1):
                    (folder / name).write_bytes(
                        next((folder / "DRUSEN" / "1").glob(f"{i:03d}_*")).read_bytes()
                    )
                else: Image.fromarray(a).convert("RGB").save(folder / name, **({"quality": 95} if n % 2 == 0 else {}))
                rows.append(f"{n},{c},OD,{i},{y},{name}")
    (folder / "data_information.csv").write_text(
        "Patient ID,Class,Eye,B-scan,Label,Directory\n" + "\n".join(rows)
    )
    return folder


def neh_run(folder, name, **changes):
    data = {"data.root": str(folder), "data.n_folds": 3, "data.size": 32, "data.margin": 3}
    return create_run(
        name, preset("small-neh", **data | {"data." + k: v for k, v in changes.items()})
    )


def test_neh_runs_with_one_preset_and_says_what_it_left_out(tmp_path, capsys):
    run = neh_run(write_neh(tmp_path / "d"), "r")
    facts = prepare_data(run)
    # slices 0, 1 and 2 of CNV/1 and DRUSEN/1 have two labels; slice 3 is NORMAL in both
    assert (
        facts["images"] == 96 - 6
        and facts["problems"]["same-pixels-two-labels"] == 6
        and facts["merged_groups"] == 1
        and facts["groups"] == 23
    )
    assert "same-pixels-two-labels" in capsys.readouterr().out and read_json(
        run.path / "audit.json"
    )["merged_groups"] == {"CNV/1": ["CNV/1", "DRUSEN/1"]}
    folds = folds_of(run)
    for k in range(3):
        data = open_fold(run, k)
        for role in ("train", "val"):
            assert (data.rows(role).label == data.rows(role).patient_label).all()
        assert (data.rows("test").label != data.rows("test").patient_label).any()
        assert data.images.shape[1:] == (35, 35)  # size and margin
    assert sorted(folds.path[folds.role == "test"]) == sorted(folds.path[folds.fold == 0])


def test_neh_the_published_rule_tests_on_such_slices_only_and_a_contradiction_stops_without_leave_out(
    tmp_path,
):
    folder = write_neh(tmp_path / "d")
    run = neh_run(folder, "r", worst_case_test=True)
    prepare_data(run)
    rows = pd.concat([open_fold(run, k).rows("test") for k in range(3)])
    # a NORMAL patient's last slice is NORMAL too
    assert (rows.label == rows.patient_label).all() and len(rows) == 24 * 2 + 8 - 4
    with pytest.raises(KdoctError, match="(?s)6 same-pixels-two-labels .*leave_out"):
        prepare_data(neh_run(folder, "strict", leave_out=[]))


def test_framings_are_caches_of_their_own_and_the_recipe_chooses(images, tmp_path):
    folder, table = images
    ways = [
        {},
        dict(resize="crop"),
        dict(resize="pad"),
        dict(fill_white=True),
        dict(mask_scale_bar=True),
    ]
    caches = [decode_cache(table, folder, 48, **w) for w in ways]
    assert len({c.path for c in caches}) == 5
    for c, w in zip(caches, ways, strict=True):
        assert (
            c.images[c.rows([table.sha256[7]])[0]]
            == to_square(Image.open(folder / table.path[7]), 48, 1, **w)
        ).all()
    run = a_run(make_images(tmp_path / "d"), resize="pad", margin=4)
    prepare_data(run)
    first = open_fold(run, 0).rows("train").path[0]
    data = open_fold(run, 0)
    assert (
        data.images[data.idx["train"][0]]
        == to_square(Image.open(tmp_path / "d" / first), 36, 1, resize="pad")
    ).all()


def scan_with(white=0, bar=False, h=200, w=300):
    "A drawn B-scan: noise, a bright layer; `white` rows of padding above and as many columns at the left; a red bar."
    rng = np.random.default_rng(1)
    a = rng.normal(30, 8, (h, w)) + 150 * np.exp(-((np.arange(h)[:, None] - h / 2) / 12) ** 2)
    a = np.repeat(a.clip(0, 255).astype(np.uint8)[..., None], 3, axis=2)
    if white: a[:white], a[:, :white] = 255, 255
    if bar: a[int(.95 * h):int(.97 * h), 4:w // 12] = (250, 60, 60)
    return a


def test_white_padding_is_found_whole_and_the_retina_is_not(tmp_path):
    a = scan_with(white=20)
    found = white_padding(a[..., 0])
    assert found[:20].all() and found[:, :20].all() and not found[26:, 26:].any()
    assert not white_padding(scan_with()[..., 0]).any()
    bright = scan_with()[..., 0].copy()
    bright[90:112] = 255  # a saturated layer from border to border
    assert not white_padding(bright).any()
    Image.fromarray(a).save(tmp_path / "a.jpg", quality=70)  # specks and a grey fringe
    saved = np.asarray(Image.open(tmp_path / "a.jpg").convert("L"))
    assert (
        cover(saved, white_padding(saved))[:, :20].max() < 235
        and cover(saved, white_padding(saved))[:20].max() < 235
    )


@pytest.mark.parametrize("channels", [1, 3])
def test_what_is_covered_looks_like_the_background_and_the_rest_is_untouched(channels):
    a = scan_with(white=20, bar=True) if channels == 3 else scan_with(white=20)[..., 0]
    hidden = white_padding(a if channels == 1 else a[..., 0]) | scale_bar(a.shape)
    b = cover(a, hidden)
    assert (b[~hidden] == a[~hidden]).all() and (cover(a, hidden) == b).all() and b.shape == a.shape
    new, background = b[hidden].astype(float), a[180:188, 40:].astype(float)
    assert abs(new.mean() - background.mean()) < 3 and abs(new.std() - background.std()) < 2
    other = a.copy()
    other[100, 100] ^= 1
    assert (cover(other, hidden) != b)[hidden].mean() > 0.5  # drawn by content: not one pattern for all images


@pytest.mark.parametrize("shape", [(100, 160), (160, 100), (100, 100), (101, 32)])
def test_crop_keeps_the_middle_and_pad_keeps_everything(shape):
    a = scan_with(h=shape[0], w=shape[1])[..., 0]
    h, w, side = *shape, min(shape)
    crop, pad = (
        to_square(Image.fromarray(a), side, 1, resize="crop"),
        to_square(Image.fromarray(a), max(shape), 1, resize="pad"),
    )
    assert (crop == a[(h - side) // 2:, (w - side) // 2:][:side, :side]).all()
    top, left = (max(shape) - h) // 2, (max(shape) - w) // 2
    assert (pad[top:top + h, left:left + w] == a).all() and pad.shape == (max(shape),) * 2
    if h != w:
        assert (
            0
            < np.delete(
                pad,
                np.s_[top : top + h] if h < w else np.s_[left : left + w],
                axis=0 if h < w else 1,
            ).mean()
            < 60
        )


def test_an_image_that_is_all_padding_is_an_error_that_names_it(tmp_path):
    a = np.full((64, 64), 255, np.uint8)
    a[30, 30] = 250
    Image.fromarray(a).save(tmp_path / "white.png")
    table = pd.DataFrame(dict(path=["white.png"], sha256=[sha256_file(tmp_path / "white.png")]))
    with pytest.raises(KdoctError, match="white.png: All of the image"):
        decode_cache(table, tmp_path, 32, fill_white=True)


def test_on_real_scans_the_white_at_the_border_is_gone(shared_data):
    left = []
    for p in sorted((shared_data / "ucsd_oct").glob("*/*-1.jpeg"))[::25]:
        a = np.asarray(Image.open(p).convert("L"))
        b = cover(a, white_padding(a))
        left.append(
            [
                (
                    np.concatenate(
                        [x[:3].ravel(), x[-3:].ravel(), x[:, :3].ravel(), x[:, -3:].ravel()]
                    )
                    >= 240
                ).mean()
                for x in (a, b)
            ]
        )
    before, after = np.mean(left, axis=0)
    assert before > 0.15 and after < 0.002


def test_fewer_images_than_parts_are_refused_in_words():
    t = image_table(
        [dict(path=f"{c}/{i}.png", label=c, patient=f"{c}{i}") for c in "AB" for i in range(6)]
    )
    with pytest.raises(
        KdoctError,
        match="The largest class, [AB], has 4 images; they cannot be split into 5 "
              "parts.*\n.*val_fraction",
    ):
        make_folds(t, n_folds=3)


def patients_of_both_classes(n):
    rows = [dict(path=f"{c}/{i}_{k}.png", label=c, patient=str(i))
            for c in "AB" for i in range(n) for k in range(3)]
    return image_table(rows)


@pytest.mark.parametrize("n, n_folds, left, remedy", [(6, 5, 4, 0.25), (5, 3, 3, 0.34)])
def test_too_few_patients_for_validation_name_the_share_that_works(n, n_folds, left, remedy):
    "The number of folds is not what is wrong, and the advice must help."
    t = patients_of_both_classes(n)
    with pytest.raises(KdoctError) as e: make_folds(t, n_folds=n_folds)
    assert f"there are {left} groups (patients); data.val_fraction would split them into 5" in str(e.value)
    assert f"--set data.val_fraction={remedy}" in e.value.fix
    assert make_folds(t, n_folds=n_folds, val_fraction=remedy).fold.nunique() == n_folds


def test_a_fold_that_validates_on_more_than_it_trains_on_is_warned_of(capsys):
    per_fold = {
        "0": dict(train=dict(groups=2), val=dict(groups=3)),
        "1": dict(train=dict(groups=3), val=dict(groups=2)),
    }
    facts = dict(leak=None, val_lacks={}, calib_lacks={}, few_to_learn=stage._few_to_learn(per_fold))
    stage._print_warnings(facts)
    printed = capsys.readouterr().out
    assert "WARNING: fold 0 trains on 2 groups (patients) and validates on 3" in printed
    assert "fold 1" not in printed


PARTS_OF_1_9 = {
    0: [["P3", "P7", "P8"], ["P0", "P2", "P4"], ["P1", "P5", "P6"]],
    1: [["P0", "P7", "P8"], ["P1", "P2", "P3"], ["P4", "P5", "P6"]],
}


@pytest.mark.parametrize("seed", [0, 1])
def test_parts_are_those_of_scikit_learn_1_8_with_every_release(seed):
    "Drawn by hand: its own shuffle was mended in 1.8. The numbers are what 1.9.1 gives with `shuffle=True`."
    from sklearn.model_selection import StratifiedGroupKFold

    from kdoct.data.folds import groups_in_drawn_order
    patients = np.repeat([f"P{i}" for i in range(9)], 2)
    labels = np.repeat(list("ABCABCABC"), 2)
    drawn = groups_in_drawn_order(patients, seed)
    parts = [sorted(set(patients[test]))
             for _, test in StratifiedGroupKFold(3).split(labels, labels, drawn)]
    assert parts == PARTS_OF_1_9[seed]
    assert all(len(set(labels[np.isin(patients, part)])) == 3 for part in parts)
