"Sources: names become an image table, and what a name does not say is not guessed."
import csv
import os

import pandas as pd
import pytest

from kdoct.core import DataRecipe, KdoctError
from kdoct.sources import LAYOUTS, SOURCES, TABLE_COLUMNS, check_table, image_table, load_table


def lay_out(folder, *names):
    for n in names:
        (folder / n).parent.mkdir(parents=True, exist_ok=True)
        (folder / n).touch()
    return str(folder)


def problems(listing): return dict(zip(listing.findings.path, listing.findings.problem, strict=True))


def test_ucsd_groups_by_number_alone_across_classes_and_official_parts(tmp_path):
    root = lay_out(tmp_path, "train/CNV/CNV-7-1.jpeg", "test/DME/DME-7-2.jpeg", "test/DME/DME-07-3.JPEG")
    t = load_table(DataRecipe(source="ucsd", root=root)).table.set_index("path")
    assert dict(t.group) == {"train/CNV/CNV-7-1.jpeg": "7", "test/DME/DME-7-2.jpeg": "7", "test/DME/DME-07-3.JPEG": "07"}
    assert list(t.split) == ["test", "test", "train"]
    assert list(t["slice"]) == [3, 2, 1]


@pytest.mark.parametrize("name", ["CNV/CNV-7.jpeg", "CNV/DME-7-1.jpeg", "CNV/CNV-7a-1.jpeg", "CNV/CNV-7-1 (copy).jpeg",
                                  "CNV/sub/CNV-7-1.jpeg", "CNV-7-1.jpeg", "cnv/CNV-7-2.jpeg", "CNV/CNV--7-1.jpeg"])
def test_ucsd_does_not_guess_a_name(tmp_path, name):
    listing = load_table(DataRecipe(source="ucsd", root=lay_out(tmp_path, "CNV/CNV-1-1.jpeg", name)))
    assert problems(listing) == {name: "unparsable-name"}
    assert list(listing.table.path) == ["CNV/CNV-1-1.jpeg"]


def test_table_does_not_depend_on_the_order_of_the_directory(tmp_path, monkeypatch):
    root = lay_out(tmp_path, *(f"{c}/{c}-{i}-1.jpeg" for c in ("CNV", "DME") for i in range(20)))
    want, real = load_table(DataRecipe(source="ucsd", root=root)).table, os.scandir
    monkeypatch.setattr("kdoct.sources.os.scandir", lambda p: list(real(p))[::-1])
    assert load_table(DataRecipe(source="ucsd", root=root)).table.equals(want)


def test_folder_pattern_takes_the_group_named_patient(tmp_path):
    root = lay_out(tmp_path, "CNV/OD/12 b/ü 1.png", "NORMAL/OS/12 b/2.tiff")
    t = load_table(DataRecipe(source="folder", root=root, group_pattern=r"(?P<eye>OD|OS)/(?P<patient>\d+ b)/")).table
    assert list(t.patient) == ["12 b", "12 b"] and list(t.eye) == ["OD", "OS"] and list(t.label) == ["CNV", "NORMAL"]


def test_folder_without_pattern_warns_and_takes_each_image_as_a_group(tmp_path, capsys):
    t = load_table(DataRecipe(source="folder", root=lay_out(tmp_path, "CNV/1.png", "CNV/2.png"))).table
    assert list(t.group) == list(t.path) and "WARNING" in capsys.readouterr().out


def test_folder_pattern_that_matches_without_a_patient_is_a_finding(tmp_path):
    root = lay_out(tmp_path, "CNV/p1.png", "CNV/other.png")
    assert problems(load_table(DataRecipe(source="folder", root=root, group_pattern=r"/(p\d)?"))) == {"CNV/other.png": "unparsable-name"}


def test_walk_lists_everything_once_and_survives_loops(tmp_path):
    lay_out(tmp_path, "CNV/a.png", "CNV/.hidden/b.png", "CNV/Thumbs.db", "CNV/archive.png.zip")
    (tmp_path / "CNV" / "up").symlink_to(tmp_path)
    (tmp_path / "CNV" / "up.png").symlink_to(tmp_path)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    listing = load_table(DataRecipe(source="folder", root=str(tmp_path)))
    assert list(listing.table.path) == ["CNV/a.png"]
    assert problems(listing) == {"CNV/.hidden": "hidden", "CNV/Thumbs.db": "other-file", "CNV/archive.png.zip": "other-file",
                                 "CNV/up": "linked-folder", "CNV/up.png": "linked-folder", "loop": "other-file"}


def write_csv(path, rows):
    with open(path, "w", newline="", encoding="utf-8-sig") as f:
        w = csv.DictWriter(f, rows[0])
        w.writeheader()
        w.writerows(rows)
    return str(path)


def test_csv_joins_columns_and_keeps_leading_zeros_and_the_patient_called_na(tmp_path):
    file = write_csv(tmp_path / "t.csv", [dict(f=r"a\1.png", y="CNV", k="CNV", n="0012"), dict(f="b/2.png", y="NORMAL", k="CNV", n="NA")])
    t = load_table(DataRecipe(source="csv", root=file, columns=dict(path="f", label="y", patient="k + n"))).table
    assert list(t.path) == ["a/1.png", "b/2.png"] and list(t.group) == ["CNV/0012", "CNV/NA"]


def test_csv_absolute_paths_become_relative(tmp_path):
    file = write_csv(tmp_path / "table.csv", [dict(path=str(tmp_path / "x.png"), label="A", patient="1"), dict(path="/else/y.png", label="A", patient="1")])
    assert list(load_table(DataRecipe(source="csv", root=str(tmp_path))).table.path) == ["/else/y.png", "x.png"]
    assert file


def test_csv_rows_that_say_too_little_or_contradict_are_findings(tmp_path):
    rows = [dict(path="a.png", label="A", patient="1", slice=""), dict(path="b.png", label="", patient="1", slice=""),
            dict(path="c.png", label="A", patient="", slice="4"), dict(path="d.png", label="A", patient="1", slice="4.5"),
            *[dict(path="e.png", label="A", patient="1", slice="")] * 3, *[dict(path="f.png", label=y, patient="1", slice="") for y in "AAB"]]
    listing = load_table(DataRecipe(source="csv", root=write_csv(tmp_path / "t.csv", rows)))
    assert problems(listing) == {"b.png": "no-label", "c.png": "no-patient", "d.png": "unparsable-name", "e.png": "repeated-row",
                                 "f.png": "contradictory-rows"}
    assert dict(zip(listing.table.path, listing.table.group, strict=True)) == {"a.png": "1", "c.png": "c.png", "e.png": "1"}


@pytest.mark.parametrize(("text", "says"), [("", "cannot be read"), ("path,label\na.png,A\n", "patient (or group)"),
                                            ("label,patient\nA,1\n", "path")])
def test_csv_that_is_no_table_says_what_is_missing(tmp_path, text, says):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(KdoctError, match="->") as e: load_table(DataRecipe(source="csv", root=str(tmp_path / "t.csv")))
    assert says in str(e.value)


@pytest.mark.parametrize("source", ["ucsd", "folder", "csv"])
def test_missing_or_empty_root_names_the_expected_layout(tmp_path, source):
    for root in (None, str(tmp_path / "no"), str(tmp_path)):
        with pytest.raises(KdoctError) as e: load_table(DataRecipe(source=source, root=root))
        assert LAYOUTS[source] in str(e.value)


def test_unknown_source_names_the_known_ones():
    with pytest.raises(KdoctError) as e: load_table(DataRecipe(source="kermany"))
    assert all(name in str(e.value) for name in SOURCES)


def test_phantom_has_the_contracts_columns_and_comes_out_the_same_twice(outputs):
    data = DataRecipe(phantom=dict(patients=8, slices=2, height=64, width=64))
    first, again = load_table(data), load_table(data)
    assert tuple(first.table.columns[:10]) == TABLE_COLUMNS and first.table.equals(again.table)
    assert all((first.root / p).is_file() for p in first.table.path) and first.root.is_relative_to(outputs)


def test_check_table_refuses_numbers_for_patients():
    t = image_table([dict(path="a", label="A", patient="1")])
    with pytest.raises(KdoctError, match="patient is not text"): check_table(t.astype({"patient": "int64"}))
    with pytest.raises(KdoctError, match="columns are"): check_table(pd.DataFrame(dict(path=["a"])))


def test_real_ucsd_listing_agrees_with_its_manifest(shared_data):
    listing = load_table(DataRecipe(source="ucsd", root=str(shared_data / "ucsd_oct")))
    manifest = pd.read_csv(shared_data / "ucsd_oct" / "manifest.csv", dtype=str).sort_values("path")
    t = listing.table
    assert list(t.path) == list(manifest.path) and list(t.group) == list(manifest.patient_id) and list(t.label) == list(manifest["class"])
    assert len(t) == 800 and t.group.nunique() == 508 and set(t.label.value_counts()) == {200}
    assert (t.groupby("group").label.nunique() > 1).sum() == 19  # numbers that occur under two classes


def test_real_lung_and_chest_tables_are_read_as_csv(shared_data):
    lung = pd.read_csv(shared_data / "lc25000_lung" / "manifest.csv", dtype=str)
    label = next(c for c in lung if c in ("class", "label"))
    data = DataRecipe(source="csv", root=str(shared_data / "lc25000_lung" / "manifest.csv"), columns=dict(label=label, group="tile_group"))
    listing = load_table(data)
    assert len(listing.table) == 2429 and listing.table.group.nunique() == 120
    assert all((listing.root / p).is_file() for p in listing.table.path)
