"Batches read ahead, in blocks, in parts of a cache and on several cores are the same; errors come out, threads end."

import threading
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch

from kdoct.core.presets import preset
from kdoct.core.sections import AugmentRecipe
from kdoct.data import augment as A
from kdoct.data.augment import N_DRAWS, augment, uniforms
from kdoct.data.batches import Batches, stream_ahead

# a last-place rounding may change a level
TEACHER = preset("paper-neh").teacher.augment.model_copy(update=dict(posterize=0.0))


def batches(n=11, channels=1, **kwargs):
    images = np.random.default_rng(0).integers(
        0, 256, (n, 20, 20, 3) if channels == 3 else (n, 20, 20), dtype=np.uint8
    )
    return Batches(
        images,
        np.arange(n),
        np.arange(n, dtype=np.uint64),
        np.arange(n),
        **(dict(batch_size=3, recipe=TEACHER, seed=1, size=16) | kwargs),
    )


def close(a, b): torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("recipe", [TEACHER, None])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("block", [1, 2, 9])
def test_blocks_read_ahead_are_the_batches_asked_for_one_by_one(recipe, channels, block):
    b = batches(channels=channels, recipe=recipe)
    want = [b.batch(rows) for rows in b.parts()]
    seen = list(b.with_output(lambda x, rows: torch.from_numpy(rows), block))
    assert len(seen) == len(want) == 4
    for (x, y, output), (wx, wy) in zip(seen, want, strict=True):
        close(x, wx)
        assert torch.equal(y, wy) and torch.equal(output, wy)


def test_shares_of_two_processes_are_the_batches_of_one():
    whole, halves = (
        list(batches(batch_size=6)),
        [batches(batch_size=6, share=(k, 2)) for k in (0, 1)],
    )  # a step keeps its images
    for (x, y), (xa, ya), (xb, yb) in zip(whole, *halves, strict=True):
        close(torch.cat([xa, xb]), x)
        assert torch.equal(torch.cat([ya, yb]), y)


@pytest.mark.parametrize("channels", [1, 3])
def test_parts_of_a_batch_and_cores_change_nothing(channels, monkeypatch, threads):
    x = torch.from_numpy(uniforms(np.arange(13), channels*24*24, 0, 0)).view(13, channels, 24, 24)
    u = torch.from_numpy(uniforms(np.arange(13), N_DRAWS, 7, 0))
    monkeypatch.setattr(A, "images_at_once", len)
    whole = augment(x, u, TEACHER, 20)
    for cores in (1, 2, 3):
        threads(cores)
        for n in (1, 4):
            monkeypatch.setattr(A, "images_at_once", lambda x, n=n: n)
            close(augment(x, u, TEACHER, 20), whole)
            assert torch.get_num_threads() == cores


def test_bytes_give_the_views_of_their_fractions():
    x, u = (
        torch.from_numpy(batches().images)[:, None],
        torch.from_numpy(uniforms(np.arange(11), N_DRAWS, 7, 0)),
    )
    for recipe in (TEACHER, AugmentRecipe(hflip=0, rotate=0, scale=0, shift=0)):
        assert torch.equal(augment(x, u, recipe), augment(x.float()/255, u, recipe))


def test_next_block_is_read_while_the_first_is_in_use(monkeypatch):
    b, second = batches(), threading.Event()
    rows = b.parts()[1]
    monkeypatch.setattr(
        b,
        "read",
        lambda r, read=b.read: (read(r), second.set() if np.array_equal(r, rows) else None)[0],
    )
    it = iter(b)
    next(it)
    assert second.wait(10)


def test_error_while_reading_ahead_reaches_the_consumer():
    b = batches(recipe=None)
    b.rows = np.append(b.rows[:9], 99)
    it, seen = iter(b), 0
    with pytest.raises(IndexError, match="99"):
        for _ in it: seen += 1
    assert seen == 3


def test_interrupted_epoch_leaves_no_thread():
    before = set(threading.enumerate())
    for x, _ in batches():
        assert len(x)
        break
    kept = iter(batches())  # as a traceback would keep it
    next(kept)
    for t in set(threading.enumerate()) - before:
        t.join(10)
        assert not t.is_alive()
    kept.close()


def test_output_is_computed_in_order_in_the_thread_that_iterates():
    b, calls = batches(), []

    def compute(x, rows): calls.append((threading.current_thread(), rows.tolist()))

    order = [r.tolist() for r in b.parts()]
    made = list(b.with_output(compute, 2))
    assert len(made) == 4 and all(output is None for *_, output in made)
    assert calls == [
        (threading.current_thread(), order[0] + order[1]),
        (threading.current_thread(), order[2] + order[3]),
    ]
    with pytest.raises(ZeroDivisionError): next(b.with_output(lambda x, rows: 1//0))


class FakeStream:
    "Writes down what a stream is told."
    def __init__(self, name, log): self.name, self.log, self.events = name, log, 0

    def wait_stream(self, other): self.log.append(f"{self.name} waits for {other.name}")
    def wait_event(self, event): self.log.append(f"{self.name} waits for {event}")

    def record_event(self):
        self.events += 1
        self.log.append(f"{self.name} marks {self.events}")
        return self.events


def test_stream_ahead_makes_one_block_early_and_waits_where_it_must(monkeypatch):
    log, state = [], {}
    main = state["now"] = FakeStream("main", log)

    @contextmanager
    def stream(s):
        state["now"], before = s, state["now"]
        yield
        state["now"] = before

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: FakeStream("side", log))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: state["now"])
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda t, s: log.append(f"{int(t)} read by {s.name}")
    )

    def made():
        try:
            for i in (1, 2):
                log.append(f"{i} made on {state['now'].name}")
                yield "rows", torch.tensor(i), None
        finally: log.append("closed")

    for _, t, _ in stream_ahead(made(), torch.device("cuda")): log.append(f"{int(t)} used")
    assert main is state["now"] and log == [
        "side waits for main",
        "1 made on side",
        "side marks 1",
        "side waits for main",
        "2 made on side",
        "side marks 2",
        "main waits for 1",
        "1 read by main",
        "1 used",
        "side waits for main",
        "closed",
        "side marks 3",
        "main waits for 2",
        "2 read by main",
        "2 used",
    ]


def test_interrupted_stream_closes_what_makes_the_blocks(monkeypatch):
    main = FakeStream("main", [])
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "stream", lambda s: nullcontext())
    closed = []

    def made():
        try:
            while True: yield (1,)
        finally: closed.append(True)

    ahead = stream_ahead(made(), torch.device("cuda"))
    next(ahead)
    ahead.close()
    assert closed == [True]


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [1, 3])
def test_gpu_hands_out_the_batches_of_the_cpu(channels):
    here, there = batches(channels=channels), batches(channels=channels, device="cuda")
    made = [b.with_output(lambda x, rows: x.mean((1, 2, 3)), 2) for b in (here, there)]
    for (x, y, _), (gx, gy, output) in zip(*made, strict=True):
        torch.testing.assert_close(gx.cpu(), x, atol=1e-4, rtol=0)
        torch.testing.assert_close(output.cpu(), gx.mean((1, 2, 3)).cpu(), atol=1e-5, rtol=0)
        assert torch.equal(gy.cpu(), y)
