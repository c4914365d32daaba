"""Tests of logits of every kind: class dimensions, masks, binary outputs and sigmoid KD."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_dist import DISTLoss, KDLoss
from lightning_dist.functional import (
    dist_loss,
    inter_class_correlation,
    intra_class_correlation,
    jeffreys_loss,
    jsd_loss,
    kd_loss,
    reverse_kd_loss,
)
from lightning_dist.losses import streaming

LOSSES = [dist_loss, kd_loss, reverse_kd_loss, jeffreys_loss, jsd_loss]


def value_and_grad(loss, student: Tensor, teacher: Tensor, **options) -> tuple[Tensor, Tensor]:
    student = student.detach().requires_grad_()
    value = loss(student, teacher, **options)
    return value.detach(), torch.autograd.grad(value, student)[0]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("shape", "class_dim"),
    [((3, 4, 5), -1), ((3, 4, 5), 2), ((3, 4, 5), 1), ((5, 7), 0), ((3, 4, 2, 5), 3)],
)
@pytest.mark.parametrize("layout", ["contiguous", "sliced"])
def test_any_class_dim_gives_what_the_matrix_gives(
    monkeypatch, loss, activation, masked, shape, class_dim, layout
):
    monkeypatch.setattr(streaming, "_BLOCK_CPU", 30)
    monkeypatch.setattr(streaming, "_LEAST_ROWS", 1)
    student, teacher = torch.randn(2, *shape[:1], shape[1] + 1, *shape[2:]).double().unbind()
    # These logits are not contiguous, like the shifted logits of causal models.
    student, teacher = (x[:, 1:] for x in (student, teacher))
    if layout == "contiguous":
        student, teacher = (x.contiguous() for x in (student, teacher))
    rows = [x.movedim(class_dim, -1).flatten(0, -2) for x in (student, teacher)]
    mask = torch.rand(len(rows[0])) > 0.3 if masked else None
    folded = mask if mask is None else mask.view(student.movedim(class_dim, -1).shape[:-1])
    options = {"tau": 1.5, "activation": activation}
    value, grad = value_and_grad(
        loss, student, teacher, mask=folded, class_dim=class_dim, **options
    )
    kept = [x if mask is None else x[mask] for x in rows]
    expected, expected_grad = value_and_grad(loss, *kept, **options)
    grad = grad.movedim(class_dim, -1).flatten(0, -2)
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(
        grad if mask is None else grad[mask], expected_grad, rtol=1e-10, atol=1e-14
    )
    assert mask is None or not grad[~mask].any()


@pytest.mark.parametrize("loss", LOSSES)
def test_class_dim_compiles(loss):
    student, teacher = torch.randn(2, 3, 4, 5).double().unbind()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found = value_and_grad(compiled, student, teacher, class_dim=-1)
    expected = value_and_grad(loss, *(x.flatten(0, 1) for x in (student, teacher)))
    assert found[0].item() == pytest.approx(expected[0].item(), rel=1e-12)
    torch.testing.assert_close(found[1].flatten(0, 1), expected[1], rtol=1e-12, atol=1e-16)


def peak_memory(call) -> int:
    """Return the largest number of bytes that the tensors of a call take at one time."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        call()
    events = [x for x in profiler.profiler.kineto_results.events() if x.name() == "[memory]"]
    sizes = [x.nbytes() for x in sorted(events, key=lambda x: x.start_ns())]
    return max(itertools.accumulate(sizes))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("class_dim", [-1, 1])
@pytest.mark.parametrize("sliced", [False, True])
def test_the_loss_of_sequences_takes_the_memory_of_the_matrix(monkeypatch, loss, class_dim, sliced):
    """The memory is that of forward and backward.

    One copy of the logits would add more than the tolerance.
    """
    monkeypatch.setattr(streaming, "_BLOCK_CPU", 1024)
    monkeypatch.setattr(streaming, "_LEAST_ROWS", 1)
    student, teacher = torch.randn(2, 8, 33, 64).unbind()
    if sliced:
        student, teacher = student[:, 1:], teacher[:, 1:]
    rows = [x.movedim(class_dim, -1).flatten(0, 1).contiguous() for x in (student, teacher)]
    options = {"class_dim": class_dim}
    found = peak_memory(lambda: value_and_grad(loss, student, teacher, **options))
    expected = peak_memory(lambda: value_and_grad(loss, *rows))
    assert found < expected + 4 * student.numel() / 4


@pytest.mark.parametrize(
    "loss", [*LOSSES, inter_class_correlation, intra_class_correlation, DISTLoss(), KDLoss()]
)
def test_three_dimensions_must_be_told(loss):
    logits = torch.randn(8, 6, 5)
    with pytest.raises(
        ValueError, match=r"class_dim=1 for \(N, C, L\), or class_dim=-1 for \(B, T"
    ):
        loss(logits, logits)


def test_modules_and_correlations_take_class_dim():
    student, teacher = torch.randn(2, 4, 6, 5).unbind()
    rows = [x.flatten(0, 1) for x in (student, teacher)]
    for module in (DISTLoss, KDLoss):
        expected = module()(*rows)
        assert module(class_dim=-1)(student, teacher).item() == pytest.approx(expected.item())
    for correlation in (inter_class_correlation, intra_class_correlation):
        expected = correlation(*rows).item()
        found = correlation(student, teacher, class_dim=-1).item()
        assert found == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_class_dim_that_does_not_exist_is_refused(loss):
    logits = torch.randn(8, 6)
    with pytest.raises(ValueError, match="class_dim is 2, and logits of shape"):
        loss(logits, logits, class_dim=2)
    with pytest.raises(ValueError, match="class_dim is 'last': give a whole number"):
        (DISTLoss if loss is dist_loss else KDLoss)(class_dim="last")


# Binary outputs


@pytest.mark.parametrize("loss", LOSSES)
def test_a_softmax_over_one_class_is_refused(loss):
    logits = torch.randn(8, 1)
    with pytest.raises(ValueError, match=r"one class.*use activation='sigmoid'"):
        loss(logits, logits)


@pytest.mark.parametrize("loss", [DISTLoss(activation="sigmoid", beta=0), KDLoss(2.0, "sigmoid")])
def test_one_column_of_binary_logits_trains(loss):
    student, teacher = torch.zeros(64, 1), torch.randn(64, 1)
    student[0] = 0.1
    first = loss(student, teacher).item()
    for _ in range(300):
        _, grad = value_and_grad(loss, student, teacher)
        student = student - grad * 20
    assert loss(student, teacher).item() < first / 5


# KD by sigmoid, and its masks


def binary_kl(student: Tensor, teacher: Tensor, tau: float) -> Tensor:
    p, q = (teacher / tau).sigmoid(), (student / tau).sigmoid()
    kl = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    return tau**2 * kl.sum(1).mean()


def test_sigmoid_kd_is_the_binary_divergence_of_each_class():
    student, teacher = torch.randn(2, 9, 5).double().unbind()
    found = value_and_grad(kd_loss, student, teacher, tau=2.5, activation="sigmoid")
    expected = value_and_grad(binary_kl, student, teacher, tau=2.5)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_the_gradient_of_masked_sequences_is_that_of_finite_differences(loss, activation):
    """In the case of KD, the teacher also rules out a class."""
    student, teacher = torch.randn(2, 3, 4, 5).double().unbind()
    if loss is kd_loss:
        teacher[..., 2] = -torch.inf
    mask = torch.rand(3, 4) > 0.4
    options = {"activation": activation, "mask": mask, "class_dim": -1}
    assert torch.autograd.gradcheck(lambda x: loss(x, teacher, **options), student.requires_grad_())


def test_sigmoid_kd_of_a_certain_teacher_is_the_cross_entropy():
    student = torch.randn(9, 5).double()
    target = torch.randint(0, 2, (9, 5)).double()
    found = kd_loss(student, torch.inf * (2 * target - 1), tau=1.0, activation="sigmoid")
    expected = F.binary_cross_entropy_with_logits(student, target, reduction="sum") / 9
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)


def test_masked_samples_of_kd_may_hold_anything():
    student, teacher = torch.randn(2, 6, 4).unbind()
    mask = torch.tensor([True, True, False, True, False, True])
    student[2], teacher[4] = float("nan"), float("inf")
    for activation in ("softmax", "sigmoid"):
        options = {"activation": activation}
        value, grad = value_and_grad(kd_loss, student, teacher, mask=mask, **options)
        expected = kd_loss(student[mask], teacher[mask], **options)
        assert value.item() == pytest.approx(expected.item(), rel=1e-6)
        assert grad.isfinite().all()
        assert kd_loss(student, teacher, mask=torch.zeros(6, dtype=torch.bool)).item() == 0


def test_kd_refuses_an_activation_without_probabilities():
    with pytest.raises(ValueError, match="activation is 'identity': use 'softmax' or 'sigmoid'"):
        kd_loss(torch.zeros(4, 3), torch.zeros(4, 3), activation="identity")
    with pytest.raises(ValueError, match="activation is 'identity': use 'softmax' or 'sigmoid'"):
        KDLoss(activation="identity")


def test_kd_loss_allocates_its_gradient_and_little_more():
    student, teacher = torch.randn(2, 8000, 500).unbind()
    student.requires_grad_()
    allocated = peak_memory(lambda: kd_loss(student, teacher).backward())
    assert allocated < 1.3 * 4 * student.numel()
