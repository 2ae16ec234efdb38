"Published losses on logits: equality with an independent implementation, gradients, extremes."
import pytest
import torch
import torch.nn.functional as F

from kdoct.distill import logit_losses as L

LOSSES = {
    "per_image_temperature": lambda s, t, y: L.per_image_temperature_loss(s, t, 1. + y),
    "standardised": lambda s, t, y: L.standardised_loss(s, t),
    "decoupled": L.decoupled_loss,
    "normalised": L.normalised_loss,
    "correlation": lambda s, t, y: L.correlation_loss(s, t),
    "hard_label": lambda s, t, y: L.hard_label_loss(s, t),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def batch(n=6, classes=4, dtype=torch.float32, seed=0):
    "Logits of student and teacher, and labels."
    g = torch.Generator().manual_seed(seed)
    student = torch.randn(n, classes, generator=g, dtype=dtype)
    teacher = 3*torch.randn(n, classes, generator=g, dtype=dtype)
    return student, teacher, torch.arange(n) % classes


@every_loss
def test_the_gradient_is_that_of_finite_differences(loss):
    student, teacher, labels = batch(dtype=torch.float64)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: loss(z, teacher, labels), (student,))


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("classes", [2, 4])
def test_logits_of_ten_thousand_stay_finite(loss, dtype, classes):
    student, teacher, labels = batch(classes=classes)
    student = (1e4*student.clamp(-1, 1)).to(dtype).requires_grad_()
    value = loss(student, (-1e4*teacher.clamp(-1, 1)).to(dtype), labels)
    value.backward()
    assert value.isfinite() and student.grad.isfinite().all()


@every_loss
def test_logits_that_are_all_equal_stay_finite(loss):
    _, _, labels = batch()
    student = torch.zeros(6, 4, requires_grad=True)
    value = loss(student, torch.zeros(6, 4), labels)
    value.backward()
    assert value.isfinite() and student.grad.isfinite().all()


@every_loss
def test_the_order_of_the_batch_does_not_matter(loss):
    student, teacher, labels = batch()
    order = torch.randperm(6, generator=torch.Generator().manual_seed(1))
    assert not torch.equal(order, torch.arange(6))
    again = loss(student[order], teacher[order], labels[order])
    torch.testing.assert_close(again, loss(student, teacher, labels), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["per_image_temperature", "standardised", "decoupled", "correlation"])
def test_a_student_that_has_the_teachers_logits_has_nothing_to_learn(name):
    _, teacher, labels = batch()
    student = teacher.clone().requires_grad_()
    value = LOSSES[name](student, teacher, labels)
    value.backward()
    assert abs(value.item()) < 1e-5 and student.grad.abs().max() < 1e-5


def test_decoupled_with_the_weights_of_its_equation_6_is_the_divergence():
    student, teacher, labels = batch()
    rest = 1 - teacher.softmax(1)[range(6), labels]
    each = [
        L.decoupled_loss(student[i:i+1], teacher[i:i+1], labels[i:i+1], 1., float(rest[i]), 1.)
        for i in range(6)
    ]
    divergence = F.kl_div(
        student.log_softmax(1), teacher.log_softmax(1), reduction="batchmean", log_target=True
    )
    torch.testing.assert_close(torch.stack(each).mean(), divergence, rtol=1e-5, atol=1e-6)


def test_decoupled_is_nearly_infinite_nowhere_that_the_teacher_is_sure():
    "The authors' form takes the logarithm of a sum that rounds to 0 here."
    student = torch.tensor([[80., 0., 0.]], requires_grad=True)
    value = L.decoupled_loss(
        student, torch.tensor([[0.0, 90.0, 0.0]]), torch.tensor([0]), temperature=1.0
    )
    value.backward()
    assert value.isfinite() and student.grad.isfinite().all() and student.grad.abs().sum() > 0


def of_torchdistill(name, **options):
    "One of torchdistill's losses as a function of the logits of student and teacher."
    mid_level = pytest.importorskip("torchdistill.losses.mid_level")
    places = {
        f"{who}_module_{what}": value
        for who in ("student", "teacher") for what, value in (("path", "net"), ("io", "output"))
    }
    loss = getattr(mid_level, name)(**places, **options)
    return lambda s, t: loss({"net": {"output": s}}, {"net": {"output": t}})


@pytest.mark.parametrize("temperature", [1., 4.])
def test_correlation_is_that_of_torchdistill(temperature):
    student, teacher, _ = batch()
    theirs = of_torchdistill("DISTLoss", beta=2., gamma=.5, tau=temperature)(student, teacher)
    ours = L.correlation_loss(student, teacher, 2., .5, temperature)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("temperature", [1., 2.])
def test_standardised_is_that_of_torchdistill(temperature):
    student, teacher, _ = batch()
    theirs = of_torchdistill("LogitStdKDLoss", temperature=temperature, alpha=0.0, beta=1.0)(
        student, teacher
    )
    ours = L.standardised_loss(student, teacher, temperature)
    torch.testing.assert_close(ours, temperature**2*theirs, rtol=1e-5, atol=1e-6)
