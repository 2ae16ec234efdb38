"The worst source or device in every table, of one fold and of all, and runs of two protocols side by side."
import pandas as pd
import pytest

from kdoct.core.files import KdoctError, read_json, sha256_file
from kdoct.core.presets import preset
from kdoct.core.runs import create_run
from kdoct.data.stage import prepare_data
from kdoct.evaluate.all_folds import evaluate_run
from kdoct.evaluate.compared_runs import read_models
from kdoct.evaluate.comparison import compare_models, scores_texts
from kdoct.evaluate.hog_svm import run_hog_svm
from kdoct.evaluate.places import SMALL_GROUP
from kdoct.evaluate.simulated import write_simulated_stages
from kdoct.evaluate.stage import evaluate_fold

DEVICES = {"data.phantom.devices": "fine,strip,haze", "data.phantom.patients": 48,
           "data.phantom.height": 64, "data.phantom.width": 64, "data.size": 32}
LEFT_OUT = {"data.protocol": "leave-one-device-out"}


def simulated(name, **changes):
    "A tiny run on three devices whose models are drawn by formula, all folds."
    run = create_run(name, preset("tiny", **DEVICES, **changes))
    for k in range(run.recipe.data.n_folds): write_simulated_stages(run, k)
    return run


def test_a_run_that_leaves_devices_out_names_its_folds_and_its_worst_device(capsys):
    run = simulated("lodo", **LEFT_OUT)
    assert run.stage("data")["fold_names"] == ["fine", "haze", "strip"]
    result = evaluate_run(run, verbose=False)
    record = read_json(run.path / "summary.json")
    table = record["table"]["student"]
    folds = result["per_fold"].query("model == 'student'").accuracy
    assert table["worst_device"] == pytest.approx(folds.min())
    assert table["mean_over_devices"] == pytest.approx(folds.mean())
    names = run.stage("data")["fold_names"]
    assert table["worst_device_is"] == names[folds.reset_index(drop=True).idxmin()]
    assert "fold 0 fine, fold 1 haze, fold 2 strip" in record["protocol"]
    places, own = record["sections"]["places"], record["sections"]["folds"]["texts"]
    assert {"device fine", "worst device"} <= set(places["table"])
    assert places["table"]["device fine"]["n_images"] == 32 >= SMALL_GROUP
    assert all("devices: mean, worst %" in row for row in own.values())


@pytest.mark.slow
def test_a_fold_of_one_device_has_no_worst_and_one_of_several_has_with_small_ones_marked():
    left_out, mixed = simulated("lodo", **LEFT_OUT), simulated("mixed")
    assert "places" not in evaluate_fold(left_out, 0, verbose=False)["sections"]
    made = evaluate_fold(mixed, 0, verbose=False)
    assert "worst device" in made["sections"]["places"].texts.index
    texts = made["sections"]["places"].texts.images
    small = [name for name, n in texts.items() if n.endswith("*")]
    assert small and f"fewer than {SMALL_GROUP} images" in made["sections"]["places"].caption
    record = read_json(mixed.fold_dir(0) / "evaluation.json")
    assert "devices: mean, worst %" in record["table"]["teacher"]


def test_runs_of_two_protocols_are_compared_on_all_their_images_and_not_on_one_fold():
    runs = [simulated("mixed"), simulated("lodo", **LEFT_OUT)]
    models, _ = read_models(runs)
    made = compare_models(models, n_boot=200)
    assert {"mixed: student", "lodo: student"} <= set(made.scores.index)
    assert scores_texts(made)["devices: mean, worst %"].str.contains("fine|haze|strip").all()
    with pytest.raises(KdoctError, match="not tested alike"): read_models(runs, folds=[0])


@pytest.mark.parametrize("changes", [{}, {"data.labelled": .5}])
def test_hog_and_svm_learn_from_the_other_devices_alone(changes):
    run = create_run("lodo", preset("tiny", **DEVICES, **LEFT_OUT, **changes))
    prepare_data(run)
    about = run_hog_svm(run, 1)
    found = pd.read_parquet(run.stage_dir(1, "hog_svm")/"predictions.parquet")
    table = pd.read_parquet(run.path/"table.parquet").set_index("path")
    assert (table.device[found.path] == "haze").all() and len(found) == (table.device == "haze").sum()
    assert run_hog_svm(run, 1) == about   # finished: nothing is done again


def test_folds_that_test_another_device_are_not_taken_over():
    run = create_run("lodo", preset("tiny", **DEVICES, **LEFT_OUT))
    first = prepare_data(run)
    assert prepare_data(run)["folds_sha256"] == first["folds_sha256"]
    folds = pd.read_csv(run.folds_csv)
    folds["fold"] = (folds.fold + 1) % 3   # as good folds as any, of other devices
    folds.sort_values(["fold", "path"]).to_csv(run.folds_csv, index=False)
    run.record("data", folds_sha256=sha256_file(run.folds_csv))
    with pytest.raises(KdoctError, match="does not fit"): prepare_data(run)
