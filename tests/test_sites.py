"Several sources in one run: patients and labels that stay apart, copies that are found, and sources left out in turn."
import re
import shutil

import pandas as pd
import pytest
from PIL import Image

from kdoct.core.files import KdoctError
from kdoct.core.presets import preset
from kdoct.core.runs import create_run
from kdoct.core.sections import DataRecipe
from kdoct.data.folds import check_folds, fold_names, make_folds
from kdoct.data.listing import image_table
from kdoct.data.plan import folds_fit, list_and_audit, plan_folds
from kdoct.data.sites import read_sources, site_recipes
from kdoct.data.sources import load_table
from kdoct.data.stage import prepare_data
from kdoct.evaluate.hog_svm import run_hog_svm


def picture(file, grey, mode="L"):
    "A small picture with a gradient; every grey is another."
    file.parent.mkdir(parents=True, exist_ok=True)
    im = Image.linear_gradient("L").resize((64, 64)).point(lambda v: (v + grey) % 256)
    im.convert(mode).save(file)


def hospital(root, classes, patients=4, first=0, mode="L"):
    "A folder of classes; patient p of class c has two images."
    for k, c in enumerate(classes):
        for p in range(patients):
            for i in range(2):
                grey = first + 20 * k + 2 * p + i
                picture(root / c / f"P{p + patients * k}_{i}.png", grey, mode)


def two_hospitals(tmp_path, **south):
    "The recipe's data part for two hospitals whose patients have the same numbers."
    hospital(tmp_path / "north", ("CNV", "NORMAL"))
    hospital(tmp_path / "south", ("amd", "healthy"), first=100)
    common = dict(group_pattern=r"(P\d+)_")
    own = dict(root=str(tmp_path / "south"), map="amd=CNV,healthy=NORMAL") | common | south
    sources = dict(north=dict(root=str(tmp_path / "north")) | common, south=own)
    return dict(source="sites", sources=sources)


def test_patients_of_two_hospitals_with_one_number_are_two(tmp_path):
    table = load_table(DataRecipe(**two_hospitals(tmp_path))).table
    assert table.group.nunique() == 16 and (table.groupby("group").site.nunique() == 1).all()
    assert set(table.label) == {"CNV", "NORMAL"}


def test_a_file_that_two_hospitals_have_joins_their_patients_with_a_finding(tmp_path):
    data = two_hospitals(tmp_path)
    copy = tmp_path / "south" / "amd" / "P99_0.png"
    copy.write_bytes((tmp_path / "north" / "CNV" / "P0_0.png").read_bytes())
    data = DataRecipe(**data, near_duplicates="separate")
    listing, result = list_and_audit(data)
    of = result.table.set_index("path").group
    assert of["south/amd/P99_0.png"] == of["north/CNV/P0_0.png"] == of["north/CNV/P0_1.png"]
    found = result.findings.set_index("path").problem
    assert found["south/amd/P99_0.png"] == "duplicate-across-groups"


def test_a_file_that_two_hospitals_label_differently_stops_the_run(tmp_path):
    data = two_hospitals(tmp_path)
    copy = tmp_path / "south" / "healthy" / "P99_0.png"
    copy.write_bytes((tmp_path / "north" / "CNV" / "P0_0.png").read_bytes())
    _, result = list_and_audit(DataRecipe(**data, near_duplicates="separate"))
    assert "same-pixels-two-labels" in set(result.stops)


@pytest.mark.parametrize("south, says", [
    (dict(root="nowhere"), "Source 'south': nowhere does not exist"),
    (dict(root=None), "Source 'south': Source 'folder' needs"),
    (dict(map="amd=CNV"), "healthy"),
    (dict(map="amd=CNV|NORMAL,healthy=NORMAL"), "Source 'south'"),
    (dict(map="amd=CNV,healthy=NORMAL,dme=DME"), "dme"),
    (dict(map="amd=?,healthy=-"), "leaves no image|None of the labels"),
    (dict(map=""), "none of its labels .CNV, NORMAL. is a class of another source"),
    (dict(source="lc25000"), "different kinds"),
    (dict(source="octa"), "Source 'south': There is no source"),
    (dict(group_pattern="(X"), "Source 'south'"),
    (dict(colour="red"), "Source 'south': colour"),
])
def test_what_is_wrong_with_one_hospital_is_said_with_its_name(tmp_path, south, says):
    data = two_hospitals(tmp_path, **south)
    with pytest.raises(KdoctError) as e:
        _, result = list_and_audit(DataRecipe(**data, near_duplicates="separate"))
        result.check()
    assert re.search(says, str(e.value)), str(e.value)


def test_what_to_do_about_one_hospital_names_its_field(tmp_path):
    with pytest.raises(KdoctError) as e:
        load_table(DataRecipe(**two_hospitals(tmp_path, root="nowhere")))
    assert "data.sources.south.root" in e.value.fix and "--data-root" not in e.value.fix


def test_a_label_may_be_left_out_or_train_without_one(tmp_path):
    hospital(tmp_path / "south", ("rvo", "odd"), first=180)
    labels = "amd=CNV,healthy=NORMAL,rvo=?,odd=unlabelled"
    listing = load_table(DataRecipe(**two_hospitals(tmp_path, map=labels)))
    paths = listing.table.set_index("path").label
    assert not any("rvo" in p for p in paths.index)
    assert (paths[[p for p in paths.index if "odd" in p]] == "").all()
    notes = listing.findings[listing.findings.problem == "label-left-out"]
    assert sorted(notes.action) == ["not used", "used without a label"]


def test_a_hospital_without_any_label_needs_no_map(tmp_path):
    hospital(tmp_path / "north", ("CNV", "NORMAL"))
    hospital(tmp_path / "new", ("unlabelled",), first=180)
    common = dict(group_pattern=r"(P\d+)_")
    sources = {name: dict(root=str(tmp_path / name)) | common for name in ("north", "new")}
    table = load_table(DataRecipe(source="sites", sources=sources)).table
    assert set(table.label[table.site == "new"]) == {""}
    assert set(table.label[table.site == "north"]) == {"CNV", "NORMAL"}


def test_a_class_that_one_hospital_lacks_is_named_and_a_fold_may_test_without_it(tmp_path):
    data = two_hospitals(tmp_path)
    for name, root, label in (("east", "east", "CNV"),):
        hospital(tmp_path / root, (label,), first=60)
        data["sources"][name] = dict(root=str(tmp_path / root), group_pattern=r"(P\d+)_")
    data = DataRecipe(**data, protocol="leave-one-source-out", near_duplicates="separate")
    _, result = list_and_audit(data)
    found = result.findings[result.findings.problem == "class-not-in-source"]
    assert list(found.detail) == ["source east has no image of NORMAL"]
    folds = plan_folds(result, preset("tiny").model_copy(update=dict(data=data)))
    tested = folds[(folds.fold == 0) & (folds.role == "test")].path
    assert tested.str.startswith("east/").all()


def test_one_file_listed_by_two_sources_is_refused(tmp_path):
    hospital(tmp_path / "north", ("CNV", "NORMAL"))
    one = dict(root=str(tmp_path / "north"))
    with pytest.raises(KdoctError, match="listed by two sources, 'a' and 'b'"):
        load_table(DataRecipe(source="sites", sources=dict(a=one, b=one)))


def test_one_class_in_two_spellings_is_refused_with_the_map_that_joins_them(tmp_path):
    hospital(tmp_path / "north", ("CNV", "NORMAL"))
    hospital(tmp_path / "south", ("cnv", "NORMAL"), first=100)
    roots = {name: dict(root=str(tmp_path / name)) for name in ("north", "south")}
    with pytest.raises(KdoctError, match="data.sources.south.map='cnv=CNV'"):
        load_table(DataRecipe(source="sites", sources=roots))


@pytest.mark.parametrize("changes, says", [
    (dict(source="folder"), "source=sites"),
    (dict(root="x"), "root belongs to each"),
    (dict(protocol="official"), "official"),
    (dict(worst_case_train=True), "worst_case"),
    (dict(sources=dict(a=dict(root="x"))), "one source"),
    (dict(sources={}), "source=sites"),
])
def test_what_contradicts_several_sources_is_refused_by_the_recipe(changes, says):
    both = dict(source="sites", sources=dict(a=dict(root="x"), b=dict(root="y")))
    names = {f"data.{k}": v for k, v in (both | changes).items()}
    with pytest.raises(KdoctError, match=says): preset("edge", **names)


def test_the_number_of_folds_follows_what_is_left_out():
    both = {"data.source": "sites", "data.protocol": "leave-one-source-out",
            "data.sources": {k: dict(root=k) for k in "abc"}}
    assert preset("edge", **both).data.n_folds == 3
    assert preset("tiny", **{"data.protocol": "leave-one-device-out"}).data.n_folds == 3
    with pytest.raises(KdoctError, match="that makes 3 folds"):
        preset("edge", **both, **{"data.n_folds": 5})
    with pytest.raises(KdoctError, match="one source"):
        preset("edge", **{"data.protocol": "leave-one-source-out"})


def test_the_table_of_sources_says_its_line(tmp_path):
    file = tmp_path / "hospitals.csv"
    file.write_text('name,root,map\nnorth,n,\nnorth,s,"a=CNV"\n')
    with pytest.raises(KdoctError, match="line 3, names 'north' again"): read_sources(file)
    file.write_text("name,root,colour\nnorth,n,red\n")
    with pytest.raises(KdoctError, match="column colour"): read_sources(file)
    file.write_text("name,root,map\nnorth,n,a=CNV,b=NORMAL\n")   # commas without quotes
    with pytest.raises(KdoctError, match="line 2|cells"): read_sources(file)
    with pytest.raises(KdoctError, match="does not exist"): read_sources(tmp_path / "no.csv")


# --- folds

def table_of(rows):
    "An image table of (path, label, group, site)."
    keys = ("path", "label", "patient", "site")
    return image_table([dict(zip(keys, r, strict=True)) for r in rows])


def three_sites(patients=6):
    "Three sites, two classes, two images a patient."
    return [(f"{s}/{c}/{p}-{i}.png", c, f"{s}/{c}{p}", s)
            for s in "abc" for c in ("CNV", "NORMAL") for p in range(patients) for i in range(2)]


def test_fold_k_tests_all_images_of_site_k_and_no_patient_of_it_learns():
    table = table_of(three_sites())
    folds = make_folds(table, protocol="leave-one-source-out")
    site = table.set_index("path").site
    for k, name in enumerate(fold_names(table, "leave-one-source-out")):
        rows = folds[folds.fold == k]
        tests = rows.path.map(site) == name
        assert (rows.role[tests] == "test").all() and set(rows.role[~tests]) == {"train", "val"}


def test_a_patient_of_two_sites_does_not_train_where_one_of_them_is_tested():
    rows = three_sites()
    rows[0] = rows[0][:2] + (rows[-1][2], rows[0][3])   # an image at a of a patient at c
    table = table_of(rows)
    folds = make_folds(table, protocol="leave-one-source-out", calibration_fraction=0.2)
    both = folds[folds.group == rows[-1][2]]
    roles = both.groupby("fold").role.agg(lambda r: sorted(set(r)))
    assert roles[0] == ["out", "test"] and roles[2] == ["out", "test"]
    assert len(roles[1]) == 1 and roles[1][0] != "out"
    leaky = folds.copy()
    leaky.loc[(leaky.role == "out") & (leaky.fold == 0), "role"] = "train"
    with pytest.raises(KdoctError, match="two roles in fold 0"):
        check_folds(leaky, "leave-one-source-out")


def test_an_image_that_is_left_out_without_a_reason_is_found():
    folds = make_folds(table_of(three_sites()), protocol="leave-one-source-out")
    lost = folds.copy()
    lost.loc[lost.index[lost.role == "train"][0], "role"] = "out"
    with pytest.raises(KdoctError, match="out in fold"): check_folds(lost, "leave-one-source-out")
    again = folds.copy()
    again.loc[again.index[again.role == "test"][0], "role"] = "out"
    with pytest.raises(KdoctError, match="tested on exactly once"):
        check_folds(again, "leave-one-source-out")


def test_nothing_is_learned_from_the_source_left_out_not_even_without_a_label():
    rows = [*three_sites(), ("a/u/1.png", "", "a/u1", "a"), ("b/u/1.png", "", "b/u1", "b")]
    folds = make_folds(table_of(rows), protocol="leave-one-source-out")
    roles = folds.set_index(["path", "fold"]).role
    assert roles["a/u/1.png"].tolist() == ["out", "unlabelled", "unlabelled"]
    assert roles["b/u/1.png"].tolist() == ["unlabelled", "out", "unlabelled"]


def test_folds_of_another_source_are_not_taken_over():
    table = table_of(three_sites())
    fields = {k: dict(root=k) for k in "abc"}
    data = DataRecipe(source="sites", sources=fields, protocol="leave-one-source-out")
    folds = make_folds(table, protocol="leave-one-source-out")
    assert folds_fit(folds, table, data)
    moved = table.assign(site=table.site.replace({"a": "b", "b": "a"}))
    assert not folds_fit(folds, moved, data)
    assert not folds_fit(folds, table, data.model_copy(update=dict(calibration_fraction=0.2)))


def test_labels_are_hidden_in_training_alone_where_a_source_is_left_out():
    table = table_of(three_sites(10))
    folds = make_folds(table, protocol="leave-one-source-out", labelled=0.5)
    whole = make_folds(table, protocol="leave-one-source-out")
    held = whole.role.isin(["val", "test"])
    assert (folds.role[held] == whole.role[held]).all() and (folds.role == "unlabelled").any()


@pytest.mark.parametrize("device, says", [
    (["x", "x", "x"], "all images are of device x"),
    (["x", "y", ""], "have no device"),
    (None, "have no device"),
])
def test_devices_that_are_not_known_cannot_be_left_out(device, says):
    table = table_of(three_sites())
    if device: table = table.assign(device=table.site.map(dict(zip("abc", device, strict=True))))
    with pytest.raises(KdoctError, match=says): make_folds(table, protocol="leave-one-device-out")


def test_a_class_of_one_source_alone_cannot_be_learned_without_it():
    rows = [*three_sites(), *((f"a/DME/{p}.png", "DME", f"a/DME{p}", "a") for p in range(4))]
    with pytest.raises(KdoctError, match="Fold 0 leaves nothing to learn DME from"):
        make_folds(table_of(rows), protocol="leave-one-source-out")


def test_the_devices_of_a_table_are_folds(tmp_path):
    from kdoct.app.stages import with_folds_counted
    hospital(tmp_path, ("CNV", "NORMAL"), patients=6)
    rows = [f"{c}/P{p + 6 * k}_{i}.png,{c},{p + 6 * k},{'uvw'[p % 3]}"
            for k, c in enumerate(("CNV", "NORMAL")) for p in range(6) for i in range(2)]
    (tmp_path / "table.csv").write_text("\n".join(["path,label,patient,device", *rows]) + "\n")
    changes = {"data.source": "csv", "data.root": str(tmp_path)}
    recipe = preset("tiny", **changes, **{"data.protocol": "leave-one-device-out"})
    assert with_folds_counted(recipe).data.n_folds == 3


# --- the recipe

def test_recipes_without_several_sources_have_the_keys_they_always_had():
    tiny, edge = preset("tiny"), preset("edge")
    assert (tiny.key, tiny.network_key("student")) == ("3e836833710948c1", "8ce5c26a5ae32537")
    assert (edge.key, edge.network_key("teacher")) == ("5f0bb9995f179ec1", "02c3c1985311bdd3")
    other = preset("tiny", **{"data.phantom.devices": "fine,haze"})
    assert other.network_key("student") != tiny.network_key("student")


def test_a_colour_source_beside_a_grey_one_is_named(tmp_path):
    from kdoct.data.sites import colour_text
    data = two_hospitals(tmp_path)
    hospital(tmp_path / "east", ("CNV", "NORMAL"), first=60, mode="RGB")
    for f in (tmp_path / "east").glob("*/*.png"):
        im = Image.open(f)
        Image.merge("RGB", [im.getchannel(0), im.getchannel(1).point(lambda v: v // 2), im.getchannel(2)]).save(f)
    data["sources"]["east"] = dict(root=str(tmp_path / "east"), group_pattern=r"(P\d+)_")
    _, result = list_and_audit(DataRecipe(**data, near_duplicates="separate"))
    assert "source east (100 % of its images)" in colour_text(result.table)
    assert result.channels == 3


def test_a_source_is_read_by_its_own_fields_alone(tmp_path):
    data = DataRecipe(**two_hospitals(tmp_path), classes=("NORMAL", "CNV"))
    own = site_recipes(data)
    assert own["north"].classes is None and own["south"].protocol == "grouped-cv"
    assert isinstance(load_table(data).table, pd.DataFrame)


def test_hog_and_svm_are_tested_on_the_source_left_out(tmp_path):
    south = tmp_path / "south"
    hospital(tmp_path / "west", ("CNV", "NORMAL"), first=50)
    given = two_hospitals(tmp_path)
    given["sources"]["west"] = dict(root=str(tmp_path / "west"), group_pattern=r"(P\d+)_")
    shutil.rmtree(south / "healthy")   # a fold tests without a class
    given["sources"]["south"]["map"] = "amd=CNV"
    fields = given | dict(protocol="leave-one-source-out", size=32)
    run = create_run("loso", preset("tiny", **{f"data.{k}": v for k, v in fields.items()}))
    prepare_data(run)
    assert run_hog_svm(run, 1)["classes"] == ["CNV", "NORMAL"]
    found = pd.read_parquet(run.stage_dir(1, "hog_svm") / "predictions.parquet")
    assert found.path.str.startswith("south/").all() and set(found.label) == {"CNV"}
