"""A student with a teacher cache: the same training, each view queried once, refused where it would differ."""
import numpy as np
import pytest
import torch
from fastai.callback.core import Callback

from kdoct.core.files import KdoctError, outputs_root, read_json, write_json
from kdoct.core.presets import preset
from kdoct.core.runs import create_run
from kdoct.core.sections import DataRecipe, DistillRecipe
from kdoct.data.batches import Batches
from kdoct.data.stage import prepare_data
from kdoct.distill.callback import Distill
from kdoct.distill.student import train_student
from kdoct.distill.teacher import train_teacher
from kdoct.distill.teacher_cache import TeacherCache, arithmetic, picture_facts
from kdoct.models.backbones import create_classifier
from kdoct.training.inference import InferenceModel
from kdoct.training.loop import make_learner
from kdoct.training.losses import cross_entropy, soft_loss


@pytest.fixture(autouse=True)
def outputs(tmp_path, monkeypatch):
    monkeypatch.setenv('KDOCT_OUTPUTS', str(tmp_path/'outputs'))
    return tmp_path


def recipe(**changes): return preset('tiny').student.model_copy(update={'epochs': 4, **changes})


class Asked(InferenceModel):
    "Counts the images that a teacher is asked about."
    seen = 0
    def forward(self, x):
        self.seen += len(x)
        return super().forward(x)


def teacher(seed=3, arch='test_efficientnet', size=32):
    torch.manual_seed(seed)
    return Asked(create_classifier(recipe(arch=arch), 3, size))


def cached(frozen, name='a'): return TeacherCache(frozen, name*64, batch=16)


def learner(
    folder, teachers, cbs=(), views=0, refresh=0, combine='probabilities', seed=1, **changes
):
    images = np.random.default_rng(0).integers(0, 255, (32, 36, 36), dtype=np.uint8)
    labels, ids, r = np.arange(32) % 3, np.arange(500, 532, dtype=np.uint64), recipe(**changes)
    torch.manual_seed(5)
    return make_learner(
        create_classifier(r, 3, 32),
        Batches(images, labels, ids, np.arange(24), 8, r.augment, seed, size=32),
        Batches(images, labels, ids, np.arange(24, 32), 8, size=32),
        cross_entropy,
        r,
        folder,
        cbs=[Distill(teachers, DistillRecipe(views=views, refresh=refresh, combine=combine)), *cbs],
    )


def fit(learn):
    with learn.no_bar(), learn.no_logging(): learn.fit(learn.checkpoint.recipe.epochs)
    return learn


def losses(learn): return [row['train_loss'] for row in learn.history.rows]


@pytest.mark.slow
@pytest.mark.parametrize('combine', ['probabilities', 'turn'])
def test_with_as_many_views_as_epochs_it_is_the_training_that_asks_every_time(outputs, combine):
    two = {'teacher': teacher(), 'teacher-b': teacher(4, 'test_resnet', 48)}
    online = fit(learner(outputs/'a', two, combine=combine))
    kept = fit(
        learner(
            outputs / 'b', {r: cached(t, r[-1]) for r, t in two.items()}, views=4, combine=combine
        )
    )
    assert losses(kept) == pytest.approx(losses(online), rel=1e-4)


def test_few_views_come_back(outputs):
    t, shown = teacher(), []
    class Look(Callback):
        order, run_valid = 1, False
        def before_batch(self): shown.append(self.xb[0].sum().item())
    fit(learner(outputs/'a', {'teacher': cached(t)}, [Look()], views=2))
    by_epoch = [sum(shown[3*e:3*e + 3]) for e in range(4)]
    assert by_epoch[0] == pytest.approx(by_epoch[2], rel=1e-6) and by_epoch[1] == pytest.approx(
        by_epoch[3], rel=1e-6
    )
    assert abs(by_epoch[0] - by_epoch[1]) > 1e-3*by_epoch[0]
    assert t.seen == 2*24


def test_views_are_refreshed_when_it_is_time(outputs):
    t, seen = teacher(), []
    class Note(Callback):
        order, run_valid = 60, False
        def after_train(self): seen.append(t.seen)
    fit(learner(outputs/'a', {'teacher': cached(t)}, [Note()], views=1, refresh=2))
    assert seen == [24, 24, 48, 48]


def test_a_second_student_does_not_ask_again(outputs):
    fit(learner(outputs/'a', {'teacher': cached(teacher())}, views=2, epochs=2))
    t = teacher()
    fit(learner(outputs/'b', {'teacher': cached(t)}, views=2, epochs=2))
    assert t.seen == 2*4   # four images a view, as a proof


def test_another_seed_or_teacher_has_a_cache_of_its_own(outputs):
    for seed, name in ((1, 'a'), (2, 'a'), (1, 'b')):
        fit(
            learner(
                outputs / f'{seed}{name}',
                {'teacher': cached(teacher(), name)},
                views=1,
                seed=seed,
                epochs=1,
            )
        )
    assert len(list((outputs_root()/'cache').glob('teacher-*/about.json'))) == 3


def cache_name(batches=None, teacher_changes=(), **how):
    "Name of the cache's folder of a small training."
    images = np.random.default_rng(0).integers(0, 255, (12, 36, 36), dtype=np.uint8)
    given = dict(recipe=recipe().augment, seed=1, size=32, views=2) | (batches or {})
    model = teacher()
    for name, value in teacher_changes: setattr(model, name, value)
    made = Batches(
        images, np.arange(12) % 3, np.arange(12, dtype=np.uint64), np.arange(12), 4, **given
    )
    return (
        TeacherCache(
            model,
            **{
                'weights_sha256': 'a',
                'arch': 'test_efficientnet',
                'pictures': picture_facts(DataRecipe()),
                **how,
            },
        )
        .open(made)
        .path
    )


@pytest.mark.parametrize(
    'how',
    [
        dict(weights_sha256='b'),
        dict(arch='test_resnet'),
        dict(teacher_changes=[('precision', 'bf16')]),
        dict(teacher_changes=[('size', 48)]),
        dict(teacher_changes=[('interpolation', 'bilinear')]),
        dict(teacher_changes=[('mean', torch.zeros(1, 3, 1, 1))]),
        dict(batches=dict(seed=2)),
        dict(batches=dict(size=28)),
        dict(batches=dict(recipe=recipe().augment.model_copy(update=dict(rotate=33.0)))),
        *(
            dict(pictures=picture_facts(DataRecipe(**{k: v})))
            for k, v in dict(resize='pad', margin=4, fill_white=True, mask_scale_bar=True, size=96).items()
        ),
        dict(pictures=picture_facts(DataRecipe()) | dict(decoder='another')),
    ],
    ids=str,
)
def test_whatever_decides_an_answer_has_a_cache_of_its_own(how):
    assert cache_name() == cache_name() != cache_name(**how)


@pytest.mark.parametrize('device,allowed', [('cpu', False), ('cuda', True), ('cuda', False)])
def test_rounded_products_of_a_gpu_are_another_arithmetic(device, allowed):
    places = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [p.allow_tf32 for p in places]
    try:
        for p in places: p.allow_tf32 = allowed or device == 'cpu'
        assert arithmetic(teacher(), device) == dict(precision='fp32', tf32=allowed)
    finally:
        for p, value in zip(places, before, strict=True): p.allow_tf32 = value


@pytest.mark.parametrize('part', ['teacher', 'pictures', 'views', 'images'])
def test_a_folder_whose_record_says_something_else_is_refused(part):
    path = cache_name()/'about.json'
    write_json(path, read_json(path) | {part: 'something else'})
    with pytest.raises(KdoctError, match=f'belongs to something else .{part}.'): cache_name()


class Killed(Exception): "As if the process had ended."


def test_a_build_that_was_killed_goes_on_where_it_stopped(outputs):
    class Mortal(Asked):
        def forward(self, x):
            if self.seen >= 16: raise Killed('now')
            return super().forward(x)
    torch.manual_seed(3)
    t = Mortal(create_classifier(recipe(), 3, 32))
    with pytest.raises(Killed): fit(learner(outputs/'a', {'teacher': cached(t)}, views=1))
    again = teacher()
    online = fit(learner(outputs/'c', {'teacher': teacher()}, epochs=1))
    kept = fit(learner(outputs/'b', {'teacher': cached(again)}, views=1, epochs=1))
    assert again.seen == 4 + 8   # a proof of what is there, and the last eight
    assert losses(kept) == pytest.approx(losses(online), rel=1e-4)


@pytest.mark.slow
def test_a_training_that_was_cut_off_goes_on_with_the_right_view(outputs):
    class StopAt(Callback):
        order = 99
        def after_batch(self):
            if self.training and (self.epoch, self.iter) == (3, 0): raise Killed('now')
    whole = fit(learner(outputs/'a', {'teacher': cached(teacher())}, views=3))
    with pytest.raises(Killed):
        fit(
            learner(
                outputs / 'b',
                {'teacher': cached(teacher())},
                [StopAt()],
                views=3,
                checkpoint_minutes=1e-9,
            )
        )
    resumed = fit(
        learner(outputs / 'b', {'teacher': cached(teacher())}, views=3, checkpoint_minutes=1e-9)
    )
    assert resumed.first_epoch == 3 and losses(resumed) == pytest.approx(losses(whole), rel=1e-5)


def test_blended_images_have_blended_answers(outputs):
    told = []
    class Note(Callback):
        order, run_valid = 6, False
        def after_loss(self):
            z, shares = self.learn.distill.columns, self.learn.mix.shares
            target = (shares @ torch.softmax(z/4, 1)).log()*4   # as the labels are blended
            told.append(
                (
                    self.learn.loss_terms['soft'].item(),
                    soft_loss(self.pred, target, 4.0).item(),
                    shares.diagonal().mean().item(),
                )
            )
    fit(
        learner(
            outputs / 'a', {'teacher': cached(teacher())}, [Note()], views=1, epochs=2, mix_prob=1.0
        )
    )
    for got, want, own in told: assert got == pytest.approx(want, rel=1e-4) and own < 1


def test_a_changed_or_foreign_file_is_refused(outputs):
    fit(learner(outputs/'a', {'teacher': cached(teacher())}, views=1, epochs=1))
    folder, = (outputs_root()/'cache').glob('teacher-*[0-9a-f]/')
    z = np.load(folder/'view_00000.npy')
    np.save(folder/'view_00000.npy', z[::-1])   # the answers to other images
    with pytest.raises(KdoctError, match='does not give today'):
        fit(learner(outputs/'b', {'teacher': cached(teacher())}, views=1, epochs=1))
    np.save(folder/'view_00000.npy', z[:-1])
    with pytest.raises(KdoctError, match=r'not float32 \(24, 3\)'):
        fit(learner(outputs/'c', {'teacher': cached(teacher())}, views=1, epochs=1))


@pytest.mark.slow
def test_a_run_with_views_records_what_was_asked(outputs):
    run = create_run(
        'kept', preset('tiny', **{'student.epochs': 2, 'teacher.epochs': 1, 'distill.views': 2})
    )
    prepare_data(run)
    train_teacher(run)
    train_student(run)
    facts = read_json(run.json)['stages']['fold_0/student']['teachers']['teacher']
    n = run.stage('data')['per_fold']['0']['train']['images']
    key = read_json(outputs_root()/'cache'/facts['cache']/'about.json')
    assert key['pictures'] == picture_facts(run.recipe.data) and {
        'decoder',
        'framing',
        'margin',
    } <= set(key['pictures'])
    assert (key['teacher']['arch'], key['teacher']['precision']) == ('test_efficientnet', 'fp32')
    assert (
        facts['queried'] == 2 * n
        and facts['seconds'] > 0
        and (outputs_root() / 'cache' / facts['cache']).is_dir()
    )
