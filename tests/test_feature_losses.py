"Published losses on maps and embeddings: an independent implementation, gradients, extremes."
import pytest
import torch

from kdoct.core.files import KdoctError
from kdoct.distill import feature_losses as L

ON_MAPS = {
    "hint": L.hint_loss,
    "direction": L.direction_loss,
    "attention": L.attention_loss,
    "channel_relation": L.channel_relation_loss,
}
ON_EMBEDDINGS = {
    "similarity": L.similarity_loss,
    "distance": L.distance_loss,
    "angle": L.angle_loss,
}
EVERY = {**ON_MAPS, **ON_EMBEDDINGS}
every_loss = pytest.mark.parametrize("name", EVERY)


def inputs(name, n=5, dtype=torch.float32):
    "What student and teacher give for a batch: maps of two sizes, or embeddings of two lengths."
    g = torch.Generator().manual_seed(0)
    if name in ON_MAPS: shapes = (n, 4, 6, 5), (n, 4, 3, 5)
    else: shapes = (n, 7), (n, 4)
    return tuple(torch.randn(*shape, generator=g, dtype=dtype) for shape in shapes)


@every_loss
def test_the_gradient_is_that_of_finite_differences(name):
    student, teacher = inputs(name, 3, torch.float64)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: EVERY[name](x, teacher), (student,))


@every_loss
def test_the_order_of_the_batch_does_not_matter(name):
    student, teacher = inputs(name)
    order = torch.tensor([3, 0, 4, 2, 1])
    again = EVERY[name](student[order], teacher[order])
    torch.testing.assert_close(again, EVERY[name](student, teacher), rtol=1e-5, atol=1e-6)


@every_loss
def test_what_equals_the_teacher_has_nothing_to_learn(name):
    _, teacher = inputs(name)
    student = teacher.clone().requires_grad_()
    value = EVERY[name](student, teacher)
    value.backward()
    assert value < 1e-5 and student.grad.abs().max() < 1e-4


@every_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [0., 1e4])
def test_features_of_nothing_and_of_ten_thousand_stay_finite(name, dtype, size):
    student, teacher = inputs(name)
    student = (size*student.clamp(-1, 1)).to(dtype).requires_grad_()
    value = EVERY[name](student, (size*teacher.clamp(-1, 1)).to(dtype))
    value.backward()
    assert value.isfinite() and student.grad.isfinite().all()


@pytest.mark.parametrize("name,least", [("similarity", 2), ("distance", 2), ("angle", 3)])
def test_a_batch_too_small_to_compare_images_is_refused(name, least):
    student, teacher = inputs(name, least)
    EVERY[name](student, teacher)
    with pytest.raises(KdoctError, match=f"compares {least} images"):
        EVERY[name](student[1:], teacher[1:])


@pytest.mark.parametrize("name", ON_EMBEDDINGS)
def test_turning_an_embedding_changes_nothing(name):
    student, teacher = inputs(name)
    turn = torch.linalg.qr(torch.randn(7, 7, generator=torch.Generator().manual_seed(1)))[0]
    value = EVERY[name](student @ turn, teacher)
    torch.testing.assert_close(value, EVERY[name](student, teacher), rtol=1e-4, atol=1e-5)


def test_a_teacher_that_is_unsure_of_the_label_still_points_at_it():
    "The exponent raises the label's share of the target, and of nothing else."
    student, teacher, labels = torch.zeros(1, 3), torch.zeros(1, 3), torch.tensor([0])
    gradients = []
    for gamma in (1., 2.):
        z = student.clone().requires_grad_()
        L.enhanced_target_loss(z, teacher, labels, gamma).backward()
        gradients.append(z.grad[0])
    assert gradients[0].abs().max() < 1e-6    # equal to the teacher
    assert gradients[1][0] < -.1 < 0 < gradients[1][1]


def test_a_projection_fits_maps_of_any_precision():
    projection = L.Projection(3, 5)
    assert projection(torch.randn(2, 3, 4, 4).bfloat16()).dtype == torch.float32


def given_to_torchdistill(student, teacher):
    "Outputs of one module each, as torchdistill's losses take them."
    return {"net": {"output": student}}, {"net": {"output": teacher}}


@pytest.fixture
def torchdistill():
    return pytest.importorskip("torchdistill.losses.mid_level")


def test_attention_is_that_of_torchdistill(torchdistill):
    student, teacher = L.same_grid(*inputs("attention"))
    place = {"io": "output", "path": "net"}
    theirs = torchdistill.ATLoss({"pair": {"teacher": place, "student": place}}, mode="code")
    want = theirs(*given_to_torchdistill(student, teacher))
    torch.testing.assert_close(L.attention_loss(student, teacher), want, rtol=1e-5, atol=1e-7)


def test_similarity_is_equation_4_pair_by_pair():
    "torchdistill 1.1 divides each row by the sum of its sizes, the paper by its length."
    student, teacher = (x.double() for x in inputs("similarity"))
    n, total = len(student), 0.
    for i in range(n):
        rows = [[float(x[i] @ x[j]) for j in range(n)] for x in (student, teacher)]
        lengths = [sum(v*v for v in row)**.5 for row in rows]
        for s, t in zip(*rows, strict=True): total += (s/lengths[0] - t/lengths[1])**2
    assert L.similarity_loss(student, teacher).item() == pytest.approx(total/n**2, rel=1e-9)


@pytest.mark.parametrize("distance,angle", [(1., 0.), (0., 1.), (25., 50.)])
def test_distances_and_angles_are_those_of_torchdistill(torchdistill, distance, angle):
    student, teacher = inputs("distance")
    theirs = torchdistill.RKDLoss("net", "net", distance, angle, "mean")
    want = theirs(*given_to_torchdistill(student, teacher))
    ours = distance*L.distance_loss(student, teacher) + angle*L.angle_loss(student, teacher)
    torch.testing.assert_close(ours, torch.as_tensor(want), rtol=1e-5, atol=1e-5)
