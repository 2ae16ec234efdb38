"Several processes train as one does; what one of them meets, all meet."
import os
import re
import subprocess
import sys
import textwrap

import numpy as np
import pandas as pd
from safetensors.torch import load_file

# Trains with toy images, in as many processes as wanted. A process that has imported everything splits; a launcher would start several.
SCRIPT = textwrap.dedent('''
    import os, signal, socket, sys, warnings
    warnings.simplefilter('ignore')
    import numpy as np, pandas as pd, torch
    from fastai.callback.core import Callback
    from safetensors.torch import save_file
    from kdoct.core import preset, seed_everything
    from kdoct.losses import hard_loss
    from kdoct.models import create_classifier
    from kdoct.together import SharedBatches, join, one_for_all, team
    from kdoct.training import make_learner

    def train(folder, processes, batch, stop_at=None, rows=41, **changes):
        with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
        children = [pid for r in range(1, processes) if (pid := os.fork()) or os.environ.update(RANK=str(r))]
        os.environ.update({'RANK': '0'} | dict(os.environ), WORLD_SIZE=str(processes), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), KDOCT_STAGE='test')
        rank, size = join()
        g = np.random.default_rng(0)
        images, labels, ids = g.integers(0, 255, (64, 32, 32), dtype=np.uint8), np.array([0, 0, 0, 1, 1, 2])[np.arange(64) % 6], np.arange(64, dtype=np.uint64)
        r = preset('tiny').student.model_copy(update=dict(arch='test_convnext2', epochs=3, batch_size=batch, drop_rate=0., lr=1e-3,
                                                          checkpoint_minutes=1e-9, freeze_epochs=1, **changes))
        seed_everything(1 + rank)   # all begin as process 0 does
        class Stop(Callback):
            order, run_valid, seen = 100, False, 0
            def after_batch(self):
                self.seen += 1
                if self.seen == stop_at and rank == size - 1: raise ValueError('out of luck')
        learn = make_learner(create_classifier(r, 3, 32), SharedBatches(images, labels, ids, np.arange(rows), batch, r.augment, 1, share=team()),
                             SharedBatches(images, labels, ids, np.arange(rows, 64), 8, share=team()), hard_loss(r, labels[:rows], 3), r, folder, 'k', [Stop()])
        try:
            with one_for_all(), learn.no_bar(), learn.no_logging(): learn.fit(3)
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
    done = subprocess.run([sys.executable, '-c', SCRIPT + code], cwd=tmp_path, capture_output=True, text=True, timeout=300,
                          env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_two_processes_train_as_one_whatever_the_batches(tmp_path):
    how = "class_weights='balanced', loss='focal', label_smoothing=.1"
    run(f"if os.fork() == 0: train('a', 2, 2, accumulate=4, {how}); os._exit(0)\n"
        f"os.wait(); train('b', 1, 8, {how})", tmp_path)   # 41 images in steps of at most 8
    a, other, b = (pd.read_csv(tmp_path/f) for f in ('a/history0.csv', 'a/history1.csv', 'b/history0.csv'))
    pd.testing.assert_frame_equal(a, other, check_exact=True)
    pd.testing.assert_frame_equal(a, b, check_exact=False, rtol=1e-4, atol=1e-4)
    assert len(a) == 3 and a.train_loss.nunique() == 3
    first, second = (load_file(tmp_path/f'a/end{r}.safetensors') for r in (0, 1))
    assert all(np.array_equal(first[k], second[k]) for k in first)


def test_what_fails_in_one_ends_the_other_and_both_go_on_exactly(tmp_path):
    said = run("if os.fork() == 0: train('a', 2, 4, mix_prob=.5); os._exit(0)\nos.wait()\n"
               "if os.fork() == 0: train('b', 2, 4, stop_at=9, mix_prob=.5); os._exit(0)\nos.wait(); train('b', 2, 4, mix_prob=.5)", tmp_path)
    assert re.search(r'^1 ValueError .*?out of luck', said, re.M | re.S)
    assert re.search(r'^0 KdoctError Process 1 of this training failed: .*?out of luck', said, re.M | re.S)
    for rank in (0, 1):
        pd.testing.assert_frame_equal(*(pd.read_csv(tmp_path/d/f'history{rank}.csv') for d in 'ab'), check_exact=True)
        a, b = (load_file(tmp_path/d/f'end{rank}.safetensors') for d in 'ab')
        assert all(np.array_equal(a[k], b[k]) for k in a)
