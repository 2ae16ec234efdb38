"Trained networks that only answer: every core of a CPU takes images of its own."

import threading

import pytest
import torch
from torch.overrides import TorchFunctionMode

from kdoct.core.sections import TrainRecipe
from kdoct.core.torch_versions import tf32_allowed
from kdoct.models.arithmetic import float32_products
from kdoct.models.backbones import create_classifier
from kdoct.training.inference import (
    FusedBody,
    InferenceModel,
    each_core,
    inference_model,
    private_copy,
)


def test_every_core_works_and_an_error_comes_out():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        both = threading.Barrier(2)  # passed only if two threads are at work at once
        assert each_core(lambda p: (both.wait(10), p)[1], [1, 2], torch.device("cpu")) == [1, 2]
        with pytest.raises(ZeroDivisionError):
            each_core(lambda p: 1//p, [1, 2, 0, 3], torch.device("cpu"))
        assert torch.get_num_threads() == 2
    finally: torch.set_num_threads(before)


def to_tf32(x):
    "Float32 numbers rounded to 10 bits of mantissa, halves to even; everything else unchanged."
    if not torch.is_tensor(x) or x.dtype is not torch.float32: return x
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


class LikeAGpu(TorchFunctionMode):
    "Convolutions and matrix products as a GPU with TF32 computes them, by torch's own settings."
    matmuls, rounded, exact = ("linear", "matmul", "mm", "bmm", "baddbmm"), 0, 0
    def __torch_function__(self, func, types, args=(), kwargs=None):
        name, (in_products, in_convolutions) = getattr(func, "__name__", ""), tf32_allowed()
        by = (
            in_convolutions
            if name == "conv2d"
            else in_products
            if name in self.matmuls
            else None
        )
        if by:
            args, self.rounded = tuple(map(to_tf32, args)), self.rounded + 1
        elif by is not None: self.exact += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("arch", ["tf_efficientnet_lite0", "tf_efficientnet_lite2", "ofa595", "efficientnet_b0"])
def test_the_check_of_a_simplified_network_is_exact_where_gpus_round(arch):
    torch.manual_seed(0)
    model = create_classifier(
        TrainRecipe(arch=arch, weights="none", precision="fp32"), 3, 96
    ).eval()
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for m in norms: m.momentum = 1.   # statistics as a training leaves them, so that folding scales the weights
    with torch.no_grad(): model.train()(torch.rand(4, 1, 96, 96))
    body = private_copy(model.eval())
    x = model.prepare(torch.rand(1, 1, 96, 96))
    with float32_products(True), torch.no_grad(), LikeAGpu() as gpu:
        quick = FusedBody(body, x)
        # finding what to fold is one rounded pass, whose numbers nobody uses
        products, looked = gpu.exact, gpu.rounded
        assert products >= 2*looked > 0             # both sides of the comparison are exact
        assert tf32_allowed()[1]                    # as it was
    with torch.no_grad():
        assert torch.allclose(
            quick.exact(x), body(x), rtol=1e-3, atol=1e-3 * float(body(x).abs().max())
        )


def test_a_frozen_network_in_float32_answers_exactly_where_gpus_round():
    model = create_classifier(
        TrainRecipe(arch="test_efficientnet", weights="none", precision="fp32"), 3, 64
    ).eval()
    frozen, x = InferenceModel(model), torch.rand(2, 1, 64, 64)
    with torch.no_grad(): want = frozen(x)
    with float32_products(True), LikeAGpu() as gpu:
        assert torch.equal(frozen(x), want)
        assert gpu.rounded == 0


@pytest.mark.parametrize("able", [True, False])
def test_bf16_is_tried_only_where_the_device_multiplies_in_it(monkeypatch, able):
    timed = []
    monkeypatch.setattr("kdoct.training.inference.computes_bf16", lambda device: able)
    model = create_classifier(
        TrainRecipe(arch="test_efficientnet", weights="none", precision="fp32"), 3, 64
    ).eval()
    _, facts = inference_model(
        model, seconds=0.0, timer=lambda step, p: timed.append(p) or dict(fp32=2.0, bf16=1.0)[p]
    )
    assert (facts["precision"], bool(timed)) == (("bf16", True) if able else ("fp32", False))
