"The explorer: state without widgets, widgets without a browser, and all of it in a browser."
import base64
import dataclasses
import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from test_volumes import textured, write_dicom

from kdoct.app import explore as explore
from kdoct.app import html, networks, panels
from kdoct.app.cases import CaseFilter, Cases, Thresholds, case_table, open_cases, pick
from kdoct.app.explore import App
from kdoct.app.networks import Background, Explorer
from kdoct.core.files import KdoctError
from kdoct.core.presets import preset
from kdoct.core.result_sections import EvaluateRecipe
from kdoct.core.runs import create_run
from kdoct.data.batches import Batches
from kdoct.data.fold_data import open_fold
from kdoct.data.framing import to_square
from kdoct.data.stage import prepare_data
from kdoct.evaluate.decide import decide_fold
from kdoct.evaluate.metrics import log_softmax, logits_of, simulate_predictions
from kdoct.models.backbones import create_classifier
from kdoct.models.folders import save_model_folder
from kdoct.training.results import predict_logits, predictions_frame

ROOT = Path(__file__).resolve().parent.parent
NASTY = '<img src=x onerror=alert(1)>'


def untrained(run, fold, roles):
    "Networks that have learned nothing, with all the files of trained ones."
    data = open_fold(run, fold)
    batches = Batches(
        data.images,
        data.labels,
        np.zeros(len(data.images), np.uint64),
        data.idx["test"],
        32,
        size=run.recipe.data.size,
    )
    for number, role in enumerate(roles):
        torch.manual_seed(number)
        model = create_classifier(
            run.recipe.training(role), len(data.classes), run.recipe.data.size
        ).eval()
        folder = run.stage_dir(fold, role)
        folder.mkdir(parents=True)
        predictions_frame(data, "test", predict_logits(model, batches)).to_parquet(
            folder / "predictions.parquet", index=False
        )
        save_model_folder(
            folder, model, role, run.recipe, data.classes, folds_sha256=data.folds_sha256, fold=fold
        )


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "An outputs folder with one small run: teacher and student of fold 0."
    folder = tmp_path_factory.mktemp("explore")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDOCT_OUTPUTS", str(folder))
        run = create_run("small", preset("tiny", **{"data.phantom.patients": 24}))
        prepare_data(run)
        untrained(run, 0, ("teacher", "student"))
    return folder


@pytest.fixture
def run(made, outputs):
    "The small run, in an outputs folder of the test's own."
    shutil.copytree(made, outputs)
    facts = (outputs / "small" / "run.json")
    facts.write_text(facts.read_text().replace(str(made), str(outputs)))
    from kdoct.core.runs import open_run
    return open_run("small")


def simulated(run, n=80, classes=("CNV", "DME", "DRUSEN", "NORMAL")):
    df = simulate_predictions(n, classes=classes)
    p = np.exp(log_softmax(logits_of(df)))
    return Cases(run, 0, "student", "", list(classes), df, dict(student=p), {}, None)


# --- what is read

def test_networks_are_compared_on_the_same_image_whatever_the_order_of_their_tables(run):
    before = open_cases(run, 0, "student")
    path = run.stage_dir(0, "teacher") / "predictions.parquet"
    pd.read_parquet(path).sample(frac=1, random_state=0).to_parquet(path, index=False)
    after = open_cases(run, 0, "student")
    assert np.array_equal(before.probabilities["teacher"], after.probabilities["teacher"])


def test_a_network_of_other_images_is_refused(run):
    path = run.stage_dir(0, "teacher") / "predictions.parquet"
    pd.read_parquet(path).iloc[1:].to_parquet(path, index=False)
    with pytest.raises(KdoctError, match="other images"): open_cases(run, 0, "student")


def test_a_network_alone_has_nothing_beside_it(run):
    shutil.rmtree(run.stage_dir(0, "teacher"))
    cases = open_cases(run, 0, "student")
    assert cases.beside == "" and case_table(cases).apart.isna().all()
    with pytest.raises(KdoctError, match="No other network"):
        pick(case_table(cases), CaseFilter(beside="same"))


def test_what_the_numbers_are_of_is_said(run):
    cases = open_cases(run, 0, "student")
    n = len(cases.predictions)
    for words in (
        "small", "fold 0", "student", "test_efficientnet", f"{n} images of", "not calibrated",
    ):
        assert words in cases.about
    assert "phantom" in cases.protocol and "seed" in cases.protocol


def test_choices_are_kept_together(run):
    table = case_table(simulated(run))
    rows = pick(table, CaseFilter(true="CNV", result="wrong", low=.5, order="surest first"))
    t = table.loc[rows]
    want = table[(table.label == "CNV") & (table.predicted != "CNV") & (table.confidence >= .5)]
    assert sorted(rows) == sorted(want.index) and len(rows)
    assert t.confidence.is_monotonic_decreasing


def test_a_hundred_thousand_images_are_no_burden(run):
    big = simulated(run, 40_000)
    assert len(big.predictions) > 90_000
    began = time.perf_counter()
    pick(case_table(big), CaseFilter(true="DME", order="surest first"))
    assert time.perf_counter() - began < 2


def test_what_a_decision_says_is_shown_and_can_be_chosen(run):
    decision = decide_fold(run, 0)
    state = Explorer()
    cases = state.open()
    p = cases.probabilities["student"]
    assert p == pytest.approx(decision.probabilities(logits_of(cases.predictions)))
    assert (
        state.table.deferred.tolist()
        == (
            (p.max(1) < decision.defer_below) | (cases.distances > decision.outlier.threshold)
        ).tolist()
    )
    flagged = pick(state.table, CaseFilter(outlier="outlier"))
    assert set(flagged) == set(np.flatnonzero(cases.distances > decision.outlier.threshold))
    printed = " ".join(html.verdict(cases, state.subject(0)))
    assert (
        "Prediction sets" in printed
        and ("Not deferred" in printed) != ("Deferred to" in printed)
        and ("No outlier" in printed) != ("Outlier:" in printed)
    )
    now = state.network(state.stamp()).output(state.subject(0).image)
    assert now.probabilities == pytest.approx(p[0], abs=1e-4) and now.distance == pytest.approx(
        cases.distances[0], rel=1e-3
    )


def test_predict_and_explorer_say_the_same_of_every_picture(run):
    from kdoct.deploy.rows import with_decision
    decision, state = decide_fold(run, 0), Explorer()
    cases = state.open()
    middle = float(np.median(cases.distances))
    decision = dataclasses.replace(
        decision, outlier=dataclasses.replace(decision.outlier, threshold=middle)
    )  # half are outliers
    state.cases = cases = dataclasses.replace(cases, decisions=dict(student=decision))
    state.table = case_table(cases)
    rows = with_decision(decision, cases.probabilities["student"], cases.distances, .1)
    for i, row in enumerate(rows):
        assert state.table.loc[i, ["predicted", "deferred", "why", "outlier"]].tolist() == [
            row[k] for k in ("predicted", "deferred", "why", "outlier")
        ]
        printed = html.verdict(cases, state.subject(i))
        assert (
            f"Deferred to a person ({row['why']})." if row["deferred"] else "Not deferred."
        ) in printed
    assert {r["outlier"] for r in rows} == {True, False}


def between(values):
    "A threshold in the widest gap of the middle half of some values: rounding decides nothing."
    v = np.sort(values)
    some = v[len(v) // 4:-(len(v) // 4)]
    at = np.diff(some).argmax()
    return float(some[at] + some[at + 1]) / 2


def test_the_same_picture_has_the_same_texts_in_predict_explorer_report_and_card(run):
    from kdoct.deploy.model_card import model_card
    from kdoct.deploy.predict import Predictor
    from kdoct.evaluate.decision_tables import deferral_section, outliers_section, read_decided
    from kdoct.evaluate.decisions import save_decision
    folder, cases = (
        run.stage_dir(0, "student"),
        (decide_fold(run, 0), open_cases(run, 0, "student"))[1],
    )
    d = cases.decisions["student"]
    outlier = dataclasses.replace(d.outlier, threshold=between(cases.distances))
    d = dataclasses.replace(
        d, defer_below=between(cases.probabilities["student"].max(1)), outlier=outlier
    )
    save_decision(folder, d)
    state = Explorer()
    cases = state.open("small", 0, "student")
    root = Path(run.stage("data")["root"])
    with Predictor(folder) as p: rows = list(p.predict([root / f for f in cases.predictions.path]))
    alpha = min(d.set_minimum)
    for i, row in enumerate(rows):
        assert state.table.loc[i, ["predicted", "deferred", "why", "outlier"]].tolist() == [
            row[k] for k in ("predicted", "deferred", "why", "outlier")
        ]
        # the same picture, as a file of one's own
        own = state.upload_subject(networks.read_upload_path(root / cases.predictions.path[i])[0])
        printed, of_own = (
            html.verdict(cases, state.subject(i)),
            html.verdict(cases, own, state.network(state.stamp()).output(own.image)),
        )
        assert printed[-4:] == of_own[-4:]
        assert (
            f"Deferred to a person ({row['why']})." if row["deferred"] else "Not deferred."
        ) in printed
        assert any(t.startswith("Outlier:") for t in printed) == row["outlier"]
        assert f"{' or '.join(row['prediction_set'])} at an error of {100*alpha:g} %" in printed[-1]
    assert {r["outlier"] for r in rows} == {r["deferred"] for r in rows} == {True, False}

    decided = {"student": [read_decided(folder, cases.predictions)]}   # what report and card count
    few = EvaluateRecipe(n_boot=100)
    assert deferral_section(decided, few).table.coverage["student"] == pytest.approx(
        np.mean([not r["deferred"] for r in rows])
    )
    assert outliers_section(decided, few).table.outliers["student"] == pytest.approx(
        np.mean([r["outlier"] for r in rows])
    )
    text, _ = model_card({}, run, 0, "student", d)
    assert (
        f"under {d.defer_below:.4g} is deferred to a person, and so is an outlier" in text
        and f"distance above {d.outlier.threshold:.4g}" in text
    )


def test_a_decision_of_other_weights_is_told_and_left_out(run):
    decide_fold(run, 0)
    path = run.stage_dir(0, "student") / "decision.json"
    path.write_text(
        re.sub('"weights_sha256": "[0-9a-f]+"', '"weights_sha256": "other"', path.read_text())
    )
    app = App()
    assert (
        "other weights" in app.about.value
        and "not calibrated" in app.about.value
        and app.tests.deferred.disabled
    )


# --- thresholds

@pytest.mark.parametrize("threshold", [0, .2, .5, .93, 1])
def test_counts_of_a_threshold_are_those_of_the_images(run, threshold):
    cases = simulated(run)
    stats = Thresholds(cases, "DME", EvaluateRecipe(n_boot=100)).at(threshold)
    predicted, true = (
        cases.probabilities["student"][:, 1] >= threshold,
        (cases.predictions.label == "DME").to_numpy(),
    )
    assert stats.predicted.tolist() == [
        int((predicted & (cases.predictions.label == c)).sum()) for c in cases.classes
    ]
    assert stats.sensitivity[0] == pytest.approx((predicted & true).sum() / true.sum())
    assert stats.specificity[0] == pytest.approx((~predicted & ~true).sum() / (~true).sum())
    for value, low, high in (stats.sensitivity, stats.specificity): assert low <= value <= high


def test_a_class_without_images_has_no_sensitivity(run):
    cases = simulated(run)
    keep = (cases.predictions.label != "DME").to_numpy()
    p = dict(student=cases.probabilities["student"][keep])
    cases = Cases(
        run,
        0,
        "student",
        "",
        cases.classes,
        cases.predictions[keep].reset_index(drop=True),
        p,
        {},
        {},
    )
    of = Thresholds(cases, "DME", EvaluateRecipe(n_boot=100))
    assert np.isnan(of.at(.5).sensitivity[0]) and np.isfinite(of.at(.5).specificity[0])
    assert "undefined" in html.threshold_html(of.at(.5), cases.classes, of.n_groups, .95)
    assert "nan" not in html.curves_svg(of.curves(), of.at(.5))


def test_intervals_resample_patients_not_images(run):
    cases = simulated(run, 30)
    every = cases.predictions.assign(group=[str(i) for i in range(len(cases.predictions))])
    one = cases.predictions.assign(group="one")
    def width(df):
        _, low, high = (
            Thresholds(
                Cases(run, 0, "student", "", cases.classes, df, cases.probabilities, {}, {}),
                "CNV",
                EvaluateRecipe(),
            )
            .at(0.5)
            .sensitivity
        )
        return high - low
    assert np.isnan(width(one))
    assert width(cases.predictions) != width(every)


# --- pictures

def test_an_image_that_is_gone_is_told_and_the_rest_stays(run):
    state = Explorer()
    state.open()
    first = state.table.path[0]
    (run.path.parent / run.stage("data")["root"] / first).unlink()
    subject = state.subject(0)
    assert isinstance(subject.image, KdoctError) and "ln -s" in subject.image.fix
    assert subject.probabilities and not isinstance(state.subject(1).image, KdoctError)
    app = App()
    app.tests.list.value = 0
    assert "ln -s" in app.viewer.picture.value and "student predicts" in app.viewer.words.value


@pytest.mark.parametrize("how", ["squash", "crop", "pad"])
@pytest.mark.parametrize("shape", [(80, 160), (160, 80)])
def test_a_map_lies_where_the_network_saw_it(how, shape):
    a = np.zeros(shape, np.uint8)
    y, x = shape[0] // 2 + 8, shape[1] // 2 - 12
    a[y - 4:y + 4, x - 4:x + 4] = 255
    back = networks.lay_back(to_square(Image.fromarray(a), 64, 1, how) / 255, shape, how)
    assert back.shape == shape
    at = np.argwhere(back > .5 * back.max()).mean(0)
    assert abs(at - (y - .5, x - .5)).max() < 2


def test_a_network_answers_as_it_did_in_evaluation(run):
    state = Explorer()
    cases = state.open()
    for row in range(3):
        now = state.network(state.stamp()).output(state.subject(row).image).probabilities
        assert now == pytest.approx(cases.probabilities["student"][row], abs=1e-4)


BAD = dict(
    nothing=b"",
    text=b"no picture at all",
    torn=b"\x89PNG\r\n\x1a\n" + b"\0" * 40,
    zip=b"PK\x03\x04" + b"\0" * 99,
    pickle=b"\x80\x04\x95" + b"\0" * 30,
)


@pytest.mark.parametrize("name", ["scan.png", "scan.vol", "scan", "../../scan.dcm", NASTY + ".e2e"])
@pytest.mark.parametrize("data", BAD.values(), ids=BAD)
def test_a_bad_file_is_told(name, data):
    with pytest.raises(KdoctError): networks.read_upload(name, data)


def test_a_file_must_be_what_the_network_was_trained_on(tmp_path):
    pytest.importorskip("pydicom")
    data = write_dicom(tmp_path/"a.dcm", textured()).read_bytes()
    assert len(networks.read_upload("a.dcm", data)) == 3
    with pytest.raises(KdoctError, match="where a radiograph is expected"):
        networks.read_upload("a.dcm", data, "radiograph")


@pytest.mark.parametrize("source,modality", [("neh", "oct"), ("covid_qu_ex", "radiograph")])
def test_the_explorer_knows_what_the_network_was_trained_on(source, modality):
    def panel(cases): return SimpleNamespace(state=SimpleNamespace(cases=cases))
    recipe = preset("demo", **{"data.source": source})
    assert (
        panels.UploadPanel.modality(panel(SimpleNamespace(run=SimpleNamespace(recipe=recipe))))
        == modality
    )
    assert panels.UploadPanel.modality(panel(None)) == "oct"


# --- nothing of a file is taken for HTML

def test_names_are_escaped(run):
    classes = [NASTY, "B", "C", "NORMAL"]
    cases = simulated(run, classes=tuple(classes))
    cases.predictions["patient"] = NASTY
    subject = networks.Subject(
        ("x",),
        NASTY,
        {NASTY: NASTY},
        Image.new("L", (40, 40)),
        NASTY,
        {"student": cases.probabilities["student"][0]},
    )
    of = Thresholds(cases, NASTY, EvaluateRecipe(n_boot=100))
    shown = [
        html.probabilities_html(cases, subject),
        html.threshold_html(of.at(0.5), classes, 9, 0.95),
        html.picture_html(subject.image, '"' + NASTY),
        html.error_html(KdoctError(NASTY, fix=NASTY)),
        html.text_html(NASTY),
        *map(html.text_html, html.verdict(cases, subject)),
    ]
    for piece in shown: assert "<img src=x" not in piece
    assert 'alt="&quot;' in shown[2]


# --- the background

def test_a_job_that_fails_is_told_and_the_next_one_is_done(caplog):
    work, log = Background(), []
    work.submit("a", (1,), lambda: 1 / 0, log.append)
    work.wait()
    work.submit("a", (2,), lambda: "done", log.append)
    work.wait()
    assert (
        isinstance(log[0], KdoctError)
        and "ZeroDivisionError" in log[0].problem
        and log[1] == "done"
    )
    assert "Traceback" in caplog.text, "the log must say where"


def test_a_failed_job_is_tried_again_when_asked_again():
    work, log = Background(), []
    for answer in (KdoctError("no", fix="wait"), "yes"):
        def job(answer=answer):
            if isinstance(answer, KdoctError): raise answer
            return answer
        work.submit("a", (1,), job, log.append)
        work.wait()
    assert log[1] == "yes"


def test_the_session_forgets_what_is_oldest():
    work = Background(keep=2)
    for i in range(4):
        work.submit("a", (i,), lambda: "x", lambda r: None)
        work.wait()
    assert list(work.made) == [(2,), (3,)]


# --- widgets without a browser

def test_without_runs_the_page_says_how_to_make_one(outputs):
    app = App()
    assert (
        "kdoct demo" in app.message.value
        and app.case_view.layout.display == app.threshold.box.layout.display == "none"
    )


def test_the_list_has_pages(run, monkeypatch):
    monkeypatch.setattr("kdoct.app.panels.PAGE", 5)
    app = App()
    panel, n = app.tests, len(app.state.table)
    pages = -(-n // 5)
    assert pages > 2 and f"Page 1 of {pages}: 1 to 5 of {n}." in panel.count.value
    assert (
        panel.turns["Previous"].disabled
        and panel.turns["Previous"].tooltip == "This is the first page"
    )
    seen = [i for _, i in panel.list.options]
    while not panel.turns["Next"].disabled:
        panel.turns["Next"].click()
        seen += [i for _, i in panel.list.options]
    assert seen == panel.rows.tolist() and f"Page {pages} of {pages}" in panel.count.value
    assert panel.turns["Last"].disabled and panel.turns["Last"].tooltip == "This is the last page"
    panel.turns["First"].click()
    assert panel.page.value == 1 and not panel.turns["Last"].disabled


def test_small_pictures_are_those_of_the_page_and_open_no_file(run, monkeypatch):
    rows_made, made = [], Explorer.thumbnails
    monkeypatch.setattr("kdoct.app.panels.PAGE", 5)
    monkeypatch.setattr(
        Explorer, "thumbnails", lambda self, rows: rows_made.append(list(rows)) or made(self, rows)
    )
    app = App()
    assert (
        rows_made == [[i for _, i in app.tests.list.options]]
        and app.tests.small.value.count("url(data:image/jpeg") == 5
    )
    monkeypatch.setattr(
        "kdoct.app.cases.read_image_bytes", lambda path: pytest.fail(f"opened {path}")
    )
    row = rows_made[0][2]
    small = np.asarray(
        Image.open(io.BytesIO(base64.b64decode(app.state.thumbnails([row])[0].partition(",")[2]))),
        float,
    )
    data = open_fold(run, 0)
    square = data.images[data.idx["test"][row]]
    assert data.rows("test").path[row] == app.state.table.path[row]
    assert (
        abs(small - np.asarray(Image.fromarray(square).resize(small.shape[::-1]), float)).mean()
        < 12
    )


def test_without_decoded_squares_the_list_says_why_it_has_no_small_pictures(run, outputs):
    for file in (outputs / "cache").glob("*.npy"): file.unlink()
    app = App()
    assert (
        "No small pictures" in app.tests.small.value
        and "01_data" in app.tests.small.value
        and app.tests.list.options
    )


def test_a_selection_is_saved_with_what_it_is_of(run):
    decide_fold(run, 0)
    app = App()
    app.tests.result.value = "wrong"
    app.tests.save.click()
    file = Path(re.search(r"saved in (\S+\.csv)", app.tests.saved.value)[1])
    assert file.parent == (run.path / "selections").absolute()
    saved, cases = pd.read_csv(file), app.state.cases
    want = app.state.table.loc[app.tests.rows]
    assert (
        saved.path.tolist() == want.path.tolist()
        and saved.predicted.tolist() == want.predicted.tolist()
    )
    assert (
        saved.deferred.tolist() == want.deferred.tolist()
        and saved.outlier.tolist() == want.outlier.tolist()
    )
    for role in ("student", "teacher"):
        assert saved[
            [f"probability_{role}_{c}" for c in cases.classes]
        ].to_numpy() == pytest.approx(cases.probabilities[role][app.tests.rows])
    told = json.loads(file.with_suffix(".json").read_text())
    assert (
        told["choice"]["result"] == "wrong"
        and told["protocol"] == cases.protocol
        and told["images"] == len(want)
    )


def test_a_selection_is_downloaded_or_saved_where_one_wishes(run, tmp_path):
    app = App()
    app.tests.result.value = "wrong"
    app.tests.download.click()
    links = re.findall(
        r'download="([^"]+)" href="data:application/octet-stream;base64,([^"]+)"',
        app.tests.saved.value,
    )
    data = {Path(name).suffix: base64.b64decode(text) for name, text in links}
    assert (
        pd.read_csv(io.BytesIO(data[".csv"])).path.tolist()
        == app.state.table.loc[app.tests.rows].path.tolist()
    )
    assert (
        json.loads(data[".json"])["choice"]["result"] == "wrong"
        and not (run.path / "selections").exists()
    )

    app.tests.path.value = str(tmp_path / "cases.csv")
    app.tests.save.click()
    assert (tmp_path / "cases.csv").read_bytes() == data[".csv"] and (
        tmp_path / "cases.json"
    ).read_bytes() == data[".json"]
    app.tests.save.click()
    assert "exists already" in app.message.value
    for wrong, says in (
        ("no/such/folder/cases.csv", "There is no folder"),
        (str(tmp_path / "cases.json"), "saved as CSV"),
        ("cases.pkl", "cannot be written"),
    ):
        app.tests.path.value = wrong
        (tmp_path / "cases.json").unlink(missing_ok=True)
        app.tests.save.click()
        assert says in app.message.value and not (tmp_path / "cases.json").exists()


def test_an_empty_selection_cannot_be_saved_and_says_so(run):
    app = App()
    app.tests.confidence.value = (0, 0)
    for button in (app.tests.save, app.tests.download):
        assert button.disabled and "No test image" in button.tooltip
    assert "No test image is as chosen" in app.tests.count.value


def test_a_network_without_maps_says_why_its_controls_are_grey(run, monkeypatch):
    def none(body, size, name):
        raise KdoctError("Mixer has no layer with maps.", fix="Look at another network.")
    monkeypatch.setattr("kdoct.explain.cam.layer_of", none)
    app = App()
    app.viewer.map_on.value = True
    app.work.wait()
    assert (
        app.viewer.map_on.disabled
        and app.viewer.which.disabled
        and app.viewer.opacity.disabled
        and not app.viewer.map_on.value
    )
    assert (
        "Score-CAM, of class, opacity: Mixer has no layer with maps. Look at another network."
        in app.viewer.why.value
    )
    app.role.value = "teacher"
    assert not app.viewer.map_on.disabled and app.viewer.why.value == ""


def test_every_pixel_of_the_file_is_shown_when_zoomed(run):
    wide = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 1536), dtype=np.uint8))
    def sizes(html):
        return [
            Image.open(io.BytesIO(base64.b64decode(b))).size
            for b in re.findall(r"base64,([^\"]+)", html)
        ]
    assert sizes(html.picture_html(wide, "x")) == [
        (1024, 40)
    ] and "reduced to 1024 x 40 px" in html.size_text(wide)
    assert sizes(html.picture_html(wide, "x", np.zeros((8, 8)), whole=True)) == [
        wide.size,
        wide.size,
    ]


def test_a_damaged_run_is_told(run):
    (run.path / "run.json").write_text("{")
    app = App()
    assert "not valid JSON" in app.message.value and app.about.value == ""


def test_an_unfinished_fold_is_told_and_left_again(run):
    app = App()
    assert "papermill" not in app.message.value
    app.fold.value = 1
    assert "papermill" in app.message.value and app.case_view.layout.display == "none"
    app.fold.value = 0
    assert (
        app.message.value == ""
        and app.case_view.layout.display is None
        and "fold 0" in app.about.value
    )
    app.role.value = "baseline"
    assert "role baseline" in app.message.value


def test_a_map_waits_in_the_background_and_only_the_picture_looked_at_is_drawn(run, monkeypatch):
    gate, begun, images = threading.Event(), threading.Event(), []
    def slow(self, image, number):
        images.append(image.tobytes())
        begun.set()
        assert gate.wait(30)
        return networks.Heatmap(np.full((64, 64), .5, np.float32), "none", 0.)
    monkeypatch.setattr(networks.Network, "heatmap", slow)
    app = App()
    app.viewer.map_on.value = True
    assert begun.wait(30)
    rows = [i for _, i in app.tests.list.options]
    # the page answers while the first map is made
    for row in rows[1:5]: app.tests.list.value = row
    assert "Computing" in app.viewer.status.value
    gate.set()
    app.work.wait()
    assert len(images) == 2 and images[1] == app.state.subject(rows[4]).image.tobytes()
    assert (
        "Computing" not in app.viewer.status.value and 'alt="Score-CAM"' in app.viewer.picture.value
    )


def test_maps_are_kept_for_the_session(run, monkeypatch):
    calls = []
    empty = networks.Heatmap(np.zeros((64, 64), np.float32), "none", 0.)
    monkeypatch.setattr(
        networks.Network, "heatmap", lambda self, image, number: calls.append(number) or empty
    )
    app = App()
    app.viewer.map_on.value = True
    app.work.wait()
    first, second = (i for _, i in app.tests.list.options[:2])
    for row in (second, first, second):
        app.tests.list.value = row
        app.work.wait()
    assert len(calls) == 2


def test_a_file_of_ones_own_is_answered_by_the_network_that_is_chosen(run):
    app = App()
    app.view.value = explore.VIEWS[1]
    raw = io.BytesIO()
    app.state.subject(0).image.save(raw, "png")
    app.uploads.begin("mine.png", lambda name: networks.read_upload(name, raw.getvalue()))
    app.work.wait()
    assert "student predicts" in app.viewer.words.value and "right" not in app.viewer.words.value
    app.role.value = "teacher"
    app.work.wait()
    assert "teacher predicts" in app.viewer.words.value


def test_a_path_that_is_not_given_is_asked_for(run):
    app = App()
    app.view.value = explore.VIEWS[1]
    app.uploads.read.click()
    assert "Type the path" in app.uploads.status.value


def test_an_unforeseen_error_is_told_not_raised(run, monkeypatch):
    app = App()
    def broken(*a): raise ZeroDivisionError("surprise")
    monkeypatch.setattr("kdoct.app.panels.pick", broken)
    app.tests.result.value = "wrong"
    assert "surprise" in app.message.value and "Traceback" not in app.message.value


def test_importing_the_explorer_does_not_wait_for_torch():
    code = "import sys, kdoct.app.explore; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ}).returncode == 0


# --- as a page

def test_without_voila_the_extra_is_named(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "voila", None)
    with pytest.raises(KdoctError, match=r"kdoct\[app\]"): explore.serve(browser=False)


# --- in a browser

@pytest.fixture(scope="module")
def page(made, tmp_path_factory):
    "The address of the explorer's page, served by a process of its own as `kdoct explore` does."
    folder = tmp_path_factory.mktemp("served")
    log = folder / "log.txt"
    code = ("from kdoct.app.explore import serve; serve(browser=False, run='small', say=lambda "
            "text: print(text, flush=True))")
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "KDOCT_OUTPUTS": str(made),
    }
    with open(log, "w") as out:
        server = subprocess.Popen(
            [sys.executable, "-c", code], stdout=out, stderr=subprocess.STDOUT, cwd=folder, env=env
        )
    try:
        end = time.monotonic() + 120
        while not (found := re.search(r"http://localhost:\S+", log.read_text())):
            assert server.poll() is None and time.monotonic() < end, log.read_text()
            threading.Event().wait(.1)
        yield found[0]
    finally:
        server.terminate()
        server.wait(60)


class Hand:
    "Whoever uses the page, without a mouse."
    def __init__(self, browser): self.browser = browser

    def until(self, what, seconds=120):
        from selenium.common.exceptions import StaleElementReferenceException
        from selenium.webdriver.support.wait import WebDriverWait
        return WebDriverWait(
            self.browser, seconds, 0.1, ignored_exceptions=[StaleElementReferenceException]
        ).until(lambda b: what())

    def all(self, css):
        return [
            e
            for e in self.browser.find_elements("css selector", f".kd-app {css}")
            if e.is_displayed()
        ]
    def text(self, css): return " ".join(e.text for e in self.all(css))
    def labelled(self, text):
        (label,) = [e for e in self.all("label") if e.text.strip() == text]
        return label.find_element("tag name", "input")

    def labelled_select(self, text):
        (found,) = [e for e in self.all("select") if e.accessible_name == text]
        return found

    def press(self, *keys):
        from selenium.webdriver.common.action_chains import ActionChains
        for key in keys: ActionChains(self.browser).send_keys(key).perform()

    def give(self, file):
        "Press the button that asks for a file, and give one to the dialogue that it would open."
        self.browser.execute_script(
            "HTMLInputElement.prototype.click = function() { document.body.append(this); "
            "window.fileInput = this }"
        )
        (button,) = self.all("button.widget-upload")
        button.send_keys(" ")
        self.until(lambda: self.browser.execute_script("return window.fileInput")).send_keys(
            str(file)
        )


def reached_by_tab(browser, hand):
    "What the tab key reaches, in its order, until it leaves the page or begins again."
    from selenium.webdriver.common.keys import Keys
    hand.all("select")[0].send_keys("")
    seen = []
    while (now := browser.switch_to.active_element) not in seen and len(seen) < 60:
        seen.append(now)
        hand.press(Keys.TAB)
    return seen


@pytest.mark.slow
def test_the_page_is_used_by_keyboard_alone(run, page, browser, tmp_path):
    from selenium.webdriver.common.keys import Keys
    browser.set_window_size(1366, 768)
    hand = Hand(browser)
    browser.get(page)
    hand.until(lambda: "small, fold 0, student" in hand.text(".kd-about"))
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth"), (
        "the page is too wide for a laptop"
    )

    # every control that can be seen is reached by the tab key
    controls = [
        e
        for e in hand.all(":is(select, input, button, [role=slider])")
        if e.is_enabled() and e.get_attribute("type") != "radio"
    ]
    assert len(controls) > 12 and not [
        e.get_attribute("outerHTML")[:200]
        for e in set(controls) - set(reached_by_tab(browser, hand))
    ]

    # the list: another image
    before = hand.text(".kd-facts")
    (listed,) = hand.all(".kd-list input:checked")
    listed.send_keys(Keys.ARROW_DOWN)
    hand.until(lambda: hand.text(".kd-facts") not in ("", before))

    # the cases as a file, by the browser
    (download,) = [b for b in hand.all("button") if b.text == "Download these cases as CSV"]
    browser.execute_cdp_cmd(
        "Browser.setDownloadBehavior", dict(behavior="allow", downloadPath=str(tmp_path))
    )
    download.send_keys(Keys.SPACE)
    hand.until(lambda: list(tmp_path.glob("small-fold0-student-*.csv")))

    # its map
    hand.labelled("Score-CAM").send_keys(Keys.SPACE)
    hand.until(
        lambda: hand.all("img[alt='Score-CAM']") and "forward passes" in hand.text(".kd-soft")
    )

    # the threshold: the number that changes is the one that the images give
    hand.labelled("Threshold").send_keys(Keys.SPACE)
    shown = hand.until(lambda: hand.text("#kd-sensitivity"))
    (handle,) = hand.all("[role=slider]")
    handle.send_keys(Keys.ARROW_LEFT * 30)
    hand.until(lambda: "20.0 % on" in hand.text("caption"))
    cases = open_cases(run, 0, "student")
    stats = Thresholds(cases, cases.classes[0], run.recipe.evaluate, run.recipe.seed).at(.2)
    now = f"({stats.predicted[0]} of {stats.total[0]})"
    assert now in hand.text("#kd-sensitivity") and now not in shown

    # files of one's own: one that is none, then a good one
    hand.labelled("A file of your own").send_keys(Keys.SPACE)
    (tmp_path / "notes.png").write_text("no picture")
    hand.until(lambda: hand.all("button.widget-upload"))
    hand.give(tmp_path / "notes.png")
    hand.until(lambda: "not-an-image" in hand.text(".kd-bad"))
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 120), dtype=np.uint8)).save(
        tmp_path / "mine.png"
    )
    hand.give(tmp_path / "mine.png")
    hand.until(
        lambda: (
            "its class is not known here" in hand.text(".kd-text")
            and "mine.png" in hand.text(".kd-facts")
        )
    )
    assert "Traceback" not in browser.find_element("tag name", "body").text and not hand.all(
        ".kd-bad"
    )

    # nothing was wrong behind the scenes, and nothing but this machine was asked
    assert not [e["message"] for e in browser.get_log("browser") if e["level"] == "SEVERE"]
    sent = [json.loads(e["message"])["message"] for e in browser.get_log("performance")]
    urls = [
        m["params"]["request"]["url"] for m in sent if m["method"] == "Network.requestWillBeSent"
    ]
    assert len(urls) > 10 and not [
        u for u in urls if not re.match(r"http://localhost:|data:|blob:|chrome", u)
    ]


def opened(browser, page, width, height=1000):
    "The page at a size, once it shows a list."
    browser.set_window_size(width, height)
    browser.get(page)
    hand = Hand(browser)
    hand.until(lambda: "Page 1 of" in hand.text(".kd-page") and hand.all(".kd-pane[tabindex]"))
    return hand


def place(element): return [element.rect[k] for k in ("x", "y", "width", "height")]


@pytest.mark.slow
def test_a_wide_screen_is_used_and_a_narrow_one_scrolls_down(page, browser):
    from selenium.webdriver.common.keys import Keys
    hand = opened(browser, page, 1700)
    hand.labelled("Score-CAM").send_keys(Keys.SPACE)
    hand.until(lambda: len(hand.all(".kd-pane")) == 2)
    parts = [
        place(hand.all(css)[0])
        for css in (".kd-list", ".kd-plain", ".kd-mapped", ".kd-words table")
    ]
    for left, right in zip(parts, parts[1:], strict=False): assert left[0] + left[2] <= right[0]
    assert parts[-1][0] + parts[-1][2] > 1500 and max(y for _, y, _, _ in parts[1:]) < min(
        y + h for _, y, _, h in parts[1:]
    )
    for width in (1280, 800):
        browser.set_window_size(width, 1000)
        hand.until(lambda: len(hand.all(".kd-pane")) == 1)
        assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    assert hand.all(".kd-mapped img[alt='Score-CAM']"), "one pane: the picture under its map"
    tops = [place(hand.all(css)[0])[1] for css in (".kd-list", ".kd-mapped", ".kd-words")]
    assert (
        tops == sorted(tops)
        and len(
            {place(hand.all(css)[0])[0] // 20 for css in (".kd-list", ".kd-mapped", ".kd-words")}
        )
        == 1
    )


@pytest.mark.slow
def test_the_picture_is_enlarged_and_moved_by_keyboard_with_its_map(page, browser):
    from selenium.webdriver.common.keys import Keys
    hand = opened(browser, page, 1280)
    hand.labelled("Score-CAM").send_keys(Keys.SPACE)
    hand.until(lambda: hand.all("img[alt='Score-CAM']"))
    (pane,) = hand.all(".kd-pane")
    def fact(code):
        return browser.execute_script(
            f"return (p => {code})(arguments[0])", hand.all(".kd-pane")[0]
        )
    before = fact("p.querySelector('.kd-stack').offsetWidth")
    pane.send_keys("+")
    hand.until(
        lambda: (
            fact("p.querySelector('.kd-stack').offsetWidth") == pytest.approx(1.5 * before, abs=2)
        )
    )
    pane.send_keys("+")
    hand.until(
        lambda: fact("p.querySelector('.kd-stack').offsetWidth") == pytest.approx(2 * before, abs=2)
    )
    assert fact("(p.scrollTop + p.clientHeight/2)/p.scrollHeight") == pytest.approx(
        0.5, abs=0.02
    ), "the middle stays in the middle"
    base, above = (place(e) for e in hand.all(".kd-stack img"))
    assert base == above
    left = fact("p.scrollTop")
    pane.send_keys(Keys.ARROW_DOWN)
    hand.until(lambda: fact("p.scrollTop") > left)
    pane.send_keys("-" * 2)
    hand.until(
        lambda: fact("p.querySelector('.kd-stack').offsetWidth") == pytest.approx(before, abs=2)
    )

    # pixel for pixel
    hand.labelled_select("zoom").send_keys("pixel")
    hand.until(
        lambda: fact(
            "p.querySelector('.kd-stack').offsetWidth == p.querySelector('img').naturalWidth"
        )
    )


@pytest.mark.slow
def test_a_screen_reader_has_a_name_for_everything_and_grey_controls_say_why(made, page, browser):
    from selenium.webdriver.common.keys import Keys
    hand = opened(browser, page, 1280)
    moved = hand.all(".kd-pane, .kd-list input, select, [role=slider]")
    assert all(e.get_attribute("data-lm-suppress-shortcuts") == "true" for e in moved), (
        "JupyterLab would take the arrow keys for its cells"
    )
    everything = (":is(button, select, input, img, svg[role=img], [role=slider], "
                  "[role=radiogroup], [tabindex='0'], [contenteditable=true])")
    for view in explore.VIEWS:
        hand.labelled(view).send_keys(Keys.SPACE)
        shown = hand.until(lambda: hand.all(everything))
        # the page names what it shows as soon as it is there
        hand.until(lambda: all(e.accessible_name.strip() for e in hand.all(everything)))
        assert len(shown) > 8, view
    (points,) = [e for e in hand.all("select") if not e.is_enabled()]
    assert "No decision is fitted" in points.get_attribute("title")

    hand.labelled(explore.VIEWS[0]).send_keys(Keys.SPACE)
    hand.until(lambda: not points.is_displayed())
    grey = hand.until(lambda: [e for e in hand.all(":is(select, button)") if not e.is_enabled()])
    assert {e.accessible_name for e in grey} == {
        "deferral",
        "outlier",
        "First",
        "Previous",
        "Next",
        "Last",
    }
    for e in grey:
        assert e.get_attribute("title") not in ("", e.accessible_name)
        if e.tag_name == "select":
            assert browser.find_element("id", e.get_attribute("aria-describedby")).is_displayed()

    # each line has its own small picture
    code = ("return [...document.querySelectorAll('.kd-list .widget-radio-box label')].map(e => "
            "getComputedStyle(e, '::before').backgroundImage)")
    assert len(set(browser.execute_script(code))) == len(hand.all(".kd-list input"))

    # the table, by keyboard
    next(e for e in hand.all("button") if e.accessible_name.startswith("Save")).send_keys(
        Keys.SPACE
    )
    file = hand.until(lambda: re.search(r"saved in (\S+\.csv)", hand.text(".kd-text")))[1]
    assert (
        len(pd.read_csv(file)) == len(hand.all(".kd-list input"))
        and Path(file).parent == made / "small" / "selections"
    )


def test_the_page_is_for_those_who_have_its_token(page):
    with urllib.request.urlopen(page.partition("?")[0], timeout=30) as answer:
        body = answer.read().decode()
    assert "/login" in answer.url and "kd-app" not in body and "jupyter-config-data" not in body
