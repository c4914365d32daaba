"""Tests of the Triton kernels against float64 without kernels.

They run on a GPU, or with TRITON_INTERPRET=1 in Triton's interpreter on a CPU, which
``test_interpreted.py`` starts. The same tests serve both.
"""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import kernel_device
from lightning_dist.functional import dist_loss, kd_loss
from lightning_dist.losses import fused

DEVICE = kernel_device()
pytestmark = pytest.mark.skipif(DEVICE is None, reason="needs a GPU or TRITON_INTERPRET=1")
LOSSES = {"dist": dist_loss, "kd": kd_loss}
# Enough classes for rows in chunks, if these lower limits are set.
FEW_CLASSES, SHORT_CHUNK = 8, 16


class StartedError(Exception):
    """Raised in place of a kernel."""


@pytest.mark.parametrize("name", LOSSES)
def test_the_losses_start_kernels(monkeypatch, name):
    from lightning_dist.losses.fused import dist, kd

    def start(*arguments):
        raise StartedError

    monkeypatch.setattr({"dist": dist, "kd": kd}[name], f"{name}_forward", start)
    student, teacher = logits((4, 5))
    with pytest.raises(StartedError):
        LOSSES[name](student, teacher)
    LOSSES[name](student.double(), teacher)


def use_chunks(monkeypatch) -> None:
    from lightning_dist.losses.fused import dist, kd, layout

    for module in (dist, kd, layout):
        monkeypatch.setattr(module, "MOST_CLASSES", FEW_CLASSES)
    for module in (dist, kd):
        monkeypatch.setattr(module, "CHUNK", SHORT_CHUNK)


def value_and_gradient(loss, student: Tensor, teacher: Tensor, **options) -> tuple[Tensor, Tensor]:
    student = student.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    value = loss(student, teacher, **options)
    (gradient,) = torch.autograd.grad(3 * value, student)
    return value.detach().double(), gradient.double()


def check(
    loss, student: Tensor, teacher: Tensor, bounds: tuple[float, float] = (1e-6, 1e-6), **options
) -> None:
    """Compare the kernels with float64."""
    for error, bound in zip(errors(loss, student, teacher, **options), bounds, strict=True):
        assert error <= bound


def errors(loss, student: Tensor, teacher: Tensor, **options) -> tuple[float, float]:
    """Return the relative errors of value and gradient."""
    expected = value_and_gradient(loss, student.double(), teacher.double(), **options)
    found = value_and_gradient(loss, student, teacher, **options)
    # A loss near 0 is the difference of numbers of about tau**2.
    scale = max(expected[0].abs().item(), 0.01 * options.get("tau", 1.0) ** 2)
    error = (found[1] - expected[1]).abs().max() / expected[1].abs().max()
    return (found[0] - expected[0]).abs().item() / scale, error.item()


def logits(shape: tuple[int, ...], seed: int = 0, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, noise = (scale * torch.randn(shape, generator=generator) for _ in range(2))
    return student.to(DEVICE), (noise + 0.3 * student).to(DEVICE)


def strided(x: Tensor) -> Tensor:
    """Return the same values with gaps between them."""
    return torch.stack((x, x), -1)[..., 0]


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "strided": strided,
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "cropped": lambda x: torch.cat((x, x), 3)[..., : x.shape[3]],
}


@pytest.mark.parametrize("chunks", [False, True], ids=["whole", "chunks"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "identity"])
@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradient_are_those_of_float64(monkeypatch, name, activation, masked, chunks):
    if name == "kd" and activation == "identity":
        pytest.skip("KD needs probabilities")
    if chunks:
        use_chunks(monkeypatch)
    student, teacher = logits((2, 21, 4))
    options = {"activation": activation, "tau": 2.0, "class_dim": 1}
    if name == "dist":
        options |= {"beta": 1.5, "gamma": 0.5}
    if masked:
        options["mask"] = torch.rand(2, 4, generator=torch.Generator().manual_seed(1)) > 0.3
        options["mask"] = options["mask"].to(DEVICE)
        student.movedim(1, -1)[~options["mask"]] = torch.nan
    check(LOSSES[name], student, teacher, **options)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", LOSSES)
def test_every_layout_is_read_by_its_strides(name, layout):
    student, teacher = (LAYOUTS[layout](x) for x in logits((2, 5, 3, 4)))
    mask = (torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(1)) > 0.3).to(DEVICE)
    check(LOSSES[name], student, teacher, mask=mask)
    check(LOSSES[name], student, teacher.contiguous(), class_dim=3)
    if layout == "channels_last":
        assert value_and_gradient(LOSSES[name], student, teacher)[1].stride() == student.stride()


def test_rows_in_more_than_three_dimensions_are_copied():
    student, teacher = (x.permute(0, 1, 4, 2, 5, 3) for x in logits((2, 3, 2, 3, 2, 2)))
    check(dist_loss, student[..., :1], teacher[..., :1])
    check(kd_loss, student, teacher)


@pytest.mark.parametrize("name", LOSSES)
def test_tiles_of_several_programs_are_merged(name):
    student, teacher = logits((70, 40))
    check(LOSSES[name], student, teacher)
    again = [value_and_gradient(LOSSES[name], student, teacher) for _ in range(2)]
    assert torch.equal(again[0][1], again[1][1])


@pytest.mark.parametrize("chunks", [False, True], ids=["whole", "chunks"])
def test_values_far_from_zero_keep_their_digits(monkeypatch, chunks):
    if chunks:
        use_chunks(monkeypatch)
    student, teacher = logits((9, 20))
    check(dist_loss, 1000 + student, teacher - 500, activation="identity")


@pytest.mark.parametrize("chunks", [False, True], ids=["whole", "chunks"])
@pytest.mark.parametrize("both", [False, True])
def test_classes_that_the_teacher_rules_out_add_nothing(monkeypatch, both, chunks):
    if chunks:
        use_chunks(monkeypatch)
    student, teacher = logits((6, 20))
    teacher[:, 3] = -torch.inf
    if both:
        student[:, 3] = -torch.inf
    for activation in ("softmax", "sigmoid"):
        check(kd_loss, student, teacher, activation=activation)
    check(dist_loss, student, teacher)


def test_constant_rows_have_no_gradient_and_nan_stays_nan():
    student, teacher = torch.full((6, 5), 0.3, device=DEVICE), logits((6, 5))[1]
    for activation in ("softmax", "sigmoid", "identity"):
        value, gradient = value_and_gradient(dist_loss, student, teacher, activation=activation)
        assert not gradient.any()
        assert value.item() == pytest.approx(2)
    student[2, 1] = torch.nan
    assert dist_loss(student, teacher).isnan()
    assert kd_loss(student, teacher).isnan()


def test_a_mask_without_samples_gives_zero():
    student, teacher = logits((4, 5))
    mask = torch.zeros(4, dtype=torch.bool, device=DEVICE)
    for loss in LOSSES.values():
        value, gradient = value_and_gradient(loss, student, teacher, mask=mask)
        assert value.item() == 0
        assert not gradient.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_gradient_in_half_precision_is_rounded_once(dtype):
    student, teacher = (x.to(dtype) for x in logits((24, 12)))
    for loss in LOSSES.values():
        _, expected = value_and_gradient(loss, student.double(), teacher.double())
        _, found = value_and_gradient(loss, student, teacher.float())
        unit = torch.finfo(dtype).eps * expected.abs().clamp(min=torch.finfo(dtype).tiny)
        # The largest entries have an error of 1e-6 of their own.
        assert ((found - expected).abs() <= unit + 1e-6 * expected.abs().max()).all()


def test_the_compiled_losses_start_the_same_kernels():
    student, teacher = logits((12, 6))
    for loss in LOSSES.values():
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        check(compiled, student, teacher, tau=2.0)


def test_a_second_derivative_of_dist_is_refused_and_that_of_kd_is_exact():
    student, teacher = logits((4, 5))
    student.requires_grad_()
    (first,) = torch.autograd.grad(kd_loss(student, teacher), student, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), student)
    wide = student.detach().double().requires_grad_()
    (first,) = torch.autograd.grad(kd_loss(wide, teacher.double()), wide, create_graph=True)
    (expected,) = torch.autograd.grad(first.square().sum(), wide)
    torch.testing.assert_close(second.double(), expected, rtol=1e-4, atol=1e-6)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(dist_loss(student, teacher), student, create_graph=True)


def test_torch_func_takes_the_path_without_kernels():
    student, teacher = logits((4, 5))
    assert fused.runs_kernels(student, teacher)
    found = torch.func.grad(kd_loss)(student, teacher)
    _, expected = value_and_gradient(kd_loss, student, teacher)
    torch.testing.assert_close(3 * found.double(), expected, rtol=1e-5, atol=1e-7)


@given(
    name=st.sampled_from(list(LOSSES)),
    activation=st.sampled_from(["softmax", "sigmoid", "identity"]),
    shape=st.sampled_from([(), (1,), (3,), (2, 2)]),
    rows=st.integers(3, 5),
    classes=st.integers(3, 12),
    tau=st.sampled_from([0.5, 1.0, 4.0]),
    weights=st.tuples(st.floats(0, 2), st.floats(0.1, 2)),
    masked=st.booleans(),
    chunks=st.booleans(),
    gaps=st.booleans(),
    seed=st.integers(0, 2**32),
)
@settings(deadline=None, max_examples=30)
def test_random_cases(
    name, activation, shape, rows, classes, tau, weights, masked, chunks, gaps, seed
):
    assume(name == "dist" or activation != "identity")
    student, teacher = logits((rows, classes, *shape), seed)
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.rand(rows, *shape, generator=generator) > 0.3).to(DEVICE)
    assume(mask.any())
    options = {"activation": activation, "tau": tau, "class_dim": 1}
    if name == "dist":
        options |= {"beta": weights[0], "gamma": weights[1]}
    if masked:
        options["mask"] = mask
    if gaps:
        student, teacher = strided(student), strided(teacher)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "0")
        on_cpu = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in options.items()}
        others = errors(LOSSES[name], student.cpu(), teacher.cpu(), **on_cpu)
    with pytest.MonkeyPatch.context() as patch:
        if chunks:
            use_chunks(patch)
        # Nearly constant rows and columns lose digits in float32, with and without kernels.
        bounds = max(1e-6, 8 * others[0]), max(1e-6, 8 * others[1])
        check(LOSSES[name], student, teacher, bounds, **options)
