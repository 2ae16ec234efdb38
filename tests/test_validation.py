"Images of another place: audited, predicted as they ship, counted, and written whole or not at all."
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from conftest import copied_run
from PIL import Image

from kdoct.app import validation
from kdoct.app.cli import main
from kdoct.app.validation import Network
from kdoct.core.files import KdoctError, read_json, write_json
from kdoct.core.result_sections import EvaluateRecipe
from kdoct.deploy.engines import Engine
from kdoct.deploy.model_card import model_card
from kdoct.deploy.networks import open_bundle
from kdoct.evaluate.decision_tables import DecidedPredictions
from kdoct.evaluate.decisions import Decision
from kdoct.evaluate.external_records import report_external
from kdoct.evaluate.metrics import read_role
from kdoct.evaluate.outliers import Outlier
from kdoct.evaluate.patients import VolumeRule
from kdoct.evaluate.volume_tables import volumes_section

OURS = ("CNV", "DRUSEN", "NORMAL")
MAP = "amd=CNV|DRUSEN,healthy=NORMAL,rvo=?"


def decision(**changes):
    points = pd.DataFrame({"class": ["NORMAL"], "kind": "sensitivity", "target": .9, "threshold": .5,
                           "sensitivity": .9, "specificity": .9, "images": 9, "note": ""})
    o = Outlier(*[np.zeros(0)]*4, threshold=2.)
    known = Decision(OURS, 1., .6, {.1: .2}, points, o, (), dict(recipe={}))
    return replace(known, **changes)


def brightness(x):
    "Dark is NORMAL, bright CNV or DRUSEN, and what is very bright is far from the training."
    m = x.reshape(len(x), -1).mean(1)/255
    return np.stack([.5*m, .5*m, 1 - m], 1), np.where(m > .9, 3., 1.)


def straw(folder, name="straw", answer=brightness, decided=True, classes=OURS):
    "A bundle without a network."
    folder.mkdir(exist_ok=True)
    write_json(folder/"model.json", dict(weights_sha256=name))
    (folder/"bundle.json").touch()
    about = dict(arch="straw", name=name)
    return SimpleNamespace(folder=folder, decision=decision() if decided else None, classes=list(classes),
                           framing={}, about=about,
                           engine=lambda n="", threads=0: Engine("straw", answer, 1))


@pytest.fixture
def place(tmp_path):
    "Nine patients: three of each label, two images each, in a folder a label."
    for label, level in dict(amd=200, healthy=50, rvo=250).items():
        for i in range(3):
            for j in range(2):
                path = tmp_path/"in"/label/f"{label}{i}_{j}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                rng = np.random.default_rng([level, i, j])
                pixels = np.clip(level + rng.integers(-20, 20, (48, 40)), 0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(path)
    return tmp_path/"in"


@pytest.fixture
def validated(tmp_path, place, monkeypatch, capsys):
    "A function that validates straw networks with options; it gives the record and what was printed."
    made = {"straw": [Network("straw", straw(tmp_path/"straw"), 0)]}
    monkeypatch.setattr(validation, "networks_to_validate", lambda *a, **kw: made)
    def run(*options, labels=MAP, out=tmp_path/"out", networks=None):
        if networks is not None:
            made.clear()
            made.update(networks)
        argv = ["validate", "x", "--data-root", str(place), "--map", labels, "--out", str(out),
                "--group-pattern", r"/([a-z]+\d)_", "--resamples", "100", *options]
        with pytest.raises(SystemExit) as e: main(argv)
        shown = capsys.readouterr()
        if e.value.code: return None, shown.err
        return json.loads((out/"validation.json").read_text()), shown.out
    return run


def test_scores_are_of_known_classes_and_what_is_unknown_is_counted_apart(validated):
    record, _ = validated()
    scores = record["sections"]["scores"]["table"]["straw, here"]
    assert scores["accuracy"] == 1 and scores["n_images"] == 12 and scores["n_groups"] == 6
    unknown = record["sections"]["unknown"]["table"]["straw, rvo"]
    assert unknown["outliers"] == 1 and unknown["deferred"] == 1 and unknown["n_images"] == 6


def test_the_page_is_whole_and_loads_nothing(validated, tmp_path):
    validated()
    page = (tmp_path/"out/validation.html").read_text()
    assert "External validation: in" in page and "rvo = a class that it does not know" in page
    assert "http" not in page and page.rstrip().endswith("</html>")


def test_the_page_begins_with_how_the_network_does_here(validated, tmp_path):
    record, shown = validated()
    (text,) = record["in_short"]
    assert text.startswith("straw: of 12 images of classes that it knows, 100.0") and "at home: not known" in text
    left = record["sections"]["deferral"]["table"]["straw, here"]["deferred"]
    assert f"It leaves {100*left:.1f} [" in text and "It does not know rvo: 100.0" in text
    page = (tmp_path/"out/validation.html").read_text()
    assert page.index('id="short"') < page.index("straw: of 12 images") < page.index('id="data"')
    assert "It does not know rvo" in " ".join(shown.split())


def test_the_csv_has_a_row_an_image_and_network(validated, tmp_path):
    validated()
    t = pd.read_csv(tmp_path/"out/predictions.csv", keep_default_na=False)
    assert len(t) == 18 and set(t.theirs) == {"amd", "healthy", "rvo"}
    assert (t[t.theirs == "amd"].label == "CNV|DRUSEN").all()


@pytest.mark.parametrize(("labels", "why"), [
    ("amd=CNV|DRUSEN,healthy=NORMAL", "rvo=..."),
    ("amd=CVN,healthy=NORMAL,rvo=?", "Did you mean CNV?"),
    (MAP + ",dme=CNV|DRUSEN", "which no image has"),
    ("amd=CNV|DRUSEN,healthy", "no entry"),
])
def test_a_map_that_does_not_fit_is_named_with_the_remedy_and_nothing_is_written(validated, tmp_path, labels, why):
    record, shown = validated(labels=labels)
    assert record is None and why in shown and not (tmp_path/"out").exists()


def test_an_unreadable_file_stops_until_it_is_left_out(validated, place):
    (place/"amd/amd9_0.png").write_bytes(b"\x89PNG broken")
    record, shown = validated()
    assert record is None and "--leave-out corrupt" in shown
    record, shown = validated("--leave-out", "corrupt")
    assert "1 corrupt" in " ".join(record["images"])


def test_copies_count_once_and_those_across_parts_are_counted(validated, place):
    for part, label in (("train", "amd"), ("test", "amd"), ("train", "healthy"), ("test", "healthy"), ("test", "rvo")):
        (place/part).mkdir(exist_ok=True)
        files = sorted((place/label).iterdir())
        (place/part/label).mkdir(parents=True)
        for p in files: (place/part/label/p.name).write_bytes(p.read_bytes())
    for label in ("amd", "healthy", "rvo"):
        for p in (place/label).iterdir(): p.unlink()
        (place/label).rmdir()
    record, _ = validated()
    assert record["sections"]["scores"]["table"]["straw, here"]["n_images"] == 12
    assert "12 copies of other images (12 of an image in another part" in " ".join(record["images"])


def test_a_class_that_no_label_is_is_said_with_what_to_write(validated, place):
    for p in (place/"amd").iterdir(): p.unlink()
    (place/"amd").rmdir()
    record, shown = validated(labels="healthy=NORMAL,rvo=?")
    assert any("No label is CNV, DRUSEN" in w and "LABEL=CNV" in w for w in record["warnings"])
    assert "WARNING" in shown


def test_a_network_without_a_decision_defers_nothing_and_says_so(validated, tmp_path):
    bare = Network("bare", straw(tmp_path/"bare", "bare", decided=False), 0)
    both = {"straw": [Network("straw", straw(tmp_path/"straw"), 0)], "bare": [bare]}
    record, _ = validated(networks=both)
    deferral = record["sections"]["deferral"]
    assert list(deferral["table"]) == ["straw, here"] and "nothing is deferred" in deferral["caption"]
    difference = record["sections"]["differences"]["table"]["bare - straw | accuracy"]
    assert difference["difference"] == 0


def test_networks_of_other_classes_are_validated_beside_each_other_and_not_compared(validated, tmp_path):
    other = straw(tmp_path/"two", "two", lambda x: (brightness(x)[0][:, [0, 2]]*[2, 1], np.ones(len(x))), False,
                  ("amd", "healthy"))
    both = {"straw": [Network("straw", straw(tmp_path/"straw"), 0)], "two": [Network("two", other, 0)]}
    record, shown = validated(labels="rvo=?", networks=both)
    assert record is None and "amd" in shown   # `straw` has no class amd: the map is checked for each
    del both["straw"]
    record, _ = validated(labels="rvo=?", networks=both)
    assert record["sections"]["scores"]["table"]["two, here"]["accuracy"] == 1


def test_a_picture_that_the_network_refuses_is_in_no_score_and_named(validated, place):
    a = np.random.default_rng(0).integers(120, 255, (48, 40, 3), dtype=np.uint8)
    a[..., 1:] = 10
    Image.fromarray(a).save(place/"amd/amd0_7.png")
    record, _ = validated()
    assert any("refused 1 image (1 not-a-bscan)" in w for w in record["warnings"])
    assert record["sections"]["scores"]["table"]["straw, here"]["n_images"] == 12


def test_volumes_are_decided_by_the_shipped_rule(validated, tmp_path):
    bundle = straw(tmp_path/"worst", "worst")
    rule = VolumeRule("worst", 1, True, ("NORMAL", "DRUSEN", "CNV"))
    bundle.decision = decision(volume=rule)
    record, _ = validated("--group-pattern", r"/(?P<patient>(?P<volume>[a-z]+\d))_",
                          networks={"worst": [Network("worst", bundle, 0)]})
    volumes = record["sections"]["volumes"]
    assert list(volumes["table"]) == ["worst, here"]   # its run is not here
    here = volumes["table"]["worst, here"]
    assert here["n_volumes"] == 6 and here["accuracy"] == 1
    assert rule.text in volumes["caption"] and "3 volumes of unknown classes here" in volumes["caption"]


def test_groups_of_the_pattern_show_the_worst(validated, tmp_path):
    record, _ = validated("--group-pattern", r"/(?P<patient>[a-z]+\d)_(?P<view>\d)", "--by", "view")
    table = record["sections"]["groups"]["table"]
    assert list(table) == ["straw, view 0", "straw, view 1"]
    record, shown = validated("--by", "vew", out=tmp_path/"other")
    assert record is None and "'vew'" in shown


def test_results_that_are_there_are_not_written_over_and_that_is_said_first(validated, tmp_path):
    (tmp_path/"out").mkdir()
    record, shown = validated(labels=MAP)
    assert record is None and "exists already" in shown


def test_an_interrupted_validation_leaves_nothing(validated, tmp_path, monkeypatch):
    def stop(*a, **kw): raise KeyboardInterrupt
    monkeypatch.setattr("kdoct.app.validation_page.write_json", stop)
    validated()
    assert not [p for p in tmp_path.iterdir() if "out" in p.name or "validation" in p.name]


def test_images_without_a_label_are_refused(tmp_path):
    from kdoct.core.sections import DataRecipe
    data = DataRecipe(source="folder", root=str(tmp_path), unlabelled=True)
    with pytest.raises(KdoctError, match="without a label"):
        validation.audited_images(data, tmp_path/"f.csv")


# --- what is noted for cards and reports

@pytest.fixture
def run(tmp_path):
    "A simulated run whose fold 0 is evaluated."
    from simulated_models import quiet

    from kdoct.core.presets import preset
    from kdoct.core.runs import create_run
    from kdoct.evaluate.simulated import write_simulated_stages
    made = create_run("here", preset("tiny"))
    quiet(write_simulated_stages, made, 0)
    return made


def as_network(run, role, answer=brightness):
    "A straw network in the place of a trained one."
    folder = run.stage_dir(0, role)
    about = read_json(folder/"model.json")
    bundle = straw(folder, role, answer, False, ("CNV", "DME", "DRUSEN", "NORMAL"))
    (folder/"bundle.json").unlink()
    write_json(folder/"model.json", about | dict(weights_sha256=f"hash of {role}"))
    return Network(role, bundle, 0, role, run)


def four_classes(x):
    "Likewise, and never DME."
    p, d = brightness(x)
    return np.concatenate([p, 0*p[:, :1]], 1)[:, [0, 3, 1, 2]], d


@pytest.fixture
def noted(run, validated):
    "The run with a validation of its student."
    record, shown = validated("--name", "clinic", networks={"student": [as_network(run, "student", four_classes)]})
    return run, record, shown


def test_the_card_of_a_network_shows_its_validation_and_that_of_another_says_there_is_none(noted):
    run, record, shown = noted
    assert "external/clinic.json" in shown
    text, facts = model_card({}, run, 0, "student")
    section = text.partition("## External validation")[2].partition("\n## ")[0]
    assert record["sections"]["scores"]["texts"]["student, here"]["accuracy %"] in section
    assert "rvo, which it does not know" in section and "stands under" in " ".join(facts["limits"])
    other, facts = model_card({}, run, 0, "baseline")
    assert "Not validated on images of another place" in other
    assert any("was not measured" in limit for limit in facts["limits"])


def test_the_figures_at_home_are_those_of_the_run_in_the_joined_classes(noted):
    run, record, _ = noted
    own = read_role(run, 0, "student")
    predicted = own[[f"logit_{c}" for c in ("CNV", "DME", "DRUSEN", "NORMAL")]].to_numpy()
    p = np.exp(predicted - predicted.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    joined = np.stack([p[:, 0] + p[:, 2], p[:, 1], p[:, 3]], 1).argmax(1)
    truth = own.label.map(dict(CNV=0, DRUSEN=0, DME=1, NORMAL=2))
    at_home = record["sections"]["scores"]["table"]["student, at home"]["accuracy"]
    assert at_home == pytest.approx((joined == truth).mean())


def test_volumes_at_home_are_those_of_the_evaluation_of_the_run(run, validated, monkeypatch):
    predictions, network = read_role(run, 0, "student"), as_network(run, "student", four_classes)
    rule = VolumeRule("worst", 1, True, ("NORMAL", "DRUSEN", "DME", "CNV"))
    network.bundle.decision = decision(classes=("CNV", "DME", "DRUSEN", "NORMAL"), volume=rule)
    far = np.arange(len(predictions)) % 7 / 2.5   # two of seven are outliers
    decided = DecidedPredictions(network.bundle.decision, predictions, far)
    monkeypatch.setattr(validation, "read_decided", lambda *_: decided)
    record, _ = validated("--group-pattern", r"/(?P<patient>(?P<volume>[a-z]+\d))_",
                          networks={"student": [network]}, labels="amd=CNV,healthy=NORMAL,rvo=?")
    at_home = record["sections"]["volumes"]["table"]["student, at home"]
    models = {"student": predictions}, {"student": [decided]}
    evaluated = volumes_section(*models, rule, EvaluateRecipe(n_boot=100)).table.loc["student, volumes"]
    assert at_home["n_volumes"] == evaluated.n_units - evaluated.without
    assert at_home["accuracy"] == pytest.approx(evaluated.accuracy)
    assert 0 < at_home["deferred"] == pytest.approx(evaluated.deferred)


def test_the_report_shows_validations_of_the_networks_that_are_there_and_names_others(noted):
    run, record, _ = noted
    found, notes = report_external(run.path)
    assert found.texts.index.tolist() == ["clinic, student, fold 0"] and not notes
    write_json(run.stage_dir(0, "student")/"model.json", dict(weights_sha256="trained again"))
    found, notes = report_external(run.path)
    assert found is None and "clinic is of other networks" in notes[0]


def test_a_bundle_whose_run_is_not_here_is_said_to_be_noted_nowhere(validated, tmp_path):
    _, shown = validated()
    assert "Not noted for straw" in shown
    assert not (tmp_path/"straw/external").exists()   # its seal allows no further file


def test_networks_of_several_folds_are_means_of_theirs_and_shown_alone(validated, tmp_path):
    def other(x):
        p, d = brightness(x)
        return p[:, [2, 1, 0]], d   # dark is CNV: all controls are wrong
    folds = [Network("straw", straw(tmp_path/"a", "a"), 0), Network("straw", straw(tmp_path/"b", "b", other), 1)]
    record, _ = validated(networks={"straw": folds})
    alone = record["sections"]["folds"]["table"]
    each = [alone[f"straw, fold {k}"]["accuracy"] for k in (0, 1)]
    assert each[0] == 1 and each[1] < 1
    scores = record["sections"]["scores"]["table"]["straw, here"]
    assert scores["accuracy"] == pytest.approx(np.mean(each)) and scores["n_images"] == 12
    assert alone["straw, mean ± standard deviation"]["accuracy_sd"] == pytest.approx(np.std(each))


@pytest.mark.slow
def test_a_bundle_is_validated_as_it_is_and_the_next_one_has_it_on_its_card(exported_outputs, tmp_path, monkeypatch,
                                                                           capsys):
    run = copied_run(exported_outputs, tmp_path/"outputs")
    bundle, root = run.stage_dir(0, "baseline")/"bundle", run.stage("data")["root"]
    before = sorted(p.name for p in bundle.iterdir())
    monkeypatch.chdir(tmp_path)
    table = pd.read_csv(f"{root}/table.csv", dtype=str).groupby("label").head(12)
    table.to_csv(f"{root}/some.csv", index=False)
    argv = ["validate", str(bundle), "--source", "csv", "--data-root", f"{root}/some.csv", "--name", "again",
            "--engine", "torch", "--resamples", "100"]
    with pytest.raises(SystemExit) as e: main(argv)
    assert not e.value.code, capsys.readouterr().err
    assert sorted(p.name for p in bundle.iterdir()) == before
    open_bundle(bundle)   # its seal holds
    (record,) = json.loads((run.path/"external/again.json").read_text())["networks"]
    assert (record["role"], record["fold"]) == ("baseline", 0)
    text, _ = model_card({}, run, 0, "baseline")
    assert "| again |" in text.partition("## External validation")[2]
