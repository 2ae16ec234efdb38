"Teachers that see the clean view while the student sees another device's: the right pictures, or a refusal."
import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from torch import nn
from trainings import Stop, fit

from kdoct.core.device_section import DeviceRecipe
from kdoct.core.files import KdoctError
from kdoct.core.presets import preset
from kdoct.core.sections import AugmentRecipe, DistillRecipe, TrainRecipe
from kdoct.data.batches import Batches
from kdoct.data.mixing import Mix
from kdoct.data.unlabelled_batches import UnlabelledBatches
from kdoct.distill.callback import Distill
from kdoct.distill.methods import check_method, known_methods
from kdoct.distill.teacher_cache import TeacherCache, view_facts
from kdoct.distill.teachers import Teachers
from kdoct.models.backbones import create_classifier
from kdoct.training.inference import InferenceModel
from kdoct.training.loop import make_learner
from kdoct.training.losses import cross_entropy

N = 24
LABELS = np.arange(N) % 3
IMAGES = np.random.default_rng(0).integers(0, 255, (N, 64, 64), dtype=np.uint8)
IDS = np.arange(N, dtype=np.uint64)
STILL = dict(strip=1, flatten=False, bend=0)   # nothing is moved
CHANGED = DeviceRecipe(prob=1.0, each=0.5, **STILL)
REFUSED = {"ctcd", "ssd_kd"}   # whatever the changes are
MOVED = {"fitnet", "efcm", "attention"}   # where something is moved


@pytest.fixture(autouse=True)
def outputs(tmp_path, monkeypatch):
    monkeypatch.setenv("KDOCT_OUTPUTS", str(tmp_path / "outputs"))


@pytest.fixture(scope="module")
def original():
    torch.manual_seed(0)
    changed = preset("tiny").student.model_copy(update=dict(arch="test_resnet"))
    return create_classifier(changed, 3, 64).eval()


def batches(device=CHANGED, rows=range(16), **how):
    return Batches(IMAGES, LABELS, IDS, np.array(rows), 8, AugmentRecipe(device=device), 1, **how)


def without_labels(train):
    rows = np.arange(16, 24)
    return UnlabelledBatches(train, rows, IDS[rows], train.batch_size)


def learner(
    folder, original, recipe, cbs=(), device=CHANGED, teacher=None, unlabelled=None, **changes
):
    torch.manual_seed(1)
    changes = dict(epochs=2, precision="fp32", checkpoint_minutes=1e-9) | changes
    small = preset("tiny").student.model_copy(update=changes)
    valid = Batches(IMAGES, LABELS, IDS, np.arange(16, N), 8)
    teacher = InferenceModel(original) if teacher is None else teacher
    how = dict(originals=lambda name: original, beginnings=lambda name: original)
    distill = Distill(dict(teacher=teacher), recipe, unlabelled=unlabelled, **how)
    student = create_classifier(small, 3, 64)
    return make_learner(
        student, batches(device), valid, cross_entropy, small, folder, "k", [distill, *cbs]
    )


class Seen(InferenceModel):
    "Keeps the pictures that a teacher is given."
    def __init__(self, model):
        super().__init__(model)
        self.pictures = []
    def forward(self, x):
        self.pictures.append(x)
        return super().forward(x)
    def with_maps(self, x, recorder):
        self.pictures.append(x)
        return super().with_maps(x, recorder)


def pictures_of(epochs, clean, rows=range(16)):
    "Views of all images in some epochs."
    return torch.cat([
        batches().batch(np.array(rows), number=epoch, clean=clean)[0] for epoch in range(epochs)
    ])


def same_pictures(a, b):
    "Whether two sets hold the same pictures, in any order."
    if a.shape != b.shape: return False
    away = torch.stack([(b - one).abs().amax((1, 2, 3)).amin() for one in a])
    return bool((away < 1e-4).all())


@pytest.mark.parametrize("method", ["kl", "attention", "rkd", "similarity"])
@pytest.mark.parametrize("view", ["same", "clean"])
def test_the_view_that_the_recipe_names_reaches_the_teacher(tmp_path, original, method, view):
    teacher = Seen(original)
    recipe = DistillRecipe(method=method, teacher_view=view)
    learn = learner(tmp_path, original, recipe, teacher=teacher)
    teacher.pictures.clear()   # that its layers were found with
    fit(learn)
    seen = torch.cat(teacher.pictures)
    assert same_pictures(seen, pictures_of(2, clean=view == "clean"))
    assert not same_pictures(seen, pictures_of(2, clean=view != "clean"))


def test_the_student_sees_the_changed_view_whatever_its_teacher_sees(tmp_path, original):
    seen = []
    class Look(Callback):
        run_valid = False
        def before_batch(self): seen.append(self.xb[0])
    fit(learner(tmp_path, original, DistillRecipe(teacher_view="clean"), [Look()]))
    assert same_pictures(torch.cat(seen), pictures_of(2, clean=False))


def test_unlabelled_images_too_are_shown_clean(tmp_path, original):
    teacher = Seen(original)
    recipe = DistillRecipe(teacher_view="clean")
    learn = learner(
        tmp_path, original, recipe, teacher=teacher, unlabelled=without_labels, epochs=1
    )
    fit(learn)
    every = torch.cat([pictures_of(1, True), *(without_labels(batches()).both(k)[1] for k in range(2))])
    assert same_pictures(torch.cat(teacher.pictures), every)


@pytest.mark.parametrize("name", known_methods())
def test_every_method_learns_with_clean_teachers_or_is_refused(tmp_path, original, name):
    more = without_labels if known_methods()[name].needs_unlabelled else None
    recipe = DistillRecipe(method=name, teacher_view="clean")
    def trained(folder, device):
        return fit(learner(tmp_path / folder, original, recipe, device=device, unlabelled=more))
    if name in REFUSED:
        with pytest.raises(KdoctError, match=f"'{name}' makes student and teachers see the same"):
            trained("a", CHANGED)
        return
    learn = trained("a", CHANGED)
    assert all(np.isfinite(row["train_loss"]) for row in learn.history.rows)
    moving = TrainRecipe(augment=AugmentRecipe(device=DeviceRecipe(prob=0.5)))
    if name not in MOVED: return check_method(recipe, moving)
    with pytest.raises(KdoctError, match=f"'{name}' compares maps place by place") as e:
        check_method(recipe, moving)
    assert "student.augment.device.strip=1 student.augment.device.flatten=false" in e.value.fix


@pytest.mark.parametrize("method", ["kl", "mean_teacher"])
def test_a_resumed_training_ends_with_the_same_weights(tmp_path, original, method):
    def made(folder, *cbs):
        recipe = DistillRecipe(method=method, teacher_view="clean")
        device = DeviceRecipe(prob=1.0, each=0.5)
        return learner(tmp_path / folder, original, recipe, cbs, device, unlabelled=without_labels)
    whole = fit(made("a"))
    with pytest.raises(KeyboardInterrupt): fit(made("b", Stop(3)))
    resumed = fit(made("b"))
    a, b = (learn.model.state_dict() for learn in (whole, resumed))
    assert resumed.first_epoch == 1 and all(torch.equal(a[k], b[k]) for k in a)


def test_a_mean_teacher_sees_a_clean_view_where_the_recipe_says_so(tmp_path, original):
    seen = []
    recipe = DistillRecipe(method="mean_teacher", teacher_view="clean")
    learn = learner(tmp_path, original, recipe, epochs=1)
    network = learn.distill.companion.mean_teacher
    network.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    fit(learn)
    plain = batches(DeviceRecipe()).batch(np.arange(16), number=1 << 40)[0]
    assert same_pictures(torch.cat(seen), plain)


def key(recipe, clean):
    made = batches(recipe)
    made.clean = clean
    return view_facts(made)


def test_a_cache_of_clean_views_is_that_of_a_student_without_devices():
    plain = key(DeviceRecipe(), clean=False)
    assert "device" not in plain["augment"] and "styles" not in plain
    assert key(DeviceRecipe(svd=7), clean=False) == plain     # off
    assert key(CHANGED, clean=True) == plain
    assert key(CHANGED, clean=False) != plain != key(DeviceRecipe(prob=0.5), clean=False)


def test_a_cache_holds_what_the_teacher_makes_of_the_view_that_the_recipe_names(tmp_path, original):
    for view in ("same", "clean"):
        recipe = DistillRecipe(teacher_view=view, views=2)
        cached = TeacherCache(InferenceModel(original), "a"*64, batch=16)
        a = fit(learner(tmp_path / f"{view}a", original, recipe, teacher=cached))
        online = recipe.model_copy(update=dict(views=0))
        b = fit(learner(tmp_path / f"{view}b", original, online))
        a, b = ([row["train_soft"] for row in learn.history.rows] for learn in (a, b))
        assert a == pytest.approx(b, rel=1e-3)


def refusal(recipe=None, **training):
    training = dict(augment=AugmentRecipe(device=CHANGED)) | training
    with pytest.raises(KdoctError) as e:
        check_method(recipe or DistillRecipe(teacher_view="clean"), TrainRecipe(**training))
    return str(e.value)


def test_clean_teachers_of_a_student_whose_views_are_clean_are_refused():
    assert "augment.device.prob of the student is 0" in refusal(augment=AugmentRecipe())
    with pytest.raises(KdoctError, match="Set student.augment.device.prob"):
        check_method(preset("edge", **{"distill.teacher_view": "clean"}).distill, TrainRecipe())


def test_blended_images_are_refused_but_with_a_cache(tmp_path, original):
    assert "images are blended after they were changed" in refusal(mix_prob=0.5)
    training = TrainRecipe(mix_prob=1.0, augment=AugmentRecipe(device=CHANGED))
    recipe = DistillRecipe(teacher_view="clean", views=2)
    check_method(recipe, training)
    cached = TeacherCache(InferenceModel(original), "a"*64, batch=16)
    learn = learner(tmp_path, original, recipe, [Mix(training, 3)], teacher=cached)
    assert all(np.isfinite(row["train_soft"]) for row in fit(learn).history.rows)


def test_a_loop_of_ones_own_has_no_clean_view(original):
    x, z = torch.rand(2, 3, 32, 32), torch.zeros(2, 3, requires_grad=True)
    teachers = Teachers(original, DistillRecipe(teacher_view="clean"))
    with pytest.raises(KdoctError, match="gives one view"):
        teachers.loss(nn.functional.cross_entropy(z, torch.tensor([0, 1])), z, x)
