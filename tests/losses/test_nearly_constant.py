"""Tests of the DIST gradient for rows or columns that are constant or nearly constant."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_dist.functional import dist_loss
from lightning_dist.losses import streaming

ACTIVATIONS = {"softmax": lambda x: x.softmax(1), "sigmoid": torch.sigmoid, "identity": lambda x: x}
UNITS = 8  # Units of rounding in the dtype of the computation; see the docstring of dist_loss.


def gradient(loss, student: Tensor, teacher: Tensor, **options) -> Tensor:
    student = student.detach().clone().requires_grad_()
    return torch.autograd.grad(loss(student, teacher, **options), student)[0]


def tolerance_of(dtype: torch.dtype) -> float:
    """Return the largest relative deviation with which a row or column counts as constant."""
    computed = torch.promote_types(dtype, torch.float32)
    return max(torch.finfo(dtype).eps, UNITS * torch.finfo(computed).eps)


def deviations(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the centred values of each row, and its standard deviation divided by its mean."""
    mean = x.detach().mean(1)
    std = (x.detach() - mean[:, None]).square().mean(1).sqrt()
    return x - x.mean(1, keepdim=True), torch.where(std == 0, 0, std / mean.abs())


def zero_rule_loss(tolerance: float, activation: str = "softmax"):
    """Return the plain formulation in which a constant row or column has correlation 0."""

    def correlation(a: Tensor, b: Tensor) -> Tensor:
        (u, u_ratio), (v, v_ratio) = deviations(a), deviations(b)
        kept = (u_ratio > tolerance) & (v_ratio > tolerance)
        # Select the rows before dividing, because the gradient of a norm at 0 is NaN.
        u, v = u[kept], v[kept]
        return ((u * v).sum(1) / (u.norm(dim=1) * v.norm(dim=1) + 1e-8)).sum() / len(a)

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        a, b = (ACTIVATIONS[activation](x) for x in (student, teacher))
        return 2 - correlation(a, b) - correlation(a.T, b.T)

    return loss


def floor_of(student: Tensor, teacher: Tensor, activation: str, tolerance: float) -> float:
    """Return the smallest norm of a row or column that may have a gradient."""
    y = ACTIVATIONS[activation](student)
    floors = [len(x[0]) ** 0.5 * tolerance * x.mean(1).abs() for x in (y, y.T)]
    return min(floor.min().item() for floor in floors)


def largest_term(y: Tensor, tolerance: float) -> float:
    """Return the largest possible entry in the terms of the gradient of one mean."""
    centred, ratio = deviations(y)
    norms = centred.norm(dim=1)[ratio > tolerance]
    return (1 / norms.min()).item() / len(y) if len(norms) else 0.0


def relative_l2(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


def derivative_bound(y: Tensor, activation: str) -> Tensor:
    """Return the largest factor by which the derivative of the activation multiplies an entry."""
    if activation == "softmax":
        return 2 * y
    return y * (1 - y) if activation == "sigmoid" else torch.ones_like(y)


@given(
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
    activation=st.sampled_from(list(ACTIVATIONS)),
    classes=st.integers(1, 5),
    rows=st.integers(1, 8),
    spread=st.sampled_from([0.0, 1e-9, 1e-6, 1e-4, 1e-3, 1e-2, 1.0]),
    shift=st.sampled_from([0.0, 1.0, -3.0, 7.0]),
    ties=st.booleans(),
    seed=st.integers(0, 2**32),
)
@settings(deadline=None, max_examples=300)
def test_the_gradient_is_that_of_float64_with_constant_rows_and_columns_left_out(
    dtype, activation, classes, rows, spread, shift, ties, seed
):
    assume(classes > 1 or activation != "softmax")
    generator = torch.Generator().manual_seed(seed)
    noise, teacher = torch.randn(2, rows, classes, generator=generator).double().unbind()
    if ties:
        noise, teacher = noise.round(), teacher.round()
    student, teacher = (shift + spread * noise).to(dtype), teacher.to(dtype)
    tolerance = tolerance_of(dtype)
    wide = [ACTIVATIONS[activation](x.double()) for x in (student, teacher)]
    ratios = torch.cat([deviations(z)[1] for x in wide for z in (x, x.T)])
    # Rounding decides on which side of the tolerance the closest values are.
    assume(not ((ratios > tolerance / 4) & (ratios < 4 * tolerance)).any())

    reference = zero_rule_loss(tolerance, activation)
    expected = gradient(reference, student.double(), teacher.double())
    # Logits around 1e-7 have gradients around 1e7, which float16 cannot represent.
    assume(expected.abs().max() < torch.finfo(dtype).max)

    found = gradient(dist_loss, student, teacher, activation=activation).double()
    floor = floor_of(student.double(), teacher.double(), activation, tolerance)
    factor = derivative_bound(wide[0], activation)
    assert (found.abs() * floor <= 2.02 * factor + 1e-30).all()

    # A deviation that is small compared to its mean has lost as many digits of the activation. In
    # rows of two classes the terms cancel except for eps. So the bound includes the size of the
    # terms.
    kept = ratios[ratios > tolerance]
    lost = 1 / kept.min().clamp(max=1).item() if len(kept) else 1.0
    terms = sum(largest_term(y, tolerance) for y in (wide[0], wide[0].T))
    largest = max(expected.abs().max(), terms * factor.max()).item()
    computed = torch.promote_types(dtype, torch.float32)
    bound = 16 * torch.finfo(computed).eps * lost + torch.finfo(dtype).eps
    error = (found - expected).abs().max().item()
    assert error <= bound * largest + torch.finfo(dtype).tiny


@pytest.mark.parametrize(
    ("shape", "scale", "shift", "activation"),
    [
        ((256, 2), 3.0, 0.0, "softmax"),
        ((256, 2), 0.01, 0.0, "softmax"),
        ((1024, 1000), 0.01, 0.0, "softmax"),
        ((512, 20), 1.0, 1e3, "identity"),
    ],
)
def test_float32_gradients_do_not_cancel(shape, scale, shift, activation):
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(2, *shape, generator=generator)
    student, teacher = (shift + scale * noise).unbind()
    tolerance = tolerance_of(torch.float32)
    plain = zero_rule_loss(tolerance, activation)
    exact = gradient(plain, student.double(), teacher.double())
    found = relative_l2(gradient(dist_loss, student, teacher, activation=activation), exact)
    # For nearly uniform logits, the softmax itself has lost digits, also in the plain formulation.
    assert found <= max(1e-5, 1.5 * relative_l2(gradient(plain, student, teacher), exact))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("shape", [(64, 2), (64, 5), (4, 5, 6, 7)])
@pytest.mark.parametrize("masked", [False, True])
def test_a_zero_initialised_head_gets_a_finite_small_gradient(
    monkeypatch, dtype, blocks, shape, masked
):
    if blocks:
        monkeypatch.setattr(streaming, "_BLOCK_CPU", 30)
        monkeypatch.setattr(streaming, "_LEAST_ROWS", 1)
    teacher = torch.randn(shape)
    mask = torch.rand(shape[0], *shape[2:]) > 0.3 if masked else None
    for activation in ACTIVATIONS:
        student = torch.full(shape, 0.3, dtype=dtype)
        found = gradient(dist_loss, student, teacher, activation=activation, mask=mask)
        assert not found.any()
    # A task loss has changed the head by a few units of rounding.
    student = student + 0.3 * torch.finfo(dtype).eps * torch.randint(0, 2, shape).to(dtype)
    found = gradient(dist_loss, student, teacher, mask=mask)
    assert found.abs().max() <= 0.1


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_ties_of_two_classes_in_bfloat16_have_no_gradient_of_their_own(compiled):
    student, teacher = torch.randn(2, 512, 2).bfloat16().unbind()
    student[::4, 1] = student[::4, 0]  # p = 0.5
    loss = torch.compile(dist_loss) if compiled else dist_loss
    found = gradient(loss, student, teacher.float()).double()
    exact = gradient(
        zero_rule_loss(tolerance_of(torch.bfloat16)), student.double(), teacher.double()
    )
    assert found.abs().max() < 0.01
    assert (found - exact).abs().max() <= 0.01 * exact.abs().max()


def test_a_constant_teacher_gives_no_gradient():
    student, teacher = torch.randn(16, 4), torch.full((16, 4), 0.1)
    assert not gradient(dist_loss, student, teacher).any()
    assert dist_loss(student, teacher).item() == pytest.approx(2)


@pytest.mark.parametrize("side", [0, 1])
def test_nan_in_logits_is_not_taken_for_a_constant(side):
    logits = [torch.randn(6, 3), torch.full((6, 3), 0.1)]
    logits[side][2, 1] = torch.nan
    assert dist_loss(*logits).isnan()


def accuracy_of_a_student(seed: int, precision: torch.dtype) -> float:
    """Return the accuracy of a small network after 100 training steps with DIST under autocast."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(1024, 8, generator=generator)
    direction = torch.randn(8, generator=generator)
    target = ((features @ direction) > 0).long()
    teacher = torch.stack((-(features @ direction), features @ direction), dim=1)
    torch.manual_seed(seed)
    student = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
    nn.init.zeros_(student[2].weight)
    nn.init.zeros_(student[2].bias)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)
    for step in range(100):
        batch = torch.arange(64) + 64 * (step % 16)
        with torch.autocast("cpu", dtype=precision, enabled=precision != torch.float32):
            logits = student(features[batch])
        loss = F.cross_entropy(logits.float(), target[batch])
        loss = loss + dist_loss(logits, teacher[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return (student(features).argmax(1) == target).float().mean().item()


@pytest.mark.slow
def test_two_classes_train_in_bfloat16_as_in_float32():
    full = [accuracy_of_a_student(seed, torch.float32) for seed in range(5)]
    half = [accuracy_of_a_student(seed, torch.bfloat16) for seed in range(5)]
    assert min(full) > 0.9
    assert min(half) >= min(full) - 0.02
