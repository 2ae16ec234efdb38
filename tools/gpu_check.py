"""Does kdoct use a GPU rightly, and how fast: `python tools/gpu_check.py [--minutes 8] [--only ITEM ...]`.

Each item runs in a process of its own, which is ended when its time is over; what it found is written to the JSON
file before the next one begins, so that neither a crash nor a hang loses the rest. No network and no data is needed:
images and weights are random. `--device cpu --small` runs the same code with tiny networks, to test this script.
docs/speed.md says how to run it on a machine without network.
"""
import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

os.environ.setdefault('PYTORCH_NVML_BASED_CUDA_CHECK', '1')   # to ask for a GPU must not open it before the fork
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from fastai.callback.core import Callback, CancelFitException
from torch import nn

from kdoct.app.bench_harness import clock, machine_rates, wait_for
from kdoct.core.files import seed_everything
from kdoct.core.presets import preset
from kdoct.data.batches import Batches
from kdoct.distill.callback import Distill
from kdoct.distill.teacher_cache import TeacherCache
from kdoct.explain.cam import score_cam
from kdoct.models.arithmetic import autocast, computes_bf16, float32_products
from kdoct.models.backbones import create_classifier
from kdoct.models.cost import count_macs
from kdoct.training.distributed import best_device
from kdoct.training.inference import InferenceModel
from kdoct.training.loop import make_learner
from kdoct.training.losses import cross_entropy, hard_loss
from kdoct.training.precision import peak_memory

ITEMS = {}   # name -> (seconds it may take, function of the settings)
SMALL = dict(teacher='test_resnet.r160_in1k', student='tf_efficientnet_lite0')
# images of a training part, and how often it is trained on: NEH without the worst cases in five folds, UCSD once
TRAINED_ON = {'paper-neh': (8100, 5), 'paper-ucsd': (92000, 1)}
HARDWARE = 6.   # operations a multiply-add of a training step: forward two, backward four


class Left(Exception): "An item that cannot run here."


def item(seconds):
    "Register an item, by the name of its function."
    def add(f):
        ITEMS[f.__name__.replace('_', '-')] = seconds, f
        return f
    return add


def recipe_of(o, name='paper-neh', role='student', **changes):
    "The recipe of one role of a preset, with random weights; tiny with --small."
    recipe = preset(name)
    training, size = recipe.training(role), recipe.data.size
    changes = dict(weights='none', freeze_epochs=0, precision='auto', compile=False) | changes
    if o.small:
        size = 64
        changes |= dict(arch=SMALL[role], batch_size=4, accumulate=min(2, training.accumulate))
    return training.model_copy(update=changes), size


def images(n, size, seed=0):
    "Random pictures, labels and numbers."
    g = np.random.default_rng(seed)
    side = size + size//12
    pixels = g.integers(0, 255, (n, side, side), dtype=np.uint8)
    return pixels, np.arange(n) % 3, np.arange(n, dtype=np.uint64)


def learner(o, recipe, size, folder, n, cbs=(), seed=1):
    "A Learner of kdoct's own with random pictures, whose epoch has `n` images."
    seed_everything(seed)
    pixels, labels, ids = images(n, size)
    model = create_classifier(recipe, 3, size, o.device)
    place = dict(device=o.device, size=size)
    train = Batches(pixels, labels, ids, np.arange(n), recipe.batch_size, recipe.augment, 1, **place)
    valid = Batches(pixels, labels, ids, np.arange(8), 8, **place)
    loss = hard_loss(recipe, labels, 3, o.device)
    return make_learner(model, train, valid, loss, recipe, folder, 'check', cbs)


def fit(learn, epochs=1):
    "Train without bars."
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs)
    return learn


class Clock(Callback):
    "Times optimiser steps after the first few, and ends the training."
    order, run_valid = 100, False
    def __init__(self, device, skip, steps):
        self.device, self.skip, self.steps, self.seen = device, skip, steps, 0
    def after_batch(self):
        if not self.learn.accumulate.last: return
        self.seen += 1
        if self.seen == self.skip:
            wait_for(self.device)
            self.began = time.perf_counter()
        if self.seen == self.steps:
            wait_for(self.device)
            self.seconds = (time.perf_counter() - self.began)/(self.steps - self.skip)
            raise CancelFitException


@item(40)
def card(o):
    "What is here, and how fast it multiplies."
    about = dict(torch=torch.__version__, cuda=torch.version.cuda, processor=os.cpu_count())
    if o.device.type == 'cuda':
        p = torch.cuda.get_device_properties(o.device)
        about |= dict(name=p.name, capability=f'{p.major}.{p.minor}', memory_gib=p.total_memory/2**30,
                      cudnn=torch.backends.cudnn.version())
    rates = machine_rates(o.device)
    if o.device.type == 'cuda':
        with float32_products(True): rates['tf32'] = machine_rates(o.device)['fp32']
    return about | {f'{k}_{"gb" if k == "copy" else "tflop"}_per_s': v/(1e9 if k == 'copy' else 1e12)
                    for k, v in rates.items()}


@item(30)
def moves(o):
    "Views, labels and losses on the device are those of the CPU."
    recipe, size = recipe_of(o)
    pixels, labels, ids = images(8, size)
    changed = recipe.augment.device.model_copy(update=dict(prob=.8))
    changed = recipe.augment.model_copy(update=dict(device=changed))
    worst = {}
    for name, how in dict(plain=None, random=recipe.augment, devices=changed).items():
        given = pixels, labels, ids, np.arange(8), 8, how, 1
        made = [Batches(*given, device, size) for device in ('cpu', o.device)]
        (x, y), (there, labels_there) = (next(iter(b)) for b in made)
        assert there.device.type == o.device.type and torch.equal(y, labels_there.cpu())
        gap = (x - there.cpu()).abs()
        worst[f'{name}_median'], worst[f'{name}_max'] = float(gap.median()), float(gap.max())
        assert gap.median() < 1e-3, worst
    z, t = torch.randn(8, 3), torch.arange(8) % 3
    gap = abs(float(cross_entropy(z, t)) - float(cross_entropy(z.to(o.device), t.to(o.device))))
    assert gap < 1e-5
    return dict(worst, loss_gap=gap)


@item(40)
def arithmetic(o):
    "float32 is exact outside training steps, rounded to TF32 where that is allowed; bfloat16 ends in float32 logits."
    torch.manual_seed(0)
    a, b = torch.randn(2, 512, 512)
    x, w = torch.randn(4, 32, 32, 32), torch.randn(64, 32, 3, 3)
    todo = dict(product=(torch.mm, a, b), convolution=(torch.conv2d, x, w))
    found = dict(bf16=computes_bf16(o.device))
    for name, (f, *given) in todo.items():
        exact = f(*(v.double() for v in given))
        for rounded in (False, True):
            with float32_products(rounded): made = f(*(v.to(o.device) for v in given)).cpu()
            error = float((made - exact).norm()/exact.norm())
            found[f'{name}_error_{"tf32" if rounded else "fp32"}'] = error
            assert error < (2e-3 if rounded else 2e-6), found
        if o.device.type == 'cuda' and torch.cuda.is_tf32_supported():
            assert found[f'{name}_error_tf32'] > 1e-5, 'TF32 was allowed and not used'
    if o.device.type == 'cuda':   # as best_device() has left it
        assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32
    recipe, size = recipe_of(o, precision='bf16')
    model = create_classifier(recipe, 3, size, o.device).eval()
    x = torch.rand(2, 1, size, size, device=o.device)
    with torch.no_grad(): low = model(x)
    model.precision = 'fp32'
    with torch.no_grad(): full = model(x)
    found['bf16_logits_gap'] = float((low - full).norm()/full.norm())
    assert low.dtype is torch.float32 and found['bf16_logits_gap'] < .1
    ones = torch.ones(2, 2, device=o.device)
    with autocast('bf16', o.device): assert (ones @ ones).dtype is torch.bfloat16
    return found


@item(60)
def resume(o):
    "A training that is broken off goes on with the same random numbers and ends with the same weights."
    recipe, size = recipe_of(o, drop_rate=.3, checkpoint_minutes=1e-9, epochs=2, accumulate=1,
                             precision='fp32', mix_prob=0., average='none', patience=0)
    recipe = recipe.model_copy(update=dict(batch_size=8))
    class Stop(Callback):
        order, run_valid, left = 100, False, 6
        def after_batch(self):
            self.left -= 1
            if not self.left: raise KeyboardInterrupt
    class Random(Callback):   # before Checkpoint (50), which saves the random state
        order, run_valid = 40, False
        def after_batch(self): self.drawn = torch.rand(4, device=self.dls.device).cpu()
    def made(folder, *cbs):   # 4 batches an epoch
        return learner(o, recipe, size, f'{o.folder}/{folder}', 32, [Random(), *cbs])
    whole = fit(made('a'), 2)
    try: fit(made('b', Stop()), 2)
    except KeyboardInterrupt: pass
    resumed = fit(made('b'), 2)
    assert resumed.first_epoch == 1
    gaps = [float((a - b).norm()/a.norm().clamp_min(1e-9)) for a, b in
            zip(whole.model.parameters(), resumed.model.parameters(), strict=True)]
    same = torch.equal(whole.random.drawn, resumed.random.drawn)
    assert same and max(gaps) < 1e-2, (same, max(gaps))
    return dict(random_numbers_equal=same, weights_largest_relative_gap=max(gaps), bit_equal=max(gaps) == 0)


def timed(o, name, role, how='alone'):
    "Steps of a role of a preset: how fast, in how much memory, how many hours the whole would take."
    recipe, size = recipe_of(o, name, role)
    steps, skip = (4, 1) if o.small else (30, 5)
    n = recipe.batch_size*recipe.accumulate*(steps + 1)
    cbs, about = [], {}
    macs = count_macs(create_classifier(recipe, 3, size).eval().body, size)
    operations = HARDWARE*macs
    if how != 'alone':
        teacher_recipe, _ = recipe_of(o, name, 'teacher')
        teacher = create_classifier(teacher_recipe, 3, size, o.device).eval().requires_grad_(False)
        quick = InferenceModel(teacher, 'bf16' if computes_bf16(o.device) else 'fp32', o.device)
        distillation = preset(name).distillation('student')
        distillation = distillation.model_copy(update=dict(views=int(how == 'cached')))
        if how == 'online': operations += 2*count_macs(teacher.body, size)
        asked = TeacherCache(quick, how, 32, how) if how == 'cached' else quick
        cbs.append(Distill(asked, distillation))
    watch = Clock(o.device, skip, steps)
    if o.device.type == 'cuda': torch.cuda.reset_peak_memory_stats(o.device)
    learn = fit(learner(o, recipe, size, f'{o.folder}/{name}-{role}-{how}', n, [*cbs, watch]))
    rate = recipe.batch_size*recipe.accumulate/watch.seconds
    numbers, folds = TRAINED_ON[name]
    for teacher in learn.distill.teachers.values() if how == 'cached' else ():
        about['cache_images_per_s'] = teacher.queried/teacher.seconds
    kind = 'bf16' if learn.model.precision == 'bf16' else 'fp32'
    with float32_products(kind == 'fp32' and o.device.type == 'cuda'): most = machine_rates(o.device)[kind]
    return dict(about, precision=learn.model.precision, batch=recipe.batch_size,
                accumulate=recipe.accumulate, step_seconds=watch.seconds, images_per_s=rate,
                peak_gib=peak_memory(o.device)['bytes']/2**30,
                share_of_matrix_rate=rate*operations/most, hours_a_fold=numbers*recipe.epochs/rate/3600,
                hours_of_all_folds=folds*numbers*recipe.epochs/rate/3600)


def _register_timed():
    "Three items for each preset of the paper."
    for name in TRAINED_ON:
        for role, how in (('teacher', 'alone'), ('student', 'online'), ('student', 'cached')):
            def run(o, name=name, role=role, how=how): return timed(o, name, role, how)
            run.__doc__ = f"Steps of the {role} of {name}, {how}."
            ITEMS[f'{name}-{role}' + ('' if how == 'alone' else f'-{how}')] = 60, run


_register_timed()


@item(30)
def no_waiting(o):
    "No step waits for the GPU, with a teacher, accumulation, averaging and class weights."
    if o.device.type != 'cuda': raise Left('only CUDA says when it is waited for')
    recipe, size = recipe_of(o, accumulate=2, batch_size=4, average='ema', class_weights='balanced', clip=1.)
    teacher = create_classifier(recipe, 3, size, o.device).eval().requires_grad_(False)
    waits = []
    class Watch(Callback):
        order, run_valid = -100, False
        def before_batch(self):
            if self.iter == 4: torch.cuda.set_sync_debug_mode('warn')   # the first batches look once
        def after_train(self): torch.cuda.set_sync_debug_mode('default')
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        cbs = [Distill(InferenceModel(teacher, 'fp32', o.device)), Watch(), Clock(o.device, 8, 9)]
        fit(learner(o, recipe, size, f'{o.folder}/waiting', 96, cbs))
    waits = sorted({f'{Path(w.filename).name}:{w.lineno}' for w in seen if 'synchroniz' in str(w.message)})
    waits = [w for w in waits if not w.startswith('gpu_check')]
    assert not waits, waits
    return dict(waits=0)


@item(90)
def compiled(o):
    "torch.compile of the student's step: the same loss, and what it saves."
    found = {}
    for name, compile_it in dict(plain=False, compiled=True).items():
        recipe, size = recipe_of(o, compile=compile_it, precision='fp32')
        step = recipe.batch_size*recipe.accumulate
        watch = Clock(o.device, 5, 15)
        learn = fit(learner(o, recipe, size, f'{o.folder}/{name}', 16*step, [watch]))
        found[f'{name}_step_seconds'] = watch.seconds
        if compile_it: found |= learn.compile.facts
    assert found['compiled'], found['reason']
    return found


@item(40)
def graphs(o):
    "An inference copy as a CUDA graph: the same logits, and what it saves for one image."
    if o.device.type != 'cuda': raise Left('CUDA graphs need CUDA')
    recipe, size = recipe_of(o)
    quick = InferenceModel(create_classifier(recipe, 3, size, o.device), 'fp32', o.device)
    x = torch.rand(1, 1, size, size, device=o.device)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side), torch.no_grad():
        for _ in range(3): quick(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph): out = quick(x)
    x.copy_(torch.rand(1, 1, size, size))
    graph.replay()
    want = quick(x)
    assert torch.allclose(out, want, rtol=1e-3, atol=1e-4), (out, want)
    plain, replayed = ([clock(f, o.device) for _ in range(30)] for f in (lambda: quick(x), graph.replay))
    return dict(plain_ms=1e3*statistics.median(plain), graph_ms=1e3*statistics.median(replayed))


@item(40)
def streams(o):
    "Batches that are made on a stream of their own are those made in turn, and cost less beside a training step."
    recipe, size = recipe_of(o, accumulate=1)
    n = 4*recipe.batch_size if o.small else 24*recipe.batch_size
    pixels, labels, ids = images(n, size)
    given = pixels, labels, ids, np.arange(n), recipe.batch_size, recipe.augment, 1, o.device, size
    def made(): return Batches(*given)
    model = create_classifier(recipe, 3, size, o.device)
    def use(x): model(x).float().square().mean().backward()
    ahead = [x.clone() for x, _ in made()]
    single = made()
    for x, rows in zip(ahead, single.parts(), strict=True):
        assert torch.allclose(x, single.batch(rows)[0], atol=1e-5)
    def in_turn():
        for rows in single.parts(): use(single.batch(rows)[0])
    def streamed():
        for x, _ in made(): use(x)
    def alone():
        for x in ahead: use(x)
    alone()
    return {k: clock(f, o.device)/n*1e3 for k, f in
            dict(network_ms=alone, streamed_ms=streamed, in_turn_ms=in_turn).items()}


def network_of(o):
    "The student's network on the CPU, the same each time, and the side of its pictures."
    recipe, size = recipe_of(o)
    seed_everything(0)
    return create_classifier(recipe, 3, size, 'cpu').eval(), size


@item(60)
def cam(o):
    "Approximate Score-CAM is near the exact one, both on the device."
    model, size = network_of(o)
    x = torch.rand(1, 1, size, size)
    began = time.perf_counter()
    quick = score_cam(model.to(o.device), x.to(o.device), classes=1, batch=32)
    seconds = time.perf_counter() - began
    exact = score_cam(model, x.to(o.device), classes=1, tolerance=0, batch=32)
    gap = float((quick.maps - exact.maps).abs().max())
    assert gap < .1 and exact.maps.isfinite().all(), gap
    return dict(seconds=seconds, gap_to_exact=gap, **quick.cost[0])


@item(60)
def predict(o):
    "Logits of an inference copy on the device are those of the CPU; images a second."
    model, size = network_of(o)
    for m in model.modules():   # as trained: statistics that are not 0 and 1
        if isinstance(m, nn.BatchNorm2d): m.running_var.uniform_(.5, 1.5)
    x = torch.rand(4, 1, size, size)
    want, found = InferenceModel(model)(x), {}
    for precision in ('fp32', *(['bf16'] if computes_bf16(o.device) else [])):
        quick = InferenceModel(model, precision, o.device)
        gap = float((quick(x.to(o.device)).cpu() - want).norm()/want.norm())
        assert gap < (1e-3 if precision == 'fp32' else .1), (precision, gap)
        many = torch.rand(4 if o.small else 64, 1, size, size, device=o.device)
        times = [clock(lambda quick=quick, many=many: quick(many), o.device) for _ in range(4)][1:]
        found |= {f'{precision}_gap': gap, f'{precision}_images_per_s': len(many)/statistics.median(times)}
    return found


def _work(name, o, pipe):
    "One item, in a process of its own."
    torch.set_num_threads(max(1, int(os.environ.get('OMP_NUM_THREADS', os.cpu_count() or 1))))
    began = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory() as o.folder:
            os.environ['KDOCT_OUTPUTS'] = o.folder
            if o.device.type == 'cuda': o.device = best_device()
            result = dict(status='passed', **ITEMS[name][1](o))
    except Left as e: result = dict(status='left out', reason=str(e))
    except BaseException as e:  # noqa: BLE001 (it is what the item has found)
        result = dict(status='failed', reason=f'{type(e).__name__}: {e}', trace=traceback.format_exc()[-3000:])
    pipe.send(result | dict(seconds=time.perf_counter() - began))


def run_item(name, o, seconds):
    "What an item finds within its time."
    kind = 'fork' if 'fork' in multiprocessing.get_all_start_methods() else 'spawn'
    context = multiprocessing.get_context(kind)
    mine, theirs = context.Pipe(False)
    process = context.Process(target=_work, args=(name, o, theirs))
    process.start()
    theirs.close()
    try:
        if mine.poll(seconds): return mine.recv()
        return dict(status='failed', reason=f'not done in {seconds:.0f} s', seconds=seconds)
    except EOFError:
        process.join()
        return dict(status='failed', reason=f'its process ended with {process.exitcode}', seconds=0.)
    finally:
        process.join(2)
        if process.is_alive(): process.kill()


def as_text(value):
    "A number as a table shows it."
    return f'{value:.4g}' if isinstance(value, float) else str(value)


def table(results):
    "One row an item, as Markdown."
    rows = ['| item | | s | found |', '| --- | --- | --- | --- |']
    for name, r in results.items():
        rest = {k: v for k, v in r.items() if k not in ('status', 'seconds', 'trace')}
        found = ', '.join(f'{k} {as_text(v)}' for k, v in rest.items()).replace('\n', ' ').replace('|', '/')
        rows.append(f"| {name} | {r['status']} | {r['seconds']:.1f} | {found} |")
    return '\n'.join(rows)


def options(arguments=None):
    "What the command line says."
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--device', default='cuda', type=torch.device, help='cuda (default) or cpu')
    p.add_argument('--small', action='store_true', help='tiny networks and pictures, few steps')
    p.add_argument('--minutes', type=float, default=8, help='time for all items (default: 8)')
    p.add_argument('--only', nargs='+', choices=list(ITEMS), metavar='ITEM', help=', '.join(ITEMS))
    p.add_argument('--out', type=Path, default=Path('gpu_check.json'), help='file of the results')
    return p.parse_args(arguments)


def main(arguments=None):
    "Run the items; 0 if none has failed."
    o, began, results = options(arguments), time.perf_counter(), {}
    if o.device.type == 'cuda' and not torch.cuda.is_available():
        print('torch sees no GPU here. Run it where there is one; --device cpu --small tries the script itself.')
        return 2
    for name in o.only or ITEMS:
        left = 60*o.minutes - (time.perf_counter() - began)
        print(f'{name}: {ITEMS[name][1].__doc__}', flush=True)
        if left < 5: results[name] = dict(status='left out', reason='no time is left', seconds=0.)
        else: results[name] = run_item(name, o, min(ITEMS[name][0], left))
        o.out.write_text(json.dumps(dict(arguments=vars(o) | dict(device=str(o.device), out=str(o.out)),
                                         results=results), indent=1, default=str), encoding='utf-8')
    print(f'\n{table(results)}\n\n{o.out}')
    return int(any(r['status'] == 'failed' for r in results.values()))


if __name__ == '__main__': sys.exit(main())
