"Maps beside each other: randomised copies, similarity, chance, partners."
import numpy as np
import pytest
import torch
from torch import nn

from kdoct.core.files import KdoctError
from kdoct.explain.comparison import (
    map_ssim,
    other_group,
    randomised,
    rank_correlation,
    top_overlap,
)
from kdoct.explain.faithfulness import random_maps
from kdoct.models.backbones import Classifier


class Net(nn.Sequential):
    "A small network with BatchNorm."
    def __init__(self):
        torch.manual_seed(0)
        super().__init__(
            nn.Conv2d(3, 8, 3),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 3),
        )


@pytest.fixture
def network():
    "A network and four images."
    x = torch.rand(4, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    return Classifier(Net(), 32, (0, 0, 0), (1, 1, 1), "bilinear").eval(), x


def test_randomised_copy_leaves_the_original_bit_for_bit(network):
    model, x = network
    before = {k: v.clone() for k, v in model.state_dict().items()}
    lost = randomised(model, 1, x)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not lost.training
    for k, v in lost.named_parameters():
        assert torch.equal(v.flatten().sort()[0], before[k].flatten().sort()[0])
    for k in ("body.0.weight", "body.3.weight", "body.8.weight", "body.1.running_var"):
        assert not torch.equal(lost.state_dict()[k], before[k])
    assert not torch.allclose(lost(x), model(x))


def test_randomisation_cascades_from_the_output(network):
    model, x = network

    def changed(share):
        lost = dict(randomised(model, 1, x, share).named_parameters())
        return {k for k, v in model.named_parameters() if not torch.equal(v, lost[k])}

    assert changed(.2) == {"body.8.weight", "body.8.bias"} < changed(.6) < changed(1)


def test_randomisation_repeats_with_its_seed(network):
    model, x = network
    assert torch.equal(randomised(model, 1, x)(x), randomised(model, 1, x)(x))
    assert not torch.equal(randomised(model, 1, x)(x), randomised(model, 2, x)(x))


def test_identical_maps_agree_wholly_and_independent_ones_by_chance():
    a, b = random_maps(400, 21, 21, 0), random_maps(400, 21, 21, 1)
    np.testing.assert_allclose(rank_correlation(a, a), 1)
    assert (top_overlap(a, a)[0] == 1).all()
    np.testing.assert_allclose(map_ssim(a[:2], a[:2]), 1)
    assert abs(rank_correlation(a, b).mean()) < .03 and abs(top_overlap(a, b)[0].mean() - 1/9) < .03
    np.testing.assert_allclose(top_overlap(a, b)[1], 1/9, atol=4e-3)


def test_rank_correlation_is_scipys():
    from scipy.stats import spearmanr
    a, b = np.random.default_rng(0).integers(0, 5, (2, 6, 10, 10))
    np.testing.assert_allclose(
        rank_correlation(a, b),
        [spearmanr(p.ravel(), q.ravel())[0] for p, q in zip(a, b, strict=True)],
    )


def test_pixels_at_the_lowest_value_never_count_as_important():
    a, b = np.zeros((2, 1, 20, 20))
    a[0, :2, :2], b[0, 10:12, 10:12] = 1, 1
    iou, chance = top_overlap(a, b)
    assert iou[0] == 0 and chance[0] == pytest.approx((16/400)/(8 - 16/400))
    assert np.isnan(top_overlap(a, 0*b)[0]).all()


def test_partners_come_from_other_groups():
    groups = np.random.default_rng(0).integers(0, 4, 50)
    partner = other_group(groups)
    assert (groups[partner] != groups).all() and sorted(partner) == list(range(50))
    with pytest.raises(KdoctError, match="more than half"): other_group(["a", "a", "a", "b"])
