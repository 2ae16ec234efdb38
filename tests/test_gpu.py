"Training on a GPU, as far as it can be known without one: the device `meta` has no numbers that could be waited for."
import copy
import json
import runpy
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback, CancelFitException
from test_methods import copies_of, learner, originals, without_labels  # noqa: F401 (a fixture)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kdoct.core.files import KdoctError
from kdoct.core.sections import DistillRecipe
from kdoct.distill.methods import known_methods
from kdoct.training.loop import History
from kdoct.training.losses import hard_loss

ROOT = Path(__file__).resolve().parent.parent
ADAMW, AUTOCAST = torch.optim.AdamW, torch.autocast


class OneDevice(TorchDispatchMode):
    "Fails where an operation takes tensors of the CPU and of the pretended GPU; transfers may."
    transfers = torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [t for t in tree_leaves((args, kwargs)) if torch.is_tensor(t) and t.ndim]
        if len({t.device.type for t in tensors}) > 1 and func not in self.transfers:
            raise AssertionError(f"{func} takes tensors of two devices")
        return func(*args, **(kwargs or {}))


class AfterTraining(Callback):
    "Ends a fit before the validation, which fetches its logits."
    order = 100
    def __init__(self): self.steps = 0
    def after_batch(self): self.steps += 1
    def after_train(self): raise CancelFitException


def to_meta(learn, teachers):
    "Have a Learner compute on a device whose numbers nobody can look at."
    networks = *teachers.values(), learn.model, learn.distill.companion
    for network in networks: network.to("meta")
    learn.dls.device = torch.device("meta")
    learn.distill.group.checked = set(teachers)   # the first logits are looked at, once
    learn.distill.companion.looked = set(teachers)   # ssd_kd's small networks likewise
    labels = learn.dls.train.labels
    learn.loss_func = hard_loss(learn.checkpoint.recipe, labels, 3, "meta")
    return learn


def train_on_meta(learn, teachers, monkeypatch):
    "The number of batches that were trained on without a look at a number."
    def optimizer(groups, fused): return ADAMW(groups, foreach=False)
    def autocast(kind, *args, **how): return AUTOCAST("cpu" if kind == "meta" else kind, *args, **how)
    monkeypatch.setattr(torch.optim, "AdamW", optimizer)   # neither is made for meta
    monkeypatch.setattr(torch, "autocast", autocast)
    to_meta(learn, teachers)
    with OneDevice(), learn.no_bar(), learn.no_logging(): learn.fit(learn.checkpoint.recipe.epochs)
    assert all(p.device.type == "meta" for p in learn.model.parameters())
    return learn.after_training.steps


ON = dict(average="ema", class_weights="balanced", loss="focal", label_smoothing=.1, clip=1.,
          checkpoint_minutes=60)


# acid chooses images by what the networks give, and looks their rows up on the host
@pytest.mark.parametrize("name", sorted(set(known_methods()) - {"acid"}))
def test_no_step_of_a_method_waits_for_the_gpu_or_mixes_devices(
    tmp_path, originals, monkeypatch, name  # noqa: F811
):
    more = without_labels if known_methods()[name].needs_unlabelled else None
    teachers = copy.deepcopy(dict(copies_of(tuple(originals.items()))))
    changes = ON | dict(epochs=3)
    learn = learner(tmp_path, originals, DistillRecipe(method=name), [AfterTraining()], teachers,
                    more, **changes)
    assert train_on_meta(learn, teachers, monkeypatch) == 3


def test_blended_images_in_steps_of_two_batches_need_no_look_either(
    tmp_path, originals, monkeypatch  # noqa: F811
):
    teachers = copy.deepcopy(dict(copies_of(tuple(originals.items()))))
    changes = ON | dict(mix_prob=1., accumulate=2, batch_size=4)
    learn = learner(tmp_path, originals, DistillRecipe(), [AfterTraining()], teachers, **changes)
    assert train_on_meta(learn, teachers, monkeypatch) == 6


def test_a_step_that_looks_at_a_number_is_noticed(tmp_path, originals, monkeypatch):  # noqa: F811
    class Look(Callback):
        run_valid = False
        def after_loss(self): float(self.loss)
    teachers = copy.deepcopy(dict(copies_of(tuple(originals.items()))))
    cbs = [AfterTraining(), Look()]
    learn = learner(tmp_path, originals, DistillRecipe(), cbs, teachers, **ON)
    with pytest.raises(RuntimeError, match="meta"): train_on_meta(learn, teachers, monkeypatch)


def test_a_step_that_mixes_devices_is_noticed(tmp_path, originals, monkeypatch):  # noqa: F811
    class Here(Callback):
        run_valid = False
        def after_loss(self): self.pred + torch.ones(self.pred.shape)
    teachers = copy.deepcopy(dict(copies_of(tuple(originals.items()))))
    cbs = [AfterTraining(), Here()]
    learn = learner(tmp_path, originals, DistillRecipe(), cbs, teachers, **ON)
    with pytest.raises(AssertionError, match="two devices"):
        train_on_meta(learn, teachers, monkeypatch)


def test_losses_that_are_fetched_many_at_once_make_the_same_record(
    tmp_path, originals, monkeypatch  # noqa: F811
):
    def rows(folder):
        learn = learner(tmp_path/folder, originals, DistillRecipe(), checkpoint_minutes=60)
        with learn.no_bar(), learn.no_logging(): learn.fit(1)
        return [{k: v for k, v in row.items() if k != "seconds"} for row in learn.history.rows]
    at_once = rows("a")
    monkeypatch.setattr(History, "at_once", "")
    assert rows("b") == at_once


def test_a_loss_that_is_not_finite_is_noticed_before_a_state_is_saved(
    tmp_path, originals, monkeypatch  # noqa: F811
):
    monkeypatch.setattr(History, "at_once", "")
    class Break(Callback):
        order, run_valid = 14, False   # before History (15)
        def after_loss(self):
            if self.iter == 0: self.learn.loss_terms = dict(soft=torch.tensor(np.nan))
    learn = learner(tmp_path, originals, DistillRecipe(), [Break()], checkpoint_minutes=60)
    with learn.no_bar(), learn.no_logging(), pytest.raises(KdoctError, match="soft term.*batch 0"):
        learn.fit(1)
    assert not learn.checkpoint.state.exists()


@pytest.fixture(scope="module")
def check():
    "The functions of tools/gpu_check.py."
    return runpy.run_path(str(ROOT / "tools" / "gpu_check.py"))


def test_an_item_of_the_check_that_fails_or_hangs_does_not_lose_the_others(check, tmp_path, capsys):
    def breaks(o):
        "One that breaks."
        raise ValueError("out of luck")
    def hangs(o):
        "One that hangs."
        time.sleep(60)
    def works(o):
        "One that works."
        return dict(rate=2.)
    for name, seconds, f in (("breaks", 5, breaks), ("hangs", .3, hangs), ("works", 5, works)):
        check["ITEMS"][name] = seconds, f
    out = tmp_path / "found.json"
    only = ["--only", "breaks", "hangs", "works", "no-waiting"]
    assert check["main"](["--device", "cpu", "--small", "--out", str(out), *only]) == 1
    results = json.loads(out.read_text())["results"]
    assert [r["status"] for r in results.values()] == ["failed", "failed", "passed", "left out"]
    assert "out of luck" in results["breaks"]["reason"] and "not done" in results["hangs"]["reason"]
    assert "| works | passed |" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("name", ["moves", "arithmetic", "resume", "no-waiting", "predict"])
def test_the_check_passes_on_the_gpu_that_is_here(check, name, tmp_path):
    o = check["options"](["--small", "--out", str(tmp_path / "found.json")])
    found = check["run_item"](name, o, 120)
    assert found["status"] == "passed", found
