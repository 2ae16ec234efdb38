"Training survives a kill at any moment and ends with the weights of the uninterrupted run."
import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from kdoct.augment import Batches
from kdoct.core import KdoctError, preset
from kdoct.losses import cross_entropy
from kdoct.models import create_classifier
from kdoct.training import make_learner, param_groups, warmup_cosine

# One training in a process of its own. It prints a line after every batch, so that the test can kill it at a known place.
SCRIPT = textwrap.dedent('''
    import sys, numpy as np, torch
    from fastai.callback.core import Callback
    from safetensors.torch import save_file
    from kdoct.augment import Batches
    from kdoct.core import preset, seed_everything
    from kdoct.losses import cross_entropy
    from kdoct.models import create_classifier
    from kdoct.training import make_learner
    folder, out, every = sys.argv[1:]
    torch.set_num_threads(1)
    g = np.random.default_rng(0)
    images, labels, ids = g.integers(0, 255, (60, 32, 32), dtype=np.uint8), np.arange(60) % 3, np.arange(60, dtype=np.uint64)
    recipe = preset('tiny').student.model_copy(update=dict(epochs=3, batch_size=8, accumulate=2, checkpoint_minutes=float(every)))
    seed_everything(1)
    class Tell(Callback):
        order, run_valid = 100, False
        def after_batch(self): print(self.epoch, self.dls.train.start + self.iter, flush=True)
    learn = make_learner(create_classifier(recipe, 3, 32), Batches(images, labels, ids, np.arange(48), 8, recipe.augment, 1),
                         Batches(images, labels, ids, np.arange(48, 60), 8), cross_entropy, recipe, folder, 'k', [Tell()])
    with learn.no_bar(), learn.no_logging(): learn.fit(recipe.epochs)
    save_file({k: v.contiguous() for k, v in learn.model.body.state_dict().items()}, out)
''')


def train(folder, out, every, kill_at=None):
    "Run the script; kill it with SIGKILL as soon as it has printed `kill_at`. Returns whether it ended by itself."
    p = subprocess.Popen([sys.executable, '-c', SCRIPT, str(folder), str(out), str(every)], stdout=subprocess.PIPE, text=True,
                         env={**os.environ, 'OMP_NUM_THREADS': '1'})
    for line in p.stdout:
        if line.strip() == kill_at:
            p.send_signal(signal.SIGKILL)
            break
    p.stdout.close()
    return p.wait() == 0


@pytest.mark.parametrize('every', [1e-9, 60], ids=['saved within the epoch', 'saved after the epoch'])
def test_kill_in_the_middle_of_an_epoch_changes_nothing(tmp_path, every):
    assert train(tmp_path/'a', tmp_path/'a.safetensors', 60)
    assert not train(tmp_path/'b', tmp_path/'b.safetensors', every, kill_at='1 3')
    assert train(tmp_path/'b', tmp_path/'b.safetensors', every)
    a, b = load_file(tmp_path/'a.safetensors'), load_file(tmp_path/'b.safetensors')
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def learner(folder, recipe, key='k', loss=cross_entropy):
    images = np.random.default_rng(0).integers(0, 255, (24, 32, 32), dtype=np.uint8)
    labels, ids = np.arange(24) % 3, np.arange(24, dtype=np.uint64)
    return make_learner(create_classifier(recipe, 3, 32), Batches(images, labels, ids, np.arange(16), 8, recipe.augment, 1),
                        Batches(images, labels, ids, np.arange(16, 24), 8), loss, recipe, folder, key)


def fit(learn):
    with learn.no_bar(), learn.no_logging(): learn.fit(learn.checkpoint.recipe.epochs)
    return learn


@pytest.fixture
def recipe(): return preset('tiny').student.model_copy(update=dict(epochs=3, lr=1e-3))


def test_resume_state_of_another_recipe_is_refused(tmp_path, recipe):
    fit(learner(tmp_path, recipe))
    with pytest.raises(KdoctError, match='another recipe'): fit(learner(tmp_path, recipe, key='other'))
    other = recipe.model_copy(update=dict(arch='test_resnet'))  # said as clearly where not even the tensors would fit
    with pytest.raises(KdoctError, match='another recipe'): fit(learner(tmp_path, other, key='other'))


def test_a_loss_that_is_not_finite_stops_with_its_name(tmp_path, recipe):
    with pytest.raises(KdoctError, match='hard term of the loss became nan'):
        fit(learner(tmp_path, recipe, loss=lambda z, y: cross_entropy(z, y)*float('nan')))


def test_patience_stops_and_the_best_epoch_is_kept(tmp_path, recipe, monkeypatch):
    scores = iter([.5, .9, .3, .2, .95])  # the fifth epoch would be the best, but patience ends with the fourth
    monkeypatch.setattr('kdoct.training._validation_scores', lambda *_: dict(valid_loss=1., accuracy=next(scores), balanced_accuracy=0.))
    learn = fit(learner(tmp_path, recipe.model_copy(update=dict(epochs=5, patience=2, monitor='accuracy'))))
    assert len(learn.history.rows) == 4 and learn.checkpoint.best_epoch == 1
    kept = load_file(learn.checkpoint.best_file(1))
    assert all(torch.equal(v, learn.model.body.state_dict()[k]) for k, v in kept.items())


def test_norms_and_biases_do_not_decay(recipe):
    model = create_classifier(recipe, 3, 32)
    decayed = {id(p) for g in param_groups(model, recipe) if g['weight_decay'] for p in g['params']}
    assert {n for n, p in model.named_parameters() if id(p) in decayed} == {n for n, p in model.named_parameters() if p.ndim > 1}


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
