"Numbers of maps: known answers, what is left out, and what is drawn anew."
import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from kdoct.core.files import KdoctError
from kdoct.core.sections import EvaluateRecipe
from kdoct.explain.faithfulness import (
    agreement_numbers,
    agreement_table,
    confidence_change,
    correctness,
    energy_in_mask,
    explanation_table,
    insertion_deletion,
    map_numbers,
    map_ssim,
    mean_interval,
    other_group,
    pointing_game,
    random_maps,
    randomised,
    rank_correlation,
    sanity_verdict,
    top_overlap,
)
from kdoct.models.backbones import Classifier

FAST = EvaluateRecipe(n_boot=200)


class Patch(nn.Module):
    "Class 1 where the patch at rows and columns 8 to 15 has stripes; counts its passes."
    def __init__(self):
        super().__init__()
        self.seen = 0

    def forward(self, x):
        self.seen += len(x)
        z = 60*(x[:, 0, 8:16, 8:16].diff(dim=2).abs().mean((1, 2)) - .3)
        return torch.stack([-z, z], 1)


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
    good, blind, bad = (
        insertion_deletion(model, x, m, ones, 16)
        for m in (perfect, random_maps(5, 32, 32, 3), 1 - perfect)
    )
    assert (good.insertion_auc > blind.insertion_auc).all() and (
        blind.insertion_auc > bad.insertion_auc
    ).all()
    assert (good.deletion_auc < blind.deletion_auc).all() and (
        blind.deletion_auc < bad.deletion_auc
    ).all()


def test_curves_begin_and_end_with_the_image_and_its_background(patch):
    model, x, perfect, ones = patch
    c = insertion_deletion(model, x, perfect, ones, 8, background="mean")
    with torch.inference_mode():
        whole = model(torch.from_numpy(x)).softmax(1)[:, 1].numpy()
        empty = (
            model(torch.from_numpy(x).mean((2, 3), keepdim=True).expand(-1, -1, 32, 32))
            .softmax(1)[:, 1]
            .numpy()
        )
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
            p.append(
                model.body(
                    torch.where(
                        torch.from_numpy(keep.reshape(32, 32)),
                        z[i],
                        z[i].mean((1, 2), keepdim=True),
                    )[None]
                )
                .softmax(1)[0, 1]
                .item()
            )
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
    c = insertion_deletion(
        classifier(Patch()), large, np.kron(perfect, np.ones((1, 2, 2))), ones, 8
    )
    assert (c.insertion_auc > .8).all() and (c.deletion_auc < .2).all()


def test_a_network_in_training_mode_is_refused(patch):
    model, x, perfect, ones = patch
    with pytest.raises(KdoctError, match="training mode"):
        insertion_deletion(model.train(), x, perfect, ones)
    with pytest.raises(KdoctError, match="classes of shape"):
        insertion_deletion(model.eval(), x, perfect, ones[:2])


def test_drop_and_increase_follow_what_the_map_keeps(patch):
    model, x, perfect, ones = patch
    kept, lost = (
        confidence_change(model, x, perfect, ones),
        confidence_change(model, x, 1 - perfect, ones),
    )
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


def test_without_mask_or_map_there_is_no_number_and_the_table_counts_it(patch):
    model, x, perfect, ones = patch
    masks, maps = perfect.copy(), perfect.copy()
    masks[0], maps[1] = 0, 0
    n = map_numbers(model, x, maps, ones, masks, 4)
    assert (
        n.energy.isna().tolist() == n.pointing.isna().tolist() == [True, True, False, False, False]
    )
    assert (
        n.insertion.isna().tolist()
        == n["drop"].isna().tolist()
        == [False, True, False, False, False]
    )
    t = explanation_table(
        n.assign(path=list("abcde"), group=list("vwxyz"), role="student", method="m"), FAST
    ).table
    assert (
        "energy in mask %" in t.note.iloc[0]
        and "2 of 5 images" in t.note.iloc[0]
        and "1 of 5 images" in t.note.iloc[0]
    )
    assert t.energy.iloc[0] == 100 and t.energy_ratio.iloc[0] == pytest.approx(16)


def test_randomised_copy_leaves_the_original_bit_for_bit():
    model, x = (
        classifier(Net()),
        torch.rand(4, 1, 32, 32, generator=torch.Generator().manual_seed(0)),
    )
    before = {k: v.clone() for k, v in model.state_dict().items()}
    twin = randomised(model, 1, x)
    assert (
        all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and not twin.training
    )
    for k, v in twin.named_parameters():
        assert torch.equal(v.flatten().sort()[0], before[k].flatten().sort()[0])
    for k in ("body.0.weight", "body.3.weight", "body.8.weight", "body.1.running_var"):
        assert not torch.equal(twin.state_dict()[k], before[k])
    assert not torch.allclose(twin(x), model(x))


def test_randomisation_cascades_from_the_answer_and_repeats_with_its_seed():
    model, x = (
        classifier(Net()),
        torch.rand(4, 1, 32, 32, generator=torch.Generator().manual_seed(0)),
    )
    changed = [
        [
            k
            for k, v in randomised(model, 1, x, f).named_parameters()
            if not torch.equal(v, model.get_parameter(k))
        ]
        for f in (0.2, 0.6, 1)
    ]
    assert changed[0] == ["body.8.weight", "body.8.bias"] and set(changed[0]) < set(
        changed[1]
    ) < set(changed[2])
    assert torch.equal(randomised(model, 1, x)(x), randomised(model, 1, x)(x)) and not torch.equal(
        randomised(model, 1, x)(x), randomised(model, 2, x)(x)
    )


def test_the_verdict_follows_the_interval():
    groups = np.arange(40)
    assert "depend on the weights" in sanity_verdict(np.linspace(-.2, .2, 40), groups, FAST)
    assert "do NOT depend" in sanity_verdict(np.linspace(.8, 1, 40), groups, FAST)
    assert "may or may not" in sanity_verdict(np.linspace(0, 1, 40), groups, FAST)


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


def test_intervals_resample_groups_and_not_images():
    e = EvaluateRecipe(n_boot=4000)
    r = mean_interval([1]*3 + [0]*9, list("aaabbbbbbbbb"), e)  # draws: aa, ab, ba, bb; means 1, .25, .25, 0
    assert (r["estimate"], r["low"], r["high"]) == (.25, 0, 1)
    wide, narrow = (
        mean_interval(np.repeat([0.0, 1.0], 20), g, e) for g in (np.arange(40) // 10, np.arange(40))
    )
    assert wide["high"] - wide["low"] > 2*(narrow["high"] - narrow["low"])


def test_differences_are_paired():
    rng = np.random.default_rng(0)
    hard = rng.random(30)
    rows = [
        pd.DataFrame(
            dict(
                path=np.arange(30).astype(str),
                group=np.arange(30),
                role=r,
                method="m",
                insertion=hard + d,
            )
        )
        for r, d in (("teacher", 0), ("student", -0.1))
    ]
    t = explanation_table(
        pd.concat([rows[0], rows[1].sample(frac=1, random_state=0)]), FAST
    ).table.loc["m, student minus teacher"]
    assert (
        t.insertion == pytest.approx(-0.1)
        and t.insertion_low == pytest.approx(-0.1)
        and t.insertion_high == pytest.approx(-0.1)
    )


def test_agreement_is_told_by_who_was_right_and_few_groups_are_marked():
    a = random_maps(60, 21, 21)
    t_right, s_right = np.arange(60) > 1, np.arange(60) % 3 > 0
    n = agreement_numbers(a, np.where(s_right[:, None, None], a, a[::-1]), np.arange(60))
    t = agreement_table(
        n.assign(
            path=np.arange(60).astype(str),
            group=np.arange(60),
            method="m",
            correctness=correctness(t_right, s_right),
        ),
        FAST,
    ).table
    assert (
        t.loc["m: both right", "rank"] == pytest.approx(1)
        and t.loc["m: student wrong", "rank"] < 0.5
    )
    assert t.loc["m: both right minus student wrong", "rank_low"] > .5
    assert "too few groups (1)" in t.loc[
        "m: both wrong", "note"
    ] and t.n_images.sum() == 60 + 60 + (60 - 2)


def test_partners_come_from_other_groups():
    groups = np.random.default_rng(0).integers(0, 4, 50)
    partner = other_group(groups)
    assert (groups[partner] != groups).all() and sorted(partner) == list(range(50))
    with pytest.raises(KdoctError, match="more than half"): other_group(["a", "a", "a", "b"])


def test_other_images_for_the_student_are_refused():
    frame = pd.DataFrame(
        dict(
            path=["a", "b", "a", "c"],
            group=list("wxwy"),
            role=["teacher"] * 2 + ["student"] * 2,
            method="m",
            insertion=0.5,
        )
    )
    with pytest.raises(KdoctError, match="not explained on the same images"):
        explanation_table(frame, FAST)
