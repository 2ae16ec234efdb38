"A network whose normalisation is fitted to pictures of another place: what changes, and what is refused."
import numpy as np
import pytest
import timm
import torch
from PIL import Image

from kdoct.app.cli import main
from kdoct.core.files import KdoctError, read_json
from kdoct.core.presets import preset
from kdoct.deploy.adapt import NOTE, adapt
from kdoct.deploy.networks import open_network
from kdoct.models.adaptation import NormStatistics
from kdoct.models.backbones import create_classifier
from kdoct.models.folders import load_model_folder, save_model_folder


def pictures(folder, n, factor=1., start=0):
    folder.mkdir(exist_ok=True)
    for i in range(start, start + n):
        pixels = np.random.default_rng(i).integers(30, 90, (50, 60))
        pixels[10 + i % 20:30 + i % 20] += 100
        Image.fromarray((pixels*factor).astype(np.uint8)).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def network(tmp_path):
    torch.manual_seed(3)
    recipe = preset("tiny", **{"teacher.arch": "test_efficientnet", "teacher.weights": "none"})
    net = create_classifier(recipe.teacher, 2, 48)
    save_model_folder(tmp_path / "ours", net, "teacher", recipe, ["CNV", "NORMAL"])
    return tmp_path / "ours"


def first_norm(folder):
    return load_model_folder(folder)[0].body.bn1


def test_the_order_of_folders_changes_nothing_but_rounding(network, tmp_path):
    a, b = pictures(tmp_path / "a", 30), pictures(tmp_path / "b", 30, factor=.5, start=30)
    adapt(network, [a, b], tmp_path / "one", prior=400)
    adapt(network, [b, a], tmp_path / "two", prior=400, seed=7)
    one, two = first_norm(tmp_path / "one"), first_norm(tmp_path / "two")
    torch.testing.assert_close(one.running_mean, two.running_mean, rtol=1e-4, atol=1e-5)


def test_a_large_prior_leaves_the_network_as_it_was(network, tmp_path):
    adapt(network, [pictures(tmp_path / "a", 32)], tmp_path / "out", prior=1e9)
    old, new = first_norm(network), first_norm(tmp_path / "out")
    torch.testing.assert_close(old.running_var, new.running_var, rtol=1e-5, atol=1e-6)


def test_a_network_without_batch_normalisation_is_refused():
    with pytest.raises(KdoctError, match="no batch normalisation") as e:
        NormStatistics(timm.create_model("test_convnext", num_classes=2))
    assert "without labels" in e.value.fix


def test_too_few_readable_pictures_are_refused_and_nothing_is_written(network, tmp_path):
    folder = pictures(tmp_path / "a", 31)
    (folder / "cut.png").write_bytes(b"\x89PNG")
    with pytest.raises(KdoctError, match="31 pictures can be read"):
        adapt(network, [folder], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_network_that_collapses_is_not_written(network, tmp_path, monkeypatch):
    monkeypatch.setattr("kdoct.deploy.adapt.collapse", lambda before, after: "all are CNV")
    with pytest.raises(KdoctError, match="all are CNV. Nothing is written"):
        adapt(network, [pictures(tmp_path / "a", 32)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_a_network_is_not_written_over(network, tmp_path):
    with pytest.raises(KdoctError, match="holds a network already"):
        adapt(network, [pictures(tmp_path / "a", 32)], network)


def test_the_record_says_from_which_weights_and_how(network, tmp_path):
    adapt(network, [pictures(tmp_path / "a", 40)], tmp_path / "out", prior=400)
    old, new = read_json(network / "model.json"), read_json(tmp_path / "out" / "model.json")
    assert new["adapted_from"] == old["weights_sha256"] != new["weights_sha256"]
    assert (new["adapted"]["images"], new["adapted"]["prior"]) == (40, 400)
    assert "failed" not in new or new["adapted"]["failed"] == 0


def test_the_command_adapts_and_says_what_is_not_known(network, tmp_path, capsys):
    folder, out = pictures(tmp_path / "a", 40), tmp_path / "out"
    args = ["adapt", str(network), str(folder), "--out", str(out), "--prior", "400"]
    with pytest.raises(SystemExit) as e: main(args)
    assert e.value.code == 0
    said = capsys.readouterr().out
    assert "Normalisation measured on 40 pictures" in said and "kdoct validate" in said
    assert open_network(out).engines == ["torch"]


def test_the_decision_goes_along_and_says_that_it_is_older(exported_outputs, tmp_path):
    from conftest import copied_run
    run = copied_run(exported_outputs, tmp_path / "outputs")
    bundle = next(p.parent for p in run.path.rglob("bundle.json"))
    rng = np.random.default_rng(1)
    (tmp_path / "a").mkdir()
    for i in range(40):
        Image.fromarray(rng.integers(0, 255, (60, 60), dtype=np.uint8)).save(tmp_path/f"a/{i}.png")
    adapt(bundle, [tmp_path / "a"], tmp_path / "out", prior=1e6)
    new, old = open_network(tmp_path / "out").decision, open_network(bundle).decision
    assert new.temperature == old.temperature and new.notes == (*old.notes, NOTE)
