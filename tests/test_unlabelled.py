"Images without a label: where they come from, who may train on them, and that no tested patient is among them."

import hashlib
import shutil

import numpy as np
import pandas as pd
import pytest
from conftest import folder_run, lay_out, problems, table_recipe
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from kdoct.app.report_parts import data_tables
from kdoct.core.files import KdoctError
from kdoct.core.presets import preset
from kdoct.core.sections import DataRecipe
from kdoct.data.audit import audit, audit_page
from kdoct.data.fold_data import open_fold
from kdoct.data.folds import check_folds, make_folds, read_folds, write_folds
from kdoct.data.hidden_labels import labelled_groups
from kdoct.data.listing import image_table
from kdoct.data.plan import folds_fit, labels_of, labels_text, plan_folds
from kdoct.data.shortcuts import FEATURES, detect_shortcuts
from kdoct.data.sources import load_table
from kdoct.data.stage import prepare_data
from kdoct.deploy.model_card import _data_text
from kdoct.deploy.model_card_facts import _data_facts
from kdoct.evaluate.figures import counts_figure, counts_of
from kdoct.evaluate.protocol import protocol_of

HELD_OUT = ("val", "calib", "test")


def row(folder, patient, i, label=None, **more):
    label = folder if label is None else label
    return dict(path=f"{folder}/{patient}-{i}.png", label=label, patient=patient, **more)


def table_of(labelled=24, unlabelled=6, both=()):
    "Patients of classes A and B, patients without a label, and labelled patients who have unlabelled images too."
    rows = [row("AB"[p % 2], f"p{p:02d}", i) for p in range(labelled) for i in range(2)]
    more = [row("unlabelled", f"u{p:02d}", i, "") for p in range(unlabelled) for i in range(2)]
    of_both = [row("unlabelled", f"p{p:02d}", i, "") for p in both for i in range(2)]
    return image_table(rows + more + of_both)


def roles(folds, fold, name):
    return set(folds.group[(folds.fold == fold) & (folds.role == name)])


def held_out(folds, fold):
    return set().union(*(roles(folds, fold, r) for r in HELD_OUT))


# hidden labels


def test_the_patients_of_a_small_share_are_among_those_of_a_larger_one():
    part = table_of(200, 0)
    kept = [labelled_groups(part, share, 43, 0) for share in (0.05, 0.1, 0.25, 1)]
    assert all(a < b for a, b in zip(kept, kept[1:], strict=False))
    assert kept[-1] == set(part.group)


def test_another_seed_or_fold_keeps_other_patients():
    part = table_of(200, 0)
    assert (
        len({frozenset(labelled_groups(part, 0.1, *of)) for of in ((43, 0), (44, 0), (43, 1))}) == 3
    )


def test_each_class_keeps_the_share_of_its_patients():
    rare = [row("A", f"a{p}", i) for p in range(20) for i in range(3)]
    part = image_table(rare + [row("B", f"b{p}", 0) for p in range(100)])
    kept = labelled_groups(part, 0.1, 43, 0)
    assert sorted(g[0] for g in kept) == ["a"] * 2 + ["b"] * 10


def test_a_class_that_all_patients_share_does_not_take_the_place_of_the_rare_one():
    ill = [row(c, f"p{p}", 0) for p in range(10) for c in ("CNV", "NORMAL")]
    part = image_table(ill + [row("NORMAL", f"n{p}", 0) for p in range(40)])
    kept = labelled_groups(part, 0.1, 43, 0)
    assert sorted(g[0] for g in kept) == ["n"] * 4 + ["p"]


def test_labels_are_hidden_by_patient_and_in_training_alone():
    whole, some = make_folds(table_of(60, 0), 3), make_folds(table_of(60, 0), 3, labelled=0.25)
    trains = whole.role == "train"
    assert (some.role == whole.role)[~trains].all()
    assert set(some.role[trains]) == {"train", "unlabelled"}
    assert some[trains].groupby(["fold", "group"]).role.nunique().max() == 1


@pytest.mark.parametrize("share", [0.01, 0.03])
def test_a_share_without_a_patient_of_each_class_is_refused_with_the_one_that_is_enough(share):
    with pytest.raises(KdoctError, match=r"no label of class [AB] in fold \d") as e:
        make_folds(table_of(40, 0), 3, labelled=share)
    enough = float(e.value.fix.split("data.labelled=")[1].split()[0])
    folds = make_folds(table_of(40, 0), 3, labelled=enough)
    for k in range(3):
        assert {g for g in roles(folds, k, "train")}
    with pytest.raises(KdoctError):
        make_folds(table_of(40, 0), 3, labelled=enough - 0.001)


@pytest.mark.parametrize("share", [0, -0.1, 1.5])
def test_a_share_is_above_0_and_at_most_1(share):
    with pytest.raises(ValidationError):
        DataRecipe(labelled=share)


def test_hidden_labels_and_a_leak_that_is_kept_exclude_each_other():
    with pytest.raises(ValidationError, match="who is tested would be trained on"):
        DataRecipe(labelled=0.5, protocol="official", official_overlap="keep")


def test_the_recipe_key_tells_runs_with_other_labels_apart():
    keys = {
        preset("tiny", **c).key for c in ({}, {"data.labelled": 0.5}, {"data.unlabelled": True})
    }
    assert len(keys) == 3


# who may train without a label


def test_patients_without_any_label_train_in_every_fold():
    folds = make_folds(table_of(), 3)
    assert set(folds.role[folds.group.str.startswith("u")]) == {"unlabelled"}


def test_the_unlabelled_images_of_a_patient_follow_the_labelled_ones():
    folds = make_folds(table_of(both=range(24)), 3, calibration_fraction=0.2)
    of = folds[folds.path.str.startswith("unlabelled/p")]
    part = {
        (f, g): r
        for f, g, r in zip(folds.fold, folds.group, folds.role, strict=True)
        if r != "unlabelled" and r != "out"
    }
    for f, g, r in zip(of.fold, of.group, of.role, strict=True):
        assert r == ("unlabelled" if part[f, g] == "train" else "out")


def test_folds_of_labelled_images_are_the_same_beside_unlabelled_ones():
    alone, beside = make_folds(table_of(24, 0), 3), make_folds(table_of(24, 9, range(5)), 3)
    labelled = beside[~beside.path.str.startswith("unlabelled/")]
    assert labelled.reset_index(drop=True).equals(alone)


people = st.lists(
    st.tuples(st.sampled_from(["A", "B", "", "A+", "B+"]), st.integers(1, 3)),
    min_size=16,
    max_size=50,
)


@settings(max_examples=25)
@given(
    people, st.integers(2, 4), st.sampled_from([0, 0.2]), st.sampled_from([1, 0.5]), st.booleans()
)
def test_no_held_out_patient_trains_without_a_label_whatever_the_table(
    people, n, calibration, share, official
):
    rows = []
    for p, (what, images) in enumerate(people):
        part = "test" if p % 4 == 0 else "train"
        if label := what.rstrip("+"):
            rows += [row(label, f"p{p}", i, split=part) for i in range(images)]
        if what in ("", "A+", "B+"):
            rows += [row("unlabelled", f"p{p}", i, "") for i in range(images)]
    how = dict(protocol="official" if official else "grouped-cv", labelled=share)
    try:
        folds = make_folds(image_table(rows), n, 0.25, calibration_fraction=calibration, **how)
    except KdoctError as e:
        assert "are not valid" not in str(e)
        assume(False)  # too few patients
    for k in range(n):
        assert not roles(folds, k, "unlabelled") & held_out(folds, k)
        assert not roles(folds, k, "train") & held_out(folds, k)


def plant(folds, role):
    "One unlabelled image of a patient with this role in fold 0 trains all the same."
    group = sorted(roles(folds, 0, role))[0]
    at = (folds.fold == 0) & (folds.group == group) & folds.path.str.startswith("unlabelled/")
    leaky = folds.copy()
    leaky.loc[leaky.index[at][0], "role"] = "unlabelled"
    return leaky


@pytest.mark.parametrize("role", HELD_OUT)
def test_a_planted_leak_of_an_unlabelled_image_is_refused(role, tmp_path):
    folds = make_folds(table_of(both=range(24)), 3, calibration_fraction=0.2)
    leaky = plant(folds, role)
    with pytest.raises(KdoctError, match="trains without labels in fold 0"):
        check_folds(leaky)
    leaky.to_csv(tmp_path / "folds.csv", index=False)
    with pytest.raises(KdoctError, match="trains without labels"):
        read_folds(tmp_path / "folds.csv")


def test_a_planted_leak_is_refused_where_one_of_labelled_images_is_declared():
    rows = [
        row("AB"[p % 2], f"p{p}", i, split="test" if i == 0 and p % 3 == 0 else "train")
        for p in range(30)
        for i in range(2)
    ]
    table = image_table(rows + [row("unlabelled", f"p{p}", 0, "") for p in range(30)])
    folds = make_folds(table, 3, protocol="official", overlap="keep")
    assert not any(roles(folds, k, "unlabelled") & held_out(folds, k) for k in range(3))
    with pytest.raises(KdoctError, match="trains without labels"):
        check_folds(plant(folds, "test"), "official", leak=True)


def test_an_unlabelled_image_that_a_fold_forgets_is_found():
    folds = make_folds(table_of(), 3)
    at = folds.index[(folds.fold == 1) & (folds.path == "unlabelled/u00-0.png")]
    folds.loc[at, "role"] = "out"
    with pytest.raises(KdoctError, match="has no label, and is out in fold 1 without a reason"):
        check_folds(folds)


def test_unlabelled_images_of_the_official_test_part_are_not_used():
    rows = [
        row("AB"[p % 2], f"p{p}", 0, split="test" if p % 3 == 0 else "train") for p in range(30)
    ]
    none = [
        row("unlabelled", f"u{p}", 0, "", split=part)
        for p, part in enumerate(["test", "train", ""])
    ]
    folds = make_folds(image_table(rows + none), 3, protocol="official")
    of = folds[folds.group.str.startswith("u")].groupby("group").role.agg(set)
    assert of.to_dict() == {"u0": {"out"}, "u1": {"unlabelled"}, "u2": {"unlabelled"}}


def test_unlabelled_folds_come_back_as_written(tmp_path):
    folds = make_folds(table_of(both=(1, 2)), 3, labelled=0.5)
    write_folds(folds, tmp_path / "folds.csv")
    assert read_folds(tmp_path / "folds.csv").equals(folds)


BEFORE = {  # sha256 of folds.csv, made before there were unlabelled images
    (): "433610fa8ce0f0aa568f21bf5d1a06a7c7b92f862479800d923bb3d07785cac5",
    (
        ("calibration_fraction", 0.2),
    ): "eb8b1dd16826c49ccaae66fc33a020aad7e9d544877688874c88ef80139f3471",
    (("protocol", "official"),): "11393d4908efaf20cab136dc45b7c0a67c0b28062370410e2debe704220df7da",
}


@pytest.mark.parametrize("how", BEFORE)
def test_folds_without_unlabelled_images_have_the_bytes_they_always_had(how, tmp_path):
    rows = [
        row(
            "AB"[p % 2],
            f"{p:03d}",
            i,
            split="train" if p % 3 else "test",
            patient_label="AB"[p % 7 % 2],
        )
        for p in range(40)
        for i in range(2)
    ]
    write_folds(
        make_folds(image_table(rows), 3, **dict(how)),
        tmp_path / "folds.csv",
        dict(how).get("protocol", ""),
    )
    assert hashlib.sha256((tmp_path / "folds.csv").read_bytes()).hexdigest() == BEFORE[how]


# where they come from: folders


PLACES = {
    "beside the classes": ("A/p1-0.png", "B/p2-0.png", "unlabelled/p1-1.png"),
    "American": ("A/p1-0.png", "B/p2-0.png", "Unlabeled/p1-1.png"),
    "beside the parts": ("train/A/p1-0.png", "train/B/p2-0.png", "unlabelled/p1-1.png"),
    "in a part": ("train/A/p1-0.png", "train/B/p2-0.png", "train/unlabelled/x/p1-1.png"),
}


@pytest.mark.parametrize("names", PLACES.values(), ids=PLACES)
def test_a_folder_named_unlabelled_gives_images_without_a_label(names, tmp_path):
    root = lay_out(tmp_path, *names)
    table = load_table(DataRecipe(source="folder", root=root, group_pattern=r"(p\d+)-")).table
    label, group = table.set_index("path").label, table.set_index("path").group
    assert label[names[2]] == "" and set(label) == {"A", "B", ""}
    assert group[names[2]] == group[names[0]] == "p1"


def test_a_folder_named_unlabelled_is_a_class_where_it_is_named_as_one_and_not_used_where_nobody_wants_it(
    tmp_path,
):
    root = lay_out(tmp_path, *PLACES["beside the classes"])

    def labels(**how):
        return set(load_table(DataRecipe(source="folder", root=root, **how)).table.label)

    assert labels(classes=("A", "B", "unlabelled")) == {"A", "B", "unlabelled"}
    assert labels(classes=("A", "B")) == {"A", "B", ""}
    assert labels(classes=("A", "B"), unlabelled=False) == {"A", "B"}


def test_a_class_folder_below_unlabelled_is_refused(tmp_path):
    root = lay_out(tmp_path, *PLACES["beside the classes"], "unlabelled/A/p3-0.png")
    assert problems(load_table(DataRecipe(source="folder", root=root))) == {
        "unlabelled/A/p3-0.png": "class-in-class"
    }


def test_a_pattern_that_takes_the_folder_for_a_part_of_the_name_is_warned_of(tmp_path, capsys):
    root = lay_out(tmp_path, "A/1/0.png", "B/2/0.png", "unlabelled/1/0.png")
    load_table(DataRecipe(source="folder", root=root, group_pattern=r"^([^/]+/\d+)/"))
    assert "WARNING: --group-pattern takes the folder" in capsys.readouterr().out
    load_table(DataRecipe(source="folder", root=root, group_pattern=r"/(\d+)/"))
    assert "takes the folder" not in capsys.readouterr().out


def test_unlabelled_where_there_is_no_such_folder_or_source_is_refused(tmp_path):
    root = lay_out(tmp_path, "A/p1-0.png", "B/p2-0.png")
    with pytest.raises(KdoctError, match="no images in a folder 'unlabelled'"):
        load_table(DataRecipe(source="folder", root=root, unlabelled=True))
    with pytest.raises(KdoctError, match="has no images without a label"):
        load_table(DataRecipe(source="ucsd", root=root, unlabelled=True))


# where they come from: tables


TABLE = "path,label,patient\na.png,CNV,1\nb.png,NORMAL,2\nc.png,,1\nd.png,,3\n"


def test_an_empty_label_of_a_table_is_refused_and_the_remedy_names_the_setting(tmp_path):
    rng = np.random.default_rng(0)
    for name in "abcd":
        Image.fromarray(rng.integers(0, 255, (40, 40), np.uint8)).save(tmp_path / f"{name}.png")
    result = audit(load_table(table_recipe(tmp_path, TABLE)))
    assert list(result.stops) == ["no-label", "no-label"]
    with pytest.raises(KdoctError) as e:
        result.check()
    assert "--set data.unlabelled=true" in e.value.fix


def test_an_empty_label_of_a_table_is_kept_where_it_is_wanted(tmp_path):
    recipe = table_recipe(tmp_path, TABLE).model_copy(update=dict(unlabelled=True))
    listing = load_table(recipe)
    assert listing.table.label.to_list() == ["CNV", "NORMAL", "", ""] and not len(listing.findings)
    assert listing.table.group.to_list() == ["1", "2", "1", "3"]


@pytest.mark.parametrize(
    "word, label", [("unlabelled", ""), ("Unlabeled", ""), ("ungradable", None), ("?", None)]
)
def test_a_word_for_no_label_stays_refused_unless_it_says_just_that(word, label, tmp_path):
    recipe = table_recipe(tmp_path, TABLE.replace("d.png,,", f"d.png,{word},"))
    listing = load_table(recipe.model_copy(update=dict(unlabelled=True)))
    there = listing.table.set_index("path").label.get("d.png")
    assert there == label and (label is not None or problems(listing) == {"d.png": "no-label"})


def test_images_of_which_none_has_a_label_are_refused(tmp_path):
    recipe = table_recipe(tmp_path, "path,label,patient\na.png,,1\nb.png,,2\n")
    with pytest.raises(KdoctError, match="None of 2 images"):
        load_table(recipe.model_copy(update=dict(unlabelled=True)))


# a run


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def pictures(folder, patients=18, unlabelled=4):
    "Folders A, B and unlabelled, two pictures a patient."
    rng = np.random.default_rng(5)
    for p in range(patients + unlabelled):
        sub = "AB"[p % 2] if p < patients else "unlabelled"
        for i in range(2):
            save(folder / sub / f"p{p:02d}-{i}.png", rng.integers(0, 255, (50, 60), np.uint8))
    return folder


def prepared_run(folder, name="r", **changes):
    run = folder_run(folder, r"(p\d+)-", name, **changes)
    return run, prepare_data(run)


def test_a_fold_gives_unlabelled_images_their_pixels_and_no_label(tmp_path):
    run, facts = prepared_run(pictures(tmp_path))
    for k in range(3):
        data = open_fold(run, k)
        rows, at = data.rows("unlabelled"), data.idx["unlabelled"]
        assert len(at) == len(rows) == 8 and (data.labels[at] == -1).all()
        assert list(data.groups[at]) == list(rows.group)
        assert all((data.labels[data.idx[r]] >= 0).all() for r in ("train", "val", "test"))
        assert not set(at) & set(np.concatenate([data.idx[r] for r in ("train", "val", "test")]))
    assert data.classes == ["A", "B"] and facts["per_class"] == {"A": 18, "B": 18}


def test_hidden_labels_are_in_the_table_and_not_in_what_training_sees(tmp_path):
    run, facts = prepared_run(pictures(tmp_path, unlabelled=0), labelled=0.5)
    data = open_fold(run, 0)
    at, rows = data.idx["unlabelled"], data.rows("unlabelled")
    assert len(at) and (data.labels[at] == -1).all() and set(rows.label) == {"A", "B"}
    assert (data.labels[data.idx["train"]] >= 0).all()
    assert facts["labels"]["0"]["hidden_images"] == len(at)


def test_the_same_pixels_with_and_without_a_label_are_one_group_and_keep_the_label(tmp_path):
    pictures(tmp_path)
    shutil.copy(tmp_path / "A" / "p00-0.png", tmp_path / "unlabelled" / "p99-0.png")
    run, facts = prepared_run(tmp_path)
    folds = read_folds(run.folds_csv)
    assert set(folds.group[folds.path == "unlabelled/p99-0.png"]) == {"p00"}
    for k in range(3):
        role = folds[folds.fold == k].set_index("path").role
        trains = role["A/p00-0.png"] == "train"
        assert role["unlabelled/p99-0.png"] == ("unlabelled" if trains else "out")
        data = open_fold(run, k)
        at = data.table.path.eq("A/p00-0.png").to_numpy()
        assert (
            data.labels[
                data.idx[role["A/p00-0.png"]][data.rows(role["A/p00-0.png"]).path == "A/p00-0.png"]
            ]
            == 0
            and at.any()
        )


@pytest.mark.slow
def test_near_duplicates_without_a_label_follow_their_match(tmp_path):
    rng = np.random.default_rng(1)

    def blobs():
        return np.asarray(
            Image.fromarray(rng.integers(0, 255, (8, 8), np.uint8)).resize(
                (160, 160), Image.Resampling.BICUBIC
            )
        )

    for p in range(12):
        save(tmp_path / "AB"[p % 2] / f"p{p:02d}-0.png", blobs())
    mirrored = np.asarray(Image.open(tmp_path / "A" / "p00-0.png"))[:, ::-1].copy()
    save(tmp_path / "unlabelled" / "p99-0.png", mirrored)
    recipe = DataRecipe(source="folder", root=str(tmp_path), group_pattern=r"(p\d+)-")
    table = audit(load_table(recipe), near_duplicates="radiograph").table.set_index("path")
    assert table.group["unlabelled/p99-0.png"] == "p00"


def test_folds_of_another_share_do_not_fit(tmp_path):
    recipe = preset("tiny", **{"data.labelled": 0.5})
    table = audit(load_table(recipe.data)).table
    folds = make_folds(
        table, recipe.data.n_folds, recipe.data.val_fraction, recipe.seed, labelled=0.5
    )
    assert folds_fit(folds, table, recipe.data)
    assert not folds_fit(folds, table, preset("tiny").data)
    assert not folds_fit(folds, table, preset("tiny", **{"data.labelled": 0.8}).data)


def test_a_label_that_an_image_has_not_does_not_fit():
    table = table_of()
    folds = make_folds(table, 3)
    lies = table.assign(label=table.label.where(table.group != "u00", "A"))
    data = DataRecipe(n_folds=3)
    assert folds_fit(folds, table, data) and not folds_fit(folds, lies, data)


def test_audit_and_stage_say_how_many_images_have_no_label(tmp_path, capsys):
    pictures(tmp_path)
    page = audit_page(
        audit(load_table(DataRecipe(source="folder", root=str(tmp_path), group_pattern=r"(p\d+)-")))
    )
    said = (
        "8 images of 4 groups (patients) have no label; 4 of these groups have no labelled image."
    )
    assert said in page and "(no label)" in page
    _, facts = prepared_run(tmp_path)
    out = capsys.readouterr().out
    assert said in out and "unlabelled 8 images / 4 groups" in out
    assert facts["labels"]["0"]["unlabelled_images"] == 8


def test_a_run_without_unlabelled_images_says_nothing_of_them(tmp_path, capsys):
    _, facts = prepared_run(pictures(tmp_path, unlabelled=0))
    assert not facts["labels"] and not facts["unlabelled"]
    assert "label" not in capsys.readouterr().out


def test_the_share_of_labels_is_told_in_words():
    table = table_of(60, 0)
    text = labels_text(labels_of(make_folds(table, 3, labelled=0.1), table), [0])
    assert text.startswith("labels of 12.5 % of the training patients (4 of 32)")
    assert "hidden from all networks" in text and labels_text(None) == ""


@pytest.mark.slow
def test_shortcut_detection_reads_labelled_images_only(tmp_path):
    table = table_of(24, 6)
    f = pd.DataFrame(
        np.random.default_rng(0).random((len(table), len(FEATURES))), columns=list(FEATURES)
    )
    assert detect_shortcuts(table, features=f)["classes"] == ["A", "B"]


def test_a_plan_reads_the_share_from_the_recipe(tmp_path):
    recipe = preset("tiny", **{"data.labelled": 0.5})
    folds = plan_folds(audit(load_table(recipe.data)), recipe)
    assert "unlabelled" in set(folds.role)


def test_protocol_report_and_card_say_of_how_many_patients_the_labels_were_used(tmp_path):
    run, facts = prepared_run(pictures(tmp_path, unlabelled=2), labelled=0.5)
    of = facts["labels"]["1"]
    kept = f"({of['labelled_groups']} of {of['training_groups']})"
    test = open_fold(run, 1).rows("test").assign(fold=1, logit_A=0.0, logit_B=0.0)
    assert f"training patients {kept}" in protocol_of(run, test)
    parts = data_tables(run)[0]
    assert "are hidden from all networks of the run" in str(parts) and "unlabelled" in str(parts)
    assert f"training patients {kept}" in " ".join(_data_text(_data_facts(run, 1)))


def test_the_figure_of_the_parts_shows_classes_only():
    table = table_of(both=(1, 2))
    folds = make_folds(table, 3)
    counts = counts_of(folds[folds.fold == 0], table.set_index("path").label)
    figure = counts_figure(counts, ["A", "B"])
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == ["A", "B"]
