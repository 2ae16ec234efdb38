"Losses with memory banks and views: torchdistill's, gradients, extremes, the order of the batch."
import pytest
import torch
import torch.nn.functional as F

from kdoct.core.files import KdoctError
from kdoct.distill import contrast_losses as L


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def unit(*shape, seed=0, dtype=torch.float32):
    return F.normalize(torch.randn(*shape, generator=generator(seed), dtype=dtype), dim=-1)


# Each loss as a function of the student's numbers and the teacher's, one row an image or a view.
LABELS = torch.tensor([0, 1, 0, 2, 1])
BANK_LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 0])
SAME = LABELS[:, None] == BANK_LABELS
BANK = unit(7, 4, seed=5)


def contrast(student, teacher, at=slice(None)):
    similarities = student @ BANK.to(student.dtype).T
    return L.noise_contrastive_loss(similarities, SAME[at], ~SAME[at], 2.)


def relations(student, teacher, at=slice(None)):
    centroids = L.class_centroids(BANK.to(student.dtype), BANK_LABELS)
    return L.centroid_relation_loss(student, teacher, centroids, centroids.flip(1))


def answers(student, teacher, at=slice(None)):
    return L.selected_divergence(student, teacher, LABELS[at], .5, .75)


EVERY = {'contrast': contrast, 'relations': relations, 'answers': answers}
every_loss = pytest.mark.parametrize('name', EVERY)


@every_loss
def test_the_gradient_is_that_of_finite_differences(name):
    student = unit(5, 4, seed=1, dtype=torch.float64).requires_grad_()
    teacher = unit(5, 4, seed=2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: EVERY[name](x, teacher), (student,))


@every_loss
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('size', [0., 1e4])
def test_numbers_of_nothing_and_of_ten_thousand_stay_finite(name, dtype, size):
    student, teacher = ((size*unit(5, 4, seed=s)).to(dtype) for s in (1, 2))
    student.requires_grad_()
    value = EVERY[name](student, teacher)
    value.backward()
    assert value.isfinite() and student.grad.isfinite().all()


@every_loss
def test_the_order_of_the_batch_does_not_matter(name):
    student, teacher = unit(5, 4, seed=1), unit(5, 4, seed=2)
    order = torch.tensor([3, 0, 4, 2, 1])
    again = EVERY[name](student[order], teacher[order], order)
    torch.testing.assert_close(again, EVERY[name](student, teacher), rtol=1e-5, atol=1e-6)


@every_loss
def test_the_teacher_gets_no_gradient(name):
    student, teacher = (unit(5, 4, seed=s).requires_grad_() for s in (1, 2))
    EVERY[name](student, teacher).backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0


def test_without_images_of_other_classes_the_contrast_stays_finite():
    similarities = unit(3, 7).requires_grad_()
    every = torch.ones(3, 7, dtype=torch.bool)
    value = L.noise_contrastive_loss(similarities, every, ~every, 2.)
    value.backward()
    assert value.isfinite() and similarities.grad.isfinite().all()


def test_no_answer_that_is_passed_on_gives_no_loss_and_no_gradient():
    student = torch.randn(4, 3).requires_grad_()
    teacher = torch.tensor([[0., 1., 2.]]).repeat(4, 1)
    value = L.selected_divergence(student, teacher, torch.zeros(4, dtype=torch.long), 4., 0.)
    value.backward()
    assert value == 0 and student.grad.abs().max() == 0


def test_drawn_columns_are_allowed_and_as_many_as_can_be():
    u = torch.rand(50, 30, generator=generator())
    allowed = torch.rand(50, 30, generator=generator(1)) < .3
    chosen = L.drawn(allowed, u, 8)
    assert not (chosen & ~allowed).any()
    assert torch.equal(chosen.sum(1), allowed.sum(1).clamp_max(8))


def test_one_image_has_no_other_to_be_confused_with():
    with pytest.raises(KdoctError, match='it has one'):
        L.view_similarities(unit(1, 4), unit(3, 4))


# --- torchdistill

@pytest.fixture
def mid_level():
    return pytest.importorskip('torchdistill.losses.mid_level')


def crd_of(module, n_images, n_negative, length):
    "torchdistill's CRDLoss; its alias table, which its 1.1 cannot make, is not needed where pairs are given."
    class Given(module.CRDLoss):
        def init_prob_alias(self, probs): self.probs = self.alias = torch.zeros(1)
    return Given('net', 'empty', 'net', length, n_images, n_negative, n_images)


def test_contrast_of_one_positive_is_crd_of_torchdistill(mid_level):
    n, m, k, length = 4, 12, 5, 6
    student, teacher = unit(n, length, seed=1), unit(n, length, seed=2)
    own = torch.tensor([3, 0, 7, 11])
    others = [[i for i in range(m) if i != o][:k] for o in own.tolist()]
    pairs = torch.cat([own[:, None], torch.tensor(others)], 1)
    theirs = crd_of(mid_level, m, k, length)
    banks = theirs.memory_v1.clone(), theirs.memory_v2.clone()
    given = {'input': dict(pos_idx=own, contrast_idx=pairs)}
    want = theirs({'net': {'output': student}, 'empty': given}, {'net': {'output': teacher}})

    positive = F.one_hot(own, m).bool()
    negative = torch.zeros(n, m).scatter_(1, pairs[:, 1:], 1).bool()
    log_z = theirs.params[2:4].log()
    got = [
        L.noise_contrastive_loss(x @ bank.T, positive, negative, z)
        for x, bank, z in zip((student, teacher), banks[::-1], log_z, strict=True)
    ]
    torch.testing.assert_close(sum(got), want[0], rtol=1e-5, atol=1e-5)

    ours = L.MemoryBank(m, length)
    ours.rows.copy_(banks[0])
    ours.update(own, student)
    torch.testing.assert_close(ours.rows, theirs.memory_v1)


@pytest.mark.parametrize('weights', [[0, 0, 1., 0], [0, 0, 0, 1.]], ids=['views', 'logits'])
def test_terms_on_views_are_sskd_of_torchdistill(mid_level, weights):
    "Four images of four views each; all shares of the wrong answers at which no ties are cut."
    n, classes = 4, 5
    logits = [torch.randn(4*n, classes, generator=generator(s)) for s in (1, 2)]
    embeddings = [torch.randn(4*n, 6, generator=generator(s)) for s in (3, 4)]
    targets = torch.tensor([0, 3, 1, 4])
    theirs = mid_level.SSKDLoss(
        'logits', 'logits', 'views', 'views', 4., .5, 4., 1., 1., loss_weights=weights
    )
    given = [
        {'logits': {'output': z}, 'views': {'output': e}}
        for z, e in zip(logits, embeddings, strict=True)
    ]
    want = theirs(*given, targets)
    is_clean = torch.arange(4*n) % 4 == 0
    if weights[3]:
        pair = [z[~is_clean] for z in logits]
        got = L.selected_divergence(*pair, targets.repeat_interleave(3), 4., 1.)
    else:
        pair = [L.view_similarities(e[is_clean], e[~is_clean]) for e in embeddings]
        got = L.selected_divergence(*pair, torch.arange(n).repeat_interleave(3), .5, 1.)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_the_answers_kept_are_those_of_torchdistill_where_ranks_differ():
    "Ranks 0, 1, 2, 3 of the right class: a wrong share of a half keeps one of three."
    scores = torch.tensor([[4., 3., 2., 1.]]).repeat(4, 1)
    kept = L.kept_answers(scores, torch.tensor([3, 1, 0, 2]), .5)
    assert kept.tolist() == [False, True, True, False]
