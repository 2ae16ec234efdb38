"Schemes of training: choice among the images, two stages, pseudo-labels, co-distillation."
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import copied_run
from fastai.callback.core import Callback
from trainings import fit
from typer.testing import CliRunner

from kdoct.app.cli import app
from kdoct.core.files import KdoctError, read_json
from kdoct.core.presets import preset
from kdoct.core.runs import Run
from kdoct.core.sections import AugmentRecipe, DistillRecipe, TrainRecipe
from kdoct.data.batches import Batches
from kdoct.deploy.stage import export_fold
from kdoct.distill.callback import Distill
from kdoct.distill.methods import check_method
from kdoct.distill.scheme_methods import loss_of_each, pseudo_labels
from kdoct.distill.student import train_student
from kdoct.evaluate.compared_runs import read_models
from kdoct.evaluate.comparison import compare_models
from kdoct.evaluate.pooling import finished_models
from kdoct.models.backbones import create_classifier
from kdoct.models.folders import load_model_folder
from kdoct.training.inference import InferenceModel
from kdoct.training.loop import make_learner, param_groups
from kdoct.training.losses import cross_entropy, focal, hard_loss

LABELS = np.arange(24) % 3
SMALL = preset('tiny').student.model_copy(
    update=dict(epochs=2, lr=1e-3, warmup=0., precision='fp32', augment=AugmentRecipe())
)


def network(arch='test_resnet', seed=0):
    torch.manual_seed(seed)
    return create_classifier(SMALL.model_copy(update=dict(arch=arch)), 3, 64)


class Drawn:
    "Four images without a label beside each batch, which depend on its place alone."
    source = SimpleNamespace(rows=range(4))
    def __init__(self, train): self.train = train

    def batch(self, number):
        made = torch.Generator().manual_seed(100*self.train.epoch + number)
        return torch.rand(4, 1, 64, 64, generator=made), np.arange(4)

    def both(self, number):
        images, rows = self.batch(number)
        return images, images, rows


@pytest.fixture(scope='module')
def teacher(): return network().eval().requires_grad_(False)


def learner(folder, teacher, method, unlabelled=None, training=SMALL, **options):
    images = np.random.default_rng(0).integers(0, 255, (24, 64, 64), dtype=np.uint8)
    images[:, :8] = (LABELS*100)[:, None, None]   # what the classes differ in
    ids, recipe = np.arange(24, dtype=np.uint64), DistillRecipe(method=method, options=options)
    student = network('test_efficientnet', 1)
    distill = Distill({'teacher': InferenceModel(teacher)}, recipe, originals=lambda name: teacher,
                   beginnings=lambda name: network(seed=2), unlabelled=unlabelled)
    loss = hard_loss(training, LABELS[:16], 3)
    train = Batches(images, LABELS, ids, np.arange(16), 8, training.augment, 1)
    valid = Batches(images, LABELS, ids, np.arange(16, 24), 8)
    torch.manual_seed(7)
    return make_learner(student, train, valid, loss, training, folder, cbs=[distill])


class Stop(Exception): "Training was killed."


def stop_at(learn, monkeypatch, place):
    "Raise after the state of a place (epoch, batch) has been saved."
    saving = learn.checkpoint.save
    def save(epoch, batch):
        saving(epoch, batch)
        if (epoch, batch) == place: raise Stop('in the middle of an epoch')
    monkeypatch.setattr(learn.checkpoint, 'save', save)
    with pytest.raises(Stop): fit(learn)


ALL = {
    'acid': ('acid', None, {}),
    'acid, drawn': ('acid', None, dict(by='draw', keep=.75)),
    'efcm': ('efcm', Drawn, {}),
    'efcm, soft': ('efcm', None, dict(soft=True, loss='direction')),
    'self_training': ('self_training', Drawn, dict(threshold=.3, ramp=0)),
    'ctcd': ('ctcd', Drawn, {}),
    'ctcd, fresh': ('ctcd', None, dict(start='fresh', rate=1.)),
}


@pytest.mark.parametrize('case', ALL)
def test_a_resumed_training_ends_with_the_same_weights_and_state(
    tmp_path, teacher, monkeypatch, case
):
    method, unlabelled, options = ALL[case]
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    whole = fit(learner(tmp_path/'whole', teacher, method, unlabelled, **options))
    often = SMALL.model_copy(update=dict(checkpoint_minutes=1e-9))
    stopped = learner(tmp_path/'stopped', teacher, method, unlabelled, often, **options)
    stop_at(stopped, monkeypatch, (1, 1))
    again = fit(learner(tmp_path/'stopped', teacher, method, unlabelled, **options))
    mine, other = whole.trained.state_dict(), again.trained.state_dict()
    assert mine.keys() == other.keys() and all(torch.equal(mine[k], other[k]) for k in mine)
    assert whole.history.rows[-1]['train_loss'] == again.history.rows[-1]['train_loss']
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize('method', ['efcm', 'self_training', 'ctcd'])
def test_images_may_be_blended_whatever_the_hard_loss(tmp_path, teacher, method):
    training = SMALL.model_copy(update=dict(mix_prob=1., loss='auc'))
    learn = fit(learner(tmp_path, teacher, method, Drawn, training))
    assert all(np.isfinite(row['train_loss']) for row in learn.history.rows)


# --- the choice among the images

@pytest.mark.parametrize('loss', [cross_entropy, 'focal', 'auc'], ids=['ce', 'weighted focal', 'auc'])
def test_the_loss_of_each_image_is_that_of_a_batch_of_it_alone(loss):
    if loss == 'focal': loss = lambda z, y: focal(z, y, torch.tensor([.5, 1, 2]), smoothing=.1)
    if loss == 'auc': loss = hard_loss(TrainRecipe(loss='auc'), LABELS, 3)
    torch.manual_seed(0)
    z, y = torch.randn(5, 3), torch.tensor([0, 1, 2, 2, 1])
    alone = [loss(z[i:i + 1], y[i:i + 1]).item() for i in range(5)]
    assert loss_of_each(loss, z, y).tolist() == pytest.approx(alone, abs=1e-6)


def test_images_may_not_be_blended_where_the_method_looks_at_their_labels():
    with pytest.raises(KdoctError, match='looks at the label'):
        check_method(DistillRecipe(method='acid'), TrainRecipe(mix_prob=.5))


# --- two stages

def test_the_best_epoch_is_one_of_the_second_stage(tmp_path, teacher, monkeypatch):
    scores = iter([.1, .2, .9, .5, .7])   # losses: the first two epochs know no label
    monkeypatch.setattr(
        'kdoct.training.loop.validation_scores',
        lambda *_: dict(valid_loss=next(scores), accuracy=0., balanced_accuracy=0.),
    )
    # patience counts from the second stage on: it would end the training in the first
    training = SMALL.model_copy(update=dict(epochs=5, patience=2))
    learn = fit(learner(tmp_path, teacher, 'efcm', training=training, feature_epochs=.4))
    assert learn.checkpoint.best_epoch == 3 and len(learn.history.rows) == 5


def test_the_first_stage_sees_no_label_and_the_second_queries_no_teacher(tmp_path, teacher):
    learn = learner(tmp_path, teacher, 'efcm', training=SMALL.model_copy(update=dict(weight_decay=0.)))
    head, queried = learn.model.body.get_classifier().weight, []
    first, plain = head.detach().clone(), learn.distill.teacher_output
    after = {}
    class Look(Callback):
        "Keeps the classifier's weights of each epoch."
        order = 60
        def after_epoch(self): after[self.epoch] = head.detach().clone()
    learn.distill.teacher_output = lambda *args: queried.append(learn.epoch) or plain(*args)
    fit(learn.add_cb(Look()))
    assert torch.equal(after[0], first) and not torch.equal(after[1], first)
    assert set(queried) == {0}
    assert 'train_features' in learn.history.rows[0] and 'train_features' not in learn.history.rows[1]


def test_the_first_stage_takes_unlabelled_images_and_the_second_does_not(tmp_path, teacher):
    seen = []
    class Noted(Drawn):
        def batch(self, number):
            seen.append(self.train.epoch)
            return super().batch(number)
    learn = fit(learner(tmp_path/'noted', teacher, 'efcm', Noted))
    assert seen == [0, 0]
    alone = fit(learner(tmp_path/'alone', teacher, 'efcm'))
    assert learn.history.rows[0]['train_features'] != alone.history.rows[0]['train_features']


def test_one_epoch_has_no_two_stages(tmp_path, teacher):
    training = SMALL.model_copy(update=dict(epochs=1))
    with pytest.raises(KdoctError, match='two stages'):
        fit(learner(tmp_path, teacher, 'efcm', training=training))


# --- pseudo-labels

def test_a_pseudo_label_counts_by_tempered_confidence_and_only_above_the_threshold():
    logits = torch.tensor([[6., 0, 0], [0, 1, 0]])
    sure = (logits/2).softmax(1).amax(1).tolist()
    found = pseudo_labels(logits, 2., .7)
    assert found[0].tolist() == pytest.approx([sure[0], 0, 0]) and not found[1].any()
    assert pseudo_labels(logits, 2., .3)[1].tolist() == pytest.approx([0, sure[1], 0])


def test_the_record_says_which_share_of_the_pseudo_labels_passed(tmp_path, teacher):
    shares = [
        fit(learner(tmp_path/str(t), teacher, 'self_training', Drawn, threshold=t))
        .history.rows[-1]['train_passed'] for t in (0., 1.)
    ]
    assert shares == [1, 0]


def test_pseudo_labels_need_images_without_a_label(tmp_path, teacher):
    with pytest.raises(KdoctError, match='there are none'):
        learner(tmp_path, teacher, 'self_training')


# --- both learn

def test_both_learn_at_their_rates_and_the_run_s_teacher_stays(tmp_path, teacher):
    learn = fit(learner(tmp_path, teacher, 'ctcd', rate=.25))
    peer = learn.distill.companion.networks()['teacher']
    changed = [not torch.equal(a, b) for a, b in
               zip(peer.state_dict().values(), teacher.state_dict().values(), strict=True)]
    assert all(changed)   # BatchNorm's statistics too
    groups = [g for g in learn.opt.opt.param_groups if g.get('companion') == 'distill']
    assert [g['peak'] for g in groups] == [.25*g['peak'] for g in param_groups(peer, SMALL)]
    assert {'train_peer_hard', 'train_peer_soft'} <= learn.history.rows[0].keys()


def test_a_peer_that_begins_afresh_is_not_the_trained_teacher(tmp_path, teacher):
    learn = learner(tmp_path, teacher, 'ctcd', start='fresh')
    peer = learn.distill.companion.networks()['teacher']
    assert torch.equal(peer.body.get_classifier().weight, network(seed=2).body.get_classifier().weight)


def test_teachers_are_not_queried_while_they_learn_and_no_cache_is_used(tmp_path, teacher):
    learn = learner(tmp_path, teacher, 'ctcd')
    def never(*_): raise AssertionError('queried')
    learn.distill.teacher_output = never
    fit(learn)
    with pytest.raises(KdoctError, match='no cache is used'):
        check_method(DistillRecipe(method='ctcd', views=2), SMALL)


def test_with_a_loss_that_learns_the_peer_has_one_of_its_own(tmp_path, teacher):
    training = SMALL.model_copy(update=dict(loss='auc'))
    learn = fit(learner(tmp_path, teacher, 'ctcd', training=training))
    own = learn.distill.companion.losses['teacher']
    assert not torch.equal(own.alpha, learn.loss_func.alpha)


@pytest.fixture(scope='module')
def distilled(trained_outputs, tmp_path_factory):
    "A run with a student that has learned together with its teacher."
    outputs = tmp_path_factory.mktemp('outputs')
    run = copied_run(trained_outputs, outputs)
    recipe = run.recipe.override(**{'students.both.distill.method': 'ctcd'})
    with pytest.MonkeyPatch.context() as env:
        env.setenv('KDOCT_OUTPUTS', str(outputs))
        run = Run(run.path, recipe)
        train_student(run, 0, 'student-both')
    return run


def test_the_peer_is_a_model_folder_beside_the_student_s(distilled):
    folder = distilled.stage_dir(0, 'student-both')
    model, about = load_model_folder(folder/'peer-teacher')
    student, first = read_json(folder/'model.json'), read_json(distilled.stage_dir(0, 'teacher')/'model.json')
    assert about['arch'] == first['arch'] and about['classes'] == student['classes']
    assert about['weights_sha256'] != first['weights_sha256']
    assert about['weights_from']['weights_sha256'] == first['weights_sha256']
    assert about['folds_sha256'] == student['folds_sha256']
    noted = student['metrics']['peers']['teacher']
    assert noted['folder'] == 'peer-teacher' and 0 <= noted['accuracy'] <= 1
    rows = [pd.read_parquet(p/'predictions.parquet') for p in (folder, folder/'peer-teacher')]
    assert list(rows[0].path) == list(rows[1].path) and list(rows[0].columns) == list(rows[1].columns)


def test_the_peer_is_a_row_of_every_table_and_is_compared(distilled):
    peer = 'student-both/peer-teacher'
    models, notes = read_models([distilled])
    assert list(models) == ['student-both', peer, 'teacher', 'baseline']
    assert notes == [f"student of run '{distilled.name}' is not trained in fold 0 and is left out"]
    about = read_json(distilled.stage_dir(0, peer)/'model.json')
    assert models[peer].mean('parameters') == about['parameters']
    made = compare_models(models, n_boot=200).differences
    assert ((made.a == peer) & (made.b == 'baseline')).any()
    assert list(read_models([distilled], roles=[peer])[0]) == [peer, 'baseline']
    assert peer in finished_models(distilled, 0)


def test_a_peer_is_exported_by_its_folder(distilled):
    with pytest.raises(KdoctError, match='learned beside a student') as e:
        export_fold(distilled, 0, 'student-both/peer-teacher')
    assert 'peer-teacher --images DIR' in e.value.fix


@pytest.mark.slow
def test_the_peer_predicts_and_is_exported(distilled, tmp_path):
    pytest.importorskip('onnx', reason='the extra deploy is not installed')
    folder, images = distilled.stage_dir(0, 'student-both')/'peer-teacher', tmp_path/'images'
    images.mkdir()
    for i, picture in enumerate(sorted(distilled.path.parent.rglob('*.png'))[:8]):
        shutil.copy(picture, images/f'{i}.png')
    def command(*arguments):
        done = CliRunner().invoke(app, list(map(str, arguments)))
        assert done.exit_code == 0, done.output
    command('predict', folder, images, '--out', tmp_path/'rows.csv')
    assert len(pd.read_csv(tmp_path/'rows.csv')) == 8
    command('export', folder, '--images', images, '--formats', 'onnx', '--out', tmp_path/'bundle')
    assert read_json(tmp_path/'bundle'/'bundle.json')['arch'] == distilled.recipe.teacher.arch
