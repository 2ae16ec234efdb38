"A network of one's own as the teacher: in a run, in one's own fastai Learner, and in a plain loop."
import copy
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.mixup import MixUp
from fastai.callback.training import GradientAccumulation
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.transforms import Normalize, RandomSplitter, get_image_files, parent_label
from fastai.learner import Learner, load_learner
from fastai.losses import CrossEntropyLossFlat
from fastai.vision.all import ImageBlock, ImageDataLoaders, PILImageBW, Resize
from PIL import Image
from torch import nn
from torch.nn.functional import cross_entropy

from kdoct.app.cli import main
from kdoct.app.report import report_html
from kdoct.core.files import KdoctError, outputs_root, read_json
from kdoct.core.overrides import own_teachers
from kdoct.core.presets import preset
from kdoct.core.requirements import require_weights
from kdoct.core.runs import create_run
from kdoct.core.sections import DistillRecipe
from kdoct.data.batches import Batches
from kdoct.data.fold_data import open_fold
from kdoct.data.stage import prepare_data
from kdoct.distill.callback import Distill
from kdoct.distill.loading import load_teachers
from kdoct.distill.student import train_baseline, train_student
from kdoct.distill.teacher import train_teacher
from kdoct.distill.teachers import Teachers, plain_tensor
from kdoct.evaluate.decide import decide_fold
from kdoct.evaluate.metrics import logits_of
from kdoct.evaluate.protocol import origins_of_teachers
from kdoct.evaluate.stage import evaluate_fold
from kdoct.models.backbones import Classifier, create_classifier
from kdoct.models.folders import import_model_folder, load_model_folder, save_model_folder
from kdoct.models.trained_on import seen_images
from kdoct.training.losses import combine, soft_loss

STATS = (.4, .3, .2), (.2, .3, .4)


@pytest.fixture
def images(tmp_path):
    for i in range(24):
        (folder := tmp_path/'images'/('CNV', 'NORMAL')[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (40, 48), dtype=np.uint8)).save(
            folder / f'{i}.png'
        )
    return tmp_path/'images'


@pytest.fixture
def folder(tmp_path): return model_folder(tmp_path/'teacher', ['NORMAL', 'CNV'])


def model_folder(path, classes, arch='test_efficientnet', size=48, mean=(.5, .5, .5)):
    torch.manual_seed(7)
    recipe = preset('tiny', **{'teacher.arch': arch, 'teacher.weights': 'none'})
    net = create_classifier(recipe.teacher, len(classes), size)
    net.mean.copy_(torch.tensor(mean).view(1, 3, 1, 1))
    save_model_folder(path, net, 'teacher', recipe, classes)
    return path


def loaders(images, **how):
    how = dict(batch_tfms=Normalize.from_stats(*STATS, cuda=False)) | how
    return ImageDataLoaders.from_folder(
        images,
        valid_pct=0.3,
        seed=1,
        bs=4,
        item_tfms=Resize(32),
        num_workers=0,
        device='cpu',
        **how,
    )


def student(classes=2, channels=3):
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(channels, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, classes),
    )


def fit(learn, epochs=1):
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, 1e-2)
    return learn


class Note(Callback):
    "Keeps each training batch, its answers and its loss."
    order, run_valid = 6, False
    def __init__(self): self.seen = []
    def after_loss(self):
        self.seen.append(
            [
                torch.Tensor(v).detach().clone()
                for v in (self.xb[0], self.yb[0], self.pred, self.loss_grad)
            ]
        )


def learner(dls, teacher, loss=None, cbs=(), recipe=None, **how):
    return Learner(
        dls,
        student(),
        loss_func=loss or nn.CrossEntropyLoss(),
        cbs=[Distill(teacher, recipe, **how), *cbs],
    )


def test_the_loss_in_a_users_learner_is_that_of_the_paper(images, folder):
    recipe, note = DistillRecipe(alpha=.6, beta=.2, temperature=2.), Note()
    fit(learner(loaders(images), folder, nn.CrossEntropyLoss(label_smoothing=.1), [note], recipe))
    net, _ = load_model_folder(folder)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in STATS)
    assert len(note.seen) == 4
    for x, y, pred, loss in note.seen:
        # the folders' order is CNV, NORMAL; by its own statistics, at its own size
        teacher_logits = net(x*std + mean).detach()[:, [1, 0]]
        hard = cross_entropy(pred, y.long(), label_smoothing=.1)
        want = .2*hard + .6*soft_loss(pred, teacher_logits, 2.)
        assert loss.item() == pytest.approx(want.item(), rel=1e-4)


def test_any_network_teaches_and_is_given_what_the_student_is_given(images):
    large, note = student().train(), Note()
    nn.init.normal_(large[-1].weight)
    before = copy.deepcopy(large.state_dict())
    learn = fit(learner(loaders(images), large, cbs=[note]))
    for x, y, pred, loss in note.seen:
        want = .3*cross_entropy(pred, y.long()) + .7*soft_loss(pred, large(x).detach(), 4.)
        assert loss.item() == pytest.approx(want.item(), rel=1e-4)
    assert all(torch.equal(v, large.state_dict()[k]) for k, v in before.items())   # BatchNorm's statistics too
    assert not any(m.training for m in large.modules()) and all(
        p.grad is None for p in large.parameters()
    )
    assert not any(p is q for p in large.parameters() for q in learn.opt.all_params().itemgot(0))


def test_validation_measures_the_hard_loss_alone(images, folder):
    learn = fit(learner(loaders(images), folder))
    logits, y = learn.get_preds(act=lambda z: z)
    assert learn.validate()[0] == pytest.approx(
        cross_entropy(torch.Tensor(logits), torch.Tensor(y).long()).item(), rel=1e-4
    )


def test_the_rate_finder_one_cycle_and_fine_tuning_work(images, folder):
    learn = learner(loaders(images), folder)
    with learn.no_bar(), learn.no_logging():
        start = copy.deepcopy(learn.model.state_dict())
        learn.lr_find(num_it=12, show_plot=False)
        assert all(torch.equal(v, learn.model.state_dict()[k]) for k, v in start.items())
        learn.fit_one_cycle(1, 1e-2)
        learn.fine_tune(1)


def test_neither_saved_weights_nor_an_exported_learner_hold_the_teacher(images, folder, tmp_path):
    learn = fit(learner(loaders(images), folder, CrossEntropyLossFlat()))
    learn.save(tmp_path/'weights')
    learn.export(tmp_path/'learner.pkl')
    teacher = (folder/'model.safetensors').stat().st_size
    assert (tmp_path / 'weights.pth').stat().st_size < teacher / 4 and (
        tmp_path / 'learner.pkl'
    ).stat().st_size < teacher / 4
    again = load_learner(tmp_path/'learner.pkl')
    with again.no_bar():
        assert again.predict(next((tmp_path/'images').rglob('*.png')))[0] in ('CNV', 'NORMAL')
    again.dls = loaders(images)
    with pytest.raises(KdoctError, match='exported Learner has no teachers'): fit(again)
    again.remove_cb(again.distill)
    fit(again)


def test_batches_without_a_normalisation_go_to_the_teacher_as_they_are(images, folder):
    note = Note()
    fit(learner(loaders(images, batch_tfms=None), folder, cbs=[note]))
    net, _ = load_model_folder(folder)
    x, y, pred, loss = note.seen[0]
    assert loss.item() == pytest.approx(
        (
            0.3 * cross_entropy(pred, y.long())
            + 0.7 * soft_loss(pred, net(x).detach()[:, [1, 0]], 4.0)
        ).item(),
        rel=1e-4,
    )


def test_a_normalisation_that_nobody_told_of_is_refused_and_may_be_told(images, folder):
    class Own(Callback):
        order = -5
        def before_batch(self): self.learn.xb = (self.xb[0]*6 - 3,)
    note = Note()
    with pytest.raises(KdoctError, match=r'pictures in \[0, 1\]') as e:
        fit(learner(loaders(images, batch_tfms=None), folder, cbs=[Own()]))
    assert 'normalised=(mean, std)' in e.value.fix
    fit(
        learner(
            loaders(images, batch_tfms=None),
            folder,
            cbs=[Own(), note],
            normalised=([0.5] * 3, [1 / 6] * 3),
        )
    )
    x, y, pred, loss = note.seen[0]
    teacher_logits = load_model_folder(folder)[0]((x + 3)/6).detach()[:, [1, 0]]
    want = .3*cross_entropy(pred, y.long()) + .7*soft_loss(pred, teacher_logits, 4.)
    assert loss.item() == pytest.approx(want.item(), rel=1e-4)


def test_a_network_that_says_another_normalisation_is_refused_until_it_normalises_for_itself(
    images,
):
    net = timm.create_model('test_efficientnet', num_classes=2)   # ImageNet's statistics, says timm
    with pytest.raises(
        KdoctError, match=r'normalised by \[0.485, 0.456, 0.406\].*batches are by \[0.4, 0.3, 0.2\]'
    ) as e:
        fit(learner(loaders(images), net))
    assert 'Classifier(' in e.value.fix
    fit(
        learner(
            loaders(images),
            Classifier(net, 32, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 'bilinear'),
        )
    )


def test_other_classes_are_refused_by_name(images, tmp_path):
    with pytest.raises(KdoctError, match='has the classes CNV, DME; here they are CNV, NORMAL'):
        fit(learner(loaders(images), model_folder(tmp_path/'a', ['CNV', 'DME'])))
    with pytest.raises(KdoctError, match='has the classes Cnv, Normal') as e:
        fit(learner(loaders(images), model_folder(tmp_path/'b', ['Cnv', 'Normal'])))
    assert 'spelling' in e.value.fix
    with pytest.raises(KdoctError, match=r'student gives \(4, 2\) logits, the teachers \(4, 3\)'):
        fit(learner(loaders(images), student(3)))


def test_what_cannot_teach_is_refused(images, folder):
    learn = learner(loaders(images), folder)
    learn.remove_cb(learn.distill)
    with pytest.raises(KdoctError, match='student itself'): fit(learn.add_cb(Distill(learn.model)))
    with pytest.raises(KdoctError, match='is no teacher'): Distill(learn)
    with pytest.raises(KdoctError, match='no weights'):
        Distill({'a': student(), 'b': student()}, DistillRecipe(combine='nll'))
    with pytest.raises(KdoctError, match="shape \\(4,\\)"):
        fit(learner(loaders(images), folder, nn.CrossEntropyLoss(reduction='none')))
    with pytest.raises(KdoctError, match='Views that come back'):
        fit(learner(loaders(images), folder, recipe=DistillRecipe(views=2)))


@pytest.mark.parametrize('normalised', [((0,)*3, (0,)*3), ((.5,)*3, (.2, -.2, .2))])
def test_a_normalisation_that_cannot_be_is_refused(normalised):
    with pytest.raises(KdoctError, match='No picture was normalised by'):
        Teachers(student(), normalised=normalised)


def test_a_teacher_that_gives_probabilities_is_refused():
    teacher, x = nn.Sequential(student(), nn.Softmax(1)), torch.rand(4, 3, 32, 32)
    with pytest.raises(KdoctError, match='gives probabilities, not logits') as e:
        Teachers(teacher).loss(torch.zeros(()), student()(x), x)
    assert 'without its Softmax' in e.value.fix
    Teachers(nn.Sequential(student(), nn.LogSoftmax(1))).loss(torch.zeros(()), student()(x), x)


def test_two_callbacks_in_one_learner_are_refused(images, folder):
    learn = learner(loaders(images), folder, cbs=[Distill(folder)])
    with pytest.raises(KdoctError, match='two Distill callbacks'): fit(learn)


def test_what_is_no_model_folder_is_answered_with_the_import(tmp_path):
    with pytest.raises(KdoctError, match='There is no model folder .*nosuch') as e:
        Teachers(tmp_path/'nosuch')
    assert 'kdoct import' in e.value.fix
    torch.save(student().state_dict(), tmp_path/'plain.pth')
    with pytest.raises(KdoctError, match='is a file, no model folder') as e:
        Teachers(tmp_path/'plain.pth')
    assert f"kdoct import {tmp_path/'plain.pth'} --model" in e.value.fix


def test_the_guide_to_ones_own_teacher_has_the_same_classes_throughout(tmp_path):
    text = (Path(__file__).parents[1]/'docs'/'own_teacher.md').read_text(encoding='utf-8')
    written = re.search(r'kdoct import .* --classes (\S+)', text)[1].split(',')
    in_loop = [re.findall(r"'(.+?)'", m) for m in re.findall(r'classes=(\[.*?\])', text)]
    assert in_loop
    for classes in in_loop: Teachers(model_folder(tmp_path/'mine', written), classes=classes)


def test_grey_pictures_of_a_data_block_teach_too(images, folder):
    block = DataBlock(
        (ImageBlock(PILImageBW), CategoryBlock),
        get_items=get_image_files,
        get_y=parent_label,
        splitter=RandomSplitter(0.3, seed=1),
        item_tfms=Resize(32),
    )
    dls = block.dataloaders(images, bs=4, num_workers=0, device='cpu')
    learn, note = (
        Learner(dls, student(channels=1), loss_func=nn.CrossEntropyLoss(), cbs=[Distill(folder)]),
        Note(),
    )
    fit(learn.add_cb(note))
    x, y, pred, loss = note.seen[0]
    teacher_logits = load_model_folder(folder)[0](x).detach()[:, [1, 0]]
    want = .3*cross_entropy(pred, y.long()) + .7*soft_loss(pred, teacher_logits, 4.)
    assert x.shape[1] == 1 and loss.item() == pytest.approx(want.item(), rel=1e-4)


def test_mixed_precision_of_the_student_does_not_touch_the_teacher(images, folder):
    queries = []
    class Listen(Distill):
        def teacher_output(self, role, x):
            output = super().teacher_output(role, x)
            enabled = torch.is_autocast_enabled('cpu')
            queries.append((enabled, torch.Tensor(x.float()), output.logits))
            return output
    learn = Learner(
        loaders(images), student(), loss_func=nn.CrossEntropyLoss(), cbs=[Listen(folder)]
    )
    with torch.autocast('cpu', torch.bfloat16): fit(learn)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in STATS)
    enabled, x, z = queries[0]
    assert enabled and z.dtype == torch.float32
    torch.testing.assert_close(
        z, load_model_folder(folder)[0](x * std + mean).detach()[:, [1, 0]], rtol=1e-4, atol=1e-5
    )


def test_it_stands_beside_fastais_own_callbacks(images, folder):
    fit(learner(loaders(images), folder, cbs=[MixedPrecision(), GradientAccumulation(8)]))
    fit(learner(loaders(images), folder, CrossEntropyLossFlat(), [MixUp()]))


@pytest.mark.parametrize('how', ['probabilities', 'logits', 'turn'])
def test_several_teachers_are_combined_as_in_a_run(images, folder, tmp_path, how):
    other, note, recipe = (
        model_folder(tmp_path / 'b', ['CNV', 'NORMAL'], 'test_resnet', 32),
        Note(),
        DistillRecipe(combine=how),
    )
    fit(learner(loaders(images), {'a': folder, 'b': other}, cbs=[note], recipe=recipe))
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in STATS)
    for i, (x, y, pred, loss) in enumerate(note.seen):
        each = [
            load_model_folder(folder)[0](x * std + mean).detach()[:, [1, 0]],
            load_model_folder(other)[0](x * std + mean).detach(),
        ]
        together = each[i % 2] if how == 'turn' else combine(each, recipe)
        assert loss.item() == pytest.approx(
            (0.3 * cross_entropy(pred, y.long()) + 0.7 * soft_loss(pred, together, 4.0)).item(),
            rel=1e-3,
        )


def test_a_plain_loop_learns_the_same_as_the_callback(images, folder):
    dls, note = loaders(images), Note()
    learn = fit(learner(dls, folder, cbs=[note]))
    net, teachers = student(), Teachers(folder, normalised=STATS, classes=dls.vocab)
    for x, y, _, loss in note.seen[:1]:
        logits = net.train()(x)
        ours = teachers.loss(cross_entropy(logits, y.long()), logits, x)
        assert ours.item() == pytest.approx(loss.item(), rel=1e-4)
        ours.backward()
    assert all(p.grad is not None for p in net.parameters()) and learn.model is not net
    with pytest.raises(KdoctError, match='here they are A, B'): Teachers(folder, classes=['A', 'B'])


def test_a_plain_loop_over_fastai_loaders_takes_plain_tensors(images, folder):
    "The types of fastai stop PyTorch's own losses, before kdoct is called."
    dls = loaders(images)
    net, teachers = student(), Teachers(folder, normalised=STATS, classes=dls.vocab)
    x, y = dls.train.one_batch()
    with pytest.raises(TypeError): torch.nn.functional.cross_entropy(net(x), y)
    x, y = map(plain_tensor, (x, y))
    logits = net(x)
    loss = teachers.loss(torch.nn.functional.cross_entropy(logits, y), logits, x)
    loss.backward()
    assert type(loss) is torch.Tensor and all(p.grad is not None for p in net.parameters())


def test_the_exported_callback_is_a_small_file(folder):
    assert len(pickle.dumps(Distill(folder))) < 5000


# --- in a run

CLASSES = ['CNV', 'DME', 'DRUSEN', 'NORMAL']
SHORT = {'student.epochs': 1, 'teacher.epochs': 1, 'evaluate.n_boot': 100}


def imported(folder, classes=('NORMAL', 'DRUSEN', 'DME', 'CNV'), size=48, seed=1, trained_on=None):
    torch.manual_seed(seed)
    net = timm.create_model('test_efficientnet', num_classes=len(classes))
    nn.init.normal_(net.classifier.weight)
    folder.parent.mkdir(parents=True, exist_ok=True)
    torch.save(net.state_dict(), folder.with_suffix('.pth'))
    import_model_folder(
        folder.with_suffix('.pth'), 'test_efficientnet', list(classes), folder, size, 'teacher',
        trained_on=trained_on,
    )
    return folder


def run_with(name, *folders, **changes):
    run = create_run(name, preset('tiny', **{**own_teachers(folders), **SHORT, **changes}))
    prepare_data(run)
    return run


@pytest.mark.slow
def test_a_teacher_of_ones_own_is_evaluated_recorded_and_used(tmp_path):
    mine = imported(tmp_path/'mine')
    run = run_with('own', mine, **{'distill.views': 1})
    about = train_teacher(run)
    facts, source = run.stage('fold_0/teacher'), read_json(mine/'model.json')
    assert (facts['status'], facts['trained'], about['trained'], about['classes']) == (
        'done',
        False,
        False,
        CLASSES,
    )
    assert (
        facts['weights_from']['weights_sha256'] == source['weights_sha256']
        and facts['weights_from']['imported'] == source['imported']
    )
    assert any('not trained here' in n for n in facts['notes']) and any(
        'not known which images' in n for n in facts['notes']
    )
    there, data = load_model_folder(mine)[0], open_fold(run, 0)
    for part, got in (
        ('test', logits_of(pd.read_parquet(run.stage_dir(0, 'teacher') / 'predictions.parquet'))),
        ('val', None),
    ):
        x, y = next(
            iter(
                Batches(
                    data.images,
                    data.labels,
                    np.zeros(len(data.images), np.uint64),
                    data.idx[part],
                    999,
                    size=64,
                )
            )
        )
        with torch.no_grad(): z = there(x)[:, [3, 2, 1, 0]]
        if got is not None: np.testing.assert_allclose(got, z, atol=1e-4)
        else: assert facts['validation']['valid_loss'] == pytest.approx(cross_entropy(z, y).item(), rel=1e-4)
    about = train_student(run)
    key = read_json(next((outputs_root()/'cache').glob('teacher-*/about.json')))
    assert (
        key['teacher']['weights_sha256']
        == about['distilled_from']['teacher']['weights_sha256']
        == facts['weights_sha256']
    )
    train_baseline(run)
    decide_fold(run, 0, 'teacher')
    assert 'accuracy' in str(evaluate_fold(run, 0, verbose=False))
    assert 'was not trained here' in report_html(run).read_text()


def test_weights_in_the_runs_order_keep_their_hash(tmp_path):
    mine = imported(tmp_path/'mine', CLASSES)
    about = train_teacher(run_with('same', mine))
    assert about['weights_sha256'] == read_json(mine/'model.json')['weights_sha256']


def test_several_teachers_of_ones_own_and_one_that_is_trained(tmp_path):
    a, b = imported(tmp_path/'a'), imported(tmp_path/'b', seed=2, size=32)
    run = run_with('several', a, b)
    assert run.recipe.teacher_roles == ('teacher', 'teacher-b')
    mixed = preset('tiny', teachers={'mine': dict(weights=str(b), train=False)})
    assert (
        mixed.teacher.train,
        mixed.training('teacher-mine').train,
        mixed.training('teacher-mine').size,
    ) == (True, False, 32)
    train_teacher(run), train_teacher(run, 0, 'b')
    assert {r: t[0].size for r, t in load_teachers(run, 0).items()} == {
        'teacher': 48,
        'teacher-b': 32,
    }
    assert set(train_student(run)['distilled_from']) == {'teacher', 'teacher-b'}


def test_the_long_form_reads_architecture_and_size_from_the_folder(tmp_path):
    mine = imported(tmp_path/'mine')
    changed = preset('demo', **{'teacher.train': False, 'teacher.weights': str(mine)}).teacher
    assert (changed.arch, changed.size) == ('test_efficientnet', 48)
    with pytest.raises(KdoctError, match='takes 48 px, not 64 px'):
        require_weights(
            preset(
                'demo', **{'teacher.train': False, 'teacher.weights': str(mine), 'teacher.size': 64}
            ).teacher
        )
    with pytest.raises(KdoctError, match='is a test_efficientnet, not a resnet18'):
        require_weights(
            preset(
                'demo',
                **{
                    'teacher.train': False,
                    'teacher.weights': str(mine),
                    'teacher.arch': 'resnet18',
                },
            ).teacher
        )


def test_what_no_teacher_can_be_is_refused_with_a_way_out(tmp_path):
    mine = imported(tmp_path/'mine')
    recipe = preset(
        'demo', **{'teacher.train': False, 'teacher.weights': str(mine.with_suffix('.pth'))}
    ).teacher
    with pytest.raises(KdoctError, match='is no model folder') as e: require_weights(recipe)
    assert 'kdoct import' in e.value.fix
    with pytest.raises(KdoctError, match='only a teacher'):
        preset('demo', **{'student.train': False, 'student.weights': str(mine)})
    with pytest.raises(KdoctError, match='names no weights'):
        preset('demo', **{**own_teachers([mine]), 'teachers': {'x': dict(arch='resnet18')}})
    with pytest.raises(KdoctError, match='has the classes A, B; here they are CNV'):
        train_teacher(run_with('r', imported(tmp_path/'ab', 'AB')))


def test_a_teacher_that_knows_the_test_images_is_refused(tmp_path):
    first = create_run('first', preset('tiny', **SHORT))
    prepare_data(first)
    train_teacher(first, 0)
    theirs = first.stage_dir(0, 'teacher')
    run = run_with('second', theirs)   # the same images and folds
    assert train_teacher(run, 0)['trained'] is False
    with pytest.raises(KdoctError, match=r'has learned from \d+ of the \d+ test images of fold 1'):
        train_teacher(run, 1)
    copied = shutil.copytree(theirs, tmp_path/'copied')   # its run is not known any more
    with pytest.raises(KdoctError, match='another fold'):
        train_teacher(run_with('third', copied), 1)
    with pytest.raises(KdoctError, match='other folds'):
        train_teacher(run_with('fourth', copied, seed=5), 0)


def test_all_folds_have_the_same_teacher(tmp_path):
    mine = imported(tmp_path/'mine')
    run = run_with('swapped', mine)
    train_teacher(run, 0)
    shutil.rmtree(mine)
    imported(mine, seed=9)
    with pytest.raises(KdoctError, match='fold_0 had other weights'): train_teacher(run, 1)


def test_the_command_takes_a_model_folder(tmp_path, monkeypatch, capsys):
    mine, made = imported(tmp_path/'mine'), []
    monkeypatch.setattr('kdoct.app.cli._all_stages', lambda run, *_: made.append(run))
    with pytest.raises(SystemExit) as e:
        main(['crossval', '--preset', 'tiny', '--teacher', str(mine), '--run', 'x'])
    teacher = made[0].recipe.teacher
    assert e.value.code == 0 and (teacher.train, teacher.weights, teacher.arch) == (
        False,
        mine.resolve().as_posix(),
        'test_efficientnet',
    )
    with pytest.raises(SystemExit):
        main(['crossval', '--preset', 'tiny', '--teacher', str(tmp_path), '--run', 'y'])
    assert 'is no model folder' in capsys.readouterr().err


def named_training(tmp_path, run, fold):
    "The `--trained-on` table of a network that has seen the training images of a fold, saved anew."
    table, folds = pd.read_parquet(run.path/'table.parquet'), pd.read_csv(run.folds_csv)
    rows = folds[(folds.fold == fold) & (folds.role == 'train')]
    root = Path(run.stage('data')['root'])
    for i, path in enumerate(rows.path): Image.open(root/path).save(tmp_path/f'{i}.bmp')
    assert set(rows.path) <= set(table.path)
    names = ''.join(f'{i}.bmp\n' for i in range(len(rows)))
    (tmp_path/'used.csv').write_text(f'path\n{names}')
    return tmp_path/'used.csv', len(rows)


def test_a_fold_that_tests_an_image_named_at_import_refuses_the_network(tmp_path):
    run = create_run('first', preset('tiny', **SHORT))
    prepare_data(run)
    used, n = named_training(tmp_path, run, 0)
    mine = imported(tmp_path/'mine', trained_on=used)
    second = run_with('second', mine)
    train_teacher(second, 0)
    (text,) = origins_of_teachers(second)
    assert f'trained on {n} images that its owner named; none of them is tested here' in text
    with pytest.raises(KdoctError, match=r'has learned from \d+ of the \d+ test images of fold 1'):
        train_teacher(second, 1)
    start = {'student.weights': str(mine), 'student.arch': 'test_efficientnet'}
    third = create_run('third', preset('tiny', **SHORT, **start))
    prepare_data(third)
    with pytest.raises(KdoctError, match='has learned from'): train_baseline(third, 1)


def test_a_network_trained_from_an_imported_one_keeps_the_record_of_its_images(tmp_path):
    run = create_run('first', preset('tiny', **SHORT))
    prepare_data(run)
    mine = imported(tmp_path/'mine', trained_on=named_training(tmp_path, run, 0)[0])
    second = run_with('second', mine)
    train_teacher(second, 0)
    copied = shutil.copytree(second.stage_dir(0, 'teacher'), tmp_path/'copied')
    assert seen_images(copied) == seen_images(mine) != set()
