"""``FusedKDFunction``: the KD loss and its gradient by Triton kernels."""

import functools
from typing import Any

import torch
from torch import Tensor

from lightning_dist.losses.fused import kd_kernels as kernels
from lightning_dist.losses.fused.layout import (
    CHUNK,
    CHUNK_WARPS,
    MOST_CLASSES,
    READ,
    arrange,
    on,
    programs,
)
from lightning_dist.losses.streaming_kd import kd_gradient

_ACTIVATIONS = {"softmax": 0, "sigmoid": 1}


class FusedKDFunction(torch.autograd.Function):
    """The KD loss as an autograd function that starts a few kernels.

    The arguments are those of :func:`lightning_dist.functional.kd_loss`; the mask has size 1 in the
    dimension `axis` of the classes.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        mask: Tensor | None,
        axis: int,
        tau: float,
        activation: str,
    ) -> Tensor:
        """Return the loss, a scalar in float32."""
        operator = torch.ops.lightning_dist.kd_forward
        forward = operator if torch.compiler.is_compiling() else kd_forward
        loss, weight, constants = forward(student, teacher, mask, axis, tau, activation)
        ctx.save_for_backward(student, teacher, mask, weight, constants)
        ctx.options = axis, tau, activation
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of the student's logits, and None for every other argument."""
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # a second derivative
            student, teacher, mask, weight, _ = ctx.saved_tensors
            axis, tau, activation = ctx.options
            gradient = kd_gradient(student, teacher, mask, tau, activation, axis)
            return (gradient * (upstream * weight)).to(student.dtype), *[None] * 5
        operator = torch.ops.lightning_dist.kd_backward
        backward = operator if torch.compiler.is_compiling() else kd_backward
        return backward(upstream, *ctx.saved_tensors, *ctx.options), *[None] * 5


def kd_forward(
    student: Tensor, teacher: Tensor, mask: Tensor | None, axis: int, tau: float, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the kernels of the forward pass.

    Args:
        student: logits of any shape and layout.
        teacher: logits of the same shape.
        mask: a boolean tensor of this shape, but with size 1 in the dimension of the classes.
        axis: the dimension of the classes.
        tau: the temperature.
        activation: ``"softmax"`` or ``"sigmoid"``.

    Returns:
        The loss; the weight of the gradient; the constants of rows in chunks, (4, rows) or empty.
    """
    layout, logits = arrange(axis, student, teacher, mask)
    device, rows = student.device, layout.rows
    tiles = layout.tiles()
    count = programs(device, tiles.count) if layout.fits else rows
    counts = torch.empty(count, device=device, dtype=torch.float64)
    sums = torch.empty_like(counts)
    loss = torch.empty((), device=device)
    weight = torch.empty_like(loss)
    constants = torch.empty(0 if layout.fits else 4, rows, device=device)
    options = {"ACTIVATION": _ACTIVATIONS[activation], "MASKED": mask is not None}
    sizes, strides = (layout.classes, *layout.sizes[1:]), layout.numbers()[:READ]
    with on(device):
        if layout.fits:
            kernels.forward_rows[(count,)](
                *logits, counts, sums, *sizes, tiles.across, tiles.count, 1 / tau,
                *strides, **options, **tiles.options(),
            )  # fmt: skip
        else:
            kernels.forward_row_in_chunks[(rows,)](
                *logits, constants, counts, sums, *sizes, rows, 1 / tau,
                *strides, **options, BC=CHUNK, num_warps=CHUNK_WARPS,
            )  # fmt: skip
        kernels.finish[(1,)](counts, sums, loss, weight, count, tau, BLOCK=1024, num_warps=4)
    return loss, weight, constants


def kd_backward(
    upstream: Tensor,
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    constants: Tensor,
    axis: int,
    tau: float,
    activation: str,
) -> Tensor:
    """Run the kernel of the backward pass, and return the gradient of the student's logits.

    Args:
        upstream: the gradient of the loss, a scalar.
        student: as in :func:`kd_forward`, like all arguments below that are not its results.
        teacher: logits of the same shape.
        mask: the mask or None.
        weight: a result of :func:`kd_forward`.
        constants: another one.
        axis: the dimension of the classes.
        tau: the temperature.
        activation: the activation.
    """
    layout, logits = arrange(axis, student, teacher, mask)
    gradient = torch.empty_like(logits[0])
    options = {"ACTIVATION": _ACTIVATIONS[activation], "MASKED": mask is not None}
    sizes = layout.classes, *layout.sizes[1:]
    with on(student.device):
        if layout.fits:
            tiles = layout.tiles()
            kernels.gradient[(programs(student.device, tiles.count),)](
                *logits, weight, upstream, gradient, *sizes, tiles.across, tiles.count, 1 / tau,
                *layout.numbers(), **options, **tiles.options(),
            )  # fmt: skip
        else:
            kernels.gradient_in_chunks[(layout.rows, -(-layout.classes // CHUNK))](
                *logits, weight, upstream, gradient, constants, *sizes, layout.rows, 1 / tau,
                *layout.numbers(), **options, BC=CHUNK, num_warps=CHUNK_WARPS,
            )  # fmt: skip
    return gradient


_forward_operator = torch.library.custom_op(
    "lightning_dist::kd_forward", kd_forward, mutates_args=()
)
_backward_operator = torch.library.custom_op(
    "lightning_dist::kd_backward", kd_backward, mutates_args=()
)


@_forward_operator.register_fake
def _(
    student: Tensor, teacher: Tensor, mask: Tensor | None, axis: int, tau: float, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    classes = student.shape[axis]
    new = functools.partial(student.new_empty, dtype=torch.float32)
    constants = new(0 if classes <= MOST_CLASSES else 4, student.numel() // classes)
    return new(()), new(()), constants


@_backward_operator.register_fake
def _(upstream: Tensor, student: Tensor, *others: Any) -> Tensor:
    return torch.empty_like(student)
