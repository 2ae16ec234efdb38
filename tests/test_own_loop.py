"The examples for a loop of one's own are run as they stand in the guide."
import re

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kdoct.core.files import KdoctError
from kdoct.core.sections import DistillRecipe
from kdoct.distill.teachers import Teachers


@pytest.fixture
def world():
    "A student, a teacher, and batches of noise: names that the examples take as given."
    torch.manual_seed(0)
    teacher, student = (nn.Sequential(nn.Flatten(), nn.Linear(48, 3)) for _ in range(2))
    x = torch.rand(64, 3, 4, 4)
    y = teacher(x).argmax(1)
    loader = DataLoader(TensorDataset(x, y), batch_size=8)
    return dict(student=student, teacher=teacher.eval(), loader=loader, x=x)


def examples(root):
    "Blocks of the guide that are said to run."
    text = (root / "docs" / "distillation.md").read_text(encoding="utf-8")
    return re.findall(r"<!-- runs as a test -->\n\n```python\n(.*?)^```$", text, re.M | re.S)


def distance(world):
    "Divergence of the student from the teacher."
    with torch.no_grad():
        ours, theirs = (world[n](world["x"]).log_softmax(1) for n in ("student", "teacher"))
    return float(nn.functional.kl_div(ours, theirs, log_target=True, reduction="batchmean"))


def test_the_pytorch_example_runs_and_the_student_comes_nearer(world, root):
    example, before = examples(root)[0], distance(world)
    for _ in range(20): exec(example, world)
    assert distance(world) < .7 * before
    assert len(example.split("\n\n")[1].strip().splitlines()) <= 10


def test_the_fastai_example_runs_and_the_student_comes_nearer(world, root):
    from fastai.data.core import DataLoaders
    from fastai.data.load import DataLoader as Loader
    data = list(zip(world["x"], world["teacher"](world["x"]).argmax(1), strict=True))
    world["dls"] = DataLoaders(Loader(data, bs=8, shuffle=True), Loader(data, bs=8))
    before = distance(world)
    for _ in range(4): exec(examples(root)[1], world)
    assert distance(world) < before


@pytest.mark.parametrize("name", ["kl", "dkd", "nkd", "dist", "lskd", "hard_label",
                                  "image_temperature", "class_temperature"])
def test_every_method_of_logits_teaches_in_a_plain_loop(name, world):
    options = dict(temperatures=[2, 4, 8]) if name == "class_temperature" else {}
    teachers = Teachers(world["teacher"], DistillRecipe(method=name, options=options))
    for x, y in world["loader"]:
        logits = world["student"](x)
        teachers.loss(nn.functional.cross_entropy(logits, y), logits, x, y).backward()
        break
    grads = [p.grad for p in world["student"].parameters()]
    assert all(g.isfinite().all() and g.abs().sum() > 0 for g in grads)
    assert all(p.grad is None for p in world["teacher"].parameters())


@pytest.mark.parametrize("name", ["acid", "fitnet", "crckd", "ssd_kd"])
def test_a_method_that_needs_more_than_logits_is_refused_in_a_plain_loop(name, world):
    teachers = Teachers(world["teacher"], DistillRecipe(method=name))
    x, y = next(iter(world["loader"]))
    logits = world["student"](x)
    with pytest.raises(KdoctError, match="needs more than the logits"):
        teachers.loss(nn.functional.cross_entropy(logits, y), logits, x, y)
