"The benchmark measures what it says: the reference's pattern, our steps, ratios in a round."
import functools
import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from kdoct.app import bench as bench
from kdoct.app import bench_harness, bench_reference, bench_rows
from kdoct.app.cli import app
from kdoct.core.files import KdoctError, read_json
from kdoct.models.arithmetic import computes_bf16

SMALL = dict(
    teacher="test_convnext2", student="test_efficientnet", size=48, images=8, steps=2, rounds=2
)


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    return bench_harness.Plan("step", **SMALL, place=str(tmp_path_factory.mktemp("bench")))


@pytest.fixture(scope="module")
def images(plan): return bench_harness.bench_images(plan)


def made(what, plan, images):
    "All rows of a benchmark, in this process."
    plan = replace(plan, what=what)
    return {
        name: row
        for make in bench_harness.BENCHES[what].values()
        for name, row in make(plan, images).items()
    }


@pytest.fixture(scope="module")
def rows_of(plan, images):
    "The same, each benchmark made once."
    return functools.cache(lambda what: made(what, plan, images))


def test_every_file_is_decoded_in_every_epoch(plan, images, monkeypatch):
    opened, really = [], Image.open
    monkeypatch.setattr(Image, "open", lambda f: opened.append(f) or really(f))
    files = bench_reference.PilFiles(
        images, bench_reference.pil_changes(plan.recipe.student.augment, 48, 4), 24
    )
    for i in range(24): files[i]
    assert opened == 3 * images.files


def test_reference_loader_gives_whole_batches_from_worker_processes(plan, images):
    loader = bench_reference.pil_loader(images, plan.recipe.teacher.augment, plan)
    x, y = next(iter(loader))
    assert loader.num_workers == min(4, len(os.sched_getaffinity(0))) and loader.drop_last
    assert x.shape == (8, 3, 48, 48) and x.dtype == torch.float32 and len(y) == 8


class Watching(torch.nn.Module):
    "Notes how it is asked."
    def __init__(self):
        super().__init__()
        self.layer, self.seen = torch.nn.Linear(3, 4), []

    def forward(self, x):
        z = self.layer(x.mean((2, 3)))
        self.seen.append(
            dict(
                dtype=z.dtype,
                autocast=torch.is_autocast_enabled("cpu"),
                grad=z.requires_grad,
                training=self.training,
            )
        )
        return z


def test_reference_asks_its_teacher_in_float32_outside_autocast_without_gradients(plan):
    teacher, student = Watching(), Watching()
    step = bench_reference.ReferenceStep(teacher, student, plan.recipe, "cpu")
    step([torch.rand(8, 3, 4, 4), torch.arange(8) % 4])
    assert teacher.seen == [dict(dtype=torch.float32, autocast=False, grad=False, training=False)]
    assert student.seen == [dict(dtype=torch.float32, autocast=False, grad=True, training=True)]
    assert not step.opt.param_groups[0]["fused"]


def test_reference_loss_is_the_papers(plan):
    x, y = torch.rand(8, 3, 4, 4), torch.arange(8) % 4
    step = bench_reference.ReferenceStep(
        teacher := Watching(), student := Watching(), plan.recipe, "cpu"
    )
    # softening by T = 4
    with torch.no_grad(): t, s = (net(x).log_softmax(1) / 4 for net in (teacher, student))
    soft = (t.softmax(1) * (t.log_softmax(1) - s.log_softmax(1))).sum(1).mean() * 16
    with torch.no_grad(): hard = torch.nn.functional.cross_entropy(student(x), y)
    assert step.losses(x, y).item() == pytest.approx((0.3 * hard + 0.7 * soft).item(), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["input", "step", "cache", "infer", "score-cam"])
def test_every_row_can_be_timed_and_knows_its_comparison(what, rows_of):
    rows = rows_of(what)
    assert any("kdoct" in name for name in rows)
    for name, row in rows.items():
        lap = row.turn()
        assert lap["images"] > 0 and lap["seconds"] > 0, name
        assert set(row.against) <= set(rows), name
        assert row.macs or row.nbytes or what == "score-cam" or "decoding" in name, name


def test_steps_are_counted_in_whole_blocks_of_the_teacher(rows_of):
    online = rows_of("step")["kdoct, online"].turn()
    # two batches of 8 were wanted; the teacher is queried about four at once
    assert online["images"] == 32
    assert online["precision"] in ("fp32", "bf16")


def test_a_thing_is_as_fast_as_itself():
    work, a = torch.nn.Linear(256, 256), torch.rand(256, 256)

    def turn():
        return dict(images=20, seconds=bench_harness.clock(lambda: [work(a) for _ in range(20)]))
    times = [
        dict(round=r, row=name, peak=0, gpu=0, rates=dict(fp32=1e12, bf16=1e12, copy=1e9), **turn())
        for r in range(15)
        for name in "ab"
    ]
    rows = {name: dict(against=("a",), macs=1, nbytes=0, about={}, side="x") for name in "ab"}
    found = bench.summary(rows, times)
    assert found["a"]["times_as_fast_as"]["a"] == dict(median=1, least=1, largest=1)
    assert 0.4 < found["b"]["times_as_fast_as"]["a"]["median"] < 2.5


@pytest.mark.parametrize("able", [True, False])
def test_bf16_is_timed_only_where_the_device_multiplies_in_it(monkeypatch, able):
    products = []
    monkeypatch.setattr("kdoct.app.bench_harness.computes_bf16", lambda device: able)
    monkeypatch.setattr(torch, "mm", lambda a, b: products.append(a.dtype))
    rates = bench_harness.machine_rates()
    assert set(rates) == {"fp32", "copy"} | ({"bf16"} if able else set())
    assert (torch.bfloat16 in products) == able
    part = [dict(rates=rates, images=1, seconds=1.)]
    assert set(bench._limits(dict(macs=1, nbytes=1), part)) == set(rates)


def test_arithmetic_of_a_step_is_three_forwards_and_the_teachers(plan):
    from kdoct.models.backbones import create_classifier
    from kdoct.models.cost import count_macs
    teacher, student = (
        count_macs(create_classifier(r, 4, 48).eval(), 48)
        for r in (plan.recipe.teacher, plan.recipe.student)
    )
    assert (
        bench_rows._macs(plan, 0) == 3 * student
        and bench_rows._macs(plan, 1) == teacher + 3 * student
    )


def test_ours_with_their_masks_agrees_with_them(rows_of):
    laps = {name: row.turn() for name, row in rows_of("score-cam").items()}
    assert laps["kdoct as pytorch-grad-cam"]["correlation"]["pytorch-grad-cam"] > 0.98


@pytest.mark.slow
def test_command_writes_a_whole_record_and_prints_its_table(tmp_path):
    options = [word for k, v in SMALL.items() for word in (f"--{k}", str(v))]
    done = CliRunner().invoke(app, ["bench", "input", *options, "--out", str(tmp_path / "r.json")])
    assert done.exit_code == 0, done.output
    record = read_json(tmp_path / "r.json")
    assert {
        "what",
        "about",
        "made",
        "plan",
        "images",
        "weights",
        "device",
        "threads",
        "workers",
        "load",
        "rates",
        "rows",
        "times",
        "git",
        "packages",
        "machine",
    } <= set(record)
    assert (
        set(record["rates"]) == {"fp32", "copy"} | ({"bf16"} if computes_bf16() else set())
        and record["plan"]["rounds"] == 2
    )
    ours = record["rows"]["kdoct"]
    assert (
        ours["times_as_fast_as"]["reference pattern"]["median"] > 0
        and 0 < ours["share_of_limit"]["copy"]["median"] < 1.5
    )
    assert len({t["round"] for t in record["times"]}) >= 1 and [
        t["row"] for t in record["times"][:3]
    ] == list(record["rows"])
    assert str(tmp_path) not in json.dumps(record), "a folder of this machine stands in the record"
    assert (
        "| kdoct |" in done.output
        and "reference pattern" in done.output
        and "Medians of" in done.output
    )


def test_mistakes_say_what_to_do(plan, tmp_path):
    with pytest.raises(KdoctError, match="Take one of: input, step, cache, infer, score-cam"):
        bench.bench("stpe")
    unknown = replace(plan, student="no_such_network", place=str(tmp_path))
    with pytest.raises(KdoctError, match="timm knows no model"):
        made("step", unknown, bench_harness.bench_images(plan))
    with pytest.raises(KdoctError, match="does not exist"):
        bench_harness.bench_images(replace(plan, root="no/such/folder", place=str(tmp_path)))


def test_real_images(shared_data, plan, tmp_path):
    found = bench_harness.bench_images(
        replace(plan, root=str(shared_data / "ucsd_oct"), place=str(tmp_path))
    )
    assert found.decoded.shape == (8, 52, 52) and len(np.unique(found.labels)) == 4
