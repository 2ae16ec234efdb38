"Deep AUC: the margin loss, its saddle point, and how it learns beside the network."
import numpy as np
import pytest
import torch
from pydantic import ValidationError

from kdoct.core.presets import preset
from kdoct.core.sections import TrainRecipe
from kdoct.data.batches import Batches
from kdoct.models.backbones import create_classifier
from kdoct.training.loop import companion_groups, make_learner
from kdoct.training.losses import AucMargin, hard_loss


def published(scores, positive, a, b, alpha, p, margin=1.):
    "Yuan et al. 2021, arXiv 2012.03173, eq. 6, image by image."
    total = 0.
    for f, is_positive in zip(scores.tolist(), positive.tolist(), strict=True):
        if is_positive: total += (1 - p)*(f - a)**2 - 2*alpha*(1 - p)*f
        else: total += p*(f - b)**2 + 2*alpha*p*f
    return total/len(scores) + 2*alpha*p*(1 - p)*margin - p*(1 - p)*alpha**2


def test_it_is_the_published_sum_of_each_class_against_the_others():
    torch.manual_seed(0)
    logits, target = torch.randn(7, 3), torch.tensor([0, 1, 2, 2, 1, 2, 2])
    loss = AucMargin([.2, .3, .5], margin=.8)
    with torch.no_grad():
        for parameter in loss.parameters(): parameter.uniform_(0, 1)
    a, b, alpha = (p.tolist() for p in (loss.a, loss.b, loss.alpha))
    want = sum(
        published(logits.sigmoid()[:, c], target == c, a[c], b[c], alpha[c], p, .8)
        for c, p in enumerate([.2, .3, .5])
    )
    assert loss(logits, target).item() == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize('order', [1, -1], ids=['mixed order', 'the wrong order'])
def test_steps_find_the_saddle_point_that_a_grid_finds(order):
    scores = order*torch.tensor([2., .5, -1, -.2, -3])
    positive = torch.tensor([True, False, True, False, False])
    logits, target = torch.stack([scores, -scores], 1), (~positive).long()
    f, p, grid = scores.sigmoid(), .4, torch.linspace(0, 2, 81).tolist()
    inner = lambda a, b: max(published(f, positive, a, b, alpha, p) for alpha in grid)
    value, a, b = min((inner(a, b), a, b) for a in grid[:41] for b in grid[:41])
    alpha = max(grid, key=lambda x: published(f, positive, a, b, x, p))
    loss = AucMargin([.4, .6])
    optimizer = torch.optim.SGD(loss.parameters(), lr=.5)
    for _ in range(300):
        optimizer.zero_grad()
        loss(logits, target).backward()
        optimizer.step()
    found = [parameter[0].item() for parameter in (loss.a, loss.b, loss.alpha)]
    assert found == pytest.approx([a, b, alpha], abs=.03)
    of_class = published(f, positive, *found, p)
    assert of_class == pytest.approx(value, abs=1e-3)


def test_alpha_stays_at_0_where_all_pairs_have_their_margin_and_more():
    logits, target = torch.tensor([[8., -8], [-8, 8]]), torch.tensor([0, 1])
    loss = AucMargin([.5, .5], margin=.2)
    optimizer = torch.optim.SGD(loss.parameters(), lr=.5)
    for _ in range(50):
        optimizer.zero_grad()
        loss(logits, target).backward()
        optimizer.step()
    loss(logits, target)
    assert loss.alpha.tolist() == [0, 0]


def test_a_step_is_the_same_in_one_batch_and_in_two():
    torch.manual_seed(0)
    logits, target, loss = torch.randn(8, 3), torch.arange(8) % 3, AucMargin([.5, .25, .25])
    parts = .75*loss(logits[:6], target[:6]) + .25*loss(logits[6:], target[6:])
    assert loss(logits, target).item() == pytest.approx(parts.item(), abs=1e-6)


def test_blended_labels_count_by_their_shares():
    logits, loss = torch.randn(1, 2).repeat(4, 1), AucMargin([.5, .5])
    blended = loss(logits, torch.tensor([[.75, .25]]*4))
    assert blended.item() == pytest.approx(
        loss(logits, torch.tensor([0, 0, 0, 1])).item(), abs=1e-6
    )


def test_the_gradient_of_the_network_is_that_of_finite_differences():
    torch.manual_seed(0)
    loss, target = AucMargin([.3, .7]), torch.tensor([0, 1, 1, 0])
    logits = torch.randn(4, 2, requires_grad=True)
    loss(logits, target).backward()
    step = torch.zeros(4, 2)
    step[2, 1] = .01
    up, down = (loss(logits.detach() + s*step, target).item() for s in (1, -1))
    assert logits.grad[2, 1].item() == pytest.approx((up - down)/.02, abs=1e-4)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_it_is_finite_for_large_logits(dtype):
    logits = (torch.eye(3)*1e4).to(dtype).requires_grad_()
    loss = AucMargin([.2, .3, .5])(logits, torch.tensor([2, 1, 0]))
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all()


def test_it_does_not_take_class_weights_or_smoothed_labels():
    for changed in (dict(class_weights='balanced'), dict(label_smoothing=.1)):
        with pytest.raises(ValidationError, match='weighs the classes itself'):
            TrainRecipe(loss='auc', **changed)


LABELS = np.arange(24) % 3


def learner(folder, recipe):
    images = np.random.default_rng(0).integers(0, 255, (24, 32, 32), dtype=np.uint8)
    images[:, :4] = (LABELS*100)[:, None, None]   # what the classes differ in
    ids = np.arange(24, dtype=np.uint64)
    torch.manual_seed(0)
    return make_learner(
        create_classifier(recipe, 3, 32),
        Batches(images, LABELS, ids, np.arange(16), 8, recipe.augment, 1),
        Batches(images, LABELS, ids, np.arange(16, 24), 8),
        hard_loss(recipe, LABELS[:16], 3),
        recipe,
        folder,
    )


def fit(learn):
    with learn.no_bar(), learn.no_logging(): learn.fit(learn.checkpoint.recipe.epochs)
    return learn


@pytest.fixture
def recipe():
    changed = dict(loss='auc', epochs=2, lr=1e-3, precision='fp32')
    return preset('tiny').student.model_copy(update=changed)


class Stop(Exception): "Training was killed."


def test_a_resumed_training_ends_with_the_same_network_and_saddle_point(
    tmp_path, recipe, monkeypatch
):
    whole = fit(learner(tmp_path/'whole', recipe))
    stopped = learner(tmp_path/'stopped', recipe.model_copy(update=dict(checkpoint_minutes=1e-9)))
    place = stopped.checkpoint
    saving = place.save
    def stop(epoch, batch):
        saving(epoch, batch)
        if (epoch, batch) == (1, 1): raise Stop('in the middle of the second epoch')
    monkeypatch.setattr(place, 'save', stop)
    with pytest.raises(Stop): fit(stopped)
    again = fit(learner(tmp_path/'stopped', recipe))
    for a, b in zip(whole.trained.parameters(), again.trained.parameters(), strict=True):
        assert torch.equal(a, b)
    first = AucMargin(whole.loss_func.priors)
    assert not torch.equal(whole.loss_func.alpha, first.alpha)


def test_a_b_and_alpha_learn_faster_and_do_not_decay(recipe):
    group, = companion_groups({'loss': hard_loss(recipe, LABELS, 3)}, recipe)
    assert (group['weight_decay'], group['peak'], group['companion']) == (0, 1e-2, 'loss')
