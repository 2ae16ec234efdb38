"Several teachers: each sees the images in its own way, all come before the student, the result shows them."
import numpy as np
import pytest
import torch
from fastai.callback.core import Callback

from kdoct.app import crossval as C
from kdoct.app.report import report_html
from kdoct.core.files import KdoctError, read_json, write_json
from kdoct.core.presets import preset
from kdoct.core.runs import create_run
from kdoct.core.sections import DistillRecipe
from kdoct.data.batches import Batches
from kdoct.data.stage import prepare_data
from kdoct.distill.callback import Distill
from kdoct.distill.loading import load_teachers
from kdoct.distill.student import train_baseline, train_student
from kdoct.distill.teacher import train_teacher
from kdoct.evaluate import stage as evaluate_stage
from kdoct.evaluate.metrics import log_softmax, logits_of
from kdoct.evaluate.pooling import fold_models
from kdoct.evaluate.stage import evaluate_fold
from kdoct.evaluate.tables import COMBINED
from kdoct.models.backbones import create_classifier
from kdoct.models.folders import load_model_folder
from kdoct.training import results as training
from kdoct.training.inference import InferenceModel
from kdoct.training.loop import make_learner
from kdoct.training.losses import combine, cross_entropy, soft_loss, teacher_weights

TWO = {
    'teachers': {
        'resnet': dict(arch='test_resnet', size=96),
        'vit': dict(arch='test_vit', size=48, lr=1e-4),
    }
}


# --- how they are combined

def three(n=8, c=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [3*torch.randn(n, c, generator=g) for _ in range(3)]


@pytest.mark.parametrize('how', ['probabilities', 'logits', 'nll', 'turn'])
def test_one_teacher_is_handed_on_untouched(how):
    z = three()[0]
    assert combine([z], DistillRecipe(combine=how), torch.ones(1)) is z


@pytest.mark.parametrize('temperature', [1., 4.])
@pytest.mark.parametrize('how', ['probabilities', 'logits', 'nll'])
def test_the_soft_loss_is_the_divergence_from_what_the_teachers_say_together(how, temperature):
    student, zs, w = torch.randn(8, 4), three(), teacher_weights([.1, .5, 1.])
    soft = [np.exp(log_softmax(z.double().numpy()/temperature)) for z in zs]
    p = {'probabilities': sum(soft)/3, 'nll': sum(float(v)*s for v, s in zip(w, soft, strict=True)),
         'logits': np.exp(log_softmax(sum(z.double().numpy() for z in zs)/3/temperature))}[how]
    log_q = log_softmax(student.double().numpy()/temperature)
    want = temperature**2*(p*(np.log(p) - log_q)).sum(1).mean()
    together = combine(zs, DistillRecipe(combine=how, temperature=temperature), w)
    assert soft_loss(student, together, temperature).item() == pytest.approx(want, rel=1e-4)


def test_the_combination_survives_half_precision_and_huge_logits():
    zs = [torch.tensor([[6e4, -6e4, 0.]]).half(), torch.tensor([[-6e4, 6e4, 0.]]).half()]
    together = combine(zs, DistillRecipe(temperature=1.))
    assert together.dtype == torch.float32 and together.softmax(1)[0].tolist() == pytest.approx(
        [0.5, 0.5, 0.0]
    )


def test_weights_follow_the_validation_loss():
    w = teacher_weights([.2, .7, 900.])
    assert (
        w.sum().item() == pytest.approx(1)
        and (w[0] / w[1]).item() == pytest.approx(np.exp(0.5), rel=1e-5)
        and w[2] == 0
    )
    assert combine(three(), DistillRecipe(combine='nll'), w).isfinite().all()   # a weight of 0 is no NaN


# --- in training

def recipe(**changes): return preset('tiny').student.model_copy(update={'epochs': 2, **changes})


def different_teachers():
    "Teachers of another size and normalisation each."
    made = {}
    for name, (arch, size, mean, std) in {
        'teacher': ('test_efficientnet', 32, 0.5, 0.5),
        'teacher-a': ('test_resnet', 48, 0.2, 0.1),
        'teacher-b': ('test_vit', 64, 0.7, 0.3),
    }.items():
        torch.manual_seed(len(made))
        made[name] = create_classifier(recipe(arch=arch), 3, size).eval()
        made[name].mean.fill_(mean), made[name].std.fill_(std)
    return made


class Seen(Callback):
    "Keeps what the teachers were shown and what the student was told."
    order, run_valid = 4, False
    def __init__(self): self.batches = []
    def after_loss(self): self.batches.append(self.xb[0].clone())


def learner(folder, teachers, how='probabilities', cbs=(), weights=None, **changes):
    images = np.random.default_rng(0).integers(0, 255, (32, 32, 32), dtype=np.uint8)
    labels, ids, r = np.arange(32) % 3, np.arange(32, dtype=np.uint64), recipe(**changes)
    frozen = {
        role: t if isinstance(t, InferenceModel) else InferenceModel(t)
        for role, t in teachers.items()
    }
    torch.manual_seed(5)
    return make_learner(
        create_classifier(r, 3, 32),
        Batches(images, labels, ids, np.arange(24), 8, r.augment, 1),
        Batches(images, labels, ids, np.arange(24, 32), 8),
        cross_entropy,
        r,
        folder,
        cbs=[Distill(frozen, DistillRecipe(combine=how, temperature=2.0), weights), *cbs],
    )


def fit(learn):
    with learn.no_bar(), learn.no_logging(): learn.fit(learn.checkpoint.recipe.epochs)
    return learn


@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
def test_each_teacher_says_in_distillation_what_it_says_alone(tmp_path, precision):
    teachers, outputs, seen = different_teachers(), {}, Seen()
    class Listen(Distill):
        def teacher_output(self, role, x):
            output = super().teacher_output(role, x)
            outputs.setdefault(role, []).append(output.logits)
            return output
    learn = learner(tmp_path, teachers, precision=precision, cbs=[seen])
    learn.remove_cb(learn.distill)
    teachers = {r: InferenceModel(t, precision) for r, t in teachers.items()}
    learn.add_cb(Listen(teachers, DistillRecipe()))
    before = {r: {k: v.clone() for k, v in t.state_dict().items()} for r, t in teachers.items()}
    fit(learn)
    assert len(seen.batches) == 6 and seen.batches[0].shape == (8, 1, 32, 32)
    for role, alone in different_teachers().items():   # made anew: fed by themselves, with what timm would do
        alone = InferenceModel(alone, precision)
        for x, z in zip(
            (torch.cat(seen.batches[:3]), torch.cat(seen.batches[3:])), outputs[role], strict=True
        ):  # three batches at once
            assert not z.requires_grad and z.dtype == torch.float32
            with torch.no_grad(): assert torch.equal(alone(x), z)
        assert not teachers[role].training and all(
            torch.equal(v, before[role][k]) for k, v in teachers[role].state_dict().items()
        )
    with torch.no_grad():   # without Classifier: resized and normalised by hand
        x, net = torch.cat(seen.batches[:3]), teachers['teacher-a']
        by_hand = torch.nn.functional.interpolate(
            x, (48, 48), mode=net.interpolation, antialias=True, align_corners=False
        ).clamp(0, 1)
        if precision == 'fp32':
            torch.testing.assert_close(
                net.body((by_hand.expand(-1, 3, -1, -1) - 0.2) / 0.1), outputs['teacher-a'][0]
            )


def test_with_turn_each_batch_has_one_teacher_counted_over_all_epochs(tmp_path):
    queried = []
    class Note(Callback):
        order, run_valid = 6, False
        def after_loss(self): queried.append((self.epoch, self.iter, *self.learn.distill.queried()))
    fit(learner(tmp_path, dict(list(different_teachers().items())[:2]), 'turn', [Note()], epochs=3))
    assert queried == [
        (e, i, ('teacher', 'teacher-a')[(3 * e + i) % 2]) for e in range(3) for i in range(3)
    ]


def test_with_turn_all_batches_of_a_step_have_the_same_teacher(tmp_path):
    queried = []
    class Note(Callback):
        order, run_valid = 6, False
        def after_loss(self): queried.append(*self.learn.distill.queried())
    learn = learner(
        tmp_path,
        dict(list(different_teachers().items())[:2]),
        'turn',
        [Note()],
        accumulate=2,
        epochs=2,
    )  # 24 images: 12 and 12, in batches of 6
    fit(learn)
    assert queried == ['teacher', 'teacher', 'teacher-a', 'teacher-a']*2


class Stop(Exception): "As if the process had ended."


class StopAt(Callback):
    "Ends the training in the second epoch, after its first batch was saved."
    order = 99
    def after_batch(self):
        if self.training and (self.epoch, self.iter) == (1, 0): raise Stop('now')


@pytest.mark.slow
@pytest.mark.parametrize('how', ['turn', 'nll'])
def test_a_training_that_was_cut_off_ends_with_the_weights_of_the_uncut_one(tmp_path, how):
    pair, w = dict(list(different_teachers().items())[:2]), torch.tensor([.7, .3])
    whole = fit(learner(tmp_path/'a', pair, how, weights=w)).model.state_dict()
    with pytest.raises(Stop):
        fit(learner(tmp_path/'b', pair, how, [StopAt()], w, checkpoint_minutes=1e-9))
    resumed = fit(learner(tmp_path/'b', pair, how, weights=w, checkpoint_minutes=1e-9))
    assert resumed.first_epoch == 1   # it did go on
    assert all(torch.equal(v, resumed.model.state_dict()[k]) for k, v in whole.items())


def test_a_teacher_that_says_nonsense_stops_the_run_with_its_name(tmp_path):
    teachers = {r: InferenceModel(t) for r, t in different_teachers().items()}
    with torch.no_grad(): teachers['teacher-a'].body.get_classifier().bias[1] = float('nan')
    with pytest.raises(KdoctError, match='logits of the teacher-a are not finite in epoch 0'):
        fit(learner(tmp_path, teachers))


# --- in a run

@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "`explainable-covid` in small: three teachers of three families and sizes, from data to evaluation."
    with pytest.MonkeyPatch.context() as m:
        m.setenv('KDOCT_OUTPUTS', str(tmp_path_factory.mktemp('outputs')))
        short = {
            f'{who}.{k}': v
            for who in ('teacher', 'student')
            for k, v in dict(
                weights='none', epochs=1, patience=0, batch_size=16, warmup=0.5, precision='fp32'
            ).items()
        }
        teachers = {
            'visformer': dict(arch='test_vit', size=96),
            'autoformer': dict(arch='test_resnet', size=48, lr=1e-3),
        }
        the_run = create_run(
            'covid',
            preset(
                'explainable-covid',
                **short,
                **{
                    'data.source': 'phantom',
                    'data.classes': None,
                    'data.protocol': 'grouped-cv',
                    'data.size': 64,
                    'data.margin': 6,
                    'data.n_folds': 3,
                    'data.phantom.patients': 40,
                    'data.phantom.slices': 1,
                    'data.phantom.height': 96,
                    'data.phantom.width': 96,
                    'teacher.arch': 'test_efficientnet',
                    'student.arch': 'test_efficientnet',
                    'teachers': teachers,
                    'distill.combine': 'nll',
                    'evaluate.n_boot': 100,
                },
            ),
        )
        prepare_data(the_run)
        train_teacher(the_run, 0)
        for name in teachers: train_teacher(the_run, 0, name)
        train_student(the_run, 0)
        train_baseline(the_run, 0)
        evaluate_fold(the_run, 0, verbose=False)
    return the_run


@pytest.fixture
def here(run, monkeypatch):
    monkeypatch.setenv('KDOCT_OUTPUTS', str(run.path.parent))
    return run


@pytest.mark.slow
def test_the_preset_keeps_its_shape(run):
    r = run.recipe
    assert (r.name, r.teacher_roles) == (
        'explainable-covid',
        ('teacher', 'teacher-visformer', 'teacher-autoformer'),
    )
    assert (r.distill.alpha, r.distill.beta, r.distill.temperature, r.teacher.monitor) == (
        0.7,
        0.3,
        4,
        'balanced_accuracy',
    )
    assert (
        r.training('teacher-visformer').augment == r.teacher.augment
        and r.training('teacher-autoformer').lr == 1e-3
    )


@pytest.mark.slow
def test_each_teacher_has_its_own_bundle_and_input_size(here):
    found = load_teachers(here, 0)
    assert {
        role: (about['arch'], model.size, about['role']) for role, (model, about) in found.items()
    } == {
        'teacher': ('test_efficientnet', 64, 'teacher'),
        'teacher-visformer': ('test_vit', 96, 'teacher-visformer'),
        'teacher-autoformer': ('test_resnet', 48, 'teacher-autoformer'),
    }
    assert all(not p.requires_grad for model, _ in found.values() for p in model.parameters())
    hashes = {a['weights_sha256'] for _, a in found.values()}
    assert len(hashes) == 3


@pytest.mark.slow
def test_the_student_records_its_teachers_and_their_weights(here):
    distilled_from, found = (
        read_json(here.stage_dir(0, 'student') / 'model.json')['distilled_from'],
        load_teachers(here, 0),
    )
    losses = [a['metrics']['validation']['valid_loss'] for _, a in found.values()]
    assert [t['weight'] for t in distilled_from.values()] == pytest.approx(
        teacher_weights(losses).tolist()
    )
    assert {r: t['weights_sha256'] for r, t in distilled_from.items()} == {
        r: a['weights_sha256'] for r, (_, a) in found.items()
    }
    assert 'distilled_from' not in read_json(here.stage_dir(0, 'baseline')/'model.json')


@pytest.mark.slow
def test_every_teacher_and_what_they_say_together_is_a_row(here):
    models, saved = fold_models(here, 0), read_json(here.fold_dir(0)/'evaluation.json')
    rows = ['teacher', 'teacher-visformer', 'teacher-autoformer', COMBINED, 'student', 'baseline']
    assert list(models) == rows == list(saved['table'])
    distilled_from = read_json(here.stage_dir(0, 'student')/'model.json')['distilled_from']
    want = sum(
        t['weight'] * np.exp(log_softmax(logits_of(models[r]))) for r, t in distilled_from.items()
    )
    np.testing.assert_allclose(np.exp(log_softmax(logits_of(models[COMBINED]))), want, atol=1e-6)
    assert (
        saved['parameters'][COMBINED]
        == sum(saved['parameters'][r] for r in rows[:3])
        > saved['parameters']['teacher']
    )
    assert set(saved['predictions']) == set(rows) - {COMBINED} and evaluate_stage.is_evaluated(
        here, 0
    )
    assert 'student - teachers, combined | accuracy' in saved['differences']
    assert set(saved['sections']['costs']['table']) == set(rows) - {COMBINED}
    assert {'teacher-visformer', 'teacher-autoformer'} <= set(saved['sections']['blanked']['table'])


@pytest.mark.slow
def test_the_protocol_names_the_teachers_and_how_they_are_combined(here):
    text = read_json(here.fold_dir(0)/'evaluation.json')['protocol']
    assert (
        'distilled from 3 teachers (teacher: test_efficientnet, teacher-visformer: '
        'test_vit at 96 px, '
        'teacher-autoformer: test_resnet at 48 px): the mean of '
        'their probabilities, weighted by exp(-validation NLL), at T 4, with alpha 0.7 (soft loss) '
        'and beta 0.3 (hard loss)'
    ) in text
    weights = [
        f"{t['weight']:.3f}"
        for t in read_json(here.stage_dir(0, 'student') / 'model.json')['distilled_from'].values()
    ]
    assert (
        f'fold 0 teacher {weights[0]}, teacher-visformer {weights[1]}, teacher-autoformer '
        f'{weights[2]}'
        in text
    )


def test_a_single_teachers_protocol_says_nothing_of_teachers():
    from kdoct.evaluate.metrics import simulate_predictions
    from kdoct.evaluate.protocol import protocol_of
    assert 'distilled from' not in protocol_of(
        create_run('one', preset('tiny')), simulate_predictions(20)
    )


@pytest.mark.slow
def test_the_report_shows_all_and_names_one_that_is_missing_with_its_command(here):
    report = report_html(here).read_text()
    assert (
        all(m in report for m in ('teacher-visformer', COMBINED, 'all teachers combined'))
        and 'Nothing: no stage failed' in report
    )
    path = here.stage_dir(0, 'teacher-visformer')/'model.json'
    hidden = path.rename(path.with_suffix('.hidden'))
    try:
        assert list(fold_models(here, 0)) == [
            'teacher',
            'teacher-autoformer',
            'student',
            'baseline',
        ] and not evaluate_stage.is_evaluated(here, 0)
        report = report_html(here).read_text()
        assert (
            'Fold 0 has no predictions of the teacher-visformer' in report
            and '-p run covid -p fold 0 -p name visformer' in report
        )
    finally:
        hidden.rename(path)
        evaluate_fold(here, 0, verbose=False)


@pytest.mark.slow
@pytest.mark.parametrize('change,says', [
    (dict(classes=['NORMAL', 'CNV', 'DME', 'DRUSEN']), 'teacher-autoformer of fold 0 has the '
                                                       'classes NORMAL, CNV'),
    (dict(folds_sha256='other'), 'teacher-autoformer of fold 0 was trained on other folds'),
    (dict(fold=1), 'teacher-autoformer of fold 0 was trained on other folds'),
], ids=['other order of classes', 'other folds', 'another fold'])
def test_a_teacher_that_does_not_belong_is_refused(here, change, says):
    path = here.stage_dir(0, 'teacher-autoformer')/'model.json'
    right = path.read_bytes()
    try:
        write_json(path, read_json(path) | change)
        with pytest.raises(KdoctError, match=says) as e: load_teachers(here, 0)
        assert '-p name autoformer' in e.value.fix
    finally: path.write_bytes(right)


@pytest.mark.slow
def test_a_student_of_other_teachers_is_not_shown_as_distilled_from_these(here):
    path = here.stage_dir(0, 'student')/'model.json'
    right = path.read_bytes()
    try:
        about = read_json(path)
        del about['distilled_from']['teacher-visformer']
        write_json(path, about)
        with pytest.raises(
            KdoctError, match='distilled from teacher, teacher-autoformer, not from'
        ):
            fold_models(here, 0)
    finally: path.write_bytes(right)


@pytest.mark.slow
def test_no_student_before_all_its_teachers(here):
    with pytest.raises(KdoctError, match='no teacher for fold 1'): train_student(here, 1)
    with pytest.raises(KdoctError, match="no role 'teacher-vgg'"): train_teacher(here, 0, 'vgg')


@pytest.mark.slow
def test_enlarged_images_are_told_of_once(here, capsys):
    (path := here.stage_dir(0, 'teacher-visformer') / 'model.json').rename(
        path.with_suffix('.hidden')
    )
    try:
        train_teacher(here, 0, 'visformer')
        assert (
            capsys.readouterr().out.count(
                'teacher-visformer takes 96 px: images of 64 px are enlarged'
            )
            == 1
        )
        net, _ = load_model_folder(path.parent)
        assert net.size == 96
    finally: path.with_suffix('.hidden').replace(path)


# --- stages

def test_all_teachers_come_before_the_student_and_finished_ones_are_skipped(monkeypatch, capsys):
    run, ran = create_run('order', preset('tiny', **TWO)), []
    monkeypatch.setattr(C, 'run_stage', lambda run, stage, fold, *_: ran.append((stage, fold)))
    C.crossval(run, [1, 2])
    each = ['teacher', 'teacher-resnet', 'teacher-vit', 'student', 'baseline', 'decide', 'evaluate']
    assert ran == [('data', 1), *((s, k) for k in (1, 2) for s in each)]
    folder = run.stage_dir(2, 'teacher-vit')
    folder.mkdir(parents=True)
    for f in ('predictions.parquet', 'model.json'): (folder/f).touch()
    ran.clear()
    C.crossval(run, [2])
    assert ran == [('data', 2), *((s, 2) for s in each if s != 'teacher-vit')]
    assert 'fold 2, teacher-vit: finished before' in capsys.readouterr().out


def test_weights_of_every_teacher_are_asked_for_beforehand(monkeypatch, tmp_path):
    run = create_run('w', preset('tiny', teachers={'far': dict(weights=str(tmp_path/'far.pth'))}))
    monkeypatch.setattr(C, 'run_stage', lambda *a: pytest.fail('began'))
    with pytest.raises(KdoctError, match='no weight file .*far.pth'): C.crossval(run, [0])


@pytest.mark.slow
def test_the_notebook_trains_a_further_teacher_by_name(stage_server):
    run = create_run('named', preset('tiny', **{**TWO, 'teacher.epochs': 1}))
    prepare_data(run)
    executed = C.run_stage(run, 'teacher-vit', 2)   # papermill, in a process of its own
    assert (
        executed.name == 'teacher-vit.ipynb'
        and run.is_finished('teacher-vit', 2)
        and not run.is_finished('teacher', 2)
    )
    about = read_json(run.stage_dir(2, 'teacher-vit')/'model.json')
    assert (about['role'], about['arch'], about['input_size'], about['fold']) == (
        'teacher-vit',
        'test_vit',
        48,
        2,
    )


@pytest.mark.slow
def test_the_resume_state_of_a_student_belongs_to_its_teachers(here, monkeypatch):
    class Stop(Exception): pass

    def capture(run, data, role, key, cbs): raise Stop(key)
    monkeypatch.setattr(training, 'is_trained', lambda *args: False)
    monkeypatch.setattr(type(here), 'is_finished', lambda *args: False)
    monkeypatch.setattr(training, '_fold_learner', capture)
    with pytest.raises(Stop) as e: train_student(here, 0)
    for role in here.recipe.teacher_roles:
        assert read_json(here.stage_dir(0, role) / 'model.json')['weights_sha256'][:16] in str(
            e.value
        )
