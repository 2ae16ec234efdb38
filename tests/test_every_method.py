"What every method of distillation must do: those of the registry, so that a new one is tested too."
import copy
import functools
from dataclasses import replace

import numpy as np
import pytest
import torch

from kdoct.core.presets import preset
from kdoct.core.sections import AugmentRecipe, DistillRecipe
from kdoct.data.batches import Batches
from kdoct.distill.methods import LayerPair, Setting, Step, known_methods, make_method, output_of
from kdoct.models.backbones import create_classifier
from kdoct.models.feature_maps import corresponding_layers, layer_of
from kdoct.training.losses import cross_entropy

SIDE, N, CLASSES, EPOCHS = 48, 6, 3, 8
# Without what is drawn at random in the order of the batch; a head on a teacher learns quickly.
OPTIONS = dict(self_training=dict(mixup=0., threshold=0.), ssd_kd=dict(head_epochs=1, views=1))
every_method = pytest.mark.parametrize("name", known_methods())


@functools.cache
def networks():
    "Student and teacher, of unlike architectures, with the layers that correspond."
    torch.manual_seed(0)
    def network(arch):
        recipe = preset("tiny").student.model_copy(update=dict(arch=arch))
        return create_classifier(recipe, CLASSES, SIDE).eval()
    student, teacher = network("test_efficientnet"), network("test_resnet")
    def layers(which):
        pairs = corresponding_layers(student.body, teacher.body, which)
        each = [(layer_of(student.body, SIDE, a), layer_of(teacher.body, SIDE, b)) for a, b in pairs]
        return [LayerPair(*pair) for pair in each]
    return student, teacher, {which: layers(which) for which in ("last", "stages")}


def answers(images, layers, seed, needs):
    "Logits, and maps of 2 x 2 where they are needed, as fixed linear functions of the pictures."
    flat = images.flatten(1).float()
    def of(place, *shape):
        g = torch.Generator().manual_seed(100*seed + place)
        weights = torch.randn(flat.shape[1], int(np.prod(shape)), generator=g)/SIDE
        return (flat @ weights).unflatten(1, shape).to(images.dtype)
    maps = [] if needs == "logits" else [of(i, x.channels, 2, 2) for i, x in enumerate(layers, 1)]
    return of(0, CLASSES), maps


class Batch:
    "One batch for a method: what student and teacher give for it, as leaves that may have gradients."
    def __init__(self, name, epoch=5, dtype=torch.float32):
        student, teacher, layers = copy.deepcopy(networks())
        self.method = make_method(DistillRecipe(method=name, options=OPTIONS.get(name, {})))
        self.needs = self.method.needs
        self.pairs = layers["stages" if self.needs == "stages" else "last"]
        pictures = np.random.default_rng(0).integers(0, 255, (12, SIDE, SIDE), dtype=np.uint8)
        labels, ids = np.arange(12) % CLASSES, np.arange(12, dtype=np.uint64)
        train = Batches(pictures, labels, ids, np.arange(12), N, AugmentRecipe(), seed=1)
        torch.manual_seed(0)
        has_pairs = {} if self.needs == "logits" else {"teacher": self.pairs}
        self.method.setup(Setting(
            student, has_pairs, CLASSES, labels, np.arange(12), lambda name: teacher,
            lambda name: teacher, ("teacher",), cross_entropy, train,
        ))
        self.method.plan(EPOCHS)
        self.method.before_epoch(epoch)
        self.method.to(dtype).eval()   # networks of its own drop nothing
        self.before = copy.deepcopy(self.method.state_dict())
        student.to(dtype)
        self.rows, self.labels, self.epoch, self.dtype = np.arange(N), labels, epoch, dtype
        self.images = torch.rand(N, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(3)).to(dtype)

    def leaves(self, whose):
        "Logits and maps of student or teacher for all images of the batch."
        layers = [getattr(pair, whose) for pair in self.pairs]
        logits, maps = answers(self.images, layers, dict(student=1, teacher=2)[whose], self.needs)
        return [logits, *maps]

    def output(self, whose, leaves): return {"teacher": output_of(leaves[0], list(leaves[1:]))}

    def of_pictures(self, whose):
        "A function as the callback gives it: pictures -> outputs."
        layers, seed = [getattr(pair, whose) for pair in self.pairs], dict(student=1, teacher=2)[whose]
        def run(images):
            logits, maps = answers(images.to(self.dtype), layers, seed, self.needs)
            return self.output(whose, [logits, *maps])
        return run

    def step(self, student, teacher, order=None):
        "The batch as a method gets it, with as many images without a label where it learns from such."
        order = torch.arange(N) if order is None else order
        mine = {"teacher": self.output("student", student)["teacher"][order]}
        theirs = {"teacher": self.output("teacher", teacher)["teacher"][order]}
        if not self.method.queries: theirs = {}
        targets, rows = torch.from_numpy(self.labels[:N])[order], self.rows[order]
        logits = theirs["teacher"].logits if theirs else None
        step = Step(
            self.images[order], targets, cross_entropy(mine["teacher"].logits, targets), mine, theirs,
            logits, rows, self.epoch, 9, EPOCHS, self.of_pictures("student"), self.of_pictures("teacher"),
            cross_entropy,
        )
        if self.method.uses_unlabelled: step.unlabelled = replace(step, targets=None, hard=None)
        return step

    def loss(self, student, teacher, order=None):
        "What the student learns from; without what others learn from it, which gives it no gradient."
        self.method.load_state_dict(copy.deepcopy(self.before), assign=True)   # nothing remembered
        torch.manual_seed(0)
        loss, terms = self.method.terms(self.step(student, teacher, order))
        others = [v for k, v in terms.items() if k.startswith("peer_")]
        return loss - sum(others) if others else loss


@pytest.fixture(params=[1, 5], ids=["early", "late"])
def epoch(request): return request.param


@every_method
def test_the_gradient_is_that_of_finite_differences(name, epoch):
    batch = Batch(name, epoch, torch.float64)
    teacher = batch.leaves("teacher")
    student = [x.requires_grad_() for x in batch.leaves("student")]
    assert torch.autograd.gradcheck(
        lambda *leaves: batch.loss(leaves, teacher), student, fast_mode=True, atol=1e-4
    )


@every_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_outputs_of_ten_thousand_stay_finite(name, dtype):
    batch = Batch(name)
    def large(leaves): return [(1e4*x.clamp(-1, 1)).to(dtype) for x in leaves]
    student = [x.requires_grad_() for x in large(batch.leaves("student"))]
    loss = batch.loss(student, [-x for x in large(batch.leaves("teacher"))])
    loss.backward()
    assert loss.isfinite()
    assert all(x.grad is None or x.grad.isfinite().all() for x in student)


@every_method
def test_the_order_of_the_batch_does_not_matter(name, epoch):
    batch = Batch(name, epoch)
    leaves = batch.leaves("student"), batch.leaves("teacher")
    order = torch.tensor([3, 0, 5, 4, 2, 1])
    torch.testing.assert_close(batch.loss(*leaves, order), batch.loss(*leaves), rtol=1e-4, atol=1e-5)


@every_method
def test_the_student_gets_a_gradient(name, epoch):
    batch = Batch(name, epoch)
    student = [x.requires_grad_() for x in batch.leaves("student")]
    batch.loss(student, batch.leaves("teacher")).backward()
    assert any(x.grad is not None and x.grad.any() for x in student)
    assert all(p.grad is None for p in networks()[1].parameters())
