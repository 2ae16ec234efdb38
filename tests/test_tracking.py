"A training is followed by a tracker, by one field of the recipe; one that fails stops nothing."
import sys
import types
import warnings

import pytest
from conftest import copied_run

from kdoct.core.files import KdoctError, read_json
from kdoct.core.presets import preset
from kdoct.core.runs import create_run, open_run
from kdoct.distill.student import train_baseline
from kdoct.training import tracking
from kdoct.training.tracking import track_results


@pytest.fixture
def tracked(trained_outputs, outputs):
    "A function: a run whose data are ready and whose baseline is to be trained, with this tracker."
    def make(by):
        run = copied_run(trained_outputs, outputs)
        for f in sorted(run.stage_dir(0, "baseline").glob("*")):
            if f.is_file(): f.unlink()
        return create_run("tiny", run.recipe.override(tracking=by))
    return make


def mlflow_run(name):
    "What MLflow's local store has of a network: parameters, metrics and how the accuracy went."
    from mlflow import MlflowClient
    client = MlflowClient(tracking_uri=tracking.mlflow_address())
    experiment = client.get_experiment_by_name("tiny").experiment_id
    found = client.search_runs([experiment], f"attributes.run_name = '{name}'")
    assert len(found) == 1, "one tracked run a network, also after a resume"
    history = client.get_metric_history(found[0].info.run_id, "accuracy")
    return client, found[0], [m.value for m in sorted(history, key=lambda m: m.step)]


@pytest.mark.slow
def test_mlflow_has_parameters_the_curves_of_history_and_the_report(tracked, tmp_path):
    pytest.importorskip("mlflow", reason="the extra tracking is not installed")
    run = tracked("mlflow")
    train_baseline(run, 0)
    _, found, accuracy = mlflow_run("fold-0-baseline")
    rows = [line.split(",") for line in (run.stage_dir(0, "baseline") / "history.csv").read_text().split()]
    assert accuracy == pytest.approx([float(r[rows[0].index("accuracy")]) for r in rows[1:]])
    assert found.data.params["training.arch"] == run.recipe.student.arch
    assert found.info.status == "FINISHED"
    (tmp_path / "report.html").write_text("<p>report</p>")
    track_results(run, [tmp_path / "report.html"])
    client, found, _ = mlflow_run("report")
    assert [f.path for f in client.list_artifacts(found.info.run_id)] == ["report.html"]


@pytest.mark.slow
def test_a_resumed_training_goes_on_in_the_same_tracked_run(tracked):
    pytest.importorskip("mlflow", reason="the extra tracking is not installed")
    run = tracked("mlflow")
    for epoch in (0, 1):   # a second process takes up where the first was ended
        again = tracking.MLflow("tiny", "fold-0-baseline", epoch)
        again.parameters(dict(lr=.1))
        again.scores(epoch, dict(accuracy=.5 + epoch/10))
    assert mlflow_run("fold-0-baseline")[2] == [.5, .6] and run.recipe.tracking == "mlflow"


def test_tensorboard_has_the_curve_and_a_figure(outputs, tmp_path):
    pytest.importorskip("tensorboard", reason="the extra tracking is not installed")
    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    Image.new("RGB", (8, 6)).save(tmp_path / "confusion.png")
    board = tracking.TensorBoard("r", "fold-0-student")
    board.parameters(dict(lr=.1))
    for epoch in range(2): board.scores(epoch, dict(accuracy=epoch / 2))
    board.artefact(tmp_path / "confusion.png")
    board.close()
    seen = EventAccumulator(str(outputs / "tracking/tensorboard/r/fold-0-student")).Reload()
    assert [e.value for e in seen.Scalars("accuracy")] == [0, .5]
    assert seen.Tags()["images"] == ["confusion"] and "parameters/text_summary" in seen.Tags()["tensors"]


class Recorded:
    "A tracker that keeps what it is sent."
    packages, sent = (), []
    def __init__(self, run, name, first=0): self.sent.append(("begun", run, name, first))
    def parameters(self, values): self.sent.append(("parameters", values))
    def scores(self, epoch, values): self.sent.append(("scores", epoch, values))
    def artefact(self, path): self.sent.append(("artefact", path.name))
    def close(self): self.sent.append(("closed",))


class Failing(Recorded):
    def scores(self, epoch, values): raise ConnectionError("the server is gone")


def test_every_epoch_is_sent_and_no_folder_of_this_machine(tracked, monkeypatch, outputs):
    monkeypatch.setitem(tracking.TRACKERS, "mlflow", Recorded)
    monkeypatch.setattr(Recorded, "sent", [])
    run = tracked("mlflow")
    train_baseline(run, 0)
    kinds = [kind for kind, *_ in Recorded.sent]
    assert kinds == ["begun", "parameters", *["scores"] * run.recipe.student.epochs, "closed"]
    assert str(outputs) not in str(Recorded.sent) and "tiny" in str(Recorded.sent[0])


def test_a_tracker_that_fails_is_said_once_and_training_goes_on(tracked, monkeypatch):
    monkeypatch.setitem(tracking.TRACKERS, "mlflow", Failing)
    run = tracked("mlflow")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        train_baseline(run, 0)
    assert sum("Tracking by mlflow has ended" in str(w.message) for w in said) == 1
    facts = run.stage("fold_0/baseline")
    assert facts["status"] == "done" and "the server is gone" in facts["tracking"]["error"]


def test_a_missing_tracker_is_refused_before_training(monkeypatch, outputs):
    monkeypatch.setattr(Recorded, "packages", ("no_such_package",))
    monkeypatch.setitem(tracking.TRACKERS, "mlflow", Recorded)
    from kdoct.app.stages import new_run
    with pytest.raises(KdoctError, match="no_such_package") as e: new_run("r", preset("tiny", tracking="mlflow"))
    assert "kdoct[tracking]" in e.value.fix and not (outputs / "r").exists()


def test_the_tracker_of_a_run_may_change_and_no_network_does(trained_outputs, outputs):
    run = copied_run(trained_outputs, outputs)
    before = run.recipe.key
    create_run("tiny", run.recipe.override(tracking="tensorboard"))
    again = open_run("tiny")
    assert again.recipe.tracking == "tensorboard" and again.recipe.key == before
    assert read_json(again.json)["recipe_key"] == before


def test_weights_and_biases_gets_fastais_callback_in_one_run_a_network(monkeypatch, outputs):
    calls = []
    class Run:
        config = types.SimpleNamespace(update=lambda values, **_: calls.append(values))
        def log(self, values): calls.append(values)
        def finish(self): calls.append("finished")
    wandb = types.ModuleType("wandb")
    wandb.init = lambda **given: calls.append(given) or Run()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    tracker = tracking.WandB("r", "fold-0-student")
    tracker.parameters(dict(lr=.1))
    tracker.scores(0, dict(accuracy=.5))
    tracker.close()
    begun, *rest = calls
    assert (begun["group"], begun["name"], begun["resume"]) == ("r", "fold-0-student", "allow")
    assert rest == [dict(lr=.1), dict(epoch=0, accuracy=.5), "finished"]
    tracking.WandB("r", "fold-0-student")
    assert calls[-1]["id"] == begun["id"], "a resumed training goes on in the same run"
