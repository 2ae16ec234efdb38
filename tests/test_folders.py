"Folders of images: which level is the class, and what is refused because it is none."
import os
import sys
import zipfile

import pytest
from conftest import lay_out, problems

from kdoct.core.files import KdoctError
from kdoct.core.sections import DataRecipe
from kdoct.data.listing import part_name
from kdoct.data.sources import load_table


def tree(tops, classes=("CNV", "NORMAL")):
    return [f"{top}/{c}/{i}.png" for top in tops for c in classes for i in range(2)]


def table_of(folder, names, classes=None):
    return load_table(
        DataRecipe(source="folder", root=lay_out(folder, *names), classes=classes)
    ).table


NO_CLASSES = {  # folders -> what the message calls them
    ("train1", "train2", "test1"): "parts of a split",
    ("images_train", "images_test"): "parts of a split",
    ("train_a", "val_a"): "parts of a split",
    tuple(f"fold_{i}" for i in range(5)): "folds",
    ("Fold 1", "Fold 2"): "folds",
    ("cv1", "cv2"): "folds",
    ("OD", "OS", "OU"): "eyes",
    ("left", "right"): "eyes",
    ("Right eye", "Left eye"): "eyes",
    ("rechts", "links"): "eyes",
    ("SiteA", "SiteB"): "sites",
    ("hospital_1", "hospital_2"): "sites",
    ("Noor Eye Hospital", "Klinik Bonn"): "sites",
    ("Cirrus", "Spectralis"): "sites",
    ("P001", "P002"): "patients",
    ("patient_1", "patient_2"): "patients",
    ("2019", "2020"): "dates",
    ("2019-01", "2019-02"): "dates",
    ("batch1", "batch2"): "pieces",
    ("Noor", "Tehran"): "not the classes: each has folders CNV, NORMAL",
}


def test_folders_that_hold_the_same_unknown_folders_ask_for_the_classes(tmp_path):
    with pytest.raises(KdoctError, match="perhaps not the classes: each has folders MH, VMT") as e:
        table_of(tmp_path, tree(("Duke", "Noor"), ("MH", "VMT")))
    assert "--classes MH,VMT" in e.value.fix and "--classes Duke,Noor" in e.value.fix
    assert set(table_of(tmp_path, [], ("MH", "VMT")).label) == {"MH", "VMT"}


def test_a_remedy_is_quoted_for_the_shell(tmp_path):
    with pytest.raises(KdoctError) as e:
        table_of(tmp_path, tree(("OD", "OS"), ("NORMAL", "wet AMD")))
    assert "--classes 'NORMAL,wet AMD'" in e.value.fix


@pytest.mark.parametrize("tops", NO_CLASSES, ids="-".join)
def test_folders_that_are_no_classes_are_refused_and_naming_the_classes_helps(tops, tmp_path):
    with pytest.raises(KdoctError) as e: table_of(tmp_path, tree(tops))
    assert (
        NO_CLASSES[tops] in e.value.problem
        and "--classes CNV,NORMAL" in e.value.fix
        and "--source csv" in e.value.fix
    )
    t = table_of(tmp_path, [], ("CNV", "NORMAL"))
    assert dict(t.label.value_counts()) == dict(CNV=2 * len(tops), NORMAL=2 * len(tops))
    assert set(table_of(tmp_path, [], tops).label) == set(tops)   # who names them means them


@pytest.mark.parametrize(
    "tops", [("OD", "OS"), ("fold_0", "fold_1"), ("train1", "test1")], ids="-".join
)
def test_without_folders_below_the_remedy_is_a_table(tops, tmp_path):
    with pytest.raises(KdoctError) as e:
        table_of(tmp_path, [f"{top}/{i}.png" for top in tops for i in range(3)])
    assert e.value.fix.startswith("List the images in a table")


@pytest.mark.parametrize("tops", [
    ("Training", "Validierung", "Testdaten"),
    ("Trainingsdaten", "Validierungsdaten", "Pr\u00fcfung"), ("Training", "Val", "Pruefdaten"),
    ("entra\u00eenement", "validation", "test"), ("entrenamiento", "validaci\u00f3n", "prueba"),
    ("Train", "Dev", "hold-out"),
], ids="-".join)
def test_parts_in_other_words_are_the_split(tops, tmp_path):
    t = table_of(tmp_path, tree(tops))
    assert set(t.label) == {"CNV", "NORMAL"} and dict(t.split.value_counts()) == dict(
        train=4, val=4, test=4
    )


@pytest.mark.parametrize(
    "mark", ["masks", "annotations", "labels", "segmentation", "ground_truth", "CNV_masks"]
)
def test_folders_of_marks_beside_classes_are_refused_and_left_out_where_the_classes_are_named(
    mark, tmp_path
):
    root = lay_out(tmp_path, "CNV/1.png", "NORMAL/1.png", f"{mark}/1.png", f"{mark}/deep/2.png")
    with pytest.raises(KdoctError, match=rf"marks \({mark}\) beside .*\n.*--classes CNV,NORMAL"):
        load_table(DataRecipe(source="folder", root=root))
    listing = load_table(DataRecipe(source="folder", root=root, classes=("CNV", "NORMAL")))
    assert sorted(listing.table.label) == ["CNV", "NORMAL"] and problems(listing) == {
        mark: "annotation-folder"
    }
    assert listing.findings.detail[0] == "2 files"


def test_marks_beside_parts_and_in_them_are_no_images(tmp_path):
    names = [*tree(("train", "test")), "masks/CNV/0.png", "train/labels/0.png"]
    with pytest.raises(
        KdoctError,
        match=r"parts \(test, train\) beside other folders \(masks\)(.|\n)*--classes CNV,NORMAL",
    ):
        table_of(tmp_path, names)
    listing = load_table(DataRecipe(source="folder", root=str(tmp_path), classes=("CNV", "NORMAL")))
    assert dict(listing.table.split.value_counts()) == dict(train=4, test=4)
    assert problems(listing) == {"masks": "annotation-folder", "train/labels": "annotation-folder"}


@pytest.mark.parametrize(("names", "says", "helps"), [
    (["images/1.png", "masks/1.png"], "folders of images and of masks", "table"),
    (["images/1.png", "images/2.png"], "folders of images", "table"),
    (
        ["train/images/1.png", "train/labels/1.png", "test/images/2.png"],
        "folders of images and of masks", "table",
    ),
    (
        ["images/CNV/1.png", "images/DME/1.png", "labels/CNV/1.png"],
        "folders of images and of masks", "--data-root {}/images",
    ),
    (
        ["SiteA/CNV/1.png", "SiteB/DME/1.png", "masks/1.png"], "masks or other marks (masks)",
        "--classes CNV,DME",
    ),
])
def test_images_beside_their_masks_are_no_classes(names, says, helps, tmp_path):
    with pytest.raises(KdoctError) as e: table_of(tmp_path, names)
    assert says in e.value.problem and helps.format(tmp_path) in e.value.fix


def test_masks_named_like_their_image_in_its_folder_are_no_images(tmp_path):
    names = [
        "benign/b (1).png",
        "benign/b (1)_mask.png",
        "benign/B (1)_mask_1.png",
        "normal/n.png",
        "normal/no label.png",
    ]
    listing = load_table(DataRecipe(source="folder", root=lay_out(tmp_path, *names)))
    assert (
        problems(listing) == {names[1]: "mask-file", names[2]: "mask-file"}
        and len(listing.table) == 3
    )


@pytest.mark.parametrize(("names", "there"), [
    (["dataset/CNV/1.png", "dataset/NORMAL/1.png"], "dataset"),
    (["dataset/CNV/1.png", "dataset/NORMAL/1.png", "dataset/cover.png"], "dataset"),
    (["a/b c/CNV/1.png", "a/b c/NORMAL/1.png"], "a/b c"),
    (["dataset/train/CNV/1.png", "dataset/test/CNV/1.png"], "dataset"),
])
def test_a_root_that_is_too_high_is_answered_with_the_right_folder(names, there, tmp_path):
    with pytest.raises(KdoctError) as e: table_of(tmp_path, names)
    assert f"--data-root '{tmp_path / there}'" in e.value.fix or e.value.fix.endswith(
        f"--data-root {tmp_path / there}"
    )


def test_a_root_that_is_too_high_is_no_matter_where_the_classes_are_named(tmp_path):
    t = table_of(
        tmp_path,
        [f"dataset/{part}/{c}/1.png" for part in ("train", "test") for c in ("CNV", "NORMAL")],
        ("CNV", "NORMAL"),
    )
    assert set(t.label) == {"CNV", "NORMAL"} and set(t.split) == {"train", "test"}


@pytest.mark.parametrize("names", [
    ["0/1.png", "1/1.png"], ["grade 1/1.png", "grade 2/1.png"], ["stage_1/1.png", "stage_2/1.png"],
    ["Type A/1.png", "Type B/1.png"], ["A/1.png", "B/1.png"], ["case/1.png", "control/1.png"],
    ["test positive/1.png", "test negative/1.png"], ["with_mask/1.png", "no_mask/1.png"],
    ["label_0/1.png", "label_1/1.png"], ["CNV/OD/1.png", "NORMAL/OD/1.png"],
    ["CNV/P001/1.png", "NORMAL/P001/1.png"],
    ["benign/a/1.png", "benign/b/1.png", "malign/a/1.png", "malign/b/1.png"],
    [f"{c}/{d}/1.png" for c in ("A", "B") for d in ("OD", "OS")],
    [f"{c}/{d}/1.png" for c in ("A", "B") for d in ("001", "2")],
    [f"{c}/{d}/1.png" for c in ("A", "B") for d in ("40X", "100X")],
    [f"{c}/{d}/1.png" for c in ("A", "B") for d in ("train", "test")],
    ["COVID/images/1.png", "Normal/images/1.png"],
    ["center involved/1.png", "non center involved/1.png"], ["CNV/1.png", "trainable/1.png"],
])
def test_sound_folders_are_classes(names, tmp_path):
    t = table_of(tmp_path, names)
    assert set(t.label) == {n.split("/")[0] for n in names} and len(t) == len(names)


@pytest.mark.parametrize(("typed", "helps"), [
    (("CNV;NORMAL", "CNV"), "Put commas between the classes: --classes CNV,NORMAL"),
    (("CNV", "NROMAL"), "Did you mean: --classes CNV,NORMAL"),
    (("normal", "cnv"), "Did you mean: --classes NORMAL,CNV"),
    (("AMD", "DME"), "The images are of these classes: --classes CNV,NORMAL"),
])
def test_classes_that_are_misspelt_are_refused_with_what_was_meant(typed, helps, tmp_path):
    with pytest.raises(KdoctError, match="There is no image of class") as e:
        table_of(tmp_path, ["CNV/1.png", "NORMAL/1.png"], typed)
    assert helps in e.value.fix


@pytest.mark.parametrize("typed", ["CNV;NORMAL", "CNV NORMAL", "CNV|NORMAL"])
def test_classes_without_commas_are_refused_by_the_recipe(typed):
    with pytest.raises(ValueError, match="put commas between several: CNV,NORMAL"):
        DataRecipe(source="folder", root="", classes=(typed,))


def test_some_of_the_classes_may_be_named(tmp_path):
    t = table_of(tmp_path, ["CNV/1.png", "NORMAL/1.png", "DME/1.png"], ("CNV", "DME"))
    assert set(t.label) == {"CNV", "DME", "NORMAL"}   # the audit finds the unknown label


@pytest.mark.parametrize("names", [["train/x.png"], ["a/b/c/Train/x.png", "a/d/Test/x.png"]])
def test_covid_folders_are_named_in_words(names, tmp_path):
    with pytest.raises(KdoctError) as e:
        load_table(DataRecipe(source="covid_qu_ex", root=lay_out(tmp_path, *names)))
    assert "Neither" in e.value.problem and "none" not in e.value.problem


@pytest.mark.parametrize(
    "other",
    ["gradcam", "Grad-CAM", "old", "trash", "unknown", "Not labelled", "to_delete", "tmp", "backup"],
)
def test_folders_that_are_no_classes_beside_classes_are_refused_and_left_out_where_these_are_named(
    other, tmp_path
):
    root = lay_out(tmp_path, "CNV/1.png", "NORMAL/1.png", f"{other}/1.png")
    with pytest.raises(KdoctError, match=rf"\({other}\) beside other folders") as e:
        load_table(DataRecipe(source="folder", root=root))
    assert "--classes CNV,NORMAL" in e.value.fix
    listing = load_table(DataRecipe(source="folder", root=root, classes=("CNV", "NORMAL")))
    assert sorted(listing.table.label) == ["CNV", "NORMAL"]
    assert problems(listing) == {other: "annotation-folder"}
    everything = tuple(sorted(("CNV", "NORMAL", other)))
    assert set(table_of(tmp_path, [], everything).label) == set(everything)


@pytest.mark.parametrize(
    "copy", ["CNV (1)", "CNV - Copy", "CNV - Kopie (2)", "CNV_copy", "Copy of CNV"]
)
def test_a_copy_of_a_class_folder_is_no_class(copy, tmp_path):
    with pytest.raises(KdoctError, match="One class in several spellings") as e:
        table_of(tmp_path, ["CNV/1.png", "NORMAL/1.png", f"{copy}/1.png"])
    assert "--classes" in e.value.fix
    assert len(table_of(tmp_path, [], ("CNV", copy, "NORMAL"))) == 3


def test_normal_and_healthy_are_one_class_until_both_are_named(tmp_path):
    with pytest.raises(KdoctError, match="'Healthy' .*, 'NORMAL'"):
        table_of(tmp_path, ["CNV/1.png", "NORMAL/1.png", "Healthy/1.png"])
    assert len(table_of(tmp_path, [], ("CNV", "Healthy", "NORMAL"))) == 3


def test_left_overs_below_a_class_are_no_images_of_it(tmp_path):
    root = lay_out(tmp_path, "CNV/1.png", "CNV/trash/2.png", "CNV/gradcam/1.png", "NORMAL/1.png")
    listing = load_table(DataRecipe(source="folder", root=root))
    assert problems(listing) == {
        "CNV/trash/2.png": "left-over-folder",
        "CNV/gradcam/1.png": "mask-folder",
    }


@pytest.mark.parametrize("tops", [
    ("none", "mild", "severe"), ("0", "1"), ("good", "bad"), ("No DR", "Mild"), ("other", "CNV"),
    ("gold", "cold"),
], ids="-".join)
def test_classes_that_only_resemble_left_overs_are_classes(tops, tmp_path):
    assert set(table_of(tmp_path, [f"{top}/1.png" for top in tops]).label) == set(tops)


BITMAP = b"BM" + bytes(8) + b"\x36\0\0\0\x28\0\0\0" + bytes(120)


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("2.heic", b"", "other-format"),
        ("2.vol", b"", "other-format"),
        ("2.DCM", b"", "other-format"),
        ("2", b"\0\0\0\x18ftypheic" + bytes(120), "other-format"),
        ("2", b"\0\0\0\x1cftypavif" + bytes(120), "other-format"),
        ("2", b"HSF-OCT-103" + bytes(120), "other-format"),
        ("2.jxl", b"\xff\x0a", "other-format"),
        ("2", b"RIFF\x24\0\0\0WEBPVP8 " + bytes(120), "picture-by-content"),
        ("2", BITMAP, "picture-by-content"),
        ("2.dat", b"\x89PNG\r\n" + bytes(120), "picture-by-content"),
        ("2.txt", b"BMI of the patients: 22, 23, 24", "other-file"),
        ("2", b"RIFF\x24\0\0\0WAVEfmt " + bytes(120), "other-file"),
        ("2.ini", b"", "other-file"),
    ],
)
def test_what_is_left_out_of_a_class_folder_is_a_finding(name, content, problem, tmp_path):
    root = lay_out(tmp_path, "CNV/1.png", "NORMAL/1.png")
    (tmp_path / "CNV" / name).write_bytes(content)
    listing = load_table(DataRecipe(source="folder", root=root))
    assert problems(listing) == {f"CNV/{name}": problem}


def test_every_image_a_patient_of_its_own_is_said_with_a_pattern_too(tmp_path, capsys):
    root = lay_out(tmp_path, *(f"{c}/{i}.png" for c in ("CNV", "NORMAL") for i in range(4)))
    data = DataRecipe(source="folder", root=root, group_pattern="^(.*)$")
    load_table(data)
    assert "--group-pattern finds another patient in each path" in capsys.readouterr().out
    load_table(data.model_copy(update=dict(group_pattern=r"/(\d)")))
    assert "WARNING" not in capsys.readouterr().out


@pytest.mark.parametrize("names", [
    ("train", "val", "test"), ("Train", "Valid", "Test"), ("training", "validation", "Testing"),
    ("train_set", "dev", "test set"),
])
def test_folders_of_parts_are_the_split_and_not_the_classes(names, tmp_path):
    root = lay_out(
        tmp_path,
        *(
            f"{part}/{c}/{c}_{part}{i}_1.png"
            for part in names
            for c in ("AMD", "NORMAL")
            for i in range(2)
        ),
    )
    t = load_table(DataRecipe(source="folder", root=root, group_pattern=r"_([^_]+)_")).table
    assert set(t.label) == {"AMD", "NORMAL"} and dict(t.split.value_counts()) == dict(
        train=4, val=4, test=4
    )


def test_parts_within_classes_and_patients_within_parts(tmp_path):
    inner = lay_out(tmp_path / "a", "CNV/train/1.png", "CNV/test/2.png", "DME/train/3.png")
    assert list(load_table(DataRecipe(source="folder", root=inner)).table.split) == [
        "test",
        "train",
        "train",
    ]
    deep = lay_out(tmp_path / "b", "train/CNV/p1/OD/1.png", "train/DME/p2/1.png")
    t = load_table(DataRecipe(source="folder", root=deep, group_pattern=r"/(p\d+)/")).table
    assert (
        list(t.label) == ["CNV", "DME"]
        and list(t.patient) == ["p1", "p2"]
        and set(t.split) == {"train"}
    )


@pytest.mark.parametrize(("names", "says"), [
    (("train/CNV/1.png", "DME/2.png"), "parts (train) beside other folders (DME)"),
    (("images/1.png", "masks/1.png"), "folders of images and of masks"),
    (("OCTDL/AMD/1.png", "OCTDL/NO/2.png"), "one class folder, OCTDL, with folders AMD, NO in it"),
])
def test_folders_that_cannot_be_classes_are_refused(names, says, tmp_path):
    with pytest.raises(KdoctError, match="->") as e:
        load_table(DataRecipe(source="folder", root=lay_out(tmp_path, *names)))
    assert says in e.value.problem and "--data-root" in e.value.fix or "--classes" in e.value.fix


def test_a_class_may_be_called_test_where_it_is_named(tmp_path):
    data = DataRecipe(
        source="folder",
        root=lay_out(tmp_path, "test/1.png", "control/2.png"),
        classes=("control", "test"),
    )
    assert list(load_table(data).table.label) == ["control", "test"] and part_name("contest") == ""


def test_masks_below_a_class_are_no_images_of_it(tmp_path):
    listing = load_table(
        DataRecipe(
            source="folder",
            root=lay_out(tmp_path, "CNV/1.png", "CNV/masks/1.png", "DME/images/2.png"),
        )
    )
    assert problems(listing) == {"CNV/masks/1.png": "mask-folder"} and len(listing.table) == 2


def test_a_class_folder_without_an_image_stops_the_run_and_says_why(tmp_path):
    root = lay_out(tmp_path, "CNV/1.png", "DME/1.doc", "DME/2.doc")
    for folder, target in dict(DRUSEN="not mounted", loop="loop").items():
        (tmp_path / folder).symlink_to(tmp_path / target)
    (tmp_path / "NORMAL").mkdir()
    (tmp_path / "again").symlink_to(tmp_path / "CNV")
    listing = load_table(DataRecipe(source="folder", root=root))
    f = listing.findings[listing.findings.problem == "empty-class"].set_index("path").detail
    assert set(f.index) == {"DME", "DRUSEN", "NORMAL", "again", "loop"}
    assert (
        "2 .doc" in f.DME
        and "leads nowhere" in f.DRUSEN
        and f.NORMAL == "no file in it"
        and "read already" in f.again
    )
    named = load_table(DataRecipe(source="folder", root=root, classes=("CNV", "DME")))
    # what is no class may be empty
    assert list(named.findings.path[named.findings.problem == "empty-class"]) == ["DME"]


def test_a_class_on_another_disk_is_followed_and_circles_are_not(tmp_path):
    lay_out(tmp_path, "data/CNV/CNV-1-1.jpeg", "disk/NORMAL/NORMAL-2-1.jpeg")
    (tmp_path / "data/NORMAL").symlink_to(tmp_path / "disk/NORMAL")
    (tmp_path / "disk/NORMAL/up").symlink_to(tmp_path / "disk")
    (tmp_path / "disk/NORMAL/home").symlink_to(tmp_path / "data")
    listing = load_table(DataRecipe(source="ucsd", root=str(tmp_path / "data")))
    assert (
        list(listing.table.label) == ["CNV", "NORMAL"]
        and (listing.root / listing.table.path[1]).is_file()
    )
    assert list(listing.findings.action) == ["followed", "not used", "not used"]


def test_our_own_outputs_in_the_folder_of_the_images_are_no_class(tmp_path, outputs):
    root = lay_out(tmp_path, "CNV/1.png", "DME/1.png", "outputs/edge/fold_0/figures/curves.png")
    assert outputs == tmp_path / "outputs"
    listing = load_table(DataRecipe(source="folder", root=root))
    assert set(listing.table.label) == {"CNV", "DME"} and problems(listing) == {"outputs": "hidden"}


def test_a_picture_under_a_name_of_no_picture_is_not_passed_over(tmp_path):
    root = lay_out(tmp_path, "CNV/1.png", "NORMAL/1.png", "NORMAL/3.txt")
    (tmp_path / "NORMAL/2.jpg_large").write_bytes(b"\xff\xd8\xff\xe0" + bytes(200))
    (tmp_path / "NORMAL/4").write_bytes(bytes(128) + b"DICM")
    assert problems(load_table(DataRecipe(source="folder", root=root))) == {
        "NORMAL/2.jpg_large": "picture-by-content",
        "NORMAL/4": "picture-by-content",
        "NORMAL/3.txt": "other-file",
    }


def test_the_folder_that_is_meant_is_named(tmp_path):
    lay_out(
        tmp_path, "OCT2017 /train/CNV/CNV-1-1.jpeg", "__MACOSX/OCT2017 /train/CNV/._CNV-1-1.jpeg"
    )
    with pytest.raises(KdoctError) as e: load_table(DataRecipe(source="ucsd", root=str(tmp_path)))
    assert f"Did you mean --data-root '{tmp_path}/OCT2017 '" in e.value.fix


def test_a_pattern_that_matches_nothing_is_shown_with_three_names(tmp_path):
    root = lay_out(tmp_path, *(f"CNV/{i}.png" for i in range(5)))
    with pytest.raises(KdoctError) as e:
        load_table(DataRecipe(source="folder", root=root, group_pattern=r"(P\d+)_"))
    assert (
        r"(P\d+)_" in e.value.problem
        and "none of 5 paths, such as CNV/0.png, CNV/1.png, CNV/2.png" in e.value.problem
    )


# --- what a fresh user left lying about

TREE = [f"{c}/P{i:03d}_{k}.png" for c in ("CNV", "NORMAL") for i in range(4) for k in range(2)]


def listed(folder, *more, classes=None, **recipe):
    root = lay_out(folder, *TREE, *more)
    return load_table(DataRecipe(source="folder", root=root, classes=classes, **recipe))


def test_a_class_dropped_into_another_stops_the_run(tmp_path):
    listing = listed(tmp_path, "CNV/normal/P700_0.png", "CNV/CNV/P701_0.png")
    assert problems(listing) == {"CNV/normal/P700_0.png": "class-in-class"}
    assert listing.findings.severity.iloc[0] == "error"


@pytest.mark.parametrize("names", [
    ["0/1/a.png", "1/0/b.png"], ["left/right/1.png", "right/1.png", "CNV/1.png"],
])
def test_patients_and_eyes_below_a_class_may_be_named_like_another(names, tmp_path):
    assert len(table_of(tmp_path, names)) == len(names)


@pytest.mark.parametrize("name", [
    "thumbs", "outputs", "NORMAL.bak", "CNV_old", "CNV_aug", "augmented", "New Folder (2)", "bad",
    "preview", "old", "aug", "aug_1", "CNV_aug2", "data_augmented", "hflip",
])
def test_left_overs_are_known_beside_classes_and_below_them(name, tmp_path):
    with pytest.raises(KdoctError, match="beside other folders") as e:
        listed(tmp_path / "beside", f"{name}/1.png")
    assert "--classes CNV,NORMAL" in e.value.fix
    below = problems(listed(tmp_path / "below", f"CNV/{name}/P009_0.png"))
    kind = "mask-folder" if name == "thumbs" else "left-over-folder"
    assert below == {f"CNV/{name}/P009_0.png": kind}


@pytest.mark.parametrize(("name", "kind"), [
    ("DME.lnk", "class-file"), ("Macula - Shortcut.lnk", "class-file"), ("DME", "class-file"),
    ("DME.dvc", "class-file"), ("DME.h5", "class-file"), ("DME.zip.001", "packed-images"),
    ("DME.z01", "packed-images"), ("DME.tar.zst", "packed-images"),
    ("DME.zip.part", "packed-images"),
    ("CNV/.P009_0.png.icloud", "not-downloaded"), ("CNV/P009_0.png.part", "not-downloaded"),
    ("CNV/P009_0.jpg.crdownload", "not-downloaded"), ("CNV/P009.mp4", "other-format"),
])
def test_a_file_in_place_of_a_class_or_a_picture_stops_the_run(name, kind, tmp_path):
    listed(tmp_path)
    (tmp_path / name).write_bytes(b"../elsewhere/DME\n")
    assert problems(listed(tmp_path)) == {name: kind}


@pytest.mark.parametrize("name", [
    "CNV.dvc", "CNV.lnk", "model.dvc", "README", "CNV/notes.part", "tour.mp4", "CNV.h5",
])
def test_a_file_that_stands_for_no_class_and_no_picture_is_no_matter(name, tmp_path):
    listed(tmp_path)
    (tmp_path / name).write_bytes(b"hello\n")
    assert problems(listed(tmp_path)) == {name: "other-file"}


@pytest.mark.skipif(os.name == "nt" or sys.platform == "darwin", reason="names there are text")
@pytest.mark.parametrize(("name", "kind"), [
    (b"CNV/\xd6_0.png", "undecodable-name"), (b"\xd6dem/P009_0.png", "undecodable-name"),
    (b"CNV/\xd6.txt", "other-file"),
])
def test_a_name_that_is_not_utf_8_is_said_and_nothing_breaks(name, kind, tmp_path):
    listed(tmp_path)
    path = os.path.join(os.fsencode(tmp_path), name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as f: f.write(b"x")
    assert list(listed(tmp_path).findings.problem) == [kind]


@pytest.mark.parametrize("name", ["raw", "CNV_raw", "original images", "resized", "224x224"])
def test_pictures_in_another_form_are_asked_about(name, tmp_path, capsys):
    listing = listed(tmp_path / "below", f"CNV/{name}/P009_0.png")
    assert problems(listing) == {f"CNV/{name}/P009_0.png": "derived-folder"}
    assert len(listing.table) == len(TREE) + 1   # kept, with a question
    assert "--set data.leave_out=derived-folder" in capsys.readouterr().out
    listed(tmp_path / "below", leave_out=("derived-folder",))
    assert "WARNING: 1 image in folders such as raw" not in capsys.readouterr().out
    with pytest.raises(KdoctError, match="in another form") as e:
        listed(tmp_path / "beside", f"{name}/1.png")
    assert "--classes CNV,NORMAL" in e.value.fix
    listing = listed(tmp_path / "beside", classes=("CNV", "NORMAL"))
    assert problems(listing) == {name: "annotation-folder"}


def test_a_folder_that_holds_all_pictures_of_a_class_is_no_other_form(tmp_path):
    names = ["CNV/raw/1.png", "CNV/raw/2.png", "NORMAL/1.png"]
    listing = load_table(DataRecipe(source="folder", root=lay_out(tmp_path, *names)))
    assert problems(listing) == {} and len(listing.table) == 3


def test_real_and_synthetic_pictures_may_be_classes(tmp_path):
    assert len(table_of(tmp_path, ["real/1.png", "synthetic/1.png"])) == 2


@pytest.mark.parametrize("name", [
    "\u00c3\u2013dem", "\u00c3\x96dem", "\u251c\u00fbdem", "%C3%96dem", "Dr\ufffdsen", "Dr?sen",
])
def test_a_class_folder_with_garbled_letters_is_refused(name, tmp_path):
    with pytest.raises(KdoctError, match="garbled letters|lost letters") as e:
        listed(tmp_path, f"{name}/P009_0.png")
    assert "Rename" in e.value.fix


def test_a_patient_with_garbled_letters_is_refused(tmp_path):
    with pytest.raises(KdoctError, match="The patient 'M.*ller'.*garbled"):
        listed(tmp_path, "CNV/PM\u00c3\u00bcller_0.png", group_pattern=r"P(\w.*?)_")


@pytest.mark.parametrize("name", [
    "\u00d6dem", "\u6d6e\u816b", "100%", "CNV?", "\u041e\u0442\u0451\u043a",
])
def test_letters_of_all_languages_are_classes(name, tmp_path):
    assert name in set(listed(tmp_path, f"{name}/P009_0.png").table.label)


@pytest.mark.parametrize("name", [
    "#recycle", "RECYCLER", "@Recently-Snapshot", "#snapshot", "__pycache__", "wandb", "venv",
    "node_modules",
])
def test_folders_of_systems_and_tools_are_no_data(name, tmp_path):
    listing = listed(tmp_path, f"{name}/1.png", f"CNV/{name}/1.png")
    assert set(listing.table.label) == {"CNV", "NORMAL"} and len(listing.table) == len(TREE)
    assert problems(listing) == {name: "hidden", f"CNV/{name}": "hidden"}


@pytest.mark.parametrize("ending", [
    ".pgm", ".PPM", ".tga", ".exr", ".dds", ".npy", ".mat", ".nii.gz", ".png.gz", ".img", ".oct",
    ".raw", ".jxr",
])
def test_every_picture_that_is_not_read_stops_the_run(ending, tmp_path):
    listing = listed(tmp_path, f"CNV/P000_8{ending}")
    assert problems(listing) == {f"CNV/P000_8{ending}": "other-format"}


def test_arrays_that_belong_to_a_picture_or_to_all_are_no_pictures(tmp_path):
    listing = listed(tmp_path, "CNV/P000_0.npy", "CNV/P000_0.nii.gz", "features.npy", "labels.mat")
    assert set(listing.findings.problem) == {"other-file"}


def pack(file, *names):
    with zipfile.ZipFile(file, "w") as z:
        for n in names: z.writestr(n, "x")


def test_a_class_that_is_still_packed_stops_the_run(tmp_path):
    listed(tmp_path, "DRUSEN.tar.gz")
    pack(tmp_path / "DME.zip", "DME/P900_0.png")
    pack(tmp_path / "other.zip", *(f"other/P8{i:02d}.png" for i in range(12)))
    assert problems(listed(tmp_path)) == dict.fromkeys(
        ["DME.zip", "DRUSEN.tar.gz", "other.zip"], "packed-images"
    )


def test_an_archive_of_what_is_there_or_of_no_pictures_is_no_matter(tmp_path):
    listed(tmp_path, "CNV.tar.gz", "OCT2017.tar.gz")
    pack(tmp_path / "archive.zip", *TREE)
    pack(tmp_path / "NORMAL.zip", *TREE[-8:])
    pack(tmp_path / "code.zip", "train.py", "logo.png")
    assert set(listed(tmp_path).findings.problem) == {"other-file"}


SLICES = [f"{c}/P{i}_{k}.png" for c in ("CNV", "NORMAL") for i in range(3) for k in range(4)]


@pytest.mark.parametrize(("pattern", "warns"), [(r"_(\d+)\.", True), (r"P(\d+)_", False)])
def test_the_number_of_the_slice_taken_for_the_patient_is_warned_of(
    pattern, warns, tmp_path, capsys
):
    root = lay_out(tmp_path, *SLICES)
    load_table(DataRecipe(source="folder", root=root, group_pattern=pattern))
    assert ("seems to be that of the slice" in capsys.readouterr().out) == warns
