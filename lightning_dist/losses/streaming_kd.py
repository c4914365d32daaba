"""``KDFunction``: the KD loss computed block by block, with its gradient in closed form."""

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_dist.losses.streaming import (
    block_of,
    blocks_of,
    compute_dtype,
    is_transposed,
    loses_digits,
    wide_dtype,
)

Probability = Literal["softmax", "sigmoid"]


class KDFunction(torch.autograd.Function):
    """The KD loss as an autograd function that works block by block.

    The logits are ``(R, C)`` or ``(N, C, S)``, and the mask is ``(R, 1)`` or ``(N, 1, S)``. The
    forward pass computes the gradient too, because it then has all it needs. So the logits are read
    once, and the peak memory is the gradient, one block and O(N) numbers.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        mask: Tensor | None,
        tau: float,
        activation: Probability,
    ) -> Tensor:
        """Return the loss, a scalar in float32 or float64."""
        # Half precision cannot store the gradient before it is multiplied by the scaled loss's.
        stored = ctx.needs_input_grad[0] and student.dtype == compute_dtype(student, teacher)
        total, gradient = _totals(student, teacher, mask, tau, activation, stored)
        weight = tau / count_samples(student, mask, 1)
        ctx.save_for_backward(student, teacher, mask)
        ctx.options = tau, activation, weight
        ctx.gradient = gradient
        return (total * (tau * weight)).to(compute_dtype(student, teacher))

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of the student's logits, and None for every other argument."""
        student, teacher, mask = ctx.saved_tensors
        tau, activation, weight = ctx.options
        if torch.is_grad_enabled():  # A second derivative needs operations that autograd records.
            gradient = kd_gradient(student, teacher, mask, tau, activation, 1)
            return (gradient * (upstream * weight)).to(student.dtype), *[None] * 4
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is not None:
            return gradient.mul_(upstream * weight), *[None] * 4
        gradient = torch.empty_like(student)
        for block in blocks_of(student, whole=False):
            logits = _logits_of_block(student, teacher, mask, block, tau)
            x, y = pairs_of_logarithms(*logits, 1, activation)[0]
            part = x.exp().sub_(y.exp())
            block_of(gradient, block).copy_(part.mul_(upstream * weight))
        return gradient, *[None] * 4


def _logits_of_block(
    student: Tensor, teacher: Tensor, mask: Tensor | None, block: Any, tau: float
) -> tuple[Tensor, Tensor]:
    part = None if mask is None else block_of(mask, block)
    x, y = scaled_logits(block_of(student, block), block_of(teacher, block), part, tau)
    return (x.contiguous(), y.contiguous()) if is_transposed(x) else (x, y)


def _totals(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    tau: float,
    activation: Probability,
    stored: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return the sum of the divergences, and `p_student - p_teacher` if it is to be stored."""
    total: Tensor | None = None
    gradient: Tensor | None = None
    for block in blocks_of(student, whole=False):
        pairs = pairs_of_logarithms(
            *_logits_of_block(student, teacher, mask, block, tau), 1, activation
        )
        (p, q), *no = [(x.exp(), y.exp()) for x, y in pairs]
        value = (pairs[0][1] - pairs[0][0]).mul_(q).sum()
        for (x, y), (_, not_q) in zip(pairs[1:], no, strict=True):
            value = value + (y - x).mul_(not_q).sum()
        # It is 0 * infinity if the teacher rules out a class. Only a CPU tells this without a wait.
        if student.device.type != "cpu" or value.isnan():
            value = torch.stack([divergence(*pair) for pair in pairs]).sum()
        if block is not None:  # float32 would lose digits in the sum of many blocks.
            value = value.to(wide_dtype(student.device))
        total = value if total is None else total + value
        if stored and block is None:
            gradient = p.sub_(q)
        elif stored:
            gradient = torch.empty_like(student) if gradient is None else gradient
            block_of(gradient, block).copy_(p.sub_(q))
    return student.new_zeros(()) if total is None else total, gradient


def kd_gradient(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    tau: float,
    activation: Probability,
    axis: int,
) -> Tensor:
    """Return ``p_student - p_teacher``, and 0 for the samples that are left out.

    Args:
        student: logits of any shape.
        teacher: logits of the same shape.
        mask: a boolean tensor with size 1 in the dimension of the classes, or None.
        tau: the temperature.
        activation: ``"softmax"`` or ``"sigmoid"``.
        axis: the dimension of the classes.
    """
    logits = scaled_logits(student, teacher, mask, tau)
    if activation == "sigmoid":
        return logits[0].sigmoid() - logits[1].sigmoid()
    return logits[0].softmax(axis) - logits[1].softmax(axis)


def scaled_logits(
    student: Tensor, teacher: Tensor, mask: Tensor | None, tau: float
) -> tuple[Tensor, Tensor]:
    """Return logits divided by the temperature, with 0 in the samples that are left out.

    Args:
        student: logits of any shape.
        teacher: logits of the same shape.
        mask: a boolean tensor with size 1 in the dimension of the classes, or None.
        tau: the temperature.
    """
    dtype = compute_dtype(student, teacher)
    x, y = student.to(dtype) / tau, teacher.to(dtype) / tau
    if mask is None:
        return x, y
    # Samples that are left out may contain any value, including NaN.
    return x.masked_fill(~mask, 0), y.masked_fill(~mask, 0)


def count_samples(student: Tensor, mask: Tensor | None, axis: int) -> int | Tensor:
    """Return the number of samples that count, but at least 1.

    Args:
        student: logits of any shape.
        mask: a boolean tensor with size 1 in the dimension of the classes, or None.
        axis: the dimension of the classes.
    """
    if mask is None:
        return max(student.numel() // student.shape[axis], 1)
    return mask.sum(dtype=torch.promote_types(student.dtype, torch.float32)).clamp(min=1)


def pairs_of_logarithms(
    x: Tensor, y: Tensor, axis: int, activation: Probability
) -> list[tuple[Tensor, Tensor]]:
    """Return pairs of log-probabilities of student and teacher.

    The softmax has one pair; the sigmoid has one for "yes" and one for "no".

    Args:
        x: the student's logits, divided by the temperature.
        y: the teacher's.
        axis: the dimension of the classes.
        activation: ``"softmax"`` or ``"sigmoid"``.
    """
    if activation == "softmax":
        if axis == 1 and loses_digits(x):
            return [(_log_softmax(x), _log_softmax(y))]
        return [(F.log_softmax(x, dim=axis), F.log_softmax(y, dim=axis))]
    return [(F.logsigmoid(x), F.logsigmoid(y)), (F.logsigmoid(-x), F.logsigmoid(-y))]


def _log_softmax(x: Tensor) -> Tensor:
    x = x - x.amax(1, keepdim=True)
    return x - x.exp().sum(1, keepdim=True).log()


def divergence(log_student: Tensor, log_teacher: Tensor) -> Tensor:
    """Return the sum of ``p_teacher * (log p_teacher - log p_student)``.

    Args:
        log_student: log-probabilities of any shape.
        log_teacher: log-probabilities of the same shape.
    """
    # A class to which the teacher gives probability 0 must add 0, but F.kl_div would add 0 * inf,
    # which is NaN.
    impossible = log_teacher == -math.inf
    log_student, log_teacher = (x.masked_fill(impossible, 0) for x in (log_student, log_teacher))
    return F.kl_div(log_student, log_teacher, reduction="sum", log_target=True)
