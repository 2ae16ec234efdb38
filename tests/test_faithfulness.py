"Numbers of maps: known values, chance, and what is left out."
import numpy as np
import pytest
import torch
from torch import nn

from kdoct.core.files import KdoctError
from kdoct.explain.faithfulness import (
    confidence_change,
    energy_in_mask,
    insertion_deletion,
    map_numbers,
    pointing_game,
    random_maps,
)
from kdoct.models.backbones import Classifier


class Patch(nn.Module):
    "Class 1 where the patch at rows and columns 8 to 15 has stripes; counts its passes."
    def __init__(self):
        super().__init__()
        self.seen = 0

    def forward(self, x):
        self.seen += len(x)
        z = 60*(x[:, 0, 8:16, 8:16].diff(dim=2).abs().mean((1, 2)) - .3)
        return torch.stack([-z, z], 1)


def classifier(body, size=32):
    return Classifier(body, size, (0, 0, 0), (1, 1, 1), "bilinear").eval()


@pytest.fixture
def patch():
    "Network, images, perfect maps, classes."
    x = np.random.default_rng(0).random((5, 1, 32, 32)).astype("float32")*.1
    x[:, :, 8:16, 8:16:2] += .7
    perfect = np.zeros((5, 32, 32), "float32")
    perfect[:, 8:16, 8:16] = 1
    return classifier(Patch()), x, perfect, np.ones(5, int)


def test_insertion_and_deletion_order_perfect_random_inverse(patch):
    model, x, perfect, ones = patch
    maps = (perfect, random_maps(5, 32, 32, 3), 1 - perfect)
    good, blind, bad = (insertion_deletion(model, x, m, ones, 16) for m in maps)
    for better, worse in ((good, blind), (blind, bad)):
        assert (better.insertion_auc > worse.insertion_auc).all()
        assert (better.deletion_auc < worse.deletion_auc).all()


def test_curves_begin_and_end_with_the_image_and_its_background(patch):
    model, x, perfect, ones = patch
    c = insertion_deletion(model, x, perfect, ones, 8, background="mean")
    with torch.inference_mode():
        whole = model(torch.from_numpy(x)).softmax(1)[:, 1].numpy()
        mean = torch.from_numpy(x).mean((2, 3), keepdim=True).expand(-1, -1, 32, 32)
        empty = model(mean).softmax(1)[:, 1].numpy()
    for curve, ends in ((c.insertion, (empty, whole)), (c.deletion, (whole, empty))):
        np.testing.assert_allclose(curve[:, 0], ends[0], atol=1e-6)
        np.testing.assert_allclose(curve[:, -1], ends[1], atol=1e-6)


def test_the_area_is_that_of_a_plain_loop_over_steps(patch):
    model, x, _, ones = patch
    maps = random_maps(5, 32, 32, 1)
    c = insertion_deletion(model, x, maps, ones, 4, background="mean")
    z = model.prepare(torch.from_numpy(x))
    for i in range(5):
        p = []
        for n in (0, 256, 512, 768, 1024):
            keep = np.zeros(1024, bool)
            keep[np.argsort(-maps[i].ravel(), kind="stable")[:n]] = True
            shown = torch.from_numpy(keep.reshape(32, 32))
            picture = torch.where(shown, z[i], z[i].mean((1, 2), keepdim=True))
            p.append(model.body(picture[None]).softmax(1)[0, 1].item())
        np.testing.assert_allclose(c.insertion[i], p, atol=1e-5)
        assert c.insertion_auc[i] == pytest.approx((sum(p) - (p[0] + p[-1])/2)/4, abs=1e-5)


def test_a_curve_costs_two_passes_a_step_whatever_the_batch(patch):
    model, x, perfect, ones = patch
    some = [insertion_deletion(model, x, perfect, ones, 6, batch=b) for b in (2, 7, 64)]
    assert model.body.seen == 3*2*6*5
    for c in some[1:]: np.testing.assert_allclose(c.insertion, some[0].insertion, atol=1e-6)


def test_a_network_of_another_size_sees_maps_at_its_own_size(patch):
    _, x, perfect, ones = patch
    large = torch.nn.functional.interpolate(torch.from_numpy(x), (64, 64))
    maps = np.kron(perfect, np.ones((1, 2, 2)))
    c = insertion_deletion(classifier(Patch()), large, maps, ones, 8)
    assert (c.insertion_auc > .8).all() and (c.deletion_auc < .2).all()


def test_a_network_in_training_mode_is_refused(patch):
    model, x, perfect, ones = patch
    with pytest.raises(KdoctError, match="training mode"):
        insertion_deletion(model.train(), x, perfect, ones)
    with pytest.raises(KdoctError, match="classes of shape"):
        insertion_deletion(model.eval(), x, perfect, ones[:2])


def test_drop_and_increase_follow_what_the_map_keeps(patch):
    model, x, perfect, ones = patch
    kept = confidence_change(model, x, perfect, ones)
    lost = confidence_change(model, x, 1 - perfect, ones)
    assert (kept.drop < .1).all() and (lost.drop > 99).all() and (lost.increase == 0).all()
    np.testing.assert_allclose(lost.drop, 100*(lost.full - lost.masked)/lost.full, rtol=1e-5)
    assert (confidence_change(model, x, 1 - perfect, 0*ones).increase == 1).all()


def test_a_map_equal_to_the_mask_has_all_its_energy_there(patch):
    _, _, perfect, _ = patch
    e = energy_in_mask(perfect, perfect)
    assert (e.inside == 1).all() and (e.area == 1/16).all() and (e.ratio == 16).all()
    assert (pointing_game(perfect, perfect)[0] == 1).all()


def test_a_flat_map_gets_what_chance_gives(patch):
    _, _, perfect, _ = patch
    flat = 0*perfect + .4
    np.testing.assert_allclose(energy_in_mask(flat, perfect).inside, 1/16)
    hit, chance = pointing_game(flat, perfect)
    np.testing.assert_allclose(hit, 1/16)
    np.testing.assert_allclose(chance, 1/16)


def test_tolerance_widens_the_mask_and_its_chance():
    maps, mask = np.zeros((1, 20, 20)), np.zeros((1, 20, 20), bool)
    maps[0, 10, 13], mask[0, 10, 10] = 1, True
    assert [pointing_game(maps, mask, t)[0][0] for t in (0, 2, 3)] == [0, 0, 1]
    assert pointing_game(maps, mask, 1)[1][0] == 5/400


def test_without_mask_or_map_there_is_no_number(patch):
    model, x, perfect, ones = patch
    masks, maps = perfect.copy(), perfect.copy()
    masks[0], maps[1] = 0, 0
    n = map_numbers(model, x, maps, ones, masks, 4)
    for column in ("energy", "pointing"):
        assert n[column].isna().tolist() == [True, True, False, False, False]
    for column in ("insertion", "drop"):
        assert n[column].isna().tolist() == [False, True, False, False, False]
