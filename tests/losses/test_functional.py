"""Tests of the loss functions against golden values, SciPy, torchdistill and plain formulas."""

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchdistill.losses.mid_level import DISTLoss as TorchdistillDISTLoss

from lightning_dist.functional import (
    dist_loss,
    inter_class_correlation,
    intra_class_correlation,
    jsd_loss,
    kd_loss,
)
from lightning_dist.losses import DISTLoss, KDLoss, StandardisedLogits, streaming

DIST_CASES = [
    "classification_n16_c10_tau1",
    "classification_n16_c10_tau4",
    "classification_n8_c100_tau1",
    "classification_n8_c100_tau4",
    "classification_n64_c1000_tau1",
    "classification_n64_c1000_tau4",
    "classification_beta2_gamma0.5_tau2",
    "dense_softmax_n2_c19_6x5",
    "dense_sigmoid_n2_c36_4x7",
    "roi_softmax_n48_c81",
]


@pytest.fixture(params=[2**17, 300], ids=["one block", "many blocks"])
def block_size(request, monkeypatch):
    monkeypatch.setattr(streaming, "_BLOCK_CPU", request.param)
    monkeypatch.setattr(streaming, "_LEAST_ROWS", 1)
    return request.param


def value_and_grad(loss, student: Tensor, teacher: Tensor, **options) -> tuple[Tensor, Tensor]:
    student = student.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    value = loss(student, teacher, **options)
    (grad,) = torch.autograd.grad(value, student)
    return value.detach(), grad


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


def test_every_golden_case_is_tested(golden_losses):
    names = {key.split("/")[0] for key in golden_losses}
    assert names == {*DIST_CASES, "kd_tau4_n16_c10"}


@pytest.mark.parametrize("name", DIST_CASES)
def test_dist_loss_equals_the_authors_code(golden_losses, block_size, name):
    case = {k.split("/")[1]: v for k, v in golden_losses.items() if k.startswith(name + "/")}
    value, grad = value_and_grad(
        dist_loss,
        torch.from_numpy(case["student"]),
        torch.from_numpy(case["teacher"]),
        tau=float(case["tau"]),
        beta=float(case["beta"]),
        gamma=float(case["gamma"]),
        activation="sigmoid" if "sigmoid" in name else "softmax",
        class_dim=1,
    )
    assert value.item() == pytest.approx(float(case["loss"]), rel=1e-12)
    assert relative_error(grad, torch.from_numpy(case["grad"])) < 1e-12


def test_kd_loss_equals_the_authors_code(golden_losses):
    case = {k.split("/")[1]: v for k, v in golden_losses.items() if k.startswith("kd_")}
    student, teacher = torch.from_numpy(case["student"]), torch.from_numpy(case["teacher"])
    value, grad = value_and_grad(kd_loss, student, teacher, tau=float(case["tau"]))
    assert value.item() == pytest.approx(float(case["loss"]), rel=1e-12)
    assert relative_error(grad, torch.from_numpy(case["grad"])) < 1e-12


@pytest.mark.parametrize("both", [False, True])
def test_classes_that_the_teacher_rules_out_add_nothing_to_kd_loss(both):
    student, teacher = torch.randn(2, 8, 5).double().unbind()
    teacher[:, 3] = -torch.inf
    if both:
        student[:, 3] = -torch.inf
    value, grad = value_and_grad(kd_loss, student, teacher)
    probability = (teacher / 4).softmax(1)
    kept = [0, 1, 2, 4]
    expected = probability.log()[:, kept] - (student / 4).log_softmax(1)[:, kept]
    expected = 16 * (probability[:, kept] * expected).sum() / 8
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(grad, 4 * ((student / 4).softmax(1) - probability) / 8)


def test_kd_loss_of_dense_logits_is_the_mean_over_pixels():
    student, teacher = torch.randn(2, 2, 5, 3, 4).double().unbind()
    rows = [x.movedim(1, -1).reshape(-1, 5) for x in (student, teacher)]
    assert kd_loss(student, teacher).item() == pytest.approx(kd_loss(*rows).item(), rel=1e-12)


def test_dist_loss_equals_torchdistill():
    student, teacher = torch.randn(2, 32, 20).double().unbind()
    theirs = TorchdistillDISTLoss(".", "output", ".", "output", tau=2.0, beta=1.5, gamma=0.5)

    def peer(student, teacher):
        return theirs({".": {"output": student}}, {".": {"output": teacher}})

    value, grad = value_and_grad(dist_loss, student, teacher, tau=2.0, beta=1.5, gamma=0.5)
    expected, expected_grad = value_and_grad(peer, student, teacher)
    # torchdistill's eps is a lower bound of each norm.
    assert value.item() == pytest.approx(expected.item(), rel=1e-7)
    assert relative_error(grad, expected_grad) < 1e-6


def test_correlations_equal_scipy(block_size):
    student, teacher = torch.rand(2, 40, 30).double().unbind()
    rows = np.mean(
        [scipy.stats.pearsonr(*pair).statistic for pair in zip(student, teacher, strict=True)]
    )
    pairs = zip(student.T, teacher.T, strict=True)
    columns = np.mean([scipy.stats.pearsonr(*pair).statistic for pair in pairs])
    assert inter_class_correlation(student, teacher).item() == pytest.approx(rows, abs=1e-7)
    assert intra_class_correlation(student, teacher).item() == pytest.approx(columns, abs=1e-7)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "identity"])
@pytest.mark.parametrize("shape", [(12, 7), (12, 20), (3, 7, 4, 5), (2, 7, 30), (2, 90, 5, 3)])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "mixed", "transposed"])
def test_dist_loss_equals_the_plain_formulation_in_every_layout(
    reference_dist_loss, block_size, monkeypatch, activation, shape, layout
):
    monkeypatch.setattr(streaming, "_BLOCK_CPU", min(block_size, 40))
    monkeypatch.setattr(streaming, "_LEAST_ROWS", 1)
    student, teacher = (3 * torch.randn(2, *shape).double()).unbind()
    if layout in ("channels_last", "mixed"):
        student = student.movedim(1, -1).contiguous().movedim(-1, 1)
        if layout == "channels_last":
            teacher = teacher.movedim(1, -1).contiguous().movedim(-1, 1)
    elif layout == "transposed":
        student = student.transpose(0, -1).contiguous().transpose(0, -1)
    options = {"tau": 1.7, "beta": 0.6, "gamma": 1.3, "activation": activation}
    value, grad = value_and_grad(dist_loss, student, teacher, class_dim=1, **options)
    expected, expected_grad = value_and_grad(reference_dist_loss, student, teacher, **options)
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    assert relative_error(grad, expected_grad) < 1e-11


@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "identity"])
@pytest.mark.parametrize("masked", [False, True])
def test_the_gradient_is_that_of_finite_differences(block_size, activation, masked):
    student, teacher = torch.randn(2, 3, 4, 5).double().unbind()
    mask = torch.rand(3, 5) > 0.4 if masked else None
    assert torch.autograd.gradcheck(
        lambda x: dist_loss(x, teacher, tau=1.5, activation=activation, mask=mask, class_dim=1),
        student.requires_grad_(),
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_logits_are_computed_in_float32(dtype):
    student, teacher = torch.randn(2, 64, 50).to(dtype).unbind()
    value, grad = value_and_grad(dist_loss, student, teacher)
    exact, exact_grad = value_and_grad(dist_loss, student.double(), teacher.double())
    assert value.dtype == torch.float32
    assert grad.dtype == dtype
    assert value.item() == pytest.approx(exact.item(), rel=1e-6)
    assert relative_error(grad.double(), exact_grad) < max(torch.finfo(dtype).eps, 2e-6)


def test_student_and_teacher_may_differ_in_dtype():
    student, teacher = torch.randn(8, 5).half(), torch.randn(8, 5)
    value, grad = value_and_grad(dist_loss, student, teacher)
    assert grad.dtype == torch.float16
    assert value.item() == pytest.approx(dist_loss(student.float(), teacher).item(), rel=1e-6)


@pytest.mark.parametrize("loss", [dist_loss, kd_loss])
@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ([[1.0, 1.0, 1.0]] * 3, [[1.0, 2.0, 3.0]] * 3),  # The rows and columns are constant.
        ([[1.0, 2.0, 3.0]], [[3.0, 1.0, 2.0]]),  # There is one sample.
        ([[1e4, -1e4, 0.0], [-1e4, 0.0, 1e4]], [[-1e4, 1e4, 0.0], [1e4, 0.0, -1e4]]),
        ([[1e4, -1e4], [1e4, -1e4]], [[1e4, -1e4], [1e4, -1e4]]),
    ],
)
def test_degenerate_logits_give_finite_value_and_gradient(loss, student, teacher):
    for activation in ["softmax", "sigmoid", "identity"] if loss is dist_loss else [None]:
        options = {"activation": activation} if activation else {}
        value, grad = value_and_grad(loss, torch.tensor(student), torch.tensor(teacher), **options)
        assert value.isfinite()
        assert grad.isfinite().all()


@pytest.mark.parametrize(
    ("shape", "activation", "compiled"),
    [
        ((1, 10), "softmax", False),
        ((1, 10), "sigmoid", False),
        ((16, 1), "sigmoid", False),
        ((1, 1), "sigmoid", False),
        pytest.param((1, 10), "softmax", True, marks=pytest.mark.slow),
        pytest.param((16, 1), "sigmoid", True, marks=pytest.mark.slow),
    ],
)
def test_constant_rows_and_columns_add_no_noise_to_the_float32_gradient(
    shape, activation, compiled
):
    student, teacher = (3 * torch.randn(2, *shape)).unbind()
    loss = torch.compile(dist_loss) if compiled else dist_loss
    options = {"activation": activation, "tau": 1.5}
    _, grad = value_and_grad(loss, student, teacher, **options)
    _, exact = value_and_grad(dist_loss, student.double(), teacher.double(), **options)
    torch.testing.assert_close(grad.double(), exact, rtol=1e-4, atol=1e-6)


def test_a_constant_column_has_correlation_zero():
    student = torch.tensor([[0.5, 0.1], [0.5, 0.9], [0.5, 0.3]]).double()
    teacher = torch.tensor([[0.1, 0.2], [0.4, 1.8], [0.2, 0.6]]).double()
    assert intra_class_correlation(student, teacher).item() == pytest.approx(0.5, abs=1e-6)


def test_near_constant_columns_do_not_cancel():
    """A column with mean 0.9 and deviation 1e-5 keeps its correlation in float32."""
    noise = torch.randn(2, 200_000, 3)
    student, teacher = 0.9 + 1e-5 * noise[0], 0.9 + 1e-5 * (noise[0] + noise[1])
    exact = intra_class_correlation(student.double(), teacher.double()).item()
    assert exact == pytest.approx(0.5**0.5, abs=0.01)
    assert intra_class_correlation(student, teacher).item() == pytest.approx(exact, rel=1e-4)


def test_sorted_rows_do_not_lose_precision():
    """The rows are sorted, so that each block has another mean: blocks must be merged exactly."""
    values = torch.linspace(0, 1, 400_000)
    student = torch.stack((values, values**2), dim=1)
    teacher = torch.stack((values**2, values), dim=1)
    exact = intra_class_correlation(student.double(), teacher.double()).item()
    assert intra_class_correlation(student, teacher).item() == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("shape", [(50_000, 10), (50_000, 19), (2, 8000, 15, 16)])
def test_float32_gradient_is_close_to_float64(shape):
    student, teacher = (3 * torch.randn(2, *shape)).unbind()
    _, grad = value_and_grad(dist_loss, student, teacher)
    _, exact = value_and_grad(dist_loss, student.double(), teacher.double())
    assert relative_error(grad.double(), exact) < 1e-6


@pytest.mark.parametrize("shape", [(20, 5), (3, 5, 4, 6)])
def test_masked_rows_count_in_neither_term(block_size, shape):
    student, teacher = torch.randn(2, *shape).double().unbind()
    mask = torch.rand(shape[0], *shape[2:]) > 0.4
    value, grad = value_and_grad(dist_loss, student, teacher, mask=mask)
    kept = [x.movedim(1, -1)[mask] for x in (student, teacher)]
    expected, expected_grad = value_and_grad(dist_loss, *kept)
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    assert relative_error(grad.movedim(1, -1)[mask], expected_grad) < 1e-12
    assert not grad.movedim(1, -1)[~mask].any()


def test_masked_rows_may_hold_anything():
    student, teacher = torch.randn(2, 6, 4).unbind()
    mask = torch.tensor([True, True, False, True, False, True])
    student[2], teacher[4] = float("nan"), float("inf")
    value, grad = value_and_grad(dist_loss, student, teacher, mask=mask)
    assert value.item() == pytest.approx(dist_loss(student[mask], teacher[mask]).item(), rel=1e-6)
    assert grad.isfinite().all()


@pytest.mark.parametrize("rows", [0, 4])
def test_without_any_row_the_loss_is_zero(rows):
    student, teacher = torch.randn(2, rows, 3).unbind()
    mask = torch.zeros(rows, dtype=torch.bool)
    value, grad = value_and_grad(dist_loss, student, teacher, mask=mask)
    assert value.item() == 0
    assert not grad.any()
    assert dist_loss(student[:0], teacher[:0]).item() == 0


@pytest.mark.parametrize("loss", [dist_loss, kd_loss, jsd_loss, StandardisedLogits(KDLoss())])
@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        (torch.zeros(4, 10), torch.zeros(4, 100), "student has 10 classes and teacher 100"),
        (
            torch.zeros(4, 10),
            torch.zeros(5, 10),
            r"differ in shape \(student \(4, 10\), teacher \(5, 10\)\)",
        ),
        (torch.zeros(4, 10, 2, 2), torch.zeros(4, 10, 2, 3), "differ in shape"),
        (torch.zeros(4), torch.zeros(4), r"student has shape \(4,\): give logits \(N, C\)"),
        (torch.zeros(4, 0), torch.zeros(4, 0), r"student has shape \(4, 0\): give logits \(N, C\)"),
        (
            torch.zeros(4, 3, dtype=torch.long),
            torch.zeros(4, 3),
            "student has dtype torch.int64: give floa",
        ),
        (torch.zeros(4, 3), torch.zeros(4, 3, dtype=torch.bool), "teacher has dtype torch.bool"),
        ([[1.0, 2.0]], torch.zeros(1, 2), "student is a list: give a tensor of logits"),
        (
            torch.zeros(4, 3),
            torch.zeros(4, 3, device="meta"),
            "student is on cpu and teacher on meta",
        ),
    ],
)
def test_logits_that_do_not_pair_are_refused(loss, student, teacher, message):
    with pytest.raises(ValueError, match=message):
        loss(student, teacher)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau": 0.0}, "tau is 0.0: the temperature must be above 0"),
        ({"tau": float("nan")}, "tau is nan: (the temperature must be above 0|give a number)"),
        ({"tau": float("inf")}, "tau is inf: (the temperature must be finite|give a number)"),
        ({"beta": float("nan")}, "beta is nan: give a (finite weight|number)"),
        ({"eps": 0}, "eps is 0: give a small number above 0"),
        ({"eps": -1.0}, "eps is -1.0: give a small number above 0"),
        ({"activation": "relu"}, "activation is 'relu': use 'softmax', 'sigmoid' or 'identity'"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        dist_loss(torch.zeros(4, 3), torch.zeros(4, 3), **options)
    with pytest.raises(ValueError, match=message):
        DISTLoss(**options)


@pytest.mark.parametrize("mask", [torch.ones(4), torch.ones(5, dtype=torch.bool)], ids=str)
def test_a_mask_that_does_not_pair_with_the_rows_is_refused(mask):
    message = rf"mask is {mask.dtype} of shape \({len(mask)},\): give torch.bool \(4,\)"
    with pytest.raises(ValueError, match=message):
        dist_loss(torch.zeros(4, 3), torch.zeros(4, 3), mask=mask)


def test_no_gradient_flows_to_the_teacher():
    student, teacher = torch.randn(2, 4, 3).unbind()
    teacher = teacher.clone().requires_grad_()
    dist_loss(student.clone().requires_grad_(), teacher).backward()
    assert teacher.grad is None


def test_double_backward_is_refused():
    student = torch.randn(4, 3, requires_grad=True)
    loss = dist_loss(student, torch.randn(4, 3))
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, student, create_graph=True)


class Distilled(nn.Module):
    """A network that computes its own distillation loss."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 5)

    def forward(self, features: Tensor, teacher: Tensor) -> Tensor:
        return dist_loss(self.head(features), teacher, tau=2.0)


@pytest.mark.slow
def test_a_compiled_module_gives_the_same_loss_and_gradient():
    module, features, teacher = Distilled(), torch.randn(16, 6), torch.randn(16, 5)
    value, grad = module(features, teacher), torch.autograd.grad
    expected = grad(value, module.head.weight)[0]
    compiled = torch.compile(module, fullgraph=True)(features, teacher)
    assert compiled.item() == pytest.approx(value.item(), rel=1e-5)
    torch.testing.assert_close(grad(compiled, module.head.weight)[0], expected)


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_module_gives_the_same_loss(strict):
    module, inputs = Distilled(), (torch.randn(16, 6), torch.randn(16, 5))
    exported = torch.export.export(module, inputs, strict=strict).module()
    assert exported(*inputs).item() == pytest.approx(module(*inputs).item(), rel=1e-6)


def scores(seed: int, rows: int, classes: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, rows, classes, generator=generator).double().unbind()


relations = pytest.mark.parametrize(
    "correlation", [inter_class_correlation, intra_class_correlation]
)
pairs = given(seed=st.integers(0, 2**32), rows=st.integers(3, 20), classes=st.integers(3, 20))


@relations
@pairs
@settings(deadline=None)
def test_correlation_is_symmetric_and_in_range(correlation, seed, rows, classes):
    student, teacher = scores(seed, rows, classes)
    found = correlation(student, teacher).item()
    assert -1 <= found <= 1
    assert found == pytest.approx(correlation(teacher, student).item(), abs=1e-12)


@relations
@given(
    seed=st.integers(0, 2**32),
    scale=st.floats(0.1, 100),
    shift=st.floats(-100, 100),
    side=st.booleans(),
)
@settings(deadline=None)
def test_correlation_ignores_positive_affine_change(correlation, seed, scale, shift, side):
    student, teacher = scores(seed, 12, 9)
    changed = (student * scale + shift, teacher) if side else (student, teacher * scale + shift)
    expected = correlation(student, teacher).item()
    assert correlation(*changed).item() == pytest.approx(expected, abs=1e-6)


@pairs
@settings(deadline=None)
def test_equal_logits_have_loss_zero(seed, rows, classes):
    student, _ = scores(seed, rows, classes)
    assert dist_loss(student, student, eps=1e-12).item() == pytest.approx(0, abs=1e-6)
    assert kd_loss(student, student).item() == pytest.approx(0, abs=1e-12)


@given(seed=st.integers(0, 2**32), tau=st.floats(0.1, 10))
@settings(deadline=None)
def test_dist_loss_is_in_range(seed, tau):
    student, teacher = scores(seed, 8, 6)
    assert -1e-9 <= dist_loss(student, teacher, tau=tau).item() <= 4 * tau**2


def test_kd_loss_has_the_same_gradient_again_and_a_second_derivative():
    student, teacher = torch.randn(2, 6, 5).double().unbind()
    student.requires_grad_()
    loss = kd_loss(student, teacher)
    first, again = (torch.autograd.grad(loss, student, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, again)
    assert torch.autograd.gradgradcheck(kd_loss, (student, teacher))
