"Methods of distillation: what drives them, what they learn, what they refuse; each is resumed exactly."
import copy
import functools

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from torch import nn
from trainings import Stop, fit

from kdoct.core.files import KdoctError
from kdoct.core.parts import Part
from kdoct.core.presets import preset
from kdoct.core.sections import AugmentRecipe, DistillRecipe, TrainRecipe
from kdoct.data.batches import Batches
from kdoct.data.unlabelled_batches import UnlabelledBatches
from kdoct.distill import methods
from kdoct.distill.callback import Distill
from kdoct.distill.methods import Method, check_method, known_methods, make_method
from kdoct.distill.teacher_cache import TeacherCache
from kdoct.distill.teachers import Teachers
from kdoct.models.backbones import create_classifier
from kdoct.training.inference import InferenceModel
from kdoct.training.loop import make_learner
from kdoct.training.losses import cross_entropy

ROWS = 36
LABELS = np.arange(ROWS) % 3


@pytest.fixture(scope="module")
def originals():
    "Two teachers of unlike architectures."
    torch.manual_seed(0)
    recipe = preset("tiny").student
    def network(arch):
        changed = recipe.model_copy(update=dict(arch=arch))
        return create_classifier(changed, 3, 64).eval()
    return {"teacher": network("test_resnet"), "teacher-convnext": network("test_convnext2")}


@functools.cache
def copies_of(networks):
    "Inference copies of these networks, made once."
    return {name: InferenceModel(network) for name, network in networks}


def learner(folder, originals, recipe, cbs=(), teachers=None, unlabelled=None, **changes):
    "A small student, 24 images of training in batches of 8, teachers as inference copies."
    torch.manual_seed(1)
    changes = dict(epochs=2, precision="fp32", checkpoint_minutes=1e-9, drop_rate=.2) | changes
    small = preset("tiny").student.model_copy(update=changes)
    images = np.random.default_rng(0).integers(0, 255, (ROWS, 64, 64), dtype=np.uint8)
    ids = np.arange(ROWS, dtype=np.uint64)
    train = Batches(images, LABELS, ids, np.arange(24), small.batch_size, AugmentRecipe(), seed=1)
    valid = Batches(images, LABELS, ids, np.arange(24, ROWS), 8)
    if teachers is None: teachers = dict(copies_of(tuple(originals.items())))
    distill = Distill(teachers, recipe, originals=originals.__getitem__, unlabelled=unlabelled)
    student = create_classifier(small, 3, 64)
    return make_learner(student, train, valid, cross_entropy, small, folder, "k", [distill, *cbs])


def state(learn):
    "Weights of the student and of the method."
    parts = dict(student=learn.model, method=learn.distill.companion)
    return {f"{k}.{n}": v for k, part in parts.items() for n, v in part.state_dict().items()}


@pytest.mark.parametrize("name", known_methods())
def test_a_training_that_stops_in_the_middle_ends_with_the_same_weights(tmp_path, originals, name):
    more = without_labels if known_methods()[name].needs_unlabelled else None
    def made(folder, *cbs):
        recipe = DistillRecipe(method=name)
        return learner(tmp_path / folder, originals, recipe, cbs, unlabelled=more)
    before = copy.deepcopy({k: v.state_dict() for k, v in originals.items()})
    whole = fit(made("a"))
    with pytest.raises(KeyboardInterrupt): fit(made("b", Stop(5)))
    resumed = fit(made("b"))
    assert resumed.first_epoch == 1
    for k, teacher in originals.items():   # they stay as they are
        assert all(torch.equal(v, before[k][n]) for n, v in teacher.state_dict().items())
        assert all(p.grad is None for p in teacher.parameters())
    a, b = state(whole), state(resumed)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    terms = [k for k in whole.history.rows[-1] if k.startswith("train_")]
    assert {"train_hard", "train_soft", "train_loss"} <= set(terms)
    assert all(np.isfinite(whole.history.rows[-1][k]) for k in terms)


@pytest.mark.parametrize("name", ["fitnet", "ofa", "channels"])
def test_what_a_method_learns_is_optimised_and_is_no_part_of_the_student(tmp_path, originals, name):
    learn = learner(tmp_path, originals, DistillRecipe(method=name))
    before = copy.deepcopy(learn.distill.companion.state_dict())
    own = set(learn.model.state_dict())
    fit(learn)
    after = learn.distill.companion.state_dict()
    assert before and all(not torch.equal(before[k], after[k]) for k in before if "weight" in k)
    assert set(learn.model.state_dict()) == own


def test_no_teacher_is_changed_and_no_hook_is_left(tmp_path, originals):
    teachers = {k: InferenceModel(v) for k, v in originals.items()}
    before = copy.deepcopy({k: v.state_dict() for k, v in teachers.items()})
    learn = fit(learner(tmp_path, originals, DistillRecipe(method="attention"), teachers=teachers))
    for name, teacher in teachers.items():
        assert all(torch.equal(v, before[name][k]) for k, v in teacher.state_dict().items())
        assert all(p.grad is None for p in teacher.parameters())
    assert not any(m._forward_hooks for m in learn.model.modules())


def test_the_gradient_of_the_method_is_clipped_with_the_students(tmp_path, originals):
    norms = []
    class Norm(Callback):
        order, run_valid = 21, False   # after Accumulate (20), which clips
        def before_step(self):
            grads = [p.grad.norm() for p in self.learn.trained.parameters() if p.grad is not None]
            norms.append(torch.stack(grads).norm().item())
    recipe = DistillRecipe(method="fitnet", options=dict(weight=1e4))
    fit(learner(tmp_path, originals, recipe, [Norm()], clip=.5, epochs=1))
    assert norms and max(norms) == pytest.approx(.5, rel=1e-3)


def test_maps_of_teacher_and_student_are_those_of_the_same_images(tmp_path, originals):
    seen = []
    class Look(Callback):
        order, run_valid = 4, False   # before Distill (5)
        def after_loss(self):
            step = self.learn.distill.step()
            seen.append((step.images.clone(), step.teachers["teacher"].maps[0].clone()))
            self.learn.distill.student_maps.kept.__dict__["blocks.4"] = torch.zeros(8, 64, 2, 2)
    fit(learner(tmp_path, originals, DistillRecipe(method="fitnet"), [Look()], epochs=1))
    net = originals["teacher"]
    kept = []
    net.body.layer4.register_forward_hook(lambda m, args, out: kept.append(out))
    images, maps = seen[0]
    with torch.no_grad(): net(images)
    torch.testing.assert_close(maps, kept[0], rtol=1e-3, atol=1e-3)


def cached(originals):
    "Teachers whose answers are kept."
    return {k: TeacherCache(InferenceModel(v), k, 8, k) for k, v in originals.items()}


def test_embeddings_of_a_cache_are_those_of_the_teacher(tmp_path, outputs, originals):
    recipe = DistillRecipe(method="rkd", views=2)
    stored = fit(learner(tmp_path / "a", originals, recipe, teachers=cached(originals)))
    online = learner(tmp_path / "b", originals, DistillRecipe(method="rkd"))
    online.dls.train.views = 2
    fit(online)
    for term in ("train_distance", "train_angle", "train_soft"):
        a, b = (learn.history.rows[-1][term] for learn in (stored, online))
        assert a == pytest.approx(b, rel=1e-3)


def test_a_cache_without_embeddings_is_another_one(tmp_path, outputs, originals):
    one = dict(list(originals.items())[:1])
    paths = set()
    for name in ("kl", "rkd"):
        teachers = cached(one)
        recipe = DistillRecipe(method=name, views=1)
        fit(learner(tmp_path / name, one, recipe, teachers=teachers, epochs=1))
        paths.add(teachers["teacher"].path)
    assert len(paths) == 2


REFUSED = {
    "accumulate": (dict(), dict(accumulate=2), 1, "rkd", "several batches"),
    "processes": (dict(), dict(), 2, "dist", "several processes"),
    "mixed images": (dict(), dict(mix_prob=.5), 1, "dkd", "blended"),
    "maps from a cache": (dict(views=2), dict(), 1, "fitnet", "teacher cache"),
    "choice among a part": (dict(), dict(accumulate=2), 1, "acid", "several batches"),
    "choice among parts": (dict(), dict(), 2, "acid", "several processes"),
    "compiled": (dict(), dict(compile=True), 1, "attention", "torch.compile"),
    "mixed and cached": (dict(views=2), dict(mix_prob=.5), 1, "rkd", "no cache"),
    "one epoch for two stages": (dict(), dict(epochs=1), 1, "efcm", "two stages"),
    "a held backbone": (dict(), dict(freeze_epochs=1), 1, "efcm", "freeze_epochs"),
    "averaged too early": (dict(), dict(average="swa", swa_start=3), 1, "efcm", "epoch 4"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_method_cannot_do_is_refused_before_training(case):
    distill, training, processes, name, word = REFUSED[case]
    recipe = DistillRecipe(method=name, **distill)
    check_method(recipe.model_copy(update=dict(views=0)), TrainRecipe(), 3, 1)
    with pytest.raises(KdoctError, match=word) as e:
        check_method(recipe, TrainRecipe(**training), 3, processes)
    assert e.value.fix


def test_standardised_logits_of_two_classes_are_refused():
    with pytest.raises(KdoctError, match="3 classes or more, and there are 2"):
        check_method(DistillRecipe(method="lskd"), TrainRecipe(), 2)


@pytest.mark.parametrize("options", [dict(wieght=1), dict(weight=-1), dict(weight="much")])
def test_options_that_are_not_valid_are_named_with_those_there_are(options):
    with pytest.raises(KdoctError, match=next(iter(options))) as e:
        make_method(DistillRecipe(method="fitnet", options=options))
    assert "weight (" in e.value.fix


def test_every_method_says_what_it_does_and_takes():
    for name, cls in known_methods().items():
        assert cls.__doc__ and "\n" not in cls.__doc__, name
        assert all(f.description for f in cls.Options.model_fields.values()), name


def test_a_method_of_ones_own_is_a_class_of_a_few_lines(tmp_path, originals, monkeypatch):
    monkeypatch.setattr(methods, "_METHODS", dict(known_methods()))
    @methods.method("mine")
    class Mine(Method):
        "Mean squared difference of the logits, by a learned scale."
        class Options(Part):
            weight:float = 2.
        def setup(self, setting): self.scale = nn.Parameter(torch.ones(setting.n_classes))
        def further(self, step):
            difference = (self.scale*step.logits - step.teacher_logits).pow(2).mean()
            return dict(mine=self.options.weight*difference)
    learn = fit(learner(tmp_path, originals, DistillRecipe(method="mine")))
    assert learn.history.rows[-1]["train_mine"] > 0
    assert not torch.equal(learn.distill.companion.scale, torch.ones(3))


def test_several_teachers_count_as_their_mean(tmp_path, originals):
    one = dict(list(originals.items())[:1])
    twice = {"teacher": one["teacher"], "teacher-again": one["teacher"]}
    recipe = DistillRecipe(method="similarity")
    a, b = (fit(learner(tmp_path / str(len(o)), o, recipe)) for o in (one, twice))
    want, got = (learn.history.rows[-1]["train_similarity"] for learn in (a, b))
    assert got == pytest.approx(want, rel=1e-4)


def test_a_loop_of_ones_own_takes_methods_that_compare_logits_alone(originals):
    z, x = torch.randn(4, 3, requires_grad=True), torch.rand(4, 1, 64, 64)
    target = torch.tensor([0, 1, 2, 0])
    dkd = Teachers(originals, DistillRecipe(method="dkd"))
    dkd.loss(cross_entropy(z, target), z, x, target).backward()
    assert z.grad.abs().sum() > 0
    with pytest.raises(KdoctError, match="label of each image"):
        dkd.loss(cross_entropy(z, target), z, x)
    with pytest.raises(KdoctError, match="more than the logits"):
        Teachers(originals, DistillRecipe(method="rkd")).loss(cross_entropy(z, target), z, x)


def test_a_callback_that_comes_late_cannot_bring_something_to_learn(tmp_path, originals):
    learn = learner(tmp_path, originals, DistillRecipe())
    learn.remove_cb(learn.distill)
    teachers = {k: InferenceModel(v) for k, v in originals.items()}
    recipe = DistillRecipe(method="fitnet")
    learn.add_cb(Distill(teachers, recipe, originals=originals.__getitem__))
    with pytest.raises(KdoctError, match="optimiser of this Learner"): fit(learn)


def without_labels(train, rows=range(24, ROWS)):
    "The validation images once more, without their labels."
    rows = np.array(rows)
    return UnlabelledBatches(train, rows, rows.astype(np.uint64), train.batch_size)


@pytest.mark.parametrize("name", ["kl", "fitnet", "rkd"])
def test_unlabelled_images_count_as_labelled_ones_do(tmp_path, originals, name):
    seen, parts = [], []
    class Look(Callback):
        order, run_valid = 6, False   # after Distill (5)
        def after_loss(self): seen.append(self.learn.loss_terms["soft"].item())
    recipe = DistillRecipe(method=name)
    learn = learner(tmp_path, originals, recipe, [Look()], unlabelled=without_labels, epochs=1)
    soft = learn.distill.companion.soft
    def noted(step):
        parts.append((len(step.images), soft(step).item()))
        return soft(step)
    learn.distill.companion.soft = noted
    fit(learn)
    (n, labelled), (more, unlabelled) = parts[:2]
    assert (n, more) == (8, 8)
    assert seen[0] == pytest.approx((labelled + unlabelled)/2, rel=1e-5)
    assert labelled != pytest.approx(unlabelled, rel=1e-3)


def test_a_resumed_training_sees_the_same_unlabelled_images(tmp_path, originals):
    def made(folder, *cbs):
        recipe = DistillRecipe(method="kl")
        return learner(tmp_path / folder, originals, recipe, cbs, unlabelled=without_labels)
    whole = fit(made("a"))
    with pytest.raises(KeyboardInterrupt): fit(made("b", Stop(5)))
    resumed = fit(made("b"))
    a, b = state(whole), state(resumed)
    assert resumed.first_epoch == 1 and all(torch.equal(a[k], b[k]) for k in a)


def test_unlabelled_images_are_left_out_where_the_recipe_or_the_method_says_so(
    tmp_path, originals, capsys
):
    for folder, recipe in dict(a=DistillRecipe(unlabelled=0), b=DistillRecipe(method="dkd")).items():
        learn = learner(tmp_path / folder, originals, recipe, unlabelled=without_labels, epochs=1)
        assert learn.distill.unlabelled is None
    assert "'dkd' does not learn from the 12 unlabelled images" in capsys.readouterr().out


def test_a_cache_cannot_hold_unlabelled_images(tmp_path, outputs, originals):
    recipe, teachers = DistillRecipe(views=2), cached(originals)
    with pytest.raises(KdoctError, match="no teacher cache holds"):
        learner(tmp_path, originals, recipe, teachers=teachers, unlabelled=without_labels)
