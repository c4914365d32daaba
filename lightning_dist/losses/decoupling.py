"""Decoupled KD, and the standardisation of logits before any loss."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_dist.checks import check_number, class_axis
from lightning_dist.losses.divergences import log_probabilities
from lightning_dist.losses.inputs import check_logits, mask_for
from lightning_dist.losses.streaming import compute_dtype
from lightning_dist.losses.streaming_kd import divergence


def dkd_loss(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    tau: float = 4.0,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    class_dim: int | None = None,
) -> Tensor:
    r"""Return the loss of decoupled knowledge distillation, ``alpha * TCKD + beta * NCKD``.

    It splits :func:`kd_loss` in two. TCKD is the divergence of the binary decision between the
    target class and all others. NCKD is the divergence of the probabilities of the other classes
    among themselves; in KD its weight is the teacher's probability of the other classes, so that it
    has little effect if the teacher is certain. With two classes NCKD is 0.

    Args:
        student: logits, as in :func:`kd_loss`.
        teacher: logits of the same shape; no gradient flows to them.
        target: the label of each sample, int64 with the logits' shape without the classes.
        alpha: the weight of TCKD.
        beta: the weight of NCKD.
        tau: the temperature, above 0.
        ignore_index: the label of samples that are left out.
        mask: the samples that count, as in :func:`kd_loss`.
        class_dim: the dimension of the classes, as in :func:`dist_loss`.

    Returns:
        The mean over samples (and pixels), a scalar in float32 (float64 for float64 logits).

    Raises:
        ValueError: in the same cases as :func:`kd_loss`, and if the target does not have one label
            for each sample.

    Reference:
        Zhao et al., Decoupled Knowledge Distillation, CVPR 2022, equation 7.
    """
    axis = check_logits(student, teacher, class_dim)
    for name, weight in (("alpha", alpha), ("beta", beta)):
        check_number(name, weight)
    counted = _labelled(student, target, ignore_index, axis)
    if mask is not None:
        mask_for(student, mask, axis)
        counted = counted & mask
    pairs, factor = log_probabilities(student, teacher, tau, "softmax", counted, class_dim)
    index = target.masked_fill(~counted, 0).unsqueeze(axis)
    is_target = torch.zeros_like(pairs[0][0], dtype=torch.bool).scatter(axis, index, True)
    others = [x.masked_fill(is_target, -math.inf) for x in pairs[0]]
    binary = [
        torch.cat([x.gather(axis, index), other.logsumexp(axis, keepdim=True)], axis)
        for x, other in zip(pairs[0], others, strict=True)
    ]
    among_others = [F.log_softmax(x, dim=axis) for x in others]
    return factor * (alpha * divergence(*binary) + beta * divergence(*among_others))


def standardise(
    logits: Tensor,
    *,
    class_dim: int | None = None,
    eps: float = 1e-7,
    mask: Tensor | None = None,
) -> Tensor:
    """Return logits with mean 0 and standard deviation 1 over the classes of each sample.

    With standardised logits, a divergence makes the student learn the teacher's relations between
    the classes, but not the range of the teacher's logits. A row that is constant up to rounding
    becomes 0 and gets no gradient. A logit of -infinity stays, and does not count in mean and
    standard deviation.

    Args:
        logits: logits of shape ``(N, C)`` or ``(N, C, *spatial)``, any floating dtype.
        class_dim: the dimension of the classes, as in :func:`dist_loss`.
        eps: a number that is added to the standard deviation.
        mask: the samples that count, as in :func:`kd_loss`; the others become 0 without a gradient.

    Returns:
        A tensor of the same shape in float32 (float64 for float64 logits).

    Example:
        >>> standardise(torch.tensor([[1.0, 2.0, 3.0]]))
        tensor([[-1.0000,  0.0000,  1.0000]])

    Reference:
        Sun et al., Logit Standardization in Knowledge Distillation, CVPR 2024, algorithm 1, with
        the sample standard deviation of its code.
    """
    axis = class_axis(logits.shape, class_dim)
    x = logits.to(compute_dtype(logits, logits))
    mask = mask_for(logits, mask, axis)
    if mask is not None:  # Rows that are left out may contain any value, including NaN.
        x = x.masked_fill(~mask, 0)
    possible = x != -math.inf
    count = possible.sum(axis, keepdim=True)
    mean = x.masked_fill(~possible, 0).sum(axis, keepdim=True) / count.clamp(min=1)
    centred = (x - mean).masked_fill(~possible, 0)
    variance = centred.square().sum(axis, keepdim=True) / (count - 1).clamp(min=1)
    constant = variance.sqrt() <= torch.finfo(logits.dtype).eps * mean.abs()
    deviation = variance.masked_fill(constant, 1).sqrt()  # the gradient of sqrt at 0 is infinite
    scaled = (centred / (deviation + eps)).masked_fill(constant, 0)
    return scaled.masked_fill(~possible, -math.inf)


def _labelled(logits: Tensor, target: Tensor, ignore_index: int, axis: int) -> Tensor:
    """Return a mask of the samples that have a label; refuse a target of the wrong form."""
    rows = (*logits.shape[:axis], *logits.shape[axis + 1 :])
    if target.dtype != torch.int64 or target.shape != rows:
        raise ValueError(
            f"target is {target.dtype} of shape {tuple(target.shape)}: give one label for each "
            f"sample, torch.int64 {rows}"
        )
    return target != ignore_index
