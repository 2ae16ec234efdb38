"Sources: names become an image table, and what a name does not say is not guessed."
import csv
import os

import pandas as pd
import pytest
from conftest import lay_out, problems

from kdoct.core.files import KdoctError
from kdoct.core.sections import DataRecipe
from kdoct.data.listing import TABLE_COLUMNS, check_table, image_table
from kdoct.data.registry import SOURCES
from kdoct.data.sources import load_table
from kdoct.data.table_sources import resolve_paths


def test_ucsd_groups_by_number_alone_across_classes_and_official_parts(tmp_path):
    root = lay_out(
        tmp_path, "train/CNV/CNV-7-1.jpeg", "test/DME/DME-7-2.jpeg", "test/DME/DME-07-3.JPEG"
    )
    t = load_table(DataRecipe(source="ucsd", root=root)).table.set_index("path")
    assert dict(t.patient) == {
        "train/CNV/CNV-7-1.jpeg": "7",
        "test/DME/DME-7-2.jpeg": "7",
        "test/DME/DME-07-3.JPEG": "07",
    }
    assert set(t.group) == {"07"}  # 7 and 07 may be one person
    assert list(t.split) == ["test", "test", "train"]
    assert list(t["slice"]) == [3, 2, 1]


@pytest.mark.parametrize("name", [
    "CNV/CNV-7.jpeg", "CNV/DME-7-1.jpeg", "CNV/CNV-7a-1.jpeg", "CNV/CNV-7-1 (copy).jpeg",
    "CNV/sub/CNV-7-1.jpeg", "CNV-7-1.jpeg", "cnv/CNV-7-2.jpeg", "CNV/CNV--7-1.jpeg",
])
def test_ucsd_does_not_guess_a_name(tmp_path, name):
    listing = load_table(
        DataRecipe(source="ucsd", root=lay_out(tmp_path, "CNV/CNV-1-1.jpeg", name))
    )
    assert problems(listing) == {name: "unparsable-name"}
    assert list(listing.table.path) == ["CNV/CNV-1-1.jpeg"]


def test_table_does_not_depend_on_the_order_of_the_directory(tmp_path, monkeypatch):
    root = lay_out(tmp_path, *(f"{c}/{c}-{i}-1.jpeg" for c in ("CNV", "DME") for i in range(20)))
    want, real = load_table(DataRecipe(source="ucsd", root=root)).table, os.scandir
    monkeypatch.setattr("kdoct.data.listing.os.scandir", lambda p: list(real(p))[::-1])
    assert load_table(DataRecipe(source="ucsd", root=root)).table.equals(want)


def test_folder_pattern_takes_the_group_named_patient(tmp_path):
    root = lay_out(tmp_path, "CNV/OD/12 b/ü 1.png", "NORMAL/OS/12 b/2.tiff")
    t = load_table(
        DataRecipe(source="folder", root=root, group_pattern=r"(?P<eye>OD|OS)/(?P<patient>\d+ b)/")
    ).table
    assert (
        list(t.patient) == ["12 b", "12 b"]
        and list(t.eye) == ["OD", "OS"]
        and list(t.label) == ["CNV", "NORMAL"]
    )


def test_folder_without_pattern_warns_and_takes_each_image_as_a_group(tmp_path, capsys):
    t = load_table(
        DataRecipe(source="folder", root=lay_out(tmp_path, "CNV/1.png", "CNV/2.png"))
    ).table
    assert list(t.group) == list(t.path) and "WARNING" in capsys.readouterr().out


def test_folder_pattern_that_matches_without_a_patient_is_a_finding(tmp_path):
    root = lay_out(tmp_path, "CNV/p1.png", "CNV/other.png")
    assert problems(
        load_table(DataRecipe(source="folder", root=root, group_pattern=r"/(p\d)?"))
    ) == {"CNV/other.png": "unparsable-name"}


@pytest.mark.parametrize(
    ("source", "helps"),
    [("csv", "data.columns.patient"), ("ucsd", "data.groups"), ("phantom", "data.groups")],
)
def test_a_pattern_that_the_source_does_not_read_is_refused(source, helps, tmp_path):
    with pytest.raises(KdoctError, match="does not read --group-pattern") as e:
        load_table(DataRecipe(source=source, root=str(tmp_path), group_pattern=r"(P\d+)_"))
    assert helps in e.value.fix


def test_walk_lists_everything_once_and_survives_loops(tmp_path):
    lay_out(tmp_path, "CNV/a.png", "CNV/.hidden/b.png", "CNV/Thumbs.db", "CNV/archive.png.zip")
    (tmp_path / "CNV" / "up").symlink_to(tmp_path)
    (tmp_path / "CNV" / "up.png").symlink_to(tmp_path)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    listing = load_table(DataRecipe(source="folder", root=str(tmp_path)))
    assert list(listing.table.path) == ["CNV/a.png"]
    assert problems(listing) == {
        "CNV/.hidden": "hidden",
        "CNV/Thumbs.db": "other-file",
        "CNV/archive.png.zip": "other-file",
        "CNV/up": "linked-folder",
        "CNV/up.png": "linked-folder",
        "loop": "empty-class",
    }  # a class behind a broken link?


def write_csv(path, rows):
    with open(path, "w", newline="", encoding="utf-8-sig") as f:
        w = csv.DictWriter(f, rows[0])
        w.writeheader()
        w.writerows(rows)
    return str(path)


def test_csv_joins_columns_and_keeps_leading_zeros_and_the_patient_called_na(tmp_path):
    file = write_csv(
        tmp_path / "t.csv",
        [
            dict(f=r"a\1.png", y="CNV", k="CNV", n="0012"),
            dict(f="b/2.png", y="NORMAL", k="CNV", n="NA"),
        ],
    )
    t = load_table(
        DataRecipe(source="csv", root=file, columns=dict(path="f", label="y", patient="k + n"))
    ).table
    assert list(t.path) == ["a/1.png", "b/2.png"] and list(t.group) == ["CNV/0012", "CNV/NA"]


def test_csv_absolute_paths_become_relative(tmp_path):
    file = write_csv(
        tmp_path / "table.csv",
        [
            dict(path=str(tmp_path / "x.png"), label="A", patient="1"),
            dict(path="/else/y.png", label="A", patient="1"),
        ],
    )
    assert list(load_table(DataRecipe(source="csv", root=str(tmp_path))).table.path) == [
        "/else/y.png",
        "x.png",
    ]
    assert file


def test_csv_rows_that_say_too_little_or_contradict_are_findings(tmp_path):
    rows = [
        dict(path="a.png", label="A", patient="1", slice=""),
        dict(path="b.png", label="", patient="1", slice=""),
        dict(path="c.png", label="A", patient="", slice="4"),
        dict(path="d.png", label="A", patient="1", slice="4.5"),
        *[dict(path="e.png", label="A", patient="1", slice="")] * 3,
        *[dict(path="f.png", label=y, patient="1", slice="") for y in "AAB"],
    ]
    listing = load_table(DataRecipe(source="csv", root=write_csv(tmp_path / "t.csv", rows)))
    assert problems(listing) == {
        "b.png": "no-label",
        "c.png": "no-patient",
        "d.png": "unparsable-name",
        "e.png": "repeated-row",
        "f.png": "contradictory-rows",
    }
    assert dict(zip(listing.table.path, listing.table.group, strict=True)) == {
        "a.png": "1",
        "c.png": "c.png",
        "e.png": "1",
    }


@pytest.mark.parametrize(("text", "says"), [
    ("", "cannot be read"), ("path,label\na.png,A\n", "patient (or group)"),
    ("label,patient\nA,1\n", "path"),
])
def test_csv_that_is_no_table_says_what_is_missing(tmp_path, text, says):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(KdoctError, match="->") as e:
        load_table(DataRecipe(source="csv", root=str(tmp_path / "t.csv")))
    assert says in str(e.value)


@pytest.mark.parametrize("source", ["ucsd", "neh", "folder", "csv"])
def test_missing_or_empty_root_names_the_expected_layout(tmp_path, source):
    for root in (None, str(tmp_path / "no"), str(tmp_path)):
        with pytest.raises(KdoctError) as e: load_table(DataRecipe(source=source, root=root))
        assert SOURCES[source].layout in str(e.value)


def test_unknown_source_names_the_known_ones():
    with pytest.raises(KdoctError) as e: load_table(DataRecipe(source="kermany"))
    assert all(name in str(e.value) for name in SOURCES)


def test_phantom_has_the_contracts_columns_and_comes_out_the_same_twice(outputs):
    data = DataRecipe(phantom=dict(patients=8, slices=2, height=64, width=64))
    first, again = load_table(data), load_table(data)
    assert tuple(first.table.columns[:10]) == TABLE_COLUMNS and first.table.equals(again.table)
    assert all((first.root / p).is_file() for p in first.table.path) and first.root.is_relative_to(
        outputs
    )


def test_check_table_refuses_numbers_for_patients():
    t = image_table([dict(path="a", label="A", patient="1")])
    with pytest.raises(KdoctError, match="patient is not text"):
        check_table(t.astype({"patient": "int64"}))
    with pytest.raises(KdoctError, match="columns are"): check_table(pd.DataFrame(dict(path=["a"])))


def test_real_ucsd_listing_agrees_with_its_manifest(shared_data):
    listing = load_table(DataRecipe(source="ucsd", root=str(shared_data / "ucsd_oct")))
    manifest = pd.read_csv(shared_data / "ucsd_oct" / "manifest.csv", dtype=str).sort_values("path")
    t = listing.table
    assert (
        list(t.path) == list(manifest.path)
        and list(t.group) == list(manifest.patient_id)
        and list(t.label) == list(manifest["class"])
    )
    assert len(t) == 800 and t.group.nunique() == 508 and set(t.label.value_counts()) == {200}
    under_two_classes = t.groupby("group").label.nunique() > 1
    assert under_two_classes.sum() == 19


def test_real_lung_and_chest_tables_are_read_as_csv(shared_data):
    lung = pd.read_csv(shared_data / "lc25000_lung" / "manifest.csv", dtype=str)
    label = next(c for c in lung if c in ("class", "label"))
    data = DataRecipe(
        source="csv",
        root=str(shared_data / "lc25000_lung" / "manifest.csv"),
        columns=dict(label=label, group="tile_group"),
    )
    listing = load_table(data)
    assert len(listing.table) == 2429 and listing.table.group.nunique() == 120
    assert all((listing.root / p).is_file() for p in listing.table.path)


def neh_tree(folder, rows, files=None, deeper=True):
    "A NEH of empty files: rows of (Patient ID, Class, Eye, Label, Directory); files, if not those of the rows."
    base = folder / "NEH_UT_2021RetinalOCTDataset" if deeper else folder
    lay_out(base, *(files if files is not None else dict.fromkeys(r[-1] for r in rows)))
    write_csv(
        folder / "data_information.csv",
        [
            {"Patient ID": p, "Class": c, "Eye": e, "B-scan": i, "Label": y, "Directory": d}
            for i, (p, c, e, y, d) in enumerate(rows)
        ],
    )
    return load_table(DataRecipe(source="neh", root=str(folder)))


def test_neh_numbers_restart_in_each_class_and_the_label_is_the_slices(tmp_path):
    t = neh_tree(
        tmp_path,
        [
            ("1", "CNV", "OS", "DRUSEN", "CNV/1/000_Drusen.jpg"),
            ("1", "CNV", "OD", "CNV", "CNV/1/OD/001_CNV.jpg"),
            ("1", "DRUSEN", "OD", "NORMAL", "DRUSEN/1/OD/000_Normal.tif"),
            ("01", "NORMAL", "OS", "NORMAL", "NORMAL/1/007_Normal.tif"),
        ],
    ).table
    assert list(t.group) == list(t.patient) == ["CNV/1", "CNV/1", "DRUSEN/1", "NORMAL/1"]
    assert list(t.label) == ["DRUSEN", "CNV", "NORMAL", "NORMAL"] and list(t.patient_label) == [
        "CNV",
        "CNV",
        "DRUSEN",
        "NORMAL",
    ]
    assert list(t.eye) == ["OS", "OD", "OD", "OS"] and list(t.volume) == [
        "CNV/1/OS",
        "CNV/1/OD",
        "DRUSEN/1/OD",
        "NORMAL/1/OS",
    ]
    assert list(t["slice"]) == [0, 1, 0, 7] and tuple(t.columns[:10]) == TABLE_COLUMNS


def test_neh_images_may_lie_beside_the_table_or_one_folder_deeper(tmp_path):
    rows = [
        ("1", "CNV", "OS", "CNV", "CNV/1/000_CNV.jpg"),
        ("1", "NORMAL", "OS", "NORMAL", "NORMAL/1/000_Normal.jpg"),
    ]
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    flat, deep = neh_tree(tmp_path / "a", rows, deeper=False), neh_tree(tmp_path / "b", rows)
    assert flat.table.equals(deep.table) and len(flat.table) == 2 and not len(flat.findings)
    images = load_table(DataRecipe(source="neh", root=str(deep.root)))   # the images' own folder
    assert images.table.equals(deep.table)


def test_neh_path_typos_are_resolved_against_the_real_folder(tmp_path):
    rows = [
        ("2", "NORMAL", "OS", "NORMAL", "NORMAL/2/000_NOrmal.jpg"),
        ("2", "NORMAL", "OS", "NORMAL", r"Normal\2\001_Normal.jpg"),
        ("3", "DRUSEN", "OS", "DRUSEN", "DRUSEN/3/000_DRusen.TIF"),
        ("3", "DRUSEN", "OS", "DRUSEN", "DRUSEN/3/001_Drusen.tif"),
        ("3", "DRUSEN", "OS", "DRUSEN", "DRUSEN/3/002_Drusen.tif"),
    ]
    listing = neh_tree(
        tmp_path,
        rows,
        [
            "NORMAL/2/000_Normal.jpg",
            "NORMAL/2/001_Normal.jpg",
            "DRUSEN/3/000_Drusen.tif",
            "DRUSEN/3/001_Drusen.tif",
        ],
    )
    assert list(listing.table.path) == [
        "DRUSEN/3/000_Drusen.tif",
        "DRUSEN/3/001_Drusen.tif",
        "NORMAL/2/000_Normal.jpg",
        "NORMAL/2/001_Normal.jpg",
    ]
    assert problems(listing) == {
        "DRUSEN/3/000_Drusen.tif": "path-by-case",
        "DRUSEN/3/002_Drusen.tif": "missing",
        "NORMAL/2/000_Normal.jpg": "path-by-case",
        "NORMAL/2/001_Normal.jpg": "path-by-case",
    }


CLASH = [
    ("59", "DRUSEN", "OD", "DRUSEN", "DRUSEN/59/010_Drusen.jpg"),
    ("59", "DRUSEN", "OD", "DRUSEN", "DRUSEN/59/010_DRusen.jpg"),
]


def test_neh_two_names_that_became_one_file_are_one_row_and_two_files_are_two(tmp_path):
    (tmp_path / "one").mkdir(), (tmp_path / "two").mkdir()
    one, two = neh_tree(tmp_path / "one", CLASH, [CLASH[0][-1]]), neh_tree(tmp_path / "two", CLASH)
    assert list(one.table.path) == ["DRUSEN/59/010_Drusen.jpg"] and sorted(
        one.findings.problem
    ) == ["path-by-case", "repeated-row"]
    assert sorted(two.table.path) == [
        "DRUSEN/59/010_DRusen.jpg",
        "DRUSEN/59/010_Drusen.jpg",
    ] and not len(two.findings)


def test_neh_a_name_that_could_be_two_files_is_not_guessed(tmp_path):
    listing = neh_tree(
        tmp_path,
        [*CLASH, ("59", "DRUSEN", "OD", "DRUSEN", "DRUSEN/59/010_DRUSEN.jpg")],
        [r[-1] for r in CLASH],
    )
    assert (
        problems(listing) == {"DRUSEN/59/010_DRUSEN.jpg": "ambiguous-path"}
        and len(listing.table) == 2
    )


def test_neh_repeated_rows_are_dropped_and_contradicting_ones_taken_out(tmp_path):
    one, other = (
        ("58", "CNV", "OD", "CNV", "CNV/58/000_CNV.jpg"),
        ("58", "CNV", "OD", "CNV", "CNV/58/001_CNV.jpg"),
    )
    eyes = ("58", "CNV", "OD", "CNV", "CNV/58/002_CNV.jpg")
    listing = neh_tree(
        tmp_path,
        [one, one, other, (*other[:3], "NORMAL", other[4]), eyes, (*eyes[:2], "OS", *eyes[3:])],
    )
    t = listing.table.set_index("path")
    assert (
        list(t.index) == ["CNV/58/000_CNV.jpg", "CNV/58/002_CNV.jpg"]
        and t.eye["CNV/58/002_CNV.jpg"] == ""
    )
    f = listing.findings
    assert set(zip(f.path, f.problem, f.severity, strict=True)) == {
        ("CNV/58/000_CNV.jpg", "repeated-row", "note"),
        ("CNV/58/001_CNV.jpg", "contradictory-rows", "error"),
        ("CNV/58/002_CNV.jpg", "repeated-row", "note"),
        ("CNV/58/002_CNV.jpg", "eye-unclear", "note"),
    }


@pytest.mark.parametrize(("row", "problem"), [
    (("1", "CNV", "OS", "DRUSEN", "CNV/1/000_CNV.jpg"), "contradicts-path"),
    (("1", "DRUSEN", "OS", "CNV", "CNV/1/000_CNV.jpg"), "contradicts-path"),
    (("2", "CNV", "OS", "CNV", "CNV/1/000_CNV.jpg"), "contradicts-path"),
    (("1", "CNV", "OS", "AMD", "CNV/1/000_AMD.jpg"), "unknown-label"),
    (("1", "CNV", "OS", "", "CNV/1/000_CNV.jpg"), "no-label"),
    (("1", "CNV", "OS", "CNV", "CNV/1/CNV.jpg"), "unparsable-name"),
])
def test_neh_rows_that_contradict_their_path_stop_the_run(tmp_path, row, problem):
    listing = neh_tree(tmp_path, [row, ("9", "CNV", "od", "Cnv", "CNV/9/000_CNV.jpg")])
    assert list(listing.table.path) == ["CNV/9/000_CNV.jpg"] and listing.table.label[0] == "CNV"
    assert list(listing.findings.problem) == [problem] and list(listing.findings.severity) == [
        "error"
    ]


def test_neh_images_that_the_table_does_not_list_are_noted_and_the_eye_is_the_tables(tmp_path):
    listing = neh_tree(
        tmp_path,
        [
            ("1", "CNV", "OS", "CNV", "CNV/1/OD/000_CNV.jpg"),
            ("2", "CNV", "", "CNV", "CNV/2/000_CNV.jpg"),
        ],
        ["CNV/1/OD/000_CNV.jpg", "CNV/2/000_CNV.jpg", "CNV/2/cover.jpg", "CNV/2/Thumbs.db"],
    )
    assert problems(listing) == {
        "CNV/1/OD/000_CNV.jpg": "eye-unclear",
        "CNV/2/000_CNV.jpg": "eye-unclear",
        "CNV/2/cover.jpg": "unlisted",
        "CNV/2/Thumbs.db": "other-file",
    }
    assert list(listing.table.eye) == ["OS", ""] and list(listing.table.volume) == [
        "CNV/1/OS",
        "CNV/2",
    ]


def test_neh_without_its_table_folders_or_columns_says_what_is_expected(tmp_path):
    with pytest.raises(KdoctError, match="0 folders with class folders"):
        load_table(DataRecipe(source="neh", root=str(tmp_path)))
    lay_out(tmp_path, "CNV/1/000_CNV.jpg")
    with pytest.raises(KdoctError, match="no data_information.csv"):
        load_table(DataRecipe(source="neh", root=str(tmp_path)))
    (tmp_path / "data_information.csv").write_text("Directory,Class,Label\n")
    with pytest.raises(KdoctError, match="no column Patient ID, Eye"):
        load_table(DataRecipe(source="neh", root=str(tmp_path)))


def test_neh_reads_the_real_layout(tmp_path, shared_data):
    "Rows of the published table as another project keeps them, laid out as empty files."
    real = pd.read_csv(shared_data / "tables" / "neh_listing_excerpt.csv", dtype=str)
    listing = neh_tree(
        tmp_path,
        [
            (g.split("_")[1], c, e, y, d)
            for g, c, e, y, d in zip(
                real.global_patient_id,
                real.Class,
                real.Eye,
                real.Label,
                real.Directory,
                strict=True,
            )
        ],
    )
    assert len(listing.table) == 152 and not len(listing.findings)
    assert sorted(listing.table.group.unique()) == [
        "CNV/1",
        "CNV/10",
        "NORMAL/104",
        "NORMAL/98",
        "NORMAL/99",
    ]
    assert list(listing.table["slice"]) == list(
        real.set_index("Directory")["B-scan"].astype(int)[listing.table.path]
    )


def test_csv_gives_the_patients_diagnosis_where_it_is_named(tmp_path):
    file = write_csv(
        tmp_path / "t.csv", [dict(path="a.png", label="NORMAL", patient="1", diagnosis="CNV")]
    )
    t = load_table(
        DataRecipe(source="csv", root=file, columns=dict(patient_label="diagnosis"))
    ).table
    assert (
        list(t.patient_label) == ["CNV"]
        and "patient_label" not in load_table(DataRecipe(source="csv", root=file)).table
    )


COVID = [
    "Train/COVID-19/images/a.png",
    "Train/COVID-19/lung masks/a.png",
    "Val/Normal/images/b.png",
    "Val/Normal/lung masks/b.png",
    "Test/Non-COVID/images/c.png",
    "Test/Non-COVID/lung masks/c.png",
]


@pytest.mark.parametrize(
    "outer", ["", "Lung Segmentation Data/", "Lung Segmentation Data/Lung Segmentation Data/"]
)
def test_covid_parts_labels_and_masks_come_from_the_published_tree_at_each_level(tmp_path, outer):
    listing = load_table(
        DataRecipe(source="covid_qu_ex", root=lay_out(tmp_path, *(outer + p for p in COVID)))
    )
    t = listing.table
    assert (
        list(t.path) == sorted(COVID[::2])
        and list(t["mask"]) == sorted(COVID[1::2])
        and not len(listing.findings)
    )
    assert (
        list(t.label) == ["Non-COVID", "COVID-19", "Normal"]
        and list(t.split) == ["test", "train", "val"]
        and list(t.group) == list(t.path)
    )


def test_covid_names_of_folders_may_be_written_in_other_case_and_labels_stay_as_published(tmp_path):
    t = load_table(
        DataRecipe(
            source="covid_qu_ex",
            root=lay_out(tmp_path, *(p.lower().replace("lung masks", "Lung Masks") for p in COVID)),
        )
    ).table
    assert set(t.label) == {"COVID-19", "Non-COVID", "Normal"} and (t["mask"] != "").all()


def test_covid_torn_pairs_and_unknown_folders_are_findings(tmp_path):
    names = [
        "Train/Normal/images/x.png",
        "Test/Normal/lung masks/y.png",
        "Train/Flu/images/z.png",
        "Train/Normal/w.png",
    ]
    listing = load_table(DataRecipe(source="covid_qu_ex", root=lay_out(tmp_path, *COVID, *names)))
    assert problems(listing) == {
        names[0]: "no-mask",
        names[1]: "mask-without-image",
        names[2]: "unparsable-name",
        names[3]: "unparsable-name",
    }
    assert dict(zip(listing.table.path, listing.table["mask"], strict=True))[names[0]] == ""


def test_covid_infection_masks_are_taken_where_they_are_and_two_trees_are_not_guessed_between(
    tmp_path,
):
    infection = [
        p for q in COVID for p in ((q, q.replace("lung", "infection")) if "lung" in q else (q,))
    ]
    lay_out(
        tmp_path,
        *(f"Infection Segmentation Data/Infection Segmentation Data/{p}" for p in infection),
    )
    t = load_table(DataRecipe(source="covid_qu_ex", root=str(tmp_path))).table
    assert t["mask"].str.contains("infection masks").all() and len(t) == 3
    lay_out(tmp_path, *(f"Lung Segmentation Data/Lung Segmentation Data/{p}" for p in COVID))
    with pytest.raises(
        KdoctError, match="Infection Segmentation Data.* and .*Lung Segmentation Data"
    ):
        load_table(DataRecipe(source="covid_qu_ex", root=str(tmp_path)))


@pytest.mark.parametrize("outer", ["", "lung_colon_image_set/", None])
def test_lc25000_is_read_at_each_published_level(tmp_path, outer):
    of = {
        c: "" if outer is None else f"{outer}{c.partition('_')[0]}_image_sets/"
        for c in ("colon_aca", "colon_n", "lung_aca", "lung_n", "lung_scc")
    }
    names = [f"{folder}{c}/{c}{i}.jpeg" for c, folder in of.items() for i in (1, 2)]
    listing = load_table(DataRecipe(source="lc25000", root=lay_out(tmp_path, *names)))
    assert list(listing.table.path) == sorted(names) and list(listing.table.label) == [
        p.split("/")[-2] for p in sorted(names)
    ]
    assert not len(listing.findings)


def test_lc25000_a_class_in_two_folders_is_refused_and_other_folders_are_findings(tmp_path):
    root = lay_out(tmp_path, "lung_n/a.jpeg", "lung_x/b.jpeg")
    assert problems(load_table(DataRecipe(source="lc25000", root=root))) == {
        "lung_x/b.jpeg": "no-class-folder"
    }
    lay_out(tmp_path, "copy/lung_n/a.jpeg")
    with pytest.raises(KdoctError, match="lung_n in two folders"):
        load_table(DataRecipe(source="lc25000", root=root))


def regrouped(folder, rows):
    root = lay_out(folder, "CNV/CNV-1-1.jpeg", "CNV/CNV-2-1.jpeg", "odd.jpeg")
    write_csv(folder / "groups.csv", [dict(path=p, group=g) for p, g in rows])
    return load_table(DataRecipe(source="ucsd", root=root, groups=str(folder / "groups.csv"))).table


BOTH = [("CNV/CNV-1-1.jpeg", "x"), ("CNV/CNV-2-1.jpeg", "x")]


def test_a_table_of_groups_replaces_those_of_any_source_and_keeps_the_patients(tmp_path):
    # a file that the source could not place may have a row
    t = regrouped(tmp_path, [*BOTH, ("odd.jpeg", "y")])
    assert list(t.group) == ["x", "x"] and list(t.patient) == ["1", "2"]


@pytest.mark.parametrize(("rows", "says"), [
    (BOTH[:1], "1 image of the source is in no row, first CNV/CNV-2-1"),
    ([*BOTH, ("z.png", "x")], "z.png"), ([*BOTH, (BOTH[0][0], "y")], "in two groups"),
    ([BOTH[0], (BOTH[1][0], " ")], "no group"),
])
def test_a_table_of_groups_that_does_not_fit_is_refused_with_the_first_row(tmp_path, rows, says):
    with pytest.raises(KdoctError, match="->") as e: regrouped(tmp_path, rows)
    assert says in str(e.value)


def test_real_lung_tiles_are_read_as_lc25000(shared_data):
    t = load_table(DataRecipe(source="lc25000", root=str(shared_data / "lc25000_lung"))).table
    assert dict(t.label.value_counts()) == {"lung_n": 830, "lung_scc": 808, "lung_aca": 791}


def test_a_name_whose_accents_have_another_unicode_form_is_the_same_name():
    apart, whole = "CNV/Mu\u0308ller/1_CNV.jpg", "CNV/M\u00fcller/1_CNV.jpg"
    assert resolve_paths([whole, apart], [apart])[0] == [apart, apart]
    assert resolve_paths([whole.upper()], [apart])[0] == [apart]
    assert resolve_paths(["CNV/Muller/1_CNV.jpg"], [apart])[0] == [""]
