"Several processes train as one does; what one of them meets, all meet."
import re
import shutil
import textwrap

import numpy as np
import pandas as pd
import prepared
import pytest
import torch
from conftest import copied_run
from safetensors.torch import load_file

from kdoct.core.files import KdoctError
from kdoct.core.runs import create_run
from kdoct.core.sections import DistillRecipe
from kdoct.data.stage import prepare_data
from kdoct.distill import own_teacher, preparation, student, teacher
from kdoct.models.arithmetic import float32_products
from kdoct.training import distributed, results

# Trains with toy images, in as many processes as wanted. A process that has imported everything splits; a launcher would start several.
SCRIPT = textwrap.dedent('''
    import os, signal, socket, sys, warnings
    warnings.simplefilter('ignore')
    import numpy as np, pandas as pd, torch
    from fastai.callback.core import Callback
    from safetensors.torch import save_file
    from kdoct.core.files import seed_everything
    from kdoct.core.presets import preset
    from kdoct.core.sections import DistillRecipe
    from kdoct.data.unlabelled_batches import UnlabelledBatches
    from kdoct.distill.callback import Distill
    from kdoct.models.backbones import create_classifier
    from kdoct.training.distributed import DistributedBatches, init_group, propagate_failure, rank_world
    from kdoct.training.inference import InferenceModel
    from kdoct.training.loop import make_learner
    from kdoct.training.losses import hard_loss

    def train(folder, processes, batch, stop_at=None, rows=41, method='', side=32, options={}, unlabelled=False, epochs=3, **changes):
        with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
        children = [pid for r in range(1, processes) if (pid := os.fork()) or os.environ.update(RANK=str(r))]
        os.environ.update({'RANK': '0'} | dict(os.environ), WORLD_SIZE=str(processes), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), KDOCT_STAGE='test')
        rank, size = init_group()
        g = np.random.default_rng(0)
        images, labels, ids = g.integers(0, 255, (64, side, side), dtype=np.uint8), np.array([0, 0, 0, 1, 1, 2])[np.arange(64) % 6], np.arange(64, dtype=np.uint64)
        r = preset('tiny').student.model_copy(update=dict(arch='test_convnext2', epochs=epochs, batch_size=batch, drop_rate=0., lr=1e-3,
                                                          checkpoint_minutes=1e-9, freeze_epochs=1, **changes))
        seed_everything(1 + rank)   # all begin as process 0 does
        class Stop(Callback):
            order, run_valid, seen = 100, False, 0
            def after_batch(self):
                self.seen += 1
                if self.seen == stop_at and rank == size - 1: raise ValueError('out of luck')
        share, loss = rank_world(), hard_loss(r, labels[:rows], 3)
        train = DistributedBatches(images, labels, ids, np.arange(rows), batch, r.augment, 1, share=share)
        valid = DistributedBatches(images, labels, ids, np.arange(rows, 64), 8, share=share)
        cbs = [Stop()]
        if method:
            torch.manual_seed(0)
            teacher = create_classifier(r, 3, side).eval().requires_grad_(False)
            others = np.arange(rows, 64)   # without a label
            def found(train): return UnlabelledBatches(train, others, ids[others], batch)
            cbs.append(Distill(InferenceModel(teacher), DistillRecipe(method=method, options=options), originals=lambda name: teacher,
                               unlabelled=found if unlabelled else None))
            torch.manual_seed(1)
        learn = make_learner(create_classifier(r, 3, side), train, valid, loss, r, folder, 'k', cbs)
        try:
            with propagate_failure(), learn.no_bar(), learn.no_logging(): learn.fit(epochs)
        except Exception as e: print(rank, type(e).__name__, e, flush=True)
        else:
            pd.DataFrame(learn.history.rows).drop(columns='seconds').to_csv(f'{folder}/history{rank}.csv', index=False)
            moments = {str(k): v['exp_avg'].contiguous() for k, v in learn.opt.opt.state_dict()['state'].items()}   # of the last step
            save_file(moments, f'{folder}/end{rank}.safetensors')
        if rank: os._exit(0)
        for pid in children: os.waitpid(pid, 0)
''')


def run(code, tmp_path):
    "Run `code` after the script, on one thread a process; what it printed."
    for d in 'ab': (tmp_path/d).mkdir()
    done = prepared.run(SCRIPT + code, folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


PSEUDO_LABELS = (
    "method='self_training', unlabelled=True, rows=40, options=dict(mixup=0, threshold=0, ramp=0)"
)
FOCAL = "class_weights='balanced', loss='focal', label_smoothing=.1"


@pytest.mark.slow
@pytest.mark.parametrize(
    'how',
    [FOCAL, "loss='auc'", "method='efcm', side=64", "method='ctcd', loss='auc'", PSEUDO_LABELS],
)
def test_two_processes_train_as_one_whatever_the_batches(tmp_path, how):
    run(f"if os.fork() == 0: train('a', 2, 2, accumulate=4, {how}); os._exit(0)\n"
        f"os.wait(); train('b', 1, 8, {how})", tmp_path)   # 41 images in steps of at most 8
    a, other, b = (
        pd.read_csv(tmp_path / f) for f in ('a/history0.csv', 'a/history1.csv', 'b/history0.csv')
    )
    pd.testing.assert_frame_equal(a, other, check_exact=True)
    pd.testing.assert_frame_equal(a, b, check_exact=False, rtol=1e-4, atol=1e-4)
    assert len(a) == 3 and a.train_loss.nunique() == 3
    first, second = (load_file(tmp_path/f'a/end{r}.safetensors') for r in (0, 1))
    assert all(np.array_equal(first[k], second[k]) for k in first)


@pytest.mark.slow
def test_what_fails_in_one_ends_the_other_and_both_go_on_exactly(tmp_path):
    said = run(
        "if os.fork() == 0: train('a', 2, 4, mix_prob=.5); os._exit(0)\nos.wait()\n"
        "if os.fork() == 0: train('b', 2, 4, stop_at=9, mix_prob=.5); os._exit(0)\nos.wait(); "
        "train('b', 2, 4, mix_prob=.5)",
        tmp_path,
    )
    assert re.search(r'^1 ValueError .*?out of luck', said, re.M | re.S)
    assert re.search(
        r'^0 KdoctError Process 1 of this training failed: .*?out of luck', said, re.M | re.S
    )
    for rank in (0, 1):
        pd.testing.assert_frame_equal(
            *(pd.read_csv(tmp_path / d / f'history{rank}.csv') for d in 'ab'), check_exact=True
        )
        a, b = (load_file(tmp_path/d/f'end{rank}.safetensors') for d in 'ab')
        assert all(np.array_equal(a[k], b[k]) for k in a)


@pytest.fixture
def gpus(monkeypatch):
    "Four GPUs that nobody can compute on, seen by process 2 of 4; which one was made current."
    current = []
    for k, v in dict(WORLD_SIZE='4', RANK='2', LOCAL_RANK='2').items(): monkeypatch.setenv(k, v)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 4)
    monkeypatch.setattr(torch.cuda, 'set_device', current.append)
    with float32_products(True): yield current


def test_each_process_has_its_own_gpu_whether_it_has_met_the_others_or_not(gpus):
    assert distributed.best_device() == torch.device('cuda', 2) == gpus[-1]
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32


def test_more_processes_than_gpus_are_refused(gpus, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    with pytest.raises(KdoctError, match='no GPU for process 2 of this machine, which has 2'):
        distributed.best_device()
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)   # the launcher shows each process its own alone
    assert distributed.best_device() == torch.device('cuda', 0)


def test_processes_meet_before_a_teacher_is_loaded_or_put_on_a_device(monkeypatch):
    order = []
    monkeypatch.setattr(student, 'init_group', lambda: order.append('join'))
    monkeypatch.setattr(student, 'load_teachers', lambda *_: order.append('load') or {})
    monkeypatch.setattr(student, 'teacher_shares', lambda *_: torch.zeros(0))
    monkeypatch.setattr(student, 'ready_teachers', lambda *_: order.append('device') or ({}, {}))
    monkeypatch.setattr(student, 'train_role', lambda *_, **__: order.append('train'))
    class Run:
        class Recipe:
            student_roles = ('student',)
            def distillation(self, role): return DistillRecipe(combine='logits')
        recipe = Recipe()
        def is_finished(self, *_): return False
        def record(self, *_, **__): pass
    monkeypatch.setattr(student, 'Distill', lambda *_, **__: None)
    student.train_student(Run(), 0)
    assert order == ['join', 'load', 'device', 'train']


class Reached(Exception): "A stage has asked for its device."


@pytest.fixture(scope='module')
def trained_run(trained_outputs, tmp_path_factory):
    "For every function that trains, a tiny run with everything that it needs."
    run = copied_run(trained_outputs, tmp_path_factory.mktemp('outputs'))
    shutil.rmtree(run.stage_dir(0, 'baseline'))
    given = {'teacher.train': False, 'teacher.weights': str(run.stage_dir(0, 'teacher'))}
    with pytest.MonkeyPatch.context() as env:
        env.setenv('KDOCT_OUTPUTS', str(run.path.parent))
        own = create_run('own', run.recipe.override(**given))
        prepare_data(own)
        new = create_run('new', run.recipe)
    return dict(train_student=run, train_baseline=run, train_teacher=new, use_teacher=own)


@pytest.mark.parametrize('stage', ['train_teacher', 'use_teacher', 'train_student', 'train_baseline'])
def test_no_stage_puts_anything_on_a_device_before_the_processes_have_met(
    trained_run, monkeypatch, stage
):
    met, plain_to = [], torch.nn.Module.to
    def meet():
        met.append(True)
        return 0, 1
    def device():
        assert met, 'a device was asked for before the processes have met'
        raise Reached
    def to(self, *args, **kwargs):
        assert met or not any(
            isinstance(a, (str, torch.device)) for a in (*args, *kwargs.values())
        ), 'a network was put on a device too early'
        return plain_to(self, *args, **kwargs)
    for module in (results, student, teacher, own_teacher, preparation):
        for name, fake in (('init_group', meet), ('best_device', device)):
            if hasattr(module, name): monkeypatch.setattr(module, name, fake)
    monkeypatch.setattr(torch.nn.Module, 'to', to)
    run = trained_run[stage]
    if stage == 'train_teacher': prepare_data(run)
    made = dict(train_student=student.train_student, train_baseline=student.train_baseline).get(
        stage, teacher.train_teacher
    )
    with pytest.raises(Reached): made(run, 0)


def test_a_failing_process_speaks_then_aborts_its_own_gpu_then_leaves(monkeypatch):
    order = []
    class Backend:
        def abort(self): order.append('abort')
    class Store:
        def compare_set(self, key, expected, value):
            order.append('speak')
            return value
        def check(self, keys): return False
    class Group:
        def _get_backend(self, device):
            assert device == torch.device('cuda')   # the gloo half of the group has nothing to abort
            return Backend()
    monkeypatch.setattr(distributed, 'rank_world', lambda: (1, 2))
    monkeypatch.setattr(distributed, '_store', Store())
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(distributed.dist, 'group', type('group', (), dict(WORLD=Group())))
    monkeypatch.setattr(distributed.dist, 'is_initialized', lambda: True)
    monkeypatch.setattr(distributed.dist, 'destroy_process_group', lambda: order.append('leave'))
    with pytest.raises(ValueError, match='out of luck'), distributed.propagate_failure():
        raise ValueError('out of luck')
    assert order == ['speak', 'abort', 'leave']


# Two processes, one of which waits as NCCL lets it: no error comes when the other is gone.
WAITS = textwrap.dedent('''
    import threading, time
    from kdoct.training import distributed
    def fate(aborts):
        with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
        child = os.fork()
        os.environ.update(RANK=str(int(child == 0)), WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), KDOCT_STAGE='test')
        distributed._watch.__defaults__ = (.1, .5)
        rank, _ = init_group()
        waiting = threading.Event()
        if aborts: distributed._abort = waiting.set
        began = time.monotonic()
        try:
            with propagate_failure():
                if rank: raise ValueError('out of luck')
                waiting.wait(100)
                raise RuntimeError('NCCL communicator was aborted')
        except Exception as e: print(rank, type(e).__name__, e, time.monotonic() - began < 20, flush=True)
        if rank: os._exit(0)
''')


@pytest.mark.slow
def test_a_process_that_no_error_wakes_is_woken_and_says_whose_fault_it_was(tmp_path):
    said = run(WAITS + 'fate(True)', tmp_path)
    assert re.search(
        r'^0 KdoctError Process 1 of this training failed: out of luck.*?True$', said, re.M | re.S
    ), said


@pytest.mark.slow
def test_a_process_that_cannot_be_woken_is_ended_with_the_reason(tmp_path):
    done = prepared.run(SCRIPT + WAITS + 'fate(False)', folder=tmp_path, timeout=100)
    assert done.returncode == 1 and 'Process 1 of this training failed: out of luck' in done.stderr


@pytest.mark.slow
def test_weights_accumulation_and_bars_run_in_two_processes(tmp_path):
    code = SCRIPT.replace(
        'with propagate_failure(), learn.no_bar(), learn.no_logging()', 'with propagate_failure()'
    )
    assert code.count('hard_loss') == 2 and 'no_bar' not in code
    (tmp_path/'a').mkdir()
    code += "train('a', 2, 4, accumulate=2, class_weights='balanced')"
    done = prepared.run(code, folder=tmp_path, timeout=100)
    assert done.returncode == 0, done.stderr
    a, b = (pd.read_csv(tmp_path/f'a/history{r}.csv') for r in (0, 1))
    pd.testing.assert_frame_equal(a, b, check_exact=True)
    assert len(a) == 3 and 'valid_loss' in done.stdout   # process 0's table
