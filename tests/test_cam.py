"Class activation maps: default layers, equality with two implementations, error estimates, nothing left behind."
import gc
import weakref

import numpy as np
import pytest
import timm
import torch
from torch import nn

from kdoct.core.files import KdoctError
from kdoct.explain.cam import (
    METHODS,
    explain,
    refine,
    score_cam,
    stretch,
    target_layer,
)
from kdoct.models.backbones import Classifier
from kdoct.models.feature_maps import Layer, default_layer, find_layout
from kdoct.models.folders import IMAGENET
from kdoct.training.inference import FusedBody, private_copy

LAYERS = {  # architecture -> layer, channels and side of its maps
    "vgg19": ("features.35", 512, 2),
    "vgg19_bn": ("features.51", 512, 2),
    "visformer_small": ("stage3", 768, 7),
    "swin_s3_tiny_224": ("layers.3", 768, 7),
    "autoformerv2_tiny": ("layers.3", 768, 7),
    "efficientnet_b2": ("blocks.6", 352, 2),
    "convnextv2_tiny": ("stages.3", 768, 2),
    "tf_efficientnet_lite0": ("blocks.6", 320, 2),
    "tf_efficientnet_lite2": ("blocks.6", 352, 2),
    "resnet18": ("layer4", 512, 2),
    "densenet121": ("features.norm5", 1024, 2),
    "ofa595": ("blocks.5", 192, 2),
    "fpn_vgg16": ("backbone.features.29", 512, 4),
    "sfnet": ("backbone.stages.3", 768, 2),
    "test_efficientnet": ("blocks.4", 64, 2),
    "test_resnet": ("layer4", 96, 2),
    "test_convnext2": ("stages.3", 128, 2),
    "test_vit": ("blocks.5.norm1", 64, 10),
    "test_mambaout": ("stages.3", 64, 2),
}
# those that take one size only
FIXED = {"visformer_small": 224, "swin_s3_tiny_224": 224, "autoformerv2_tiny": 224, "test_vit": 160}


def classifier(arch, size, classes=5, **kwargs):
    "A network whose answers differ between images: random weights, batch statistics of random images, a larger head."
    torch.manual_seed(0)
    body = timm.create_model(arch, num_classes=classes, **kwargs)
    with torch.no_grad():
        for _ in range(20): body.train()(smooth(8, size, 3))
        for m in body.modules():
            if isinstance(m, nn.Linear) and m.out_features == classes: m.weight.normal_(std=.3)
    return Classifier(body, size, *IMAGENET.values(), "bilinear").eval()


def smooth(n, size, channels=1, seed=0):
    "Blurred noise in [0, 1]."
    x = torch.rand(n, channels, 6, 6, generator=torch.Generator().manual_seed(seed))
    return nn.functional.interpolate(x, (size, size), mode="bicubic").clamp(0, 1)


@pytest.fixture(scope="module")
def small(): return classifier("test_efficientnet", 64)


@pytest.fixture(scope="module")
def swin():
    return classifier(
        "swin_s3_tiny_224",
        64,
        img_size=64,
        embed_dim=16,
        depths=(1, 1, 2),
        num_heads=(1, 2, 4),
        window_size=(4, 4, 4),
    )


def correlation(a, b): return float(np.corrcoef(np.ravel(a), np.ravel(b))[0, 1])


@pytest.mark.parametrize("arch", LAYERS)
def test_default_layer(arch):
    name, channels, side = LAYERS[arch]
    size = FIXED.get(arch, 32 if arch.startswith("vgg") else 64)
    body = timm.create_model(
        arch, **(dict(mlp_ratio=1 / 4096) if arch.startswith("vgg") else {})
    ).eval()
    assert default_layer(body) == name
    seen = []
    body.get_submodule(name).register_forward_hook(lambda m, args, out: seen.append(out))
    with torch.inference_mode(): body(torch.zeros(1, 3, size, size))
    layout, prefix = find_layout(seen[0], body)
    assert Layer(name, None, layout, prefix).maps(seen[0]).shape == (1, channels, side, side)


def test_a_layer_by_name_and_errors_that_name_others(small):
    assert target_layer(small, "blocks.2").module is small.body.blocks[2]
    with pytest.raises(KdoctError, match="blocks.3"): target_layer(small, "block.3")
    with pytest.raises(KdoctError, match="no maps"): target_layer(small, "global_pool")


@pytest.mark.parametrize("network", ["small", "swin"])
def test_as_pytorch_grad_cam(network, request):
    from pytorch_grad_cam import ScoreCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    model = request.getfixturevalue(network)
    x, layer = smooth(1, 64), target_layer(model)
    with torch.no_grad(), ScoreCAM(model.body, [layer.module], reshape_transform=layer.maps) as cam:
        want = cam(model.prepare(x), [ClassifierOutputTarget(1)])[0]
    for tolerance in (0, 1e-3):
        got = score_cam(model, x, 1, tolerance=tolerance, variant="pytorch-grad-cam").maps[0]
        assert (
            want.std() > 0.05
            and correlation(got, want) > 0.999
            and np.abs(got.numpy() - want).max() < 0.02
        )


@pytest.mark.parametrize("network", ["small", "swin"])
def test_as_torchcam(network, request):
    ScoreCAM = pytest.importorskip("torchcam.methods").ScoreCAM
    model = request.getfixturevalue(network)
    x, layer = smooth(1, 64), target_layer(model)
    with torch.no_grad(), ScoreCAM(model.body, layer.module, reshape_transform=layer.maps) as cam:
        model.body(model.prepare(x))
        want = cam(class_idx=1)[0]
    want = stretch(nn.functional.interpolate(want[None], (64, 64), mode="bilinear")[0, 0])
    for tolerance in (0, 1e-3):
        got = score_cam(model, x, 1, tolerance=tolerance, variant="torchcam").maps[0]
        assert want.std() > .05 and correlation(got, want) > .999 and (got - want).abs().max() < .02


def test_as_the_paper_step_by_step(small):
    x = small.prepare(smooth(1, 64))
    with torch.inference_mode():
        kept = []
        handle = small.body.blocks[4].register_forward_hook(
            lambda m, args, out: kept.append(out[0].clone())
        )
        small.body(x)
        handle.remove()
        scores = []
        for a in kept[0]:
            mask = nn.functional.interpolate(
                a[None, None], (64, 64), mode="bilinear", align_corners=False
            )
            scores.append(small.body(x*stretch(mask))[0, 2] - small.body(x*0)[0, 2])
        cam = (torch.stack(scores).softmax(0)[:, None, None]*kept[0]).sum(0).relu()
    want = stretch(nn.functional.interpolate(cam[None, None], (64, 64), mode="bilinear")[0, 0])
    assert torch.allclose(score_cam(small, smooth(1, 64), 2, tolerance=0).maps[0], want, atol=1e-4)


def test_a_probability_is_another_score(small):
    a, b = (score_cam(small, smooth(1, 64), 1, score=s).maps for s in ("logit", "probability"))
    assert not torch.allclose(a, b, atol=.01)


def test_constant_maps_are_left_out():
    model = classifier("test_efficientnet", 64)
    class Dead(nn.Module):
        def forward(self, out): return torch.cat([out[:, :40], torch.zeros_like(out[:, 40:])], 1)
    model.body.blocks[4].append(Dead())
    cost = score_cam(model, smooth(1, 64)).cost[0]
    assert cost["skipped"] == 24 and cost["exact"] <= 40


def test_a_network_without_any_map_gives_an_empty_one():
    model = classifier("test_efficientnet", 64)
    class Dead(nn.Module):
        def forward(self, out): return out*0
    model.body.blocks[4].append(Dead())
    found = score_cam(model, smooth(1, 64))
    assert not found.maps.any() and found.cost[0]["skipped"] == 64


def test_the_expected_error_is_the_true_one():
    rng = torch.Generator().manual_seed(1)
    ratios = []
    for _ in range(40):
        maps, truth = torch.rand(120, 5, 5, generator=rng).square(), torch.randn(120, generator=rng)
        cheap = truth + 7 + .1*torch.randn(120, generator=rng)
        got = refine(maps, cheap, lambda rows, t=truth: t[rows], .02, batch=12)
        assert got.error <= .02 and got.exact < 120
        show = [
            stretch((s.softmax(0)[:, None, None] * maps).sum(0).relu()) for s in (got.values, truth)
        ]
        ratios.append(float((show[0] - show[1]).abs().max())/got.error)
    # the largest of 25 errors is about two of their standard deviations
    assert 1 < np.median(ratios) < 3 and max(ratios) < 6


def test_tolerance_buys_exactness(small):
    x = smooth(2, 64)
    exact = score_cam(small, x, tolerance=0)
    for tolerance in (1e-1, 1e-3):
        got = score_cam(small, x, tolerance=tolerance)
        assert all(c["error"] <= tolerance for c in got.cost)
        assert (got.maps - exact.maps).abs().max() < 5*tolerance
    few = score_cam(small, x, tolerance=1e-1, clusters=16)
    assert few.cost[0]["cheap"] in (0, 16) and (few.maps - exact.maps).abs().max() < .5


def test_several_images_of_another_size(small):
    many = score_cam(small, smooth(3, 80, seed=2), [0, 1, 2])
    alone = score_cam(small, smooth(3, 80, seed=2)[2:], 2)
    assert many.maps.shape == (3, 80, 80) and many.classes.tolist() == [0, 1, 2]
    assert (many.maps[2] - alone.maps[0]).abs().max() < .01
    wide = smooth(1, 80)[..., :50]
    assert explain(small, wide, "grad-cam").maps.shape == (1, 80, 50)


@pytest.mark.parametrize("network", ["small", "swin"])
def test_quick_copy_computes_the_same(network, request):
    model = request.getfixturevalue(network)
    x = model.prepare(smooth(4, 64))
    with torch.inference_mode():
        body = private_copy(model)
        quick, want = FusedBody(body, x[:1]), body(x)
        assert torch.allclose(quick.exact(x), want, atol=1e-4)
        assert (quick.cheap(x.bfloat16()).float() - want).abs().max() < .05*want.abs().max()
    assert not any(isinstance(m, nn.BatchNorm2d) for m in quick.body.modules())


def test_vit_attends_to_tokens():
    model = classifier("test_vit", 160)
    for method in ("score-cam", "grad-cam"):
        found = explain(model, smooth(1, 160), method)
        assert found.layer == "blocks.5.norm1" and found.maps.max() == 1


def test_occlusion_finds_what_the_answer_depends_on():
    class Corner(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(1, 2)
        def forward(self, x):
            return (
                torch.stack([x[:, :, :16, :16].mean((1, 2, 3)), 0 * x[:, 0, 0, 0]], 1)
                + 0 * self.fc.bias
            )
    model = Classifier(Corner(), 48, *IMAGENET.values(), "bilinear").eval()
    found = explain(model, torch.ones(1, 3, 48, 48), "occlusion", 0)
    assert found.maps[0, :12, :12].min() > .3 and found.maps[0, 26:, 26:].max() == 0


def state(model):
    return (
        {k: v.clone() for k, v in model.state_dict().items()},
        [m.training for m in model.modules()],
        [p.requires_grad for p in model.parameters()],
        [p.grad is None for p in model.parameters()],
        sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()),
    )


def same(a, b): return all(torch.equal(v, b[0][k]) for k, v in a[0].items()) and a[1:] == b[1:]


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_left_behind(method, small):
    before = state(small)
    explain(small.train(), smooth(1, 64), method)
    small.eval()
    assert same(state(small), before)


@pytest.mark.parametrize("method", ["score-cam", "grad-cam", "occlusion"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_behind_by_an_interrupt(method, error, small, monkeypatch):
    before, calls, forward = state(small), [], type(small.body).forward
    def fail(self, x):
        calls.append(1)
        if len(calls) == 3: raise error("in the middle")
        return forward(self, x)
    monkeypatch.setattr(type(small.body), "forward", fail)
    with pytest.raises(error): explain(small, smooth(1, 64), method)
    assert same(state(small), before)


@pytest.mark.slow
def test_memory_stays_flat_over_a_hundred_images():
    model, x = classifier("test_efficientnet", 32), smooth(1, 32)
    def alive():
        gc.collect()
        return sum(isinstance(o, torch.Tensor) for o in gc.get_objects())
    counts = []
    for i in range(100):
        score_cam(model, x, layer="blocks.2", tolerance=.1)
        if i in (4, 99): counts.append(alive())
    assert counts[0] == counts[1]


def test_the_private_copy_dies_with_the_call(small, monkeypatch):
    from kdoct.explain import cam as cam
    seen, make = [], cam.private_copy
    def noted(model):
        body = make(model)
        seen.append(weakref.ref(body))
        return body
    monkeypatch.setattr(cam, "private_copy", noted)
    for method in ("score-cam", "grad-cam"): explain(small, smooth(1, 64), method)
    gc.collect()
    assert len(seen) == 2 and all(ref() is None for ref in seen)


@pytest.mark.parametrize("classes", [5, -1, [0, 1], [0]])
def test_classes_that_there_are_not(classes, small):
    n = 1 if classes in (5, -1, [0, 1]) else 2
    with pytest.raises(KdoctError, match="classes"): score_cam(small, smooth(n, 64), classes)


def test_images_that_are_none(small):
    for x in (
        smooth(1, 64)[0],
        smooth(1, 64) * 255,
        torch.zeros(0, 1, 64, 64),
        torch.full((1, 1, 8, 8), float("nan")),
    ):
        with pytest.raises(KdoctError, match="Images"): score_cam(small, x)
