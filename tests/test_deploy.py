"From checkpoint to bundle: each engine says what PyTorch said in evaluation; what does not is left out."
import importlib.util
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import copied_run, imported_network
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from kdoct.app import cli_models
from kdoct.core.files import KdoctError
from kdoct.core.runs import open_run
from kdoct.core.sections import TrainRecipe
from kdoct.data.batches import Batches
from kdoct.data.framing import framed, to_square
from kdoct.data.images import decode_image, read_image_bytes
from kdoct.deploy import engines, formats, graph, networks
from kdoct.deploy import stage as deploy_stage
from kdoct.evaluate.features import features_and_logits
from kdoct.evaluate.outliers import fit_outlier
from kdoct.models.backbones import create_classifier

ENGINES = list(engines.ENGINES)
EXACT = ["torch", "onnx", "openvino"]

pytest.importorskip("openvino", reason="the extra deploy is not installed")


@pytest.fixture(scope="module")
def made(exported_outputs, tmp_path_factory):
    "A run with a trained network, and its bundle with every engine that could be written."
    run = copied_run(exported_outputs, tmp_path_factory.mktemp("deploy"))
    record = run.stage("fold_0/deploy")["baseline"]
    folder = run.stage_dir(0, "baseline") / "bundle"
    return SimpleNamespace(run=run, folder=folder, record=record)


@pytest.fixture(scope="module")
def bundle(made): return networks.open_bundle(made.folder)


@pytest.fixture(scope="module")
def test_part(made):
    "Pictures of the test part from their files, and what evaluation reads of them."
    found = pd.read_parquet(made.run.stage_dir(0, "baseline") / "predictions.parquet")
    root = Path(made.run.stage("data")["root"])
    return np.stack(
        [framed(decode_image(read_image_bytes(root / p))[0], 1) for p in found.path]
    ), found


def pil(a, side):
    return np.asarray(Image.fromarray(a).resize((side, side), Image.Resampling.BICUBIC)).astype(int)


def in_graph(a, side):
    "The graph's own resize; tall pictures, whose columns PIL takes first from version 13 on, are left to PIL."
    x = torch.from_numpy(
        np.array(graph.squared(a[None], side) if len(a) > max(a.shape[1], side) else a[None])
    ).float()
    return graph.pil_resize(x[None], side)[0, 0].numpy().astype(int)


@settings(max_examples=40)
@given(st.integers(32, 600), st.integers(32, 600), st.integers(32, 300), st.integers(0, 9))
def test_the_graph_resizes_as_pil_does(h, w, side, seed):
    a = np.random.default_rng(seed).integers(0, 256, (h, w), dtype=np.uint8)
    away = np.abs(in_graph(a, side) - pil(a, side))
    assert away.max() <= 1 and (away == 0).mean() > .999


@pytest.mark.slow
def test_an_engine_resizes_by_pil_itself(bundle):
    a, side = (
        np.random.default_rng(0).integers(0, 256, (1, 90, 120), dtype=np.uint8),
        bundle.about["size"] + bundle.about["margin"],
    )
    engine = bundle.engine("torch")
    assert (
        engine(a)["probabilities"].tolist()
        == engine(pil(a[0], side).astype(np.uint8)[None])["probabilities"].tolist()
    )


def test_real_b_scans_are_resized_as_pil_does(shared_data):
    files = sorted((shared_data / "ucsd_oct").rglob("*.jp*g"))[::150]
    assert files
    for f in files:
        image = decode_image(read_image_bytes(f))[0]
        for way in ("squash", "crop", "pad"):
            away = np.abs(in_graph(framed(image, 1, way), 104) - to_square(image, 104, 1, way))
            assert away.max() <= 1 and (away == 0).mean() > .999, (f, way)


@pytest.mark.slow
@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_says_from_files_what_evaluation_said(name, bundle, test_part):
    if not bundle.about["formats"][name]["kept"]:
        pytest.skip(bundle.about["formats"][name]["reason"])
    pictures, found = test_part
    logits = found[[f"logit_{c}" for c in bundle.classes]].to_numpy()
    want, said = bundle.decision.probabilities(logits), bundle.engine(name)(pictures)
    assert said["probabilities"].dtype == np.float32 and said["outlier"].shape == (len(found),)
    assert np.allclose(said["probabilities"].sum(1), 1, atol=1e-4)
    if name in EXACT: assert np.abs(said["probabilities"] - want).max() < 1e-3
    else: assert (said["probabilities"].argmax(1) == want.argmax(1)).mean() > .9


@pytest.mark.slow
@pytest.mark.parametrize("name", ENGINES)
def test_pictures_of_other_sizes_and_numbers_leave_no_trace(name, bundle, test_part):
    if name not in bundle.engines: pytest.skip(bundle.about["formats"][name]["reason"])
    engine, some = bundle.engine(name, threads=1), test_part[0][:3]
    first = engine(some)
    engine(np.zeros((1, 50, 300), np.uint8))
    each = [engine(x[None]) for x in some]
    for k in graph.OUTPUTS:
        assert np.allclose(np.concatenate([e[k] for e in each]), first[k], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ENGINES)
def test_threads_may_call_one_engine_at_once(name, bundle, test_part):
    if name not in bundle.engines: pytest.skip(bundle.about["formats"][name]["reason"])
    engine, pictures = bundle.engine(name, threads=1), test_part[0]
    want, wrong = [engine(x[None])["probabilities"] for x in pictures[:4]], []

    def ask(i):
        for _ in range(5):
            if not np.allclose(engine(pictures[i][None])["probabilities"], want[i], atol=1e-5):
                wrong.append(i)
    threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert not wrong


@pytest.mark.slow
@pytest.mark.parametrize(
    "bad",
    [
        np.zeros((64, 64), np.uint8),
        np.zeros((1, 64, 64), np.float32),
        np.zeros((0, 64, 64), np.uint8),
        np.zeros((1, 64, 64, 3), np.uint8),
        np.zeros((1, 64, 0), np.uint8),
    ],
)
def test_what_is_no_picture_is_refused(bad, bundle):
    with pytest.raises(KdoctError, match=r"takes uint8 \(n, h, w\)"): bundle.engine("torch")(bad)


def test_answers_that_are_no_numbers_are_not_handed_out():
    broken = engines.Engine("x", lambda x: (np.full((len(x), 2), np.nan), np.zeros(len(x))), 1)
    with pytest.raises(KdoctError, match="not finite"): broken(np.zeros((1, 8, 8), np.uint8))


@pytest.mark.slow
def test_calibration_is_of_whole_training_patients(made, bundle):
    from kdoct.data.fold_data import open_fold
    rows, facts = open_fold(made.run, 0).rows("train"), bundle.about["calibration"]
    taken = rows[rows.sha256.isin(facts["sha256"])]
    assert len(taken) == facts["images"] == len(facts["sha256"]) and set(taken.label) == set(
        bundle.classes
    )
    assert (
        len(rows[rows.group.isin(taken.group)]) == len(taken)
        and facts["patients"] == taken.group.nunique()
    )


@pytest.mark.slow
def test_bundle_tells_no_folder_of_this_machine(made, trained_outputs, exported_outputs, root):
    outputs = (trained_outputs, exported_outputs, made.run.path.parent)
    for f in made.folder.iterdir():
        text = f.read_bytes()
        for place in (*map(str, outputs), str(root), "site-packages"):
            assert place.encode() not in text, (f.name, place)


@pytest.mark.slow
def test_record_and_bundle_say_what_was_measured(made, bundle):
    assert bundle.about["formats"] == made.record["formats"]
    for name in bundle.engines:
        f = bundle.about["formats"][name]
        assert (
            f["latency_ms"] > 0
            and f["images_a_second"] > 0
            and f["bytes"] > 0
            and f["parity"]["images"] >= 10
        )
        assert all((made.folder / file).exists() for file in f["files"])
    assert {"times_as_fast", "reason"} <= set(bundle.about["formats"]["int8"]) or not bundle.about[
        "formats"
    ]["int8"]["kept"]


@pytest.mark.slow
def test_distances_flags_and_the_spread_of_times_are_recorded_and_shown(made, bundle):
    shown = formats.summary(bundle.about["formats"])
    card = (made.folder / "MODEL_CARD.md").read_text()
    for name in bundle.engines:
        f = bundle.about["formats"][name]
        fastest, slowest = f["latency_range_ms"]
        assert fastest <= f["latency_ms"] <= slowest
        assert f["parity"]["other_flags"] >= 0
        assert shown.loc[name, "of a distance %"] == 100 * f["parity"]["distance"]
        assert shown.loc[name, "other outlier flags"] == f["parity"]["other_flags"]
    assert "of an outlier distance [%] | same predicted class %" in card
    assert "pictures with another outlier flag" in card
    assert "fastest and slowest round [ms]" in card


def test_a_flag_that_differs_near_the_threshold_is_counted_though_it_is_allowed():
    p = np.full((3, 2), .5)
    parity = engines.compare(dict(probabilities=p, outlier=np.array([1., 1.99, 3.])),
                             dict(probabilities=p, outlier=np.array([1., 2.01, 3.])), threshold=2.)
    assert (parity["flags"], parity["other_flags"]) == (1., 1)
    assert parity["distance"] == pytest.approx(.02/2.01)


@pytest.mark.slow
def test_the_times_are_shown_once_by_the_command_and_not_by_the_export(
    made, tmp_path, capsys, monkeypatch
):
    from kdoct.app import cli
    monkeypatch.setenv("KDOCT_OUTPUTS", str(made.run.path.parent))
    deploy_stage.export_fold(open_run("tiny"), 0, "baseline", tmp_path / "a", [], images=8)
    assert "slowest round" not in capsys.readouterr().out
    with pytest.raises(SystemExit):
        out = ["--out", str(tmp_path / "b")]
        cli.main(["export", "tiny", "--role", "baseline", "--formats", "", *out])
    assert capsys.readouterr().out.count("slowest round") == 1


@pytest.mark.slow
def test_a_format_that_cannot_be_written_is_recorded_and_left_out(made, tmp_path, monkeypatch):
    def fails(*_): raise RuntimeError("no such operator")
    monkeypatch.setenv("KDOCT_OUTPUTS", str(made.run.path.parent))
    monkeypatch.setattr(formats, "write_onnx", fails)
    got = networks.open_bundle(
        deploy_stage.export_fold(
            open_run("tiny"), 0, "baseline", tmp_path / "b", ["int8"], images=8
        )
    )
    assert got.about["formats"]["int8"] == dict(
        kept=False, reason="onnx could not be written (RuntimeError: no such operator)"
    )
    assert (
        got.engines == ["torch"]
        and not list(got.folder.glob("*.xml"))
        and not list(got.folder.glob("*.onnx"))
    )
    with pytest.raises(KdoctError, match="no engine 'int8': onnx could not be written"):
        got.engine("int8")


def found_of(ms, lost=0., kept=True):
    return dict(
        openvino=dict(latency_ms=13.0, images_a_second=100.0),
        int8=dict(
            kept=kept,
            reason="" if kept else "x",
            latency_ms=ms,
            images_a_second=130.0,
            parity=dict(lost_points=lost),
        ),
    )


def test_a_reason_never_compares_two_numbers_that_read_alike():
    parity = dict(probability=0.0010004, distance=0., labels=0.994999, flags=1.)
    assert engines.refused(parity, True) == (
        "a probability is off by 0.0010004 (at most 0.0010000); 99.4999 % of the predicted classes "
        "agree (at least 99.5000 %)"
    )


@pytest.mark.parametrize("ms, lost, why", [(9.9, .5, ""), (10.1, 0., "1.29 "
                                                                     "times as fast"), (5., .6, "loses 0.60 points")])
def test_int8_is_kept_only_if_it_is_worth_it(ms, lost, why):
    found = found_of(ms, lost)
    formats.evaluate_int8(found)
    assert found["int8"]["kept"] == (not why) and why in found["int8"]["reason"]
    assert found["int8"]["times_as_fast"] == pytest.approx(13 / ms)


@pytest.mark.slow
def test_what_stands_in_the_way_is_said_before_work_begins(made, tmp_path, monkeypatch):
    run = made.run
    with pytest.raises(KdoctError, match="exists already"):
        deploy_stage.export_fold(run, 0, "baseline")
    with pytest.raises(KdoctError, match="no format 'onxx'"):
        deploy_stage.export_fold(run, 0, "baseline", tmp_path / "b", ["onxx"])
    with pytest.raises(KdoctError, match="no finished student"):
        deploy_stage.export_fold(run, 0, "student", tmp_path / "b")
    really = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "nncf" else really(name, *a)
    )
    with pytest.raises(KdoctError, match="nncf") as e:
        deploy_stage.export_fold(run, 0, "baseline", tmp_path / "b")
    assert "kdoct[deploy]" in e.value.fix and not (tmp_path / "b").exists()


@pytest.mark.slow
def test_a_graph_of_another_network_is_refused(bundle, tmp_path):
    about = bundle.about | dict(classes=["A", "B"])
    with pytest.raises(KdoctError, match="The graph model.onnx takes and gives"):
        engines.make_engine(bundle.folder, "onnx", about, bundle.decision)


@pytest.mark.slow
def test_colour_pictures_go_through_the_graph(tmp_path):
    torch.manual_seed(0)
    model = create_classifier(
        TrainRecipe(arch="test_resnet", weights="none", precision="fp32"), 2, 32
    ).eval()
    rng, none = np.random.default_rng(0), np.zeros(8, np.int64)
    pictures = rng.integers(0, 256, (8, 70, 50, 3), dtype=np.uint8)
    stored = np.stack([pil(p, 40) for p in pictures]).astype(np.uint8)
    features, logits = features_and_logits(
        model, Batches(stored, none, none.astype(np.uint64), np.arange(8), 4, size=32)
    )
    stand_in = SimpleNamespace(
        temperature=2.0,
        outlier=fit_outlier(rng.normal(size=(40, features.shape[1])).astype(np.float32)),
    )
    graph.write_onnx(graph.Deployable(model, stand_in, 32, 8), 3, tmp_path / "model.onnx")
    answer, facts = engines.onnx_engine(tmp_path / "model.onnx")
    said = engines.Engine("onnx", answer, 3)(pictures)
    assert facts["images"] == ("uint8", [None, None, None, 3])
    assert np.abs(said["probabilities"] - torch.tensor(logits / 2).softmax(1).numpy()).max() < 1e-4
    assert np.allclose(said["outlier"], stand_in.outlier.score(features), rtol=1e-2)


_LIFE_AFTER_OPENVINO = """
import gc, signal, subprocess, threading
import numpy as np
import openvino as ov
import openvino.opset13 as op
from kdoct.deploy.graph import openvino_core
p = op.parameter([1, 3], np.float32)
model = ov.Model([op.relu(p)], [p], "m")
compiled = [openvino_core().compile_model(model, "CPU") for _ in range(2)]
del compiled[0]
t = threading.Thread(target=compiled.clear); t.start(); t.join(); gc.collect()
signal.signal(signal.SIGCHLD, lambda *_: None)   # as torch's DataLoader does where it has workers
subprocess.run(["true"])
print("alive")
"""


@pytest.mark.slow
def test_a_freed_engine_leaves_signals_alone():
    "OpenVINO 2026.4 takes the main thread's signal stack; the end of any child process could then end this one."
    done = subprocess.run(
        [sys.executable, "-c", _LIFE_AFTER_OPENVINO], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout.strip()) == (0, "alive"), done.stderr[-500:]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    "A model folder as `kdoct import` writes it, and pictures."
    at = tmp_path_factory.mktemp("theirs")
    imported_network(at, 7)
    return SimpleNamespace(
        folder=at / "mine",
        pictures=at / "pictures",
        bundle=deploy_stage.export_folder(at / "mine", at / "pictures"),
    )


@pytest.mark.slow
def test_an_imported_network_is_exported_and_its_bundle_predicts_without_a_decision(theirs):
    from kdoct import Predictor
    opened = networks.open_bundle(theirs.bundle)
    f = opened.about["formats"]
    assert {"torch", "onnx", "openvino"} <= set(
        opened.engines
    ) and theirs.bundle == theirs.folder / "bundle"
    for name in EXACT:
        assert (
            f[name]["parity"]["images"] == 7
            and f[name]["parity"]["probability"] < 1e-3
            and "accuracy" not in f[name]["parity"]
        )
    assert not f["int8"]["kept"] and "training pictures" in f["int8"]["reason"]
    assert (
        opened.decision is None
        and opened.about["temperature"] is None
        and "NaN" in opened.about["outputs"]["outlier"]["meaning"]
    )
    assert not any("decision" in name for name in opened.about["files"])
    assert "NaN" not in cli_models._formats_text(formats.summary(f))
    def rows(folder, engine):
        with Predictor(folder, engine=engine) as p: return list(p.predict(theirs.pictures))
    want = rows(theirs.folder, "torch")
    for engine in EXACT:
        for got, w in zip(rows(theirs.bundle, engine), want, strict=True):
            assert [got[k] for k in ("deferred", "distance", "outlier", "prediction_set")] == [
                None
            ] * 4 and got["notes"] == ("no-decision",)
            assert got["predicted"] == w["predicted"] and all(
                abs(got[k] - w[k]) < 1e-3 for k in got if k.startswith("probability_")
            )


@pytest.mark.slow
def test_the_card_of_a_network_without_a_run_says_what_is_not_known(theirs):
    text, card = (
        (theirs.bundle / "MODEL_CARD.md").read_text(),
        (theirs.bundle / "model_card.json").read_text(),
    )
    assert text.index(
        "Training data, calibration and evaluation of this network are not known"
    ) < text.index("## Network")
    for said in (
        "imported from the file their-own.pth",
        "Evaluation: not known",
        "Training pictures: not known",
        "no evaluation is recorded",
        "compared with PyTorch on 7 pictures given at the export",
        "licence is not recorded",
    ):
        assert said in text, said
    assert "None" not in text and "nan" not in text and str(theirs.folder.parent) not in text + card


@pytest.mark.slow
def test_pictures_that_cannot_be_read_are_named_before_anything_is_written(theirs, tmp_path):
    (tmp_path / "in").mkdir()
    with pytest.raises(KdoctError, match="no picture to compare") as e:
        deploy_stage.export_folder(theirs.folder, tmp_path / "in", tmp_path / "b")
    assert "--images" in e.value.fix
    (tmp_path / "in" / "bad.png").write_bytes(b"no picture")
    with pytest.raises(KdoctError, match="bad.png"):
        deploy_stage.export_folder(theirs.folder, tmp_path / "in", tmp_path / "b")
    assert not (tmp_path / "b").exists()


@pytest.mark.slow
def test_a_bundle_that_lost_its_decision_is_refused(made, theirs, tmp_path):
    import json
    import shutil

    from kdoct.deploy.bundle import seal
    copy = shutil.copytree(made.folder, tmp_path / "b")
    for name in ("decision.json", "decision.safetensors"): (copy / name).unlink()
    about = json.loads((copy / "bundle.json").read_text())
    seal(copy, {k: v for k, v in about.items() if k not in ("bundle", "files")})
    with pytest.raises(KdoctError, match="contradict each other on whether there is a decision"):
        networks.open_bundle(copy)


@pytest.mark.slow
def test_the_model_folder_of_a_run_is_exported_as_the_run_is(made, monkeypatch):
    from kdoct.app import cli
    asked = []
    monkeypatch.setattr(
        deploy_stage,
        "export_fold",
        lambda run, *rest, place: asked.append((run.name, *rest)) or made.folder,
    )
    folder = str(made.run.stage_dir(0, "baseline"))
    with pytest.raises(SystemExit) as e: cli.main(["export", folder, "--formats", "onnx"])
    assert e.value.code == 0 and asked == [("tiny", 0, "baseline", None, ("onnx",), None)]


@pytest.mark.slow
def test_a_model_folder_away_from_its_run_keeps_its_decision(made, theirs, tmp_path):
    import shutil
    copied = shutil.copytree(
        made.run.stage_dir(0, "baseline"),
        tmp_path / "copied",
        ignore=shutil.ignore_patterns("bundle", "resume"),
    )
    opened = networks.open_bundle(
        deploy_stage.export_folder(copied, theirs.pictures, formats=[])
    )
    assert opened.decision.temperature == networks.load_decision(copied).temperature
    parity = opened.about["formats"]["torch"]["parity"]
    assert (
        {"distance", "flags"} <= set(parity)
        and "accuracy" not in parity
        and opened.about["channels"] == 1
    )
    assert "Evaluation: not known" in (opened.folder / "MODEL_CARD.md").read_text()
