"Training survives a kill at any moment and ends with the weights of the uninterrupted run."
import os
import textwrap

import numpy as np
import pandas as pd
import prepared
import pytest
import timm
import torch
from conftest import copied_run
from fastai.callback.core import Callback
from safetensors.torch import load_file

from kdoct.core.files import KdoctError, read_json
from kdoct.core.presets import preset
from kdoct.core.runs import create_run
from kdoct.core.sections import DistillRecipe
from kdoct.data.augment import apply_view
from kdoct.data.batches import Batches, even_batches
from kdoct.data.fold_data import open_fold
from kdoct.data.stage import prepare_data
from kdoct.distill.callback import Distill
from kdoct.distill.teacher import train_teacher
from kdoct.models.arithmetic import computes_bf16, resolve_precision
from kdoct.models.backbones import create_classifier, head_modules, undecayed
from kdoct.models.folders import load_model_folder
from kdoct.training.inference import InferenceModel
from kdoct.training.loop import (
    make_learner,
    param_groups,
    warmup_cosine,
)
from kdoct.training.losses import balanced_weights, cross_entropy, hard_loss
from kdoct.training.precision import faster, measure_steps
from kdoct.training.scores import score_of, validation_scores

# One training in a process of its own. It prints a line after every batch, so that the test can kill it at a known place.
SCRIPT = textwrap.dedent('''
    import sys, numpy as np, torch
    from fastai.callback.core import Callback
    from safetensors.torch import save_file
    from kdoct.core.files import seed_everything
    from kdoct.core.presets import preset
    from kdoct.data.batches import Batches
    from kdoct.models.backbones import create_classifier
    from kdoct.training.losses import cross_entropy
    from kdoct.training.loop import make_learner
    folder, out, every, average = sys.argv[1:]
    torch.set_num_threads(1)
    g = np.random.default_rng(0)
    images, labels, ids = g.integers(0, 255, (60, 32, 32), dtype=np.uint8), np.arange(60) % 3, np.arange(60, dtype=np.uint64)
    recipe = preset('tiny').student.model_copy(update=dict(epochs=3, batch_size=8, accumulate=2, checkpoint_minutes=float(every),
                                                           average=average, swa_start=1, freeze_epochs=1, mix_prob=.5))
    seed_everything(1)
    class Tell(Callback):
        order, run_valid = 100, False
        def after_batch(self): print(self.epoch, self.dls.train.start + self.iter, flush=True)
    learn = make_learner(create_classifier(recipe, 3, 32), Batches(images, labels, ids, np.arange(48), 8, recipe.augment, 1),
                         Batches(images, labels, ids, np.arange(48, 60), 8), cross_entropy, recipe, folder, 'k', [Tell()])
    with learn.no_bar(), learn.no_logging(): learn.fit(recipe.epochs)
    average = learn.averaging.average.state_dict() if learn.averaging.ready else {}
    save_file({k: v.clone().contiguous() for k, v in {**learn.model.body.state_dict(), **average}.items()}, out)
''')


def train(folder, out, every, average, kill_at=None):
    "Run the script; kill it with SIGKILL as soon as it has printed `kill_at`. Returns whether it ended by itself."
    pipe = out.with_suffix('.pipe')
    pipe.unlink(missing_ok=True)
    os.mkfifo(pipe)
    p = prepared.start(SCRIPT, folder, out, every, average, output=pipe)
    with open(pipe) as printed:
        for line in printed:
            if line.strip() == kill_at:
                p.kill()
                break
    p.join()
    return p.exitcode == 0


@pytest.mark.slow
@pytest.mark.parametrize(('every', 'average'), [(1e-9, 'swa'), (60, 'ema')],
                         ids=['saved within the epoch, SWA', 'saved after the epoch, EMA'])
def test_kill_in_the_middle_of_an_epoch_changes_nothing(tmp_path, every, average):
    assert train(tmp_path/'a', tmp_path/'a.safetensors', 60, average)
    assert not train(tmp_path/'b', tmp_path/'b.safetensors', every, average, kill_at='2 3')
    assert train(tmp_path/'b', tmp_path/'b.safetensors', every, average)
    a, b = load_file(tmp_path/'a.safetensors'), load_file(tmp_path/'b.safetensors')
    assert any(k.startswith('module.') for k in a)   # the average is among them
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def learner(folder, recipe, key='k', loss=cross_entropy):
    images = np.random.default_rng(0).integers(0, 255, (24, 32, 32), dtype=np.uint8)
    labels, ids = np.arange(24) % 3, np.arange(24, dtype=np.uint64)
    return make_learner(
        create_classifier(recipe, 3, 32),
        Batches(images, labels, ids, np.arange(16), 8, recipe.augment, 1),
        Batches(images, labels, ids, np.arange(16, 24), 8),
        loss,
        recipe,
        folder,
        key,
    )


def fit(learn):
    with learn.no_bar(), learn.no_logging(): learn.fit(learn.checkpoint.recipe.epochs)
    return learn


@pytest.fixture
def recipe(): return preset('tiny').student.model_copy(update=dict(epochs=3, lr=1e-3))


def test_resume_state_of_another_recipe_is_refused(tmp_path, recipe):
    fit(learner(tmp_path, recipe))
    with pytest.raises(KdoctError, match='another recipe'):
        fit(learner(tmp_path, recipe, key='other'))
    other = recipe.model_copy(update=dict(arch='test_resnet'))  # said as clearly where not even the tensors would fit
    with pytest.raises(KdoctError, match='another recipe'):
        fit(learner(tmp_path, other, key='other'))


def test_a_loss_that_is_not_finite_stops_with_its_name(tmp_path, recipe):
    with pytest.raises(KdoctError, match='hard term of the loss became nan'):
        fit(learner(tmp_path, recipe, loss=lambda z, y: cross_entropy(z, y)*float('nan')))


ROWS = [
    dict(valid_loss=.5, tempered_loss=.5, accuracy=.7, balanced_accuracy=.7),
    dict(valid_loss=.7, tempered_loss=.3, accuracy=.8, balanced_accuracy=.6),
    dict(valid_loss=.9, tempered_loss=.4, accuracy=.6, balanced_accuracy=.9),
    dict(valid_loss=.8, tempered_loss=.6, accuracy=.5, balanced_accuracy=.5),
]


@pytest.mark.parametrize(('monitor', 'epoch'), [
    ('loss', 0), ('tempered_loss', 1), ('accuracy', 1), ('balanced_accuracy', 2), ('last', 3),
])
def test_the_score_that_is_named_chooses_the_epoch(tmp_path, recipe, monkeypatch, monitor, epoch):
    scores = iter(ROWS)
    monkeypatch.setattr('kdoct.training.loop.validation_scores', lambda *_: next(scores))
    learn = fit(learner(tmp_path, recipe.model_copy(update=dict(epochs=4, monitor=monitor))))
    assert learn.checkpoint.best_epoch == epoch


def test_a_temperature_changes_the_loss_and_not_the_tempered_one():
    targets = torch.arange(40) % 3
    noise = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)).double()
    logits = noise + torch.nn.functional.one_hot(targets, 3)
    one, other = (validation_scores(z, targets) for z in (logits, 2**.75*logits))
    assert one['tempered_loss'] == pytest.approx(other['tempered_loss'], rel=1e-6)
    assert one['valid_loss'] != pytest.approx(other['valid_loss'], rel=1e-2)


def test_patience_stops_and_the_best_epoch_is_kept(tmp_path, recipe, monkeypatch):
    scores = iter([.5, .9, .3, .2, .95])  # the fifth epoch would be the best, but patience ends with the fourth
    monkeypatch.setattr(
        'kdoct.training.loop.validation_scores',
        lambda *_: dict(valid_loss=1.0, accuracy=next(scores), balanced_accuracy=0.0),
    )
    learn = fit(
        learner(tmp_path, recipe.model_copy(update=dict(epochs=5, patience=2, monitor='accuracy')))
    )
    assert len(learn.history.rows) == 4 and learn.checkpoint.best_epoch == 1
    kept = load_file(learn.checkpoint.best_file(1))
    assert all(torch.equal(v, learn.model.body.state_dict()[k]) for k, v in kept.items())


def test_norms_and_biases_do_not_decay(recipe):
    model = create_classifier(recipe, 3, 32)
    decayed = {id(p) for g in param_groups(model, recipe) if g['weight_decay'] for p in g['params']}
    assert {n for n, p in model.named_parameters() if id(p) in decayed} == {
        n for n, p in model.named_parameters() if p.ndim > 1
    }


def test_cosine_reaches_its_floor_at_the_last_batch():
    curve = [warmup_cosine(i, 50, 5, 0.02) for i in range(50)]
    assert curve[-1] == pytest.approx(0.02) and max(curve) == 1. and np.all(np.diff(curve[5:]) < 0)


def test_bf16_gives_float32_logits_to_the_loss(tmp_path, recipe):
    seen = []
    def loss(z, y):
        seen.append(z.dtype)
        return cross_entropy(z, y)
    fit(learner(tmp_path, recipe.model_copy(update=dict(precision='bf16', epochs=1)), loss=loss))
    assert set(seen) == {torch.float32}


class AtEpochEnd(Callback):
    "Keeps the body's weights after every epoch, before they are overwritten."
    order = 40
    def __init__(self): self.states = []
    def after_epoch(self):
        self.states.append({k: v.clone() for k, v in self.model.body.state_dict().items()})


def fit_with(tmp_path, recipe):
    "A fitted learner, and the body's weights after each epoch."
    learn, seen = learner(tmp_path, recipe), AtEpochEnd()
    learn.add_cb(seen)
    return fit(learn), seen.states


def test_a_frozen_backbone_does_not_move_its_statistics_neither(tmp_path, recipe):
    torch.manual_seed(0)
    learn = learner(tmp_path, recipe.model_copy(update=dict(freeze_epochs=2)))
    start, seen = {k: v.clone() for k, v in learn.model.body.state_dict().items()}, AtEpochEnd()
    learn.add_cb(seen)
    fit(learn)
    frozen, free = (
        {k for k in start if not torch.equal(start[k], seen.states[e][k])} for e in (1, 2)
    )
    assert frozen == {'classifier.weight', 'classifier.bias'}
    assert (
        any('running_mean' in k for k in free)
        and {k for k, p in learn.model.body.named_parameters()} <= free
    )
    assert all(p.requires_grad for p in learn.model.parameters())


def test_the_swa_average_is_the_mean_of_its_epochs(tmp_path, recipe):
    learn, states = fit_with(
        tmp_path, recipe.model_copy(update=dict(epochs=4, average='swa', swa_start=1))
    )
    mean = torch.stack([s['conv_stem.weight'] for s in states[1:]]).mean(0)
    assert torch.allclose(learn.averaging.average.module.conv_stem.weight, mean, atol=1e-6)


def test_patience_brings_averaging_forward_and_does_not_cut_it(tmp_path, recipe, monkeypatch):
    monkeypatch.setattr(
        'kdoct.training.loop.validation_scores',
        lambda *_: dict(valid_loss=1.0, accuracy=0.5, balanced_accuracy=0.5),
    )
    learn = fit(
        learner(
            tmp_path,
            recipe.model_copy(update=dict(epochs=20, patience=2, average='swa', swa_start=17)),
        )
    )
    assert learn.checkpoint.best_epoch == 0 and learn.checkpoint.swa_from == 3
    assert len(learn.history.rows) == 6 and int(learn.averaging.average.n_averaged) == 3


def test_the_rates_of_both_groups_end_at_the_floor(tmp_path, recipe):
    learn = fit(
        learner(tmp_path, recipe.model_copy(update=dict(lr=1e-3, lr_head=1e-2, lr_floor=1e-5)))
    )
    assert learn.history.rows[-1]['lr'] == pytest.approx(1e-5) == learn.history.rows[-1]['lr_head']


@pytest.mark.parametrize('how', [dict(mixup=0.), dict(cutmix=0.), dict()], ids=['cutmix', 'mixup', 'either'])
@pytest.mark.parametrize('loss', ['ce', 'focal'])
def test_mixed_batches_reach_the_loss_as_distributions(tmp_path, recipe, how, loss):
    seen = []
    r = recipe.model_copy(update=dict(mix_prob=1., loss=loss, epochs=1, **how))
    def spy(z, y):
        seen.append(y)
        return hard_loss(r, np.arange(24) % 3, 3)(z, y)
    fit(learner(tmp_path, r, loss=spy))
    mixed = torch.cat([y for y in seen if y.ndim == 2])
    assert (
        torch.allclose(mixed.sum(1), torch.ones(len(mixed))) and ((mixed > 0) & (mixed < 1)).any()
    )
    assert any(y.ndim == 1 for y in seen)   # validation is not mixed


@pytest.fixture(scope='module')
def trained(trained_outputs, tmp_path_factory):
    "A tiny run whose teacher has an average beside its checkpoint; what its model.json says."
    run = copied_run(trained_outputs, tmp_path_factory.mktemp('outputs'))
    return run, read_json(run.stage_dir(0, 'teacher')/'model.json')


def test_both_candidates_are_scored_and_the_better_is_kept(trained):
    _, about = trained
    scores = about['metrics']['candidates']
    assert set(scores) == {'checkpoint', 'swa', 'swa-augmented'}
    assert score_of(scores[about['metrics']['kept']], 'loss') == max(
        score_of(s, 'loss') for s in scores.values()
    )
    assert about['metrics']['validation'] == scores[about['metrics']['kept']]


def test_variants_hold_every_weights_and_view_and_predictions_the_kept(trained):
    run, about = trained
    folder = run.stage_dir(0, 'teacher')
    v, p = pd.read_parquet(folder/'variants.parquet'), pd.read_parquet(folder/'predictions.parquet')
    kept = about['metrics']['kept']
    both = {
        (w, x) for w in ('checkpoint', 'swa', 'swa-augmented') for x in ('identity', 'averaged')
    }
    assert set(zip(v.weights, v['view'], strict=True)) == both | {(kept, 'retina blanked')}
    one = (
        v[(v.weights == kept) & (v['view'] == 'identity')]
        .drop(columns=['weights', 'view'])
        .reset_index(drop=True)
    )
    pd.testing.assert_frame_equal(one, p)
    other = v[(v.weights == kept) & (v['view'] == 'averaged')]
    assert list(other.path) == list(p.path) and not np.allclose(
        other.filter(like='logit'), p.filter(like='logit')
    )


def test_the_saved_model_folder_gives_the_saved_predictions(trained):
    run, _ = trained
    folder = run.stage_dir(0, 'teacher')
    p = pd.read_parquet(folder/'predictions.parquet')
    data = open_fold(run, 0)
    model, _ = load_model_folder(folder)
    rows = data.idx['test']
    x = apply_view(
        torch.from_numpy(np.asarray(data.images[rows]))[:, None].float() / 255, 'identity', 64
    )
    with torch.inference_mode(): logits = model(x).numpy()
    assert np.allclose(logits, p.filter(like='logit'), atol=1e-4)


def measured(learn, fp32, bf16):
    "A learner whose steps seem to take so many seconds; how often it was asked."
    asked = []
    learn.precision.timer = lambda step, p: asked.append(step(p)) or dict(fp32=fp32, bf16=bf16)[p]
    return learn, asked


@pytest.fixture
def quick(monkeypatch):
    "Measuring a step takes no time, on a processor that multiplies in bfloat16."
    monkeypatch.setattr(
        'kdoct.training.precision.measure_steps.__defaults__',
        (0.0, *measure_steps.__defaults__[1:]),
    )
    monkeypatch.setattr('kdoct.training.precision.computes_bf16', lambda device: True)


@pytest.mark.parametrize(('bf16', 'chosen'), [(.9, 'bf16'), (.97, 'fp32'), (2., 'fp32')])
def test_auto_takes_what_was_measured_to_be_faster(tmp_path, recipe, quick, bf16, chosen):
    learn, _ = measured(
        learner(tmp_path, recipe.model_copy(update=dict(precision='auto', epochs=1))), 1.0, bf16
    )
    fit(learn)
    assert learn.model.precision == chosen and learn.precision.facts == dict(
        precision=chosen, step_seconds=dict(fp32=1.0, bf16=bf16)
    )


def test_a_resumed_training_keeps_its_precision(tmp_path, recipe, quick):
    auto = recipe.model_copy(update=dict(precision='auto'))
    first, _ = measured(learner(tmp_path, auto), 1., .5)
    with first.no_bar(), first.no_logging(): first.fit(1)
    again, asked = measured(learner(tmp_path, auto), .5, 1.)
    fit(again)
    assert again.model.precision == 'bf16' and not asked and len(again.history.rows) == 3


def test_a_trial_is_remembered_for_this_network_torch_and_processor(tmp_path, recipe, quick, monkeypatch):
    def trial(arch='test_efficientnet'):
        auto = recipe.model_copy(update=dict(precision='auto', arch=arch))
        learn, asked = measured(learner(tmp_path, auto), 1., .5)
        assert learn.precision.measured() == dict(precision='bf16', step_seconds=dict(fp32=1., bf16=.5))
        return bool(asked)
    assert trial() and not trial()
    assert trial('test_convnext2')
    monkeypatch.setattr(torch, '__version__', '0.0')
    assert trial()
    monkeypatch.setattr('kdoct.training.precision.processor_name', lambda: 'another')
    assert trial() and not trial()


def test_without_bf16_units_nothing_is_tried(tmp_path, recipe, quick, monkeypatch):
    monkeypatch.setattr('kdoct.training.precision.computes_bf16', lambda device: False)
    learn, asked = measured(
        learner(tmp_path, recipe.model_copy(update=dict(precision='auto', epochs=1))), 1.0, 0.5
    )
    fit(learn)
    assert (
        learn.model.precision == 'fp32'
        and not asked
        and learn.precision.facts == dict(precision='fp32', step_seconds=None)
    )


@pytest.mark.parametrize(
    ('has', 'kernels', 'able'),
    [
        (dict(avx512_bf16=True), 'AVX512', True),
        (dict(amx_tile=True), 'AVX512', True),
        (dict(avx512_bf16=True), 'AVX2', False),
        (dict(avx512_f=True), 'AVX512', False),
        (dict(avx2=True), 'AVX2', False),
        (dict(neon=True, bf16=True), 'SVE256', True),
        (dict(neon=True), 'DEFAULT', False),
    ],
)
def test_the_processor_is_asked_whether_it_multiplies_in_bf16(monkeypatch, has, kernels, able):
    monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: has, raising=False)
    monkeypatch.setattr(torch.backends.cpu, 'get_cpu_capability', lambda: kernels)
    assert computes_bf16('cpu') is able
    assert resolve_precision('auto', 'cpu') == ('bf16' if has.get('amx_tile') else 'fp32')


@pytest.mark.parametrize(('times', 'asked'), [
    ([1.4, 11.6], 2),                      # lost in its first step, which took longer than all was meant to take
    ([.1, .9, .1, .3], 4),                 # a short first step may only be short of its kernels: one more of each
    ([.1, .15, .1, .11], 4)])              # not lost: measured until it is time
def test_a_trial_that_bf16_loses_ends_at_once(times, asked):
    said = []
    medians = measure_steps(
        None,
        2.0 if times[1] != 0.15 else 0.0,
        lambda step, p: said.append(p) or times[len(said) - 1],
    )
    assert len(said) == asked and faster(medians) == 'fp32'


def test_the_printed_times_are_for_readers(tmp_path, recipe, quick, capsys):
    learn, _ = measured(
        learner(tmp_path, recipe.model_copy(update=dict(precision='auto', epochs=1))), 1.42, 16.9
    )
    fit(learn)
    assert (
        'A training step takes 1.4 s in fp32, 17 s in bf16: fp32 it is.' in capsys.readouterr().out
    )


def test_fastai_gathers_nothing_and_the_table_is_filled(tmp_path, recipe, monkeypatch, capsys):
    called = []
    for module in ('fastai.learner', 'fastai.torch_core'):
        monkeypatch.setattr(f'{module}.to_detach', lambda *a, **k: called.append(a) or a[0])
    monkeypatch.setattr('fastai.torch_core.maybe_gather', lambda x, axis=0: called.append(x) or x)
    learn = learner(tmp_path, recipe.model_copy(update=dict(epochs=2)))
    learn.fit(2)   # with bar and table
    assert not called
    last = learn.history.rows[-1]
    assert list(learn.recorder.values[-1]) == [
        last['train_loss'],
        last['valid_loss'],
        last['accuracy'],
    ]
    assert list(learn.recorder.metric_names) == [
        'epoch',
        'train_loss',
        'valid_loss',
        'accuracy',
        'time',
    ]
    assert len(learn.recorder.losses) == 4 and float(learn.recorder.losses[-1]) == pytest.approx(
        last['train_loss'], rel=1e-4
    )


def test_only_training_steps_may_round_to_tf32(tmp_path, recipe, monkeypatch):
    seen, matmul = [], torch.backends.cuda.matmul
    for module in ('kdoct.training.loop', 'kdoct.training.precision'):
        monkeypatch.setattr(f'{module}.rounds_steps', lambda device: True)
    class Look(Callback):
        def after_pred(self): seen.append((self.training, matmul.allow_tf32))
        def after_loss(self): seen.append((self.training, matmul.allow_tf32))
        def before_step(self): seen.append((True, matmul.allow_tf32))        # backward is done
        def before_batch(self): seen.append(('input', matmul.allow_tf32))
    learn = learner(tmp_path, recipe.model_copy(update=dict(epochs=1)))
    learn.add_cb(Look())
    fit(learn)
    assert {rounds for part, rounds in seen if part is True} == {True}
    assert {rounds for part, rounds in seen if part is not True} == {False}   # validation, and the making of batches
    assert matmul.allow_tf32 is False


def test_an_ordered_precision_is_not_measured(tmp_path, recipe, quick):
    learn, asked = measured(learner(tmp_path, recipe.model_copy(update=dict(epochs=1))), 1., .5)
    assert fit(learn).model.precision == 'fp32' and not asked and not learn.precision.facts


def test_measuring_changes_nothing_that_is_trained(tmp_path, recipe, quick):
    r, ends = recipe.model_copy(update=dict(epochs=1, drop_rate=.5)), []
    for precision in ('fp32', 'auto'):
        torch.manual_seed(0)
        learn, _ = measured(
            learner(tmp_path / precision, r.model_copy(update=dict(precision=precision))), 1.0, 1.0
        )
        ends.append(fit(learn).model.body.state_dict())
    assert all(torch.equal(v, ends[1][k]) for k, v in ends[0].items())


def test_the_record_holds_steps_and_memory(trained):
    run, _ = trained
    stage = run.stage('fold_0/teacher')
    assert (
        stage['step_seconds'] is None
        and stage['tf32_steps'] is False
        and stage['peak_memory']['bytes'] > 2**26
    )


def with_maker(learn, make):
    "A learner whose compiler is `make`."
    learn.compile.make = make
    return fit(learn)


def test_where_nothing_can_be_compiled_training_goes_on_and_says_why(tmp_path, recipe, capsys):
    def make(forward, dynamic):
        def fails(x): raise RuntimeError('no compiler here')
        return fails
    learn = with_maker(
        learner(tmp_path, recipe.model_copy(update=dict(compile=True, epochs=1))), make
    )
    assert 'no compiler here' in capsys.readouterr().out and learn.compile.facts == dict(
        compiled=False, reason='RuntimeError: no compiler here'
    )
    assert len(learn.history.rows) == 1


@pytest.mark.parametrize('factor', [float('nan'), 1.5])
def test_compiled_kernels_that_compute_something_else_are_not_used(
    tmp_path, recipe, capsys, factor
):
    def make(forward, dynamic): return lambda x: factor*forward(x)
    learn = with_maker(
        learner(tmp_path, recipe.model_copy(update=dict(compile=True, epochs=1, drop_rate=0.0))),
        make,
    )
    assert (
        not learn.compile.facts['compiled']
        and 'A compiled step has loss' in learn.compile.facts['reason']
    )
    assert 'training goes on without' in capsys.readouterr().out
    assert np.isfinite(learn.history.rows[0]['train_loss'])


@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
def test_dropout_and_rounding_are_no_reason_against_compiled_kernels(tmp_path, recipe, precision):
    torch.manual_seed(0)
    r = recipe.model_copy(update=dict(compile=True, epochs=1, drop_rate=.5, precision=precision))
    learn = with_maker(
        learner(tmp_path, r), lambda forward, dynamic: lambda x: forward(x * (1 + 1e-5))
    )
    assert learn.compile.facts['compiled']


# torch keeps kernels in a folder, by a key that lacks the vector units they were made for: two processes that share the folder.
KEPT = textwrap.dedent('''
    import torch
    import torch._inductor.config
    from torch._dynamo.utils import counters
    from kdoct.training.precision import compile_here
    torch._inductor.config.cpp_cache_precompile_headers = False   # that pays for many kernels; this is one
    made, x = compile_here(lambda x: torch.softmax(x, 1).sum(0)), torch.arange(96.).reshape(4, 24).sin()
    assert torch.allclose(made(x), torch.softmax(x, 1).sum(0)), made(x)
    print(dict(counters['inductor']).get('fxgraph_cache_hit', 0))
''')


@pytest.mark.slow
def test_kernels_made_for_other_vector_units_are_not_taken_from_the_cache(tmp_path, monkeypatch):
    if not torch.backends.cpu.get_cpu_capability().startswith('AVX512'):
        pytest.skip('this processor has no two kinds of vector units to try')
    monkeypatch.setenv('TORCHINDUCTOR_CACHE_DIR', str(tmp_path))
    def hits(**env):
        for name, value in env.items(): monkeypatch.setenv(name, value)
        done = prepared.run(KEPT)
        if 'compiler' in done.stderr.lower() and done.returncode:
            pytest.skip('no C++ compiler here')
        assert done.returncode == 0, done.stderr
        return int(done.stdout.split()[-1])
    assert [hits(), hits(ATEN_CPU_CAPABILITY='avx2')] == [0, 0]


def test_only_training_batches_of_the_most_frequent_size_are_compiled(tmp_path, recipe):
    seen = []
    def make(forward, dynamic): return lambda x: seen.append(len(x)) or forward(x)
    learn = learner(tmp_path, recipe.model_copy(update=dict(compile=True, freeze_epochs=1)))
    learn.dls.train.rows = np.arange(20)   # 7, 7 and 6
    with_maker(learn, make)
    assert seen == [7]*5 and learn.compile.facts['compiled']   # the trial, and two batches in each of two epochs
    assert 'forward' not in learn.model.body.__dict__ and not any(
        '_orig_mod' in k for k in learn.model.body.state_dict()
    )


@pytest.mark.slow   # half a minute where torch has no kernels of this network in its cache
def test_compiled_training_has_the_losses_of_plain_training(tmp_path, recipe):
    rows = []
    for on in (False, True):
        torch.manual_seed(0)
        learn = fit(
            learner(
                tmp_path / str(on),
                recipe.model_copy(update=dict(compile=on, drop_rate=0.0, epochs=2)),
            )
        )
        rows.append(pd.DataFrame(learn.history.rows)[['train_loss', 'valid_loss']])
    if not learn.compile.facts['compiled']: pytest.skip(learn.compile.facts['reason'])
    assert np.allclose(*rows, atol=1e-3)


# --- steps, and how they are divided

class Targets(Callback):
    "Labels are places: each image gets its target from a table."
    order, run_valid = -5, False
    def __init__(self, table): self.table = table
    def before_batch(self): self.learn.yb = (self.table[self.yb[0]],)


class Gradients(Callback):
    "Keeps the gradient and the rate of every step."
    order, run_valid = 21, False
    def __init__(self): self.steps, self.rates = [], []
    def before_step(self):
        self.steps.append(torch.cat([p.grad.flatten() for p in self.model.parameters()]))
        self.rates.append(self.opt.opt.param_groups[0]['lr'])


TRUE = torch.tensor([0]*9 + [1]*5 + [2]*2)   # unequal classes
BLENDS = .7*torch.eye(3)[TRUE] + .3*torch.eye(3)[TRUE.roll(5)]


def gradients(folder, recipe, batch_size, table, teacher=None, n=16):
    "Gradients and rates of an epoch whose steps have 16 images, with a network without BatchNorm."
    r = recipe.model_copy(
        update=dict(
            arch='test_convnext2',
            batch_size=batch_size,
            accumulate=16 // batch_size,
            epochs=1,
            drop_rate=0.0,
            clip=0.0,
        )
    )
    images = np.random.default_rng(0).integers(0, 255, (n + 8, 32, 32), dtype=np.uint8)
    ids, labels = np.arange(n + 8, dtype=np.uint64), np.r_[np.arange(n) % 16, np.zeros(8, int)]
    torch.manual_seed(0)
    seen, said = (
        Gradients(),
        [Distill({'teacher': teacher}, DistillRecipe(temperature=2.0))] if teacher else [],
    )
    fit(
        make_learner(
            create_classifier(r, 3, 32),
            Batches(images, labels, ids, np.arange(n), batch_size, r.augment, 1),
            Batches(images, labels, ids, np.arange(n, n + 8), 8),
            hard_loss(r, TRUE.numpy(), 3),
            r,
            folder,
            cbs=[Targets(table), seen, *said],
        )
    )
    return torch.stack(seen.steps), seen.rates


@pytest.mark.parametrize('taught', [False, True], ids=['alone', 'with a teacher'])
@pytest.mark.parametrize('table', [TRUE, BLENDS], ids=['labels', 'blends'])
@pytest.mark.parametrize('how', [dict(), dict(label_smoothing=.1), dict(loss='focal')], ids=['ce', 'smoothed', 'focal'])
def test_the_gradient_with_class_weights_does_not_depend_on_the_micro_batch(
    tmp_path, recipe, how, table, taught
):
    torch.manual_seed(3)
    teacher = (
        InferenceModel(
            create_classifier(recipe.model_copy(update=dict(arch='test_vit')), 3, 32).eval()
        )
        if taught
        else None
    )
    r = recipe.model_copy(update=dict(class_weights='balanced', **how))
    whole, *parts = (gradients(tmp_path/str(b), r, b, table, teacher)[0] for b in (16, 4, 2, 1))
    plain = gradients(
        tmp_path / 'plain', r.model_copy(update=dict(class_weights='none')), 16, table, teacher
    )[0]
    for part in parts:
        torch.testing.assert_close(part, whole, rtol=1e-4, atol=1e-6*whole.abs().max().item())
    assert (plain - whole).norm() > .05*whole.norm()   # the weights do matter


def test_rates_do_not_depend_on_the_micro_batch(tmp_path, recipe):
    whole, *parts = (gradients(tmp_path/str(b), recipe, b, TRUE, n=41)[1] for b in (16, 4, 1))
    assert len(whole) == 3 and len(set(whole)) == 3 and parts == [whole, whole]


@pytest.mark.parametrize('batch', [1, 2, 4, 16])
def test_a_cnv_image_counts_1_75_times_as_much_as_a_normal_one_on_neh(batch):
    counts = [5667, 3742, 3240]   # NORMAL, DRUSEN, CNV after the published selection
    labels = np.repeat([0, 1, 2], counts)
    loss, order = (
        hard_loss(preset('paper-neh').teacher, labels, 3),
        np.random.default_rng(0).permutation(len(labels))[:1600],
    )
    z, y = torch.zeros(1600, 3, requires_grad=True), torch.from_numpy(labels[order])
    for i in range(0, 1600, batch): (loss(z[i:i + batch], y[i:i + batch])*batch/16).backward()
    felt = z.grad.norm(dim=1)
    means = [felt[y == c].mean().item() for c in range(3)]
    assert means[2] / means[0] == pytest.approx(1.75, abs=0.005) and means[1] / means[
        0
    ] == pytest.approx(5667 / 3742, rel=1e-3)


def test_balanced_weights_have_mean_one_even_if_a_class_has_no_image():
    labels = np.array([0, 0, 0, 2])
    assert (
        balanced_weights(labels, 3)[labels].mean() == pytest.approx(1)
        and balanced_weights(labels, 3)[1] == 0
    )


@pytest.mark.parametrize('processes', [1, 2, 3, 4])
@pytest.mark.parametrize(('batch', 'accumulate'), [(8, 1), (4, 4), (1, 16), (3, 2)])
def test_steps_of_an_epoch_differ_by_one_image_and_no_batch_is_tiny(batch, accumulate, processes):
    for n in (1, 5, 16, 33, 41, 64, 97, 1000):
        plan = even_batches(n, batch*accumulate, batch*processes)
        assert [i for p in plan for i in range(p.first, p.last)] == list(range(n))
        sizes = {p.step: p.images for p in plan}
        assert (
            sum(sizes.values()) == n
            and max(sizes.values()) - min(sizes.values()) <= 1
            and max(sizes.values()) <= batch * accumulate
        )
        alone = even_batches(n, batch*accumulate, batch)
        assert {p.step: p.images for p in alone} == sizes   # the same steps on any number of processes
        assert [
            p.step
            for p, q in zip(plan, [*plan[1:], None], strict=True)
            if q is None or q.step != p.step
        ] == [p.step for p in plan if p.ends]
        if len(sizes) > 1:
            assert min(p.last - p.first for p in plan) >= min(batch*processes, batch*accumulate)//2


def test_whole_steps_are_what_they_were():
    assert [(p.step, p.first, p.last) for p in even_batches(48, 16, 8)] == [
        (i // 2, 8 * i, 8 * i + 8) for i in range(6)
    ]


def test_a_step_that_cannot_be_shared_is_refused(tmp_path, recipe, monkeypatch):
    monkeypatch.setattr('kdoct.training.loop.rank_world', lambda: (0, 9))
    with pytest.raises(KdoctError, match='step of 8 images cannot be shared by 9 processes'):
        learner(tmp_path, recipe.model_copy(update=dict(accumulate=1)))


def test_a_batch_of_one_image_is_not_blended_with_itself(tmp_path, recipe):
    with pytest.raises(KdoctError, match='one image cannot be blended'):
        gradients(tmp_path, recipe.model_copy(update=dict(mix_prob=.5)), 1, TRUE)


def test_a_full_memory_names_smaller_batches_of_the_same_step(tmp_path, monkeypatch):
    monkeypatch.setenv('KDOCT_OUTPUTS', str(tmp_path))
    run = create_run('t', preset('tiny', **{'teacher.batch_size': 12, 'teacher.accumulate': 2}))
    prepare_data(run)
    def full(*_): raise torch.OutOfMemoryError('CUDA out of memory')
    monkeypatch.setattr('kdoct.training.results.hard_loss', lambda *_: full)
    with pytest.raises(KdoctError, match='batches of 12 images') as e: train_teacher(run, 0)
    assert '--set teacher.batch_size=6 --set teacher.accumulate=4' in e.value.fix


# --- validation that is not finite

def validated(monkeypatch, losses):
    "Every epoch has the next of these validation losses, and a better accuracy than the one before."
    results = iter(
        [
            dict(valid_loss=v, accuracy=1 - 0.1 * i, balanced_accuracy=0.5)
            for i, v in enumerate(losses)
        ]
    )
    monkeypatch.setattr('kdoct.training.loop.validation_scores', lambda *_: next(results))


@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
@pytest.mark.parametrize('monitor', ['loss', 'accuracy'])
def test_a_validation_loss_that_is_not_finite_is_never_the_best(
    tmp_path, recipe, monkeypatch, monitor, bad
):
    validated(monkeypatch, [bad, 2., bad])
    learn = fit(learner(tmp_path, recipe.model_copy(update=dict(monitor=monitor))))
    assert (
        learn.checkpoint.best_epoch == 1
        and learn.checkpoint.best_file(1).exists()
        and not learn.checkpoint.best_file(0).exists()
    )


def test_without_any_finite_validation_loss_training_ends_with_an_error(
    tmp_path, recipe, monkeypatch
):
    validated(monkeypatch, [float('nan')]*3)
    with pytest.raises(KdoctError, match='not finite in any of 3 epochs'):
        fit(learner(tmp_path/'a', recipe))
    validated(monkeypatch, [float('nan')]*3)
    with pytest.raises(KdoctError, match='not finite in any of 2 epochs'):
        fit(learner(tmp_path/'b', recipe.model_copy(update=dict(patience=2))))


# --- head and weight decay

def without_weights(arch):
    with torch.device('meta'): return timm.create_model(arch, num_classes=3)


@pytest.mark.parametrize(
    ('arch', 'names'),
    [
        ('convnextv2_tiny', {'head.norm', 'head.fc'}),
        ('swin_s3_tiny_224', {'head.fc'}),
        ('vgg19', {'head.fc'}),
        ('efficientnet_b2', {'classifier'}),
        ('visformer_small', {'head'}),
        ('deit_tiny_distilled_patch16_224', {'head', 'head_dist'}),
        ('beit_base_patch16_224', {'head', 'fc_norm'}),
    ],
)
def test_the_head_is_the_classifier_and_what_timm_keeps_with_it(arch, names):
    body = without_weights(arch)
    mine = {id(p) for m in head_modules(body) for p in m.parameters()}
    assert {n.rsplit('.', 1)[0] for n, p in body.named_parameters() if id(p) in mine} == names


@pytest.mark.parametrize(
    ('arch', 'table', 'how_many'),
    [
        ('swin_s3_tiny_224', 'relative_position_bias_table', 12),
        ('vit_tiny_patch16_224', 'pos_embed', 1),
        ('vit_tiny_patch16_224', 'cls_token', 1),
        ('levit_128s', 'attention_biases', 11),
        ('visformer_small', 'pos_embed', 3),
        ('samvit_base_patch16', 'rel_pos_h', 12),
    ],
)
def test_tokens_and_tables_of_positions_do_not_decay(arch, table, how_many):
    body = without_weights(arch)
    free = {id(p) for p in undecayed(body)}
    assert (
        sum(table in n and p.ndim > 1 for n, p in body.named_parameters() if id(p) in free)
        == how_many
    )
    assert all(id(p) in free for n, p in body.named_parameters() if p.ndim <= 1 or table in n)
    assert not any(id(p) in free for n, p in body.named_parameters() if n.endswith('qkv.weight'))


@pytest.mark.parametrize('arch', ['test_efficientnet', 'test_convnext2', 'vit_tiny_patch16_224'])
def test_what_does_not_decay_is_what_timm_says(arch):
    from timm.optim import param_groups_weight_decay  # here: it loads torch's compiler
    body = without_weights(arch)
    body.get_classifier().bias.requires_grad_(False)
    names = body.no_weight_decay() if hasattr(body, 'no_weight_decay') else ()
    groups = param_groups_weight_decay(body, 1., no_weight_decay_list=(*names, '*pos_embed'))
    theirs = [p for g in groups if g['weight_decay'] == 0 for p in g['params']]
    assert list(map(id, undecayed(body))) == list(map(id, theirs))


def test_the_norm_of_a_convnext_head_learns_with_it(tmp_path, recipe):
    r = recipe.model_copy(
        update=dict(arch='test_convnext2', freeze_epochs=2, lr=1e-3, lr_head=1e-2)
    )
    learn = learner(tmp_path, r)
    start, seen = {k: v.clone() for k, v in learn.model.body.state_dict().items()}, AtEpochEnd()
    learn.add_cb(seen)
    fit(learn)
    assert {k for k in start if not torch.equal(start[k], seen.states[1][k])} == {
        'head.norm.weight',
        'head.norm.bias',
        'head.fc.weight',
        'head.fc.bias',
    }
    fast = {id(p) for g in param_groups(learn.model, r) if g['peak'] == 1e-2 for p in g['params']}
    assert {n for n, p in learn.model.body.named_parameters() if id(p) in fast} == {
        'head.norm.weight',
        'head.norm.bias',
        'head.fc.weight',
        'head.fc.bias',
    }
