"Stress tests: corruptions that are the published ones and repeat, the shipped path behind them, errors by name."
import hashlib
from pathlib import Path

import numpy as np
import pandas as pd
import prepared
import pytest
from conftest import copied_run
from PIL import Image, ImageEnhance
from scipy import ndimage
from simulated_models import quiet

from kdoct.app.cli import main
from kdoct.app.report import report_html
from kdoct.core.files import KdoctError, read_json, write_json
from kdoct.core.presets import preset
from kdoct.core.runs import create_run
from kdoct.core.sections import DataRecipe
from kdoct.data.corruptions import (
    CORRUPTIONS,
    MEDMNIST,
    SEVERITIES,
    corrupted,
    corruptions_named,
    severities_named,
)
from kdoct.data.phantom import simulate_bscan
from kdoct.deploy.predict import Predictor
from kdoct.deploy.stress import planned_cells, stress_predictions
from kdoct.deploy.stress_images import drawn_images, fold_images, stressed_networks
from kdoct.evaluate.simulated import write_simulated_stages
from kdoct.evaluate.stress import CLEAN, joined_rows, stress_protocol, stress_test, summary_texts
from kdoct.evaluate.stress_figures import write_stress
from kdoct.evaluate.stress_records import card_stress, stress_records


@pytest.fixture(scope="module")
def scan():
    "A B-scan of 224 x 224 px, the size that the published parameters are of."
    im = Image.fromarray(simulate_bscan(3, 1, 0, 0, diagnosis="CNV").image)
    return im.resize((224, 224))


def as_floats(im): return np.asarray(im, float)


class Fixed:
    "Stands in for a generator: the angle of a motion blur is chosen."

    def __init__(self, angle): self.angle = angle
    def uniform(self, low, high): return self.angle


# --- the published corruptions, by the plainest code

@pytest.mark.parametrize("severity", SEVERITIES)
def test_a_defocus_blur_is_the_mean_over_the_published_disc(scan, severity):
    radius, softness = CORRUPTIONS["defocus_blur"].parameters[severity - 1]
    y, x = np.mgrid[-8:9, -8:9]
    disc = (x**2 + y**2 <= radius**2).astype(float)
    line = np.exp(-np.array([-1, 0, 1])**2/(2*softness**2))
    kernel = ndimage.correlate(disc/disc.sum(), np.outer(line, line)/line.sum()**2)
    blurred = ndimage.correlate(as_floats(scan), kernel, mode="mirror")
    assert np.abs(as_floats(corrupted(scan, "defocus_blur", severity)) - np.floor(blurred)).max() <= 1


@pytest.mark.parametrize("angle", [-44., -10., 0., 30.1])
def test_a_motion_blur_runs_from_each_pixel_along_a_line(scan, angle):
    change, (radius, sigma) = CORRUPTIONS["motion_blur"].change, (15, 8)
    a, total, weights = as_floats(scan), 0, 0
    rows, columns = np.mgrid[:224, :224]
    for i in range(2*radius + 1):
        w, turn = np.exp(-i*i/(2*sigma**2)), np.deg2rad(angle)
        y, x = (int(np.ceil(i*v - .5)) for v in (np.sin(turn), np.cos(turn)))
        total += w*a[np.clip(rows + y, 0, 223), np.clip(columns + x, 0, 223)]
        weights += w
    found = as_floats(change(scan, (radius, sigma), Fixed(angle)))
    assert np.abs(found - np.floor(total/weights)).max() <= 1


def test_less_contrast_and_fewer_pixels_are_those_of_pillow(scan):
    faint = ImageEnhance.Contrast(scan).enhance(.15)
    assert corrupted(scan, "contrast_down", 5) == faint
    few = scan.resize((22, 22), Image.Resampling.BOX).resize((224, 224), Image.Resampling.BOX)
    assert corrupted(scan, "pixelate", 5) == few


def test_speckle_of_a_grey_picture_is_the_mean_of_three_channels():
    even = Image.new("L", (224, 224), 100)
    sd = as_floats(corrupted(even, "speckle_noise", 2)).std()
    assert sd == pytest.approx(100*.3*np.linalg.norm([.299, .587, .114]), rel=.03)


@pytest.mark.parametrize("name", [n for n, c in CORRUPTIONS.items() if c.family == MEDMNIST])
def test_a_severity_means_the_same_for_a_larger_picture(scan, name):
    large = scan.resize((560, 448), Image.Resampling.BICUBIC)
    def lost(im):
        small = [x.resize((224, 224), Image.Resampling.BOX) for x in (im, corrupted(im, name, 3))]
        return np.abs(as_floats(small[0]) - as_floats(small[1])).mean()
    assert lost(large) == pytest.approx(lost(scan), rel=.3)


# --- the same for the same picture, always

def digest(im, name): return hashlib.sha256(corrupted(im, name, 3).tobytes()).hexdigest()


RANDOM = ["speckle_noise", "motion_blur", "speckle_grain", "noise_floor_up", "marks", "strip"]


def test_another_process_corrupts_a_picture_alike(scan, tmp_path):
    scan.save(tmp_path / "scan.png")
    code = f"""
import hashlib
from PIL import Image
from kdoct.data.corruptions import corrupted
im = Image.open({str(tmp_path / 'scan.png')!r})
for name in {RANDOM[::-1]}:
    print(name, hashlib.sha256(corrupted(im, name, 3).tobytes()).hexdigest())
"""
    done = prepared.run(code)
    assert done.returncode == 0, done.stderr
    assert dict(line.split() for line in done.stdout.splitlines()) == {
        name: digest(scan, name) for name in RANDOM
    }


@pytest.mark.parametrize("name", RANDOM)
def test_what_is_random_depends_on_content_severity_and_seed(scan, name):
    other = scan.copy()
    other.putpixel((0, 0), 255 - other.getpixel((0, 0)))
    alike = [corrupted(scan, name, s, seed) for s, seed in ((3, 0), (3, 0))]
    assert alike[0] == alike[1]
    changed = [corrupted(other, name, 3), corrupted(scan, name, 3, 1), corrupted(scan, name, 2)]
    away = (0, 2, scan.width, alike[0].height - 2)   # the changed pixel itself does not count
    assert all(alike[0].crop(away) != im.crop(away) for im in changed)


def test_a_coloured_picture_stays_one(scan):
    coloured = Image.merge("RGB", (scan, scan.point(lambda v: v//2), scan))
    for name in CORRUPTIONS:
        im = corrupted(coloured, name, 4)
        assert im.mode == "RGB" and not np.array_equal(*as_floats(im)[..., :2].transpose(2, 0, 1))


# --- names

def test_what_is_for_bscans_alone_is_left_out_elsewhere_and_said():
    names, left_out = corruptions_named(None, "histology")
    assert "strip" in left_out and "pixelate" in names and not set(names) & set(left_out)
    with pytest.raises(KdoctError, match="'flatten' is for OCT B-scans"):
        corruptions_named(["flatten"], "radiograph")
    assert corruptions_named(["device"], "radiograph")[1] == left_out   # a family is what fits


@pytest.mark.parametrize("text", ["0", "6", "1-9", "x", "2-1", "1,,2"])
def test_severities_that_there_are_not_are_refused(text):
    with pytest.raises(KdoctError, match="Severities are 1 to 5"): severities_named(text)


# --- the scores

def rows_of(right, deferred, groups, error=None):
    "Predictions of two classes: which are right, which are deferred."
    n = len(right)
    p = np.where(right, .9, .1)
    return pd.DataFrame(dict(
        network="student", path=[f"{i}.png" for i in range(n)], group=groups, label="CNV",
        probability_CNV=p, probability_NORMAL=1 - p, predicted=np.where(right, "CNV", "NORMAL"),
        deferred=deferred, outlier=deferred, error=error or [""]*n,
    ))


def made(clean, corrupt, **how):
    cells = {(CLEAN, 0): clean, ("pixelate", 1): corrupt}
    return stress_test(list(cells), lambda c: [cells[c]], dict(pixelate=MEDMNIST), 200, **how)


def score(test, name, corruption="pixelate", severity="1"):
    t = test.table
    one = (t.corruption == corruption) & (t.severity == severity) & (t.score == name)
    return t[one].iloc[0]


def test_differences_are_paired_over_groups():
    "Every group loses one image of two: without pairing the interval would not be a point."
    groups = np.repeat(list("abcdefgh"), 2)
    test = made(rows_of([True]*16, False, groups), rows_of([True, False]*8, False, groups))
    lost = score(test, "accuracy")
    values = [lost.difference, lost.difference_low, lost.difference_high]
    assert values == pytest.approx([-.5]*3)


def test_a_refused_picture_is_not_right_and_is_deferred():
    groups, right = list("aabbccdd"), [True]*8
    refused = rows_of(right, False, groups, ["blank"] + [""]*7)
    refused.loc[0, "predicted"] = ""
    refused = refused.astype(dict(deferred=object, outlier=object))
    refused.loc[0, "deferred"], refused.loc[0, "outlier"] = True, None
    test = made(rows_of(right, False, groups), refused)
    found = {m: score(test, m).estimate for m in ("accuracy", "deferred", "outliers", "refused",
                                                  "kept_accuracy")}
    assert found == dict(accuracy=.875, deferred=.125, outliers=0, refused=.125, kept_accuracy=1)
    assert test.how["refused"]["student"] == {"pixelate 1": {"blank": 1}}
    assert "12.5 %, at pixelate 1" in stress_protocol(test)


def test_a_single_group_has_no_intervals_and_that_is_said():
    test = made(rows_of([True]*4, False, ["a"]*4), rows_of([True, False]*2, False, ["a"]*4))
    assert "(no interval)" in summary_texts(test).to_string()
    assert "all images are of one group" in stress_protocol(test)


# --- the shipped path

@pytest.fixture(scope="module")
def trained(trained_outputs, tmp_path_factory):
    "The run `tiny`, in an outputs folder of this file."
    with pytest.MonkeyPatch.context() as m:
        folder = tmp_path_factory.mktemp("stress") / "outputs"
        m.setenv("KDOCT_OUTPUTS", str(folder))
        yield copied_run(trained_outputs, folder)


@pytest.fixture
def here(trained, monkeypatch):
    "The same, for a test that uses the command."
    monkeypatch.setenv("KDOCT_OUTPUTS", str(trained.path.parent))
    return trained


@pytest.mark.slow
def test_clean_rows_are_those_of_predict(here, tmp_path):
    stressed = stressed_networks("tiny")
    few = [s._replace(images=drawn_images(s.images, 12)) for s in stressed]
    cells = planned_cells(["gamma_up"], [5])
    stress_predictions(few, tmp_path, cells)
    rows = pd.read_parquet(tmp_path / "fold_0" / cells[0].file)
    paths = [few[0].root / p for p in few[0].images.path]
    for role in ("teacher", "baseline"):
        with Predictor(here.stage_dir(0, role)) as p: known = pd.DataFrame(p.predict(paths))
        own = rows[rows.network == role].reset_index(drop=True)
        names = [c for c in known if c.startswith("probability_")]
        np.testing.assert_allclose(own[names], known[names], atol=1e-5)
        assert (own.predicted == known.predicted).all()
    darker = pd.read_parquet(tmp_path / "fold_0" / cells[1].file)
    assert np.abs(darker[names].to_numpy() - rows[names].to_numpy()).max() > 1e-3


@pytest.mark.slow
def test_the_command_goes_on_and_writes_what_it_found(here, capsys, monkeypatch, tmp_path):
    command = ["stress", "tiny", "--fold", "0", "--images", "12", "--severities", "1,5",
               "--corruptions", "contrast_down,noise_floor_up", "--out", str(tmp_path / "out")]
    broken, seen = Predictor.rows, []

    def stops(self, prepared):
        seen.append(1)
        if len(seen) > 4: raise RuntimeError("killed")
        return broken(self, prepared)
    monkeypatch.setattr(Predictor, "rows", stops)
    with pytest.raises(SystemExit): main(command)
    assert "RuntimeError: killed" in capsys.readouterr().err
    folder = tmp_path / "out" / "predictions" / "fold_0"
    assert sorted(p.name for p in folder.glob("*.parquet")) == ["clean_0.parquet",
                                                                "contrast_down_1.parquet"]
    before = {p.name: p.stat().st_mtime_ns for p in folder.glob("*.parquet")}
    monkeypatch.setattr(Predictor, "rows", broken)
    main_quietly(command)
    assert all((folder / name).stat().st_mtime_ns == t for name, t in before.items())
    printed = capsys.readouterr().out
    assert "noise_floor_up" in printed and "teacher - baseline" in printed
    record = read_json(tmp_path / "out" / "stress.json")
    assert record["protocol"]["images"] == 12 and record["folds"] == [0]
    assert record["networks"]["fold_0"]["baseline"]["engine"] == "torch"
    assert record["protocol"]["corruptions"]["contrast_down"]["parameters"][4] == .15
    names = {p.name for p in (tmp_path / "out").glob("*.png")}
    assert {"stress.png", "stress_examples.png"} <= names
    assert "stress_deferred.png" not in names   # these networks have no decision


def main_quietly(command):
    with pytest.raises(SystemExit) as e: main(command)
    assert not e.value.code


# --- what cannot be tested is named

def simulated(name="simulated"):
    run = create_run(name, preset("tiny"))
    quiet(write_simulated_stages, run, 0)
    return run


def test_images_that_are_not_here_are_named():
    run = simulated()
    run.record("data", root="nowhere")
    with pytest.raises(KdoctError, match=r"test images of .* are not here") as e:
        fold_images(run, 0, "student")
    assert "--source folder --data-root DIR" in e.value.fix


def pictures(folder, classes):
    "Three patients of each class."
    for c in classes:
        for i in range(3):
            im = simulate_bscan(9, 3*classes.index(c) + i, 0, 0, height=64, width=96).image
            (folder / c).mkdir(parents=True, exist_ok=True)
            Image.fromarray(im).save(folder / c / f"P{classes.index(c)}{i}_1.png")
    return folder


@pytest.mark.slow
def test_labels_of_another_place_are_mapped_or_named(here, tmp_path):
    data = DataRecipe(source="folder", root=str(pictures(tmp_path / "d", ["amd", "NORMAL", "rvo"])))
    where = str(here.stage_dir(0, "baseline")), None, data, tmp_path / "audit.csv", None
    with pytest.raises(KdoctError, match="amd"): quiet(stressed_networks, *where)
    one, = quiet(stressed_networks, *where, "amd=CNV|DRUSEN,rvo=?")[0]
    assert (len(one.images), one.unknown) == (6, 3)
    assert set(one.images.label) == {"CNV|DRUSEN", "NORMAL"}
    cells = planned_cells(["gamma_up"], [1])
    stress_predictions([one], tmp_path / "out", cells)

    def read(cell):
        rows = pd.read_parquet(tmp_path / "out" / "external" / cell.file)
        return [joined_rows(rows, one.labels)]
    test = stress_test(cells, read, dict(gamma_up="device"), 100)
    assert test.how["classes"][0] == "CNV|DRUSEN" and test.how["images"] == 6


@pytest.mark.slow
def test_images_that_a_network_has_learned_from_are_refused(here, tmp_path):
    table = pd.read_parquet(here.path / "table.parquet")
    folds = pd.read_csv(here.folds_csv)
    learned = folds.path[(folds.fold == 0) & (folds.role == "train")].tolist()[:20]
    for i, path in enumerate(learned):
        label = table.label[table.path == path].iloc[0]
        target = tmp_path / "d" / label / f"P{i}_1.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((Path(here.stage("data")["root"]) / path).read_bytes())
    data = DataRecipe(source="folder", root=str(tmp_path / "d"))
    with pytest.raises(KdoctError, match=r"fold 0 in run 'tiny' has learned from \d+ images"):
        quiet(stressed_networks, "tiny", [0], data, tmp_path / "audit.csv")


@pytest.mark.parametrize("options, words", [
    (["--corruptions", "motion"], "no corruption 'motion'"),
    (["--severities", "7"], "Severities are 1 to 5"),
    (["--classes", "CNV"], "about images of another place"),
    ([], "no bundle and no model folder"),
])
def test_the_command_names_what_is_wrong(options, words, capsys):
    with pytest.raises(SystemExit) as e: main(["stress", "nothing", *options])
    assert e.value.code == 1 and words in capsys.readouterr().err


# --- report and card

def test_report_and_card_show_the_networks_that_are_there():
    run = simulated("shown")
    groups, right = list("aabbccdd"), [True]*8
    found = made(rows_of(right, False, groups), rows_of([True, False]*4, False, groups))
    model = run.stage_dir(0, "student") / "model.json"
    networks = dict(fold_0=dict(student=dict(weights_sha256="one")))
    write_json(model, read_json(model) | dict(weights_sha256="one"))
    write_stress(found, run.path / "stress", networks=networks, folds=[0])
    page = quiet(report_html, run)[0].read_text()
    assert "student, mean over severities" in page and "pixelate" in page
    assert card_stress(run, 0, "student")["rows"]["pixelate"]["accuracy %"].startswith("50.0")
    write_json(model, read_json(model) | dict(weights_sha256="two"))
    assert stress_records(run)[0] == []
    assert "is of other networks than this run has now" in stress_records(run)[1][0]
