"""``FusedDISTFunction``: the DIST loss and its gradient by Triton kernels."""

import functools
import math
from typing import Any

import torch
from torch import Tensor

from lightning_dist.losses.fused import dist_kernels as kernels
from lightning_dist.losses.fused.layout import (
    CHUNK,
    CHUNK_WARPS,
    MOST_CLASSES,
    READ,
    Layout,
    arrange,
    on,
    programs,
)
from lightning_dist.losses.streaming import (
    Activation,
    Statistics,
    loss_and_columns,
    processes_of,
    refuse_second_derivative,
    tolerance,
)

_ACTIVATIONS = {"softmax": 0, "sigmoid": 1, "identity": 2}
_CHUNKED_COLUMNS = 128
_MERGED_COLUMNS, _MERGED_PROGRAMS = 32, 64


class FusedDISTFunction(torch.autograd.Function):
    """The DIST loss as an autograd function that starts a few kernels.

    The arguments are those of :class:`lightning_dist.losses.streaming.DISTFunction`, but the logits
    have any layout, and `axis` is the dimension of the classes.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        mask: Tensor | None,
        axis: int,
        tau: float,
        beta: float,
        gamma: float,
        activation: Activation,
        eps: float,
        sync: bool,
    ) -> Tensor:
        """Return the loss, a scalar in float32."""
        world = processes_of(sync)
        operator = torch.ops.lightning_dist.dist_forward
        forward = operator if torch.compiler.is_compiling() else dist_forward
        loss, row_weight, row_data, column_data, constants, packed = forward(
            student, teacher, mask, axis, tau, beta, gamma, activation, eps, world > 1
        )
        if world > 1:
            parts = packed[2:].view(5, 1, -1)
            total = Statistics(packed[0], packed[1], parts[:2], parts[2:]).all_reduce()
            loss, columns = loss_and_columns(
                total, world, tolerances(student, teacher),
                tau, beta, gamma, activation, eps, torch.float32,
            )  # fmt: skip
            column_data = torch.cat(columns)
            rows = torch.as_tensor(total.rows)
            row_weight = (world * tau * beta / rows.clamp(min=1)).float()
        ctx.save_for_backward(student, teacher, mask, row_weight, row_data, column_data, constants)
        ctx.options = axis, tau, activation
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of the student's logits, and None for every other argument."""
        refuse_second_derivative(())
        operator = torch.ops.lightning_dist.dist_backward
        backward = operator if torch.compiler.is_compiling() else dist_backward
        return backward(upstream, *ctx.saved_tensors, *ctx.options), *[None] * 9


def tolerances(student: Tensor, teacher: Tensor) -> tuple[float, float]:
    """Return the largest relative deviations of student and teacher that count as rounding."""
    return tolerance(student, torch.float32), tolerance(teacher, torch.float32)


def dist_forward(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    axis: int,
    tau: float,
    beta: float,
    gamma: float,
    activation: str,
    eps: float,
    gathered: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run the kernels of the forward pass.

    Args:
        student: logits of any shape and layout.
        teacher: logits of the same shape.
        mask: a boolean tensor of this shape, but with size 1 in the dimension of the classes.
        axis: the dimension of the classes.
        tau: the temperature.
        beta: the weight of the inter-class term.
        gamma: the weight of the intra-class term.
        activation: ``"softmax"``, ``"sigmoid"`` or ``"identity"``.
        eps: a number that is added to the denominator of each correlation.
        gathered: whether other processes have logits too.

    Returns:
        The loss; the weight of the rows' coefficients; these coefficients, (2, rows); the data of
        the columns, (4 or 5, C); the constants of rows in chunks, (4, rows) or empty; with
        `gathered`, the statistics of this process instead of the first two and the columns.
    """
    layout, logits = arrange(axis, student, teacher, mask)
    device, rows, classes = student.device, layout.rows, layout.classes
    exact_mean = activation == "identity"
    float32: Any = {"device": device, "dtype": torch.float32}
    float64: Any = {"device": device, "dtype": torch.float64}
    row_data = torch.empty(2, rows, **float32)
    constants = torch.empty(0 if layout.fits else 4, rows, **float32)
    blocks = -(-classes // _MERGED_COLUMNS)
    column_data = torch.empty(5 if exact_mean else 4, classes, **float32)
    loss, row_weight = torch.empty((), **float32), torch.empty((), **float32)
    packed = torch.empty(2 + 5 * classes if gathered else 0, **float64)
    with on(device):
        counts, inters, means, moments = _statistics(
            layout, logits, mask is not None, row_data, constants, tau, activation, eps
        )
        intras = torch.empty(blocks, **float64)
        sizes = classes, len(counts), len(inters)
        kernels.merge_columns[(blocks,)](
            counts, inters, means, moments, column_data, intras, loss, row_weight, packed,
            *sizes, *tolerances(student, teacher), eps, tau, beta, gamma,
            GATHERED=gathered, SINGLE=blocks == 1, EXACT_MEAN=exact_mean,
            BP=_MERGED_PROGRAMS, BC=_MERGED_COLUMNS, num_warps=4,
        )  # fmt: skip
        if blocks > 1 and not gathered:
            kernels.finish[(1,)](
                counts, inters, intras, loss, row_weight, *sizes, blocks, tau, beta, gamma,
                BLOCK=1024, num_warps=4,
            )  # fmt: skip
    return loss, row_weight, row_data, column_data, constants, packed


def _statistics(
    layout: Layout,
    logits: tuple[Tensor, Tensor, Tensor],
    masked: bool,
    row_data: Tensor,
    constants: Tensor,
    tau: float,
    activation: str,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Correlate the rows, and return statistics of the columns that are not merged yet.

    Returns:
        The numbers of rows and the sums of their correlations; the means and moments of columns.
    """
    device, rows, classes = row_data.device, layout.rows, layout.classes
    tiles = layout.tiles() if layout.fits else layout.tiles(_CHUNKED_COLUMNS)
    across = 1 if layout.fits else -(-classes // _CHUNKED_COLUMNS)
    count = max(1, programs(device, tiles.count) // across)
    float64: Any = {"device": device, "dtype": torch.float64}
    counts, means = torch.empty(count, **float64), torch.empty(count, 2, classes, **float64)
    moments = torch.empty(count, 3, classes, device=device, dtype=torch.float32)
    inters = torch.empty(count if layout.fits else rows, **float64)
    floors = [math.sqrt(classes) * x for x in tolerances(*logits[:2])]
    _, height, width = layout.sizes
    options = {"ACTIVATION": _ACTIVATIONS[activation], "MASKED": masked}
    strides = layout.numbers()[:READ]
    if layout.fits:
        kernels.rows_and_columns[(count,)](
            *logits, row_data, counts, inters, means, moments,
            classes, height, width, tiles.across, tiles.count, rows, 1 / tau, *floors, eps,
            *strides, **options, **tiles.options(),
        )  # fmt: skip
        return counts, inters, means, moments
    kernels.rows_in_chunks[(rows,)](
        *logits, row_data, constants, inters, classes, height, width, rows, 1 / tau, *floors, eps,
        *strides, **options, BC=CHUNK, num_warps=CHUNK_WARPS,
    )  # fmt: skip
    kernels.columns_in_chunks[(across, count)](
        *logits, constants, counts, means, moments,
        classes, height, width, tiles.across, tiles.count, rows, 1 / tau,
        *strides, **options, **tiles.options(),
    )  # fmt: skip
    return counts, inters, means, moments


def dist_backward(
    upstream: Tensor,
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    row_weight: Tensor,
    row_data: Tensor,
    column_data: Tensor,
    constants: Tensor,
    axis: int,
    tau: float,
    activation: str,
) -> Tensor:
    """Run the kernel of the backward pass, and return the gradient of the student's logits.

    Args:
        upstream: the gradient of the loss, a scalar.
        student: as in :func:`dist_forward`, like all arguments below that are not its results.
        teacher: logits of the same shape.
        mask: the mask or None.
        row_weight: a result of :func:`dist_forward`, like the next three.
        row_data: coefficients of the rows.
        column_data: coefficients and means of the columns.
        constants: constants of rows in chunks.
        axis: the dimension of the classes.
        tau: the temperature.
        activation: the activation.
    """
    layout, logits = arrange(axis, student, teacher, mask)
    gradient = torch.empty_like(logits[0])
    _, height, width = layout.sizes
    options = {"ACTIVATION": _ACTIVATIONS[activation], "MASKED": mask is not None}
    read = *logits, row_data, row_weight, column_data, upstream
    with on(student.device):
        if layout.fits:
            tiles = layout.tiles()
            kernels.gradient[(programs(student.device, tiles.count),)](
                *read, gradient, layout.classes, height, width, tiles.across, tiles.count,
                layout.rows, 1 / tau, *layout.numbers(), **options, **tiles.options(),
            )  # fmt: skip
        else:
            kernels.gradient_in_chunks[(layout.rows,)](
                *read, gradient, constants, layout.classes, height, width, layout.rows, 1 / tau,
                *layout.numbers(), **options, BC=CHUNK, num_warps=CHUNK_WARPS,
            )  # fmt: skip
    return gradient


# torch.compile and torch.export see each pass as one operator, so the graph does not break.
_forward_operator = torch.library.custom_op(
    "lightning_dist::dist_forward", dist_forward, mutates_args=()
)
_backward_operator = torch.library.custom_op(
    "lightning_dist::dist_backward", dist_backward, mutates_args=()
)


@_forward_operator.register_fake
def _(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    axis: int,
    tau: float,
    beta: float,
    gamma: float,
    activation: str,
    eps: float,
    gathered: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    classes = student.shape[axis]
    rows = student.numel() // classes
    new = student.new_empty
    packed = new(2 + 5 * classes if gathered else 0, dtype=torch.float64)
    new = functools.partial(new, dtype=torch.float32)
    column_data = new(5 if activation == "identity" else 4, classes)
    constants = new(0 if classes <= MOST_CLASSES else 4, rows)
    return new(()), new(()), new(2, rows), column_data, constants, packed


@_backward_operator.register_fake
def _(upstream: Tensor, student: Tensor, *others: Any) -> Tensor:
    return torch.empty_like(student)
