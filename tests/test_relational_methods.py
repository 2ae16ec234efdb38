"CRCKD, SSD-KD, mean teacher: state that is resumed exactly, what they leave alone, what they are refused with."
import copy

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from safetensors.torch import load_file
from test_distributed import run

from kdoct.core.files import KdoctError
from kdoct.core.presets import preset
from kdoct.core.sections import AugmentRecipe, DistillRecipe, TrainRecipe
from kdoct.data.batches import Batches
from kdoct.data.unlabelled_batches import UnlabelledBatches
from kdoct.distill import relational_methods as R
from kdoct.distill.callback import Distill
from kdoct.distill.contrast_losses import MemoryBank
from kdoct.distill.methods import LayerPair, Setting, Step, check_method, make_method, output_of
from kdoct.distill.teacher_cache import TeacherCache
from kdoct.distill.teachers import Teachers
from kdoct.models.backbones import create_classifier
from kdoct.models.feature_maps import MapRecorder, layer_of
from kdoct.training.inference import InferenceModel
from kdoct.training.loop import make_learner
from kdoct.training.losses import cross_entropy

OPTIONS = {'mean_teacher': {}, 'crckd': dict(start=0), 'ssd_kd': dict(head_epochs=2, views=2)}
every_method = pytest.mark.parametrize('name', OPTIONS)
N, N_TRAIN, SIDE = 24, 18, 48


def recipe(**changes):
    return preset('tiny').student.model_copy(update={'epochs': 2, 'precision': 'fp32', **changes})


def network(arch='test_efficientnet', n_classes=3, seed=0):
    torch.manual_seed(seed)
    return create_classifier(recipe(arch=arch), n_classes, SIDE)


def pictures(n_classes=3, batch_size=6):
    "Training and validation batches of random images."
    images = np.random.default_rng(0).integers(0, 255, (N, SIDE, SIDE), dtype=np.uint8)
    labels, ids = np.arange(N) % n_classes, np.arange(N, dtype=np.uint64)
    every = np.arange(N)
    return (
        Batches(images, labels, ids, every[:N_TRAIN], batch_size, AugmentRecipe(), seed=1),
        Batches(images, labels, ids, every[N_TRAIN:], batch_size),
    )


def learner(folder, name, teachers=None, cbs=(), n_classes=3, options=None, **changes):
    teachers = teachers or {'teacher': network('test_resnet', n_classes, seed=1).eval()}
    how = DistillRecipe(method=name, options=OPTIONS[name] if options is None else options)
    copies = {role: InferenceModel(teacher) for role, teacher in teachers.items()}
    distill = Distill(copies, how, originals=teachers.__getitem__)
    student = network(n_classes=n_classes, seed=2)
    train, valid = pictures(n_classes)
    return make_learner(
        student, train, valid, cross_entropy, recipe(**changes), folder, cbs=[distill, *cbs]
    )


def fit(learn):
    with learn.no_bar(), learn.no_logging(): learn.fit(learn.checkpoint.recipe.epochs)
    return learn


def state_of(learn):
    "The network as training left it (not the best epoch's weights), and what the method learned."
    return {**learn.at_end, **learn.distill.companion.state_dict()}


class Stop(Exception): "As if the process had ended."


class Ends(Callback):
    "Keeps the weights of the last step; ends the second epoch after its first batch, if it is to."
    order, run_valid = 99, False
    def __init__(self, early=False): self.early = early
    def after_batch(self):
        self.learn.at_end = {f'net.{k}': v.clone() for k, v in self.model.state_dict().items()}
        if self.early and (self.epoch, self.iter) == (1, 0): raise Stop('now')


# --- in training

@every_method
def test_a_training_that_was_cut_off_ends_with_the_weights_and_the_memory_of_the_uncut_one(
    tmp_path, name
):
    whole = state_of(fit(learner(tmp_path/'a', name, cbs=[Ends()])))
    with pytest.raises(Stop):
        fit(learner(tmp_path/'b', name, cbs=[Ends(early=True)], checkpoint_minutes=1e-9))
    resumed = fit(learner(tmp_path/'b', name, cbs=[Ends()], checkpoint_minutes=1e-9))
    assert resumed.first_epoch == 1   # it did go on
    got = state_of(resumed)
    assert got.keys() == whole.keys() and len(whole) > len(resumed.at_end)
    assert [k for k, v in whole.items() if not torch.equal(v, got[k])] == []


@every_method
def test_teachers_stay_as_they_are(tmp_path, name):
    teacher = network('test_resnet', seed=1).eval()
    learn = learner(tmp_path, name, {'teacher': teacher})
    queried = learn.distill.teachers['teacher']
    before = copy.deepcopy(queried.state_dict())
    fit(learn)
    assert all(torch.equal(v, before[k]) for k, v in queried.state_dict().items())
    assert all(p.grad is None for p in queried.parameters())
    mean = getattr(learn.distill.companion, 'mean_teacher', None)
    assert mean is None or all(p.grad is None for p in mean.parameters())


@every_method
def test_two_classes_and_two_teachers_train(tmp_path, name):
    two = {f'teacher-{i}': network('test_resnet', 2, seed=i).eval() for i in (3, 4)}
    row = fit(learner(tmp_path, name, two, n_classes=2, epochs=1)).history.rows[-1]
    assert np.isfinite([v for k, v in row.items() if k.startswith('train_')]).all()


@every_method
def test_what_is_learned_beside_the_student_is_no_part_of_it(tmp_path, name):
    learn = fit(learner(tmp_path, name, epochs=1))
    assert learn.model.state_dict().keys() == network().state_dict().keys()
    beside = {id(p) for p in learn.distill.companion.parameters()}
    assert not beside & {id(p) for p in learn.model.parameters()}


def test_the_mean_teacher_queries_no_other(tmp_path):
    class Silent(InferenceModel):
        def forward(self, x): raise AssertionError('queried')
    learn = learner(tmp_path, 'mean_teacher', epochs=1)
    learn.distill.teachers['teacher'] = Silent(network('test_resnet').eval())
    assert fit(learn).history.rows[-1]['train_soft'] > 0


def test_the_mean_teacher_follows_the_student(tmp_path):
    learn = fit(learner(tmp_path, 'mean_teacher', options=dict(decay=0), cbs=[Ends()]))
    mean = learn.distill.companion.mean_teacher
    assert int(mean.steps) == 6   # two epochs of three batches
    followed = {f'net.{k}': v for k, v in mean.network.state_dict().items()}
    for k, v in followed.items(): torch.testing.assert_close(v, learn.at_end[k])


@pytest.mark.parametrize('accumulate', [1, 2])
def test_each_image_is_remembered_once_an_epoch(tmp_path, monkeypatch, accumulate):
    seen, update = [], MemoryBank.update
    def note(bank, places, embeddings):
        seen.extend(places.tolist())
        update(bank, places, embeddings)
    monkeypatch.setattr(MemoryBank, 'update', note)
    fit(learner(tmp_path, 'crckd', epochs=1, accumulate=accumulate))
    # in the bank of the student, and in the teacher's
    assert sorted(seen) == sorted(2*list(range(N_TRAIN)))


def test_remembered_embeddings_of_a_trained_teacher_may_come_from_a_cache(tmp_path, outputs):
    teacher = network('test_resnet', seed=1).eval()
    options = dict(start=0, contrast_with='trained')
    cache = TeacherCache(InferenceModel(teacher), 'teacher', 8, 'teacher')
    how = DistillRecipe(method='crckd', options=options, views=1)
    distill = Distill({'teacher': cache}, how, originals=lambda name: teacher)
    train, valid = pictures()
    learn = make_learner(
        network(), train, valid, cross_entropy, recipe(epochs=1), tmp_path, cbs=[distill]
    )
    row = fit(learn).history.rows[-1]
    assert row['train_contrast'] > 0 and row['train_relations'] > 0


@every_method
def test_unlabelled_images_are_learned_from_and_not_remembered(tmp_path, name):
    teacher = network('test_resnet', seed=1).eval()
    train, valid = pictures()
    train.rows = np.arange(12)
    rows = np.arange(12, N_TRAIN)
    how = DistillRecipe(method=name, options=OPTIONS[name])
    distill = Distill(
        InferenceModel(teacher), how, originals=lambda name: teacher,
        unlabelled=lambda batches: UnlabelledBatches(batches, rows, batches.ids[rows]),
    )
    learn = make_learner(
        network(), train, valid, cross_entropy, recipe(epochs=1), tmp_path, cbs=[distill]
    )
    row = fit(learn).history.rows[-1]
    assert row['train_soft'] > 0 and distill.unlabelled is not None
    if name == 'crckd': assert len(learn.distill.companion.memories['mean'].labels) == 12


def test_relations_and_mean_teacher_wait_for_their_epoch(tmp_path):
    rows = fit(learner(tmp_path, 'crckd', options=dict(start=.5))).history.rows
    for term in ('relations', 'consistency'):
        assert rows[0][f'train_{term}'] == 0 < rows[1][f'train_{term}']
    assert rows[0]['train_contrast'] > 0


def test_the_head_on_a_teacher_is_trained_once_and_then_frozen(tmp_path, monkeypatch):
    fitted, fit_view_head = [], R.fit_view_head
    def note(head, *args):
        share = fit_view_head(head, *args)
        fitted.append({k: v.clone() for k, v in head.state_dict().items()})
        return share
    monkeypatch.setattr(R, 'fit_view_head', note)
    learn = fit(learner(tmp_path, 'ssd_kd'))
    (once,) = fitted
    after = learn.distill.companion.teacher_heads['teacher'].state_dict()
    assert all(torch.equal(v, after[k]) for k, v in once.items())


WITH_A_MEAN_TEACHER = """
from kdoct.core.sections import DistillRecipe
from kdoct.distill.callback import Distill
from kdoct.training.inference import InferenceModel

plain_learner = make_learner
def make_learner(net, *args):
    *args, cbs = args
    recipe = DistillRecipe(method='mean_teacher', options=dict(ramp=0))
    return plain_learner(net, *args, [Distill(InferenceModel(net), recipe), *cbs])

if os.fork() == 0: train('a', 2, 2, accumulate=4); os._exit(0)
os.wait(); train('b', 1, 8)
"""


@pytest.mark.slow
def test_two_processes_have_the_mean_teacher_of_one(tmp_path):
    run(WITH_A_MEAN_TEACHER, tmp_path)
    a, other, b = (
        pd.read_csv(tmp_path/f) for f in ('a/history0.csv', 'a/history1.csv', 'b/history0.csv')
    )
    pd.testing.assert_frame_equal(a, other, check_exact=True)
    pd.testing.assert_frame_equal(a, b, check_exact=False, rtol=1e-3, atol=1e-3)
    states = [load_file(tmp_path/f/'state.safetensors') for f in 'ab']
    beside = [k for k in states[0] if k.startswith('companion.distill.mean_teacher')]
    assert beside
    for k in beside: torch.testing.assert_close(*(s[k] for s in states), rtol=1e-2, atol=1e-3)


# --- of one batch

def setting_of(train, n_classes=3):
    "Student, teacher, what a method knows of them, and functions that run them."
    student, teacher = network(n_classes=n_classes), network('test_resnet', n_classes).eval()
    layers = [layer_of(copy.deepcopy(m.body).eval(), SIDE) for m in (student, teacher)]
    recorders = [
        MapRecorder(m.body, [layer]) for m, layer in zip((student, teacher), layers, strict=True)
    ]
    setting = Setting(
        student, {'teacher': [LayerPair(*layers)]}, n_classes, train.labels, train.rows, batches=train
    )
    def run_student(x): return {'teacher': output_of(student(x), recorders[0].take())}
    @torch.no_grad()
    def query(x): return {'teacher': output_of(teacher(x), recorders[1].take())}
    return setting, run_student, query


def terms_of(name, rows, epoch=3, training=True):
    "Loss, terms, method and student of a batch; without `training` nothing is dropped at random."
    train, _ = pictures()
    torch.manual_seed(0)
    setting, run_student, query = setting_of(train)
    method = make_method(DistillRecipe(method=name, options=OPTIONS[name]))
    method.setup(setting)
    setting.student.train(training)
    images, targets = train.batch(np.array(rows), epoch)
    student, teachers = run_student(images), query(images)
    logits = student['teacher'].logits
    step = Step(
        images, targets, F.cross_entropy(logits, targets), student, teachers,
        teachers['teacher'].logits, np.array(rows), epoch, 9, 8, run_student, query, cross_entropy,
    )
    loss, terms = method.terms(step)
    return loss, terms, method, setting.student


@every_method
def test_the_order_of_the_batch_does_not_matter(name):
    loss, terms, *_ = terms_of(name, [1, 4, 6, 9, 17], training=False)
    again, others, *_ = terms_of(name, [9, 1, 17, 6, 4], training=False)
    torch.testing.assert_close(loss, again, rtol=1e-4, atol=1e-5)
    for k, v in terms.items(): torch.testing.assert_close(v, others[k], rtol=1e-3, atol=1e-5)


@every_method
def test_the_student_and_all_that_learns_get_a_gradient(name):
    loss, _, method, student = terms_of(name, [1, 4, 6, 9, 17])
    loss.backward()
    learning = [*student.named_parameters()]
    learning += [(k, p) for k, p in method.named_parameters() if p.requires_grad]
    assert [k for k, p in learning if p.grad is None or not p.grad.isfinite().all()] == []


def test_further_views_leave_the_statistics_of_the_student_alone():
    *_, student = terms_of('mean_teacher', [1, 4, 6, 9, 17])
    *_, with_views = terms_of('ssd_kd', [1, 4, 6, 9, 17])
    assert with_views.state_dict()['body.bn1.running_mean'].any()
    for k, v in student.state_dict().items():
        if 'running' in k: assert torch.equal(v, with_views.state_dict()[k])


# --- what is refused before training

@pytest.mark.parametrize('name,distill,training,processes,says', [
    ('mean_teacher', dict(views=2), {}, 1, 'no cache is used'),
    ('mean_teacher', {}, dict(mix_prob=.5), 1, 'further views'),
    ('crckd', {}, dict(mix_prob=.5), 1, 'blended'),
    ('crckd', {}, {}, 2, 'remembers each image'),
    ('crckd', {}, dict(compile=True), 1, 'torch.compile'),
    ('ssd_kd', dict(views=2), {}, 1, 'teacher cache'),
    ('ssd_kd', {}, dict(mix_prob=.5), 1, 'blended'),
    ('ssd_kd', {}, dict(accumulate=2), 1, 'several batches'),
    ('ssd_kd', {}, {}, 2, 'several processes'),
    ('ssd_kd', {}, dict(compile=True), 1, 'torch.compile'),
])
def test_what_a_method_cannot_do_is_said_before_training(name, distill, training, processes, says):
    with pytest.raises(KdoctError, match=says):
        check_method(
            DistillRecipe(method=name, **distill), TrainRecipe(**training), 3, processes
        )


@pytest.mark.parametrize('name,distill,training,processes', [
    ('mean_teacher', {}, dict(accumulate=2), 2),
    ('crckd', dict(views=2), dict(accumulate=2), 1),
    ('ssd_kd', {}, {}, 1),
])
def test_what_a_method_can_do_is_allowed(name, distill, training, processes):
    check_method(DistillRecipe(method=name, **distill), TrainRecipe(**training), 2, processes)


@every_method
def test_a_learner_of_ones_own_is_told_that_there_are_no_further_views(name):
    method = make_method(DistillRecipe(method=name))
    pair = {'teacher': [LayerPair(None, None)]}
    with pytest.raises(KdoctError, match='further views of the training images'):
        method.setup(Setting(network(), pair, 3, np.zeros(0, int), np.zeros(0, int)))


def test_in_a_loop_of_ones_own_the_mean_teacher_is_refused():
    teachers = Teachers(network('test_resnet').eval(), DistillRecipe(method='mean_teacher'))
    x, y = torch.rand(4, 1, SIDE, SIDE), torch.tensor([0, 1, 2, 0])
    with pytest.raises(KdoctError, match='more than the logits'):
        teachers.loss(torch.tensor(1.), torch.zeros(4, 3), x, y)


def test_a_batch_of_two_images_is_too_small_for_angles():
    with pytest.raises(KdoctError, match='compares 3 images'): terms_of('ssd_kd', [1, 4])
