"A model card says what the run's records say, and no more."
import json
import re
from dataclasses import replace

import numpy as np
import pytest

from kdoct.core.files import read_json, write_json
from kdoct.core.presets import preset
from kdoct.core.result_sections import DecideRecipe
from kdoct.core.runs import create_run
from kdoct.deploy.bundle import strict_json
from kdoct.deploy.licences import NOT
from kdoct.deploy.model_card import model_card
from kdoct.evaluate.decisions import fit_decision
from kdoct.evaluate.metrics import simulate_predictions
from kdoct.evaluate.simulated import write_simulated_stages
from kdoct.evaluate.stage import evaluate_fold


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    "A simulated run whose fold 0 is evaluated."
    with pytest.MonkeyPatch.context() as env:
        env.setenv("KDOCT_OUTPUTS", str(tmp_path_factory.mktemp("outputs")))
        run = create_run("card", preset("tiny"))
        write_simulated_stages(run, 0)
        evaluate_fold(run, 0, verbose=False)
        yield run


@pytest.fixture
def run(evaluated, tmp_path):
    "The same with files of its own: what a test changes is put back."
    files = (
        evaluated.json,
        evaluated.fold_dir(0) / "evaluation.json",
        *(evaluated.stage_dir(0, r) / "model.json" for r in evaluated.recipe.roles),
    )
    kept = {p: p.read_bytes() for p in files}
    yield evaluated
    for p, data in kept.items(): p.write_bytes(data)


def change(run, role, **facts):
    path = run.stage_dir(0, role) / "model.json"
    write_json(path, read_json(path) | facts)


def started(run, student, teacher):
    "Networks that started from these weights: (arch, weights_from)."
    change(run, "teacher", arch=teacher[0], weights_from=teacher[1], weights_sha256="t")
    change(
        run,
        "student",
        arch=student[0],
        weights_from=student[1],
        distilled_from={"teacher": dict(arch=teacher[0], weights_sha256="t", weight=1.0)},
    )
    return model_card({}, run, 0, "student")


def test_every_number_of_the_results_is_the_evaluations(run):
    path = run.fold_dir(0) / "evaluation.json"
    e = read_json(path)
    e["table"]["student"] |= dict(accuracy=0.12345, accuracy_low=0.1, accuracy_high=0.2)
    write_json(path, e)
    text, card = model_card({}, run, 0, "student")
    assert (
        card["measured"]["models"]["student"]["accuracy"] == [0.12345, 0.1, 0.2]
        and "12.3 [10.0, 20.0]" in text
    )
    assert e["protocol"] in text


def test_every_class_stands_there_with_its_intervals(run):
    path = run.fold_dir(0) / "evaluation.json"
    e = read_json(path)
    e["sections"]["classes"]["table"]["student, CNV"] |= dict(
        sensitivity=0.12345, sensitivity_low=0.1, sensitivity_high=0.2
    )
    write_json(path, e)
    text, card = model_card({}, run, 0, "student")
    assert list(card["measured"]["per_class"]) == e["estimates"]["student"]["classes"]
    assert card["measured"]["per_class"]["CNV"]["sensitivity"] == [0.12345, 0.1, 0.2] and re.search(
        r"^\| CNV \| \d+ \| 12.3 \[10.0, 20.0\] \|", text, re.M
    )


def test_the_network_without_a_teacher_stands_beside_the_student(run):
    text, _ = model_card({}, run, 0, "student")
    assert re.search(r"^\| \*\*student\*\* \(this one\) \|", text, re.M) and re.search(
        r"^\| baseline \|", text, re.M
    )


def test_an_evaluation_of_other_predictions_is_not_taken(run):
    path = run.fold_dir(0) / "evaluation.json"
    e = read_json(path)
    e["predictions"]["student"] = "0" * 64
    write_json(path, e)
    text, card = model_card({}, run, 0, "student")
    assert (
        "of other predictions" in text
        and card["measured"]["models"] == {}
        and card["measured"]["protocol"] == NOT
    )


HUB, NONE, PACKAGE = dict(kind="hub"), dict(kind="none"), dict(kind="package")
V2 = ("convnextv2_large.fcmae_ft_in22k_in1k", HUB)


def test_a_non_commercial_teacher_is_said_with_what_is_not_settled(run):
    text, card = started(run, ("efficientnet_b2", HUB), V2)
    assert [s["licence"] for s in card["licences"]["teachers"]] == ["cc-by-nc-4.0"] and card[
        "licences"
    ]["own"][0]["licence"] == "apache-2.0"
    assert "not settled" in text and "allow commercial use" not in text


def test_non_commercial_weights_bind_what_started_from_them(run):
    text, _ = started(run, V2, ("efficientnet_b2", HUB))
    assert "stay under their terms" in text and "allow commercial use" not in text


def test_free_weights_are_said_to_be_free(run):
    text, _ = started(run, ("tf_efficientnet_lite0", PACKAGE), ("vgg19.tv_in1k", HUB))
    assert "allow commercial use if their notices are kept" in text and "bsd-3-clause" in text


@pytest.mark.parametrize(
    "origin", [dict(kind="file", file="w.pth", sha256="ab"), {}, dict(kind="model folder", arch="x", weights_from={})]
)
def test_an_unknown_licence_is_not_guessed(run, origin):
    text, _ = started(run, ("efficientnet_b2", origin), ("efficientnet_b2", NONE))
    assert "licence is not recorded" in text and "allow commercial use" not in text


def test_a_teacher_that_the_student_is_not_distilled_from_gives_no_licence(run):
    started(run, ("efficientnet_b2", HUB), ("vgg19.tv_in1k", HUB))
    change(run, "teacher", weights_sha256="trained again")
    assert "licence is not recorded" in model_card({}, run, 0, "student")[0]


def test_a_folder_of_this_machine_is_not_named(run):
    origin = dict(
        kind="model folder",
        run="earlier",
        data="csv /secret/place",
        arch="efficientnet_b2",
        weights_from=HUB,
    )
    text, card = started(run, ("efficientnet_b2", origin), ("efficientnet_b2", NONE))
    assert "/secret" not in text and "/secret" not in json.dumps(card) and str(run.path) not in text


def test_formats_are_shown_with_whatever_was_measured(run):
    formats = dict(
        onnx=dict(kept=True, parity=dict(probability=1.5e-6), latency_ms=48.1, own=3),
        int8=dict(kept=False, reason="not 1.3 times | faster"),
    )
    text, card = model_card(dict(formats=formats), run, 0, "student")
    assert (
        "| format | kept | largest difference of a probability | one picture [ms] | reason | own |"
        in text
        and card["formats"] == formats
    )
    assert "| int8 | no | – | – | not 1.3 times \\| faster | – |" in text


def test_the_card_for_programs_is_plain_json(run):
    _, card = model_card(dict(name="x"), run, 0, "student")
    assert strict_json(json.dumps(card, allow_nan=False).encode(), "model_card.json")["name"] == "x"


def test_the_card_has_the_volume_rule_what_it_did_and_on_whom_decisions_were_fitted(run):
    val = simulate_predictions(60)
    f = np.random.default_rng(0).normal(size=(len(val), 8)).astype(np.float32)
    decision = fit_decision(val, f, f, DecideRecipe(), ("NORMAL", "DRUSEN", "DME", "CNV"))
    text, card = model_card({}, run, 0, "student", decision)
    rows = card["measured"]["decisions"]["volumes"]["table"]
    assert (
        set(rows) == {"student, volumes", "student, patients"}
        and "### Volumes and patients, on test patients" in text
    )
    assert decision.volume.text in text and card["decision"]["volume"]["min_slices"] == 2
    assert (
        f"chosen on {len(val)} images of 60 validation patients" in text
        and "have also chosen the epoch" in text
    )
    own = replace(decision, about=decision.about | dict(part="calibration"))
    text, _ = model_card({}, run, 0, "student", own)
    assert (
        f"chosen on {len(val)} images of 60 calibration patients" in text
        and "have also chosen the epoch" not in text
    )


def test_what_was_not_recorded_is_said(run):
    text, card = model_card({}, run, 0, "student")
    assert card["decision"] is None and "has no decision" in text
    assert (
        "Energy [kWh]: not recorded. Carbon: not recorded." in text
        and "Input: not recorded." in text
    )


def test_the_card_has_words_where_files_have_names(run):
    val = simulate_predictions(60)
    f = np.random.default_rng(0).normal(size=(len(val), 8)).astype(np.float32)
    about = dict(
        input=dict(name="images", dtype="uint8", shape=["n", "h", "w"], meaning="decoded pictures"),
        outputs=dict(
            probabilities=dict(dtype="float32", shape=["n", 4]),
            outlier=dict(dtype="float32", shape=["n"]),
        ),
    )
    text, _ = model_card(
        about,
        run,
        0,
        "student",
        fit_decision(val, f, f, DecideRecipe(), run=run.name, fold=0, role="student"),
    )
    for raw in (
        "recipe_key",
        "sha256",
        "memory_gb",
        "packages.",
        "train_images",
        "dtype",
        "grouped-cv",
        "| val |",
        "| train |",
        "squash",
        "|  |\n",
        "gpu",
    ):
        assert raw not in text, raw
    assert "Input: `images`, uint8, n x h x w: decoded pictures." in text
    assert "Output: `probabilities`, float32, n x 4; `outlier`, float32, n." in text
    assert [
        row.split(" | ")[0]
        for row in text.splitlines()
        if row.startswith(("| training |", "| validation |", "| test |"))
    ] == [
        "| training",
        "| validation",
        "| test",
    ] and "Prediction sets with a target error of 5 %" in text


def test_energy_is_shown_where_stages_recorded_it(run):
    for role in ("teacher", "student"): run.record(f"fold_0/{role}", energy_kwh=0.25)
    assert "Energy [kWh]: 0.5." in model_card({}, run, 0, "student")[0]


def test_a_shortcut_stands_at_the_top_of_the_card(run):
    path = run.path / "shortcuts.json"
    found = dict(
        images=60,
        of=60,
        images_a_group=1,
        groups=30,
        balanced_accuracy=0.78,
        interval=[0.7, 0.85],
        chance=0.25,
        above_chance=True,
        worst=None,
    )
    write_json(path, found)
    try: text, card = model_card({}, run, 0, "student")
    finally: path.unlink()
    words = "predicts the class with 78.0 % balanced accuracy [70.0, 85.0] where chance is 25.0 %"
    assert words in card["warnings"][0] and 0 < text.index(words) < text.index("## Network")


def test_a_score_without_an_interval_is_kept_and_said(run):
    path = run.fold_dir(0) / "evaluation.json"
    e = read_json(path)
    e["table"]["student"] |= dict(sensitivity=0.75, sensitivity_low=None, sensitivity_high=None)
    write_json(path, e)
    text, card = model_card({}, run, 0, "student")
    assert "75.0 (no interval)" in text and card["measured"]["models"]["student"][
        "sensitivity"
    ] == [0.75, None, None]
