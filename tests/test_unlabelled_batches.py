"Batches of unlabelled images: shown in turn, the same after a resume, shared by processes."

import numpy as np
import pytest
import torch

from kdoct.core.files import KdoctError
from kdoct.core.presets import preset
from kdoct.core.runs import create_run
from kdoct.core.sections import AugmentRecipe
from kdoct.data.augment import N_DRAWS, augment, image_ids, uniforms
from kdoct.data.batches import Batches
from kdoct.data.fold_data import open_fold
from kdoct.data.stage import prepare_data
from kdoct.data.unlabelled_batches import UnlabelledBatches, unlabelled_batches

N, LABELLED = 60, 26
IMAGES = np.random.default_rng(0).integers(0, 255, (N, 16, 16), np.uint8)
IDS = np.random.default_rng(1).integers(0, 2**63, N).astype(np.uint64)
AUGMENT = AugmentRecipe()


def training(batch_size=4, share=(0, 1), accumulate=1, epoch=0, seed=43):
    rows = np.arange(LABELLED)
    train = Batches(
        IMAGES, np.zeros(N, np.int64), IDS, rows, batch_size, AUGMENT, seed, share=share
    )
    train.accumulate, train.epoch = accumulate, epoch
    return train


def beside(train, batch_size=3, n=N - LABELLED):
    rows = np.arange(LABELLED, LABELLED + n)
    return UnlabelledBatches(train, rows, IDS[rows], batch_size)


def rows_of(epochs, **how):
    "Rows of all batches of these epochs, one after the other."
    batches = beside(training(), **how)
    out = []
    for batches.train.epoch in epochs:
        out += [batches.batch(k)[1] for k in range(len(batches))]
    return np.concatenate(out)


@pytest.mark.parametrize("n, size", [(34, 3), (34, 12), (5, 3), (2, 7), (1, 1)])
def test_no_image_comes_again_before_all_were_shown(n, size):
    seen = rows_of(range(4), n=n, batch_size=size)
    passes = [seen[k : k + n] for k in range(0, len(seen), n)]
    assert all(len(set(p)) == len(p) for p in passes) and set(seen) <= set(range(LABELLED, N))
    assert len(set(seen)) == min(n, len(seen))


def test_each_pass_has_another_order():
    seen = rows_of(range(20), n=10)
    assert len({tuple(seen[k : k + 10]) for k in range(0, 60, 10)}) == 6


def test_a_resume_at_any_batch_gives_the_same_images_and_views():
    whole = beside(training())
    for epoch in (0, 3):
        for number in range(len(whole)):
            whole.train.epoch = epoch
            x, rows = whole.batch(number)
            resumed = training(epoch=epoch)
            resumed.start = number  # as a resume state sets it
            again, same = beside(resumed).batch(number)
            assert torch.equal(x, again) and (rows == same).all()


def test_a_view_is_that_of_seed_image_and_pass():
    train, n = training(), N - LABELLED
    batches = beside(train, batch_size=n)  # a pass a batch
    x, rows = batches.batch(5)
    u = torch.from_numpy(uniforms(IDS[rows], N_DRAWS, 43, 5))
    expected = augment(torch.from_numpy(IMAGES[rows])[:, None], u, AUGMENT, 16)
    assert torch.equal(x, expected)
    assert not torch.equal(beside(training(seed=44), n).batch(5)[0], x)


def test_the_same_image_is_seen_in_another_view_in_the_next_pass():
    batches = beside(training(), batch_size=1, n=1)
    first, second = (batches.batch(k)[0] for k in (0, 1))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_make_the_parts_of_each_batch(processes):
    # as many images a batch of all processes
    alone = beside(training(batch_size=6), batch_size=6)
    sizes = dict(batch_size=6 // processes, accumulate=processes)
    for number in range(len(alone)):
        x, rows = alone.batch(number)
        parts = [
            beside(training(share=(rank, processes), **sizes), 6 // processes).batch(number)
            for rank in range(processes)
        ]
        assert (np.concatenate([r for _, r in parts]) == rows).all()
        assert torch.allclose(torch.cat([p for p, _ in parts]), x, atol=1e-6)


@pytest.mark.parametrize("processes, accumulate", [(1, 1), (1, 3), (2, 3), (3, 3), (2, 2)])
def test_a_step_has_the_same_unlabelled_images_however_it_is_divided(processes, accumulate):
    "Whatever the number of processes, and of batches a step."

    def steps(share, batch_size, accumulate):
        batches, out = beside(training(batch_size, share, accumulate), batch_size), {}
        for k, planned in enumerate(batches.train.plan()):
            out.setdefault(planned.step, []).extend(batches.batch(k)[1])
        return out

    one = steps((0, 1), 6, 1)
    each = [steps((rank, processes), 6 // accumulate, accumulate) for rank in range(processes)]
    for step, rows in one.items():
        assert sorted(np.concatenate([e[step] for e in each])) == sorted(rows)


def test_too_few_images_for_all_processes_are_refused():
    with pytest.raises(KdoctError, match="cannot be shared") as e:
        beside(training(share=(1, 2)), batch_size=1).batch(0)
    assert "fewer processes" in e.value.fix


def test_a_fold_hands_out_its_unlabelled_images_and_none_where_it_has_none():
    changes = {"data.labelled": 0.5}
    run, whole = (create_run(n, preset("tiny", **c)) for n, c in (("half", changes), ("all", {})))
    for r in (run, whole):
        prepare_data(r)
    data = open_fold(run, 0)

    def train(data):
        ids = np.zeros(len(data.images), np.uint64)
        ids[data.idx["train"]] = image_ids(data.rows("train").sha256)
        return Batches(data.images, data.labels, ids, data.idx["train"], 4, AUGMENT)

    batches = unlabelled_batches(data, train(data))
    x, rows = batches.batch(0)
    assert len(x) == len(rows) == 4 and set(rows) <= set(data.idx["unlabelled"])
    assert (data.labels[rows] == -1).all()
    assert unlabelled_batches(open_fold(whole, 0), train(open_fold(whole, 0))) is None
