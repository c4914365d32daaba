"""Distillation losses as pure functions of student and teacher logits."""

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor

Activation = Literal["softmax", "sigmoid", "identity"]

# Logits a block of the streaming pass holds, per side. On CPU a block and its temporaries stay in
# the cache; on an accelerator a block is large enough that kernel launches do not count.
_BLOCK_CPU = 2**17
_BLOCK_ACCELERATOR = 2**22


def dist_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    tau: float = 1.0,
    beta: float = 1.0,
    gamma: float = 1.0,
    activation: Activation = "softmax",
    eps: float = 1e-8,
    mask: Tensor | None = None,
    sync: bool = False,
) -> Tensor:
    r"""DIST loss: one minus the Pearson correlation of student and teacher, by rows and by columns.

    With :math:`y = \mathrm{softmax}(z / \tau)` and :math:`\rho` the Pearson correlation,

    .. math:: L = \tau^2 \big(\beta (1 - \overline{\rho(y^s_{i,:}, y^t_{i,:})})
        + \gamma (1 - \overline{\rho(y^s_{:,j}, y^t_{:,j})})\big)

    The first mean runs over samples *i* (inter-class), the second over classes *j* (intra-class).
    Of dense logits every pixel is a sample. The logits are read in blocks, twice: peak memory is
    the gradient plus O(N + C) statistics. The computation runs in float32 or wider. The teacher is
    a constant: no gradient flows to it. A constant row or column has correlation 0.

    Args:
        student: logits of shape ``(N, C)`` or ``(N, C, *spatial)``, any floating dtype and layout.
        teacher: logits of the same shape.
        tau: temperature, above 0.
        beta: weight of the inter-class term.
        gamma: weight of the intra-class term.
        activation: ``"softmax"`` over classes, ``"sigmoid"`` for one-vs-all heads, or
            ``"identity"`` to correlate the given values as they are.
        eps: added to the denominator of each correlation.
        mask: boolean, shape ``(N,)`` or ``(N, *spatial)``; rows where it is ``False`` count in
            neither term (``mask=target != ignore_index``). With no row left the loss is 0.
        sync: compute both means over the batches of all ranks of the default process group. One
            all-gather of ``40 * C + 16`` bytes a rank in the forward pass, none in the backward.
            The value is the same on every rank, and the gradient is scaled so that the average over
            ranks (what DDP and FSDP compute) is the gradient of the joined batch.

    Returns:
        The loss, a scalar in float32 (float64 for float64 logits), from 0 to
        ``2 * tau**2 * (beta + gamma)``.

    Raises:
        ValueError: if the inputs are not floating-point tensors of one shape and device, or an
            option is out of range.

    Example:
        >>> student = torch.tensor([[2.0, 0.0, 1.0], [0.0, 1.0, 3.0]])
        >>> teacher = torch.tensor([[4.0, 0.0, 1.0], [0.0, 1.0, 4.0]])
        >>> dist_loss(student, teacher).item()
        0.0144...

    Reference:
        Huang et al., Knowledge Distillation from A Stronger Teacher, NeurIPS 2022, equation 10.
    """
    _check_logits(student, teacher)
    if not tau > 0:
        raise ValueError(f"tau is {tau}: the temperature must be above 0")
    if activation not in ("softmax", "sigmoid", "identity"):
        raise ValueError(f"activation is {activation!r}: use 'softmax', 'sigmoid' or 'identity'")
    if mask is not None:
        rows = (student.shape[0], *student.shape[2:])
        if mask.dtype != torch.bool or mask.shape != rows:
            raise ValueError(
                f"mask is {mask.dtype} of shape {tuple(mask.shape)}: give torch.bool {rows}"
            )
        mask = mask.unsqueeze(1)
    classes_last = student.dim() > 2 and all(
        x.movedim(1, -1).is_contiguous() for x in (student, teacher)
    )
    inputs: tuple[Tensor | None, ...] = (student, teacher, mask)
    if classes_last:  # channels_last: the rows lie in memory as a matrix already
        inputs = tuple(x if x is None else x.movedim(1, -1).flatten(0, -2) for x in inputs)
    elif student.dim() > 2:
        inputs = tuple(x if x is None else x.flatten(2) for x in inputs)
    return _RelationLoss.apply(*inputs, tau, beta, gamma, activation, eps, sync)


def inter_class_correlation(
    student: Tensor, teacher: Tensor, *, eps: float = 1e-8, mask: Tensor | None = None
) -> Tensor:
    """Mean Pearson correlation over classes, row by row.

    Args:
        student: scores, usually probabilities, of shape ``(N, C)`` or ``(N, C, *spatial)``.
        teacher: scores of the same shape; a constant for the gradient.
        eps: added to the denominator of each correlation.
        mask: rows to count, boolean of shape ``(N,)`` or ``(N, *spatial)``.

    Returns:
        A scalar from -1 to 1.

    Raises:
        ValueError: as :func:`dist_loss`.

    Example:
        >>> rows = torch.tensor([[0.1, 0.2, 0.7], [0.6, 0.3, 0.1]])
        >>> round(inter_class_correlation(rows, 2 * rows + 1).item(), 4)
        1.0
    """
    return 1 - dist_loss(
        student, teacher, beta=1.0, gamma=0.0, activation="identity", eps=eps, mask=mask
    )


def intra_class_correlation(
    student: Tensor, teacher: Tensor, *, eps: float = 1e-8, mask: Tensor | None = None
) -> Tensor:
    """Mean Pearson correlation over the batch, class by class.

    Args:
        student: scores, usually probabilities, of shape ``(N, C)`` or ``(N, C, *spatial)``.
        teacher: scores of the same shape; a constant for the gradient.
        eps: added to the denominator of each correlation.
        mask: rows to count, boolean of shape ``(N,)`` or ``(N, *spatial)``.

    Returns:
        A scalar from -1 to 1.

    Raises:
        ValueError: as :func:`dist_loss`.

    Example:
        >>> rows = torch.tensor([[0.1, 0.9], [0.6, 0.4], [0.3, 0.7]])
        >>> round(intra_class_correlation(rows, 1 - rows).item(), 4)
        -1.0
    """
    return 1 - dist_loss(
        student, teacher, beta=0.0, gamma=1.0, activation="identity", eps=eps, mask=mask
    )


def kd_loss(student: Tensor, teacher: Tensor, *, tau: float = 4.0) -> Tensor:
    """Knowledge distillation loss: ``tau**2 * KL(teacher || student)`` of softened probabilities.

    Args:
        student: logits of shape ``(N, C)`` or ``(N, C, *spatial)``.
        teacher: logits of the same shape; a constant for the gradient.
        tau: temperature, above 0.

    Returns:
        The mean over samples (and pixels), a scalar in float32 (float64 for float64 logits).

    Raises:
        ValueError: as :func:`dist_loss`.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0, 1.0]])
        >>> kd_loss(logits, logits).item()
        0.0

    Reference:
        Hinton et al., Distilling the Knowledge in a Neural Network, 2015.
    """
    _check_logits(student, teacher)
    if not tau > 0:
        raise ValueError(f"tau is {tau}: the temperature must be above 0")
    dtype = _compute_dtype(student, teacher)
    log_student = F.log_softmax(student.to(dtype) / tau, dim=1)
    log_teacher = F.log_softmax(teacher.detach().to(dtype) / tau, dim=1)
    rows = max(student.numel() // student.shape[1], 1)
    return F.kl_div(log_student, log_teacher, reduction="sum", log_target=True) * (tau**2 / rows)


def _check_logits(student: Tensor, teacher: Tensor) -> None:
    """Refuse pairs whose relation is not defined, naming what differs."""
    for name, value in (("student", student), ("teacher", teacher)):
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} is a {type(value).__name__}: give a tensor of logits")
        if not value.is_floating_point():
            raise ValueError(
                f"{name} has dtype {value.dtype}: give floating-point logits, not labels"
            )
        if value.dim() < 2 or value.shape[1] == 0:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}: give logits (N, C) or (N, C, *spatial)"
            )
    shapes = f"student {tuple(student.shape)}, teacher {tuple(teacher.shape)}"
    if student.shape[1] != teacher.shape[1]:
        raise ValueError(
            f"student has {student.shape[1]} classes and teacher {teacher.shape[1]} ({shapes}): "
            "give both a head of the same classes, or map the teacher's classes to the student's"
        )
    if student.shape != teacher.shape:
        raise ValueError(f"logits differ in shape ({shapes}): they must pair element by element")
    if student.device != teacher.device:
        raise ValueError(f"student is on {student.device} and teacher on {teacher.device}")


def _compute_dtype(student: Tensor, teacher: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)


class _RelationLoss(torch.autograd.Function):
    """The DIST loss in two streaming passes over blocks of rows.

    Tensors are ``(R, C)`` or ``(N, C, S)``: the class dimension is 1, all others are rows. A *pair*
    stacks student and teacher in front: ``(2, R, C)`` or ``(2, N, C, S)``.

    The gradient of one correlation ``a / (b c + eps)``, ``a = <u, v>``, ``b = |u|``, ``c = |v|``,
    of centred ``u`` (student) and ``v`` (teacher) is ``P v - Q u``, ``P = 1 / (b c + eps)``,
    ``Q = a c P^2 / b``. So the forward pass keeps two coefficients a row and two a column, and the
    backward pass is a weighted sum of student and teacher, followed by the activation's derivative.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        mask: Tensor | None,
        tau: float,
        beta: float,
        gamma: float,
        activation: Activation,
        eps: float,
        sync: bool,
    ) -> Tensor:
        dtype = _compute_dtype(student, teacher)
        total = None
        row_coefficients, row_offsets = [], []
        for block in _blocks(student):
            pair, keep = _activate(student, teacher, mask, block, tau, activation, dtype)
            mean: Tensor | float = 1 / pair.shape[2]
            if activation != "softmax":
                mean = pair.mean(2, keepdim=True)
            moments = _moments(pair, mean, keep, over=(2,))
            rho, coefficients = _correlate(moments, eps)
            if keep is not None:
                coefficients = coefficients * keep
            row_coefficients.append(coefficients)
            if activation != "softmax":  # a constant a row vanishes in the softmax's derivative
                row_offsets.append((coefficients * mean).sum(0))
            part = _Statistics.of_block(pair, keep, rho.sum())
            total = part if total is None else total.merge(part)
        if total is None:
            total = _Statistics.zero(student)
        world = 1
        if sync and torch.distributed.is_available() and torch.distributed.is_initialized():
            world = torch.distributed.get_world_size()
            total = total.all_reduce(world)

        rows = _at_least_one(total.rows)
        rho, column_coefficients = _correlate(total.moments, eps)
        loss = tau**2 * (beta * (1 - total.inter / rows) + gamma * (1 - rho.mean()))
        loss = loss * (total.rows > 0)

        row_weight = world * tau * beta / rows
        column_coefficients = column_coefficients * (world * tau * gamma / student.shape[1])
        column_offset = (column_coefficients * total.mean).sum(0)
        ctx.save_for_backward(
            student,
            teacher,
            mask,
            column_coefficients.to(dtype),
            column_offset.to(dtype),
            *(coefficients * row_weight for coefficients in row_coefficients),
            *(offset * row_weight for offset in row_offsets),
        )
        ctx.options = (tau, activation, dtype, len(row_coefficients))
        return loss.to(dtype)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            raise RuntimeError(
                "dist_loss has no second derivative: call backward() or grad() without create_graph"
            )
        tau, activation, dtype, n_blocks = ctx.options
        student, teacher, mask, column_coefficients, column_offset, *rows = ctx.saved_tensors
        row_coefficients, row_offsets = rows[:n_blocks], rows[n_blocks:]
        gradient = torch.empty_like(student)
        for index, block in enumerate(_blocks(student)):
            pair, keep = _activate(student, teacher, mask, block, tau, activation, dtype)
            columns, offset = column_coefficients, column_offset
            if keep is not None:
                columns, offset = columns * keep, offset * keep
            weighted = (row_coefficients[index] + columns).mul_(pair)
            slope = weighted[0].add_(weighted[1]).sub_(offset)
            if row_offsets:
                slope.sub_(row_offsets[index])
            if activation == "softmax":
                slope = torch._softmax_backward_data(slope, pair[0], 1, dtype)
            elif activation == "sigmoid":
                slope = slope * pair[0] * (1 - pair[0])
            gradient[block] = slope * grad_output
        return gradient, *[None] * 8


class _Statistics(NamedTuple):
    """What a set of rows contributes: O(C) numbers, merged without cancellation."""

    rows: int | Tensor  # how many
    inter: Tensor  # sum of the row correlations
    mean: Tensor  # (2, 1, C[, 1]) column means of student and teacher
    moments: Tensor  # (3, 1, C[, 1]) centred column sums of s*s, t*t and s*t

    @classmethod
    def zero(cls, like: Tensor) -> "_Statistics":
        columns = (1, like.shape[1], 1)[: like.dim()]
        zeros = torch.zeros(5, *columns, dtype=_wide(like.device), device=like.device)
        return cls(0, zeros.new_zeros(()), zeros[:2], zeros[2:])

    @classmethod
    def of_block(cls, pair: Tensor, keep: Tensor | None, inter: Tensor) -> "_Statistics":
        over = (1, 3)[: pair.dim() - 2]
        rows: int | Tensor
        if keep is None:
            rows = pair.numel() // (2 * pair.shape[2])
            mean = pair.mean(over, keepdim=True)
        else:
            rows = keep.sum()
            mean = (pair * keep).sum(over, keepdim=True) / _at_least_one(rows)
        return cls(rows, inter, mean, _moments(pair, mean, keep, over))

    def merge(self, other: "_Statistics") -> "_Statistics":
        """Join two disjoint sets of rows (Chan, Golub, LeVeque 1979)."""
        wide = _wide(self.mean.device)
        mean = self.mean.to(wide)
        rows = self.rows + other.rows
        share = other.rows / _at_least_one(rows)
        shift = other.mean - mean
        between = torch.cat((shift * shift, shift[:1] * shift[1:])) * (self.rows * share)
        return _Statistics(
            rows,
            self.inter.to(wide) + other.inter,
            mean + shift * share,
            self.moments.to(wide) + other.moments + between,
        )

    def all_reduce(self, world: int) -> "_Statistics":
        """Merge the statistics of all ranks, in the order of the ranks, on every rank."""
        zero = self.zero(self.mean[0])
        rows = torch.as_tensor(self.rows, dtype=zero.mean.dtype, device=zero.mean.device)
        mine = torch.cat(
            (rows.view(1), self.inter.view(1), self.mean.flatten(), self.moments.flatten())
        )
        every = [torch.empty_like(mine) for _ in range(world)]
        torch.distributed.all_gather(every, mine)
        total = zero
        for packed in every:
            mean, moments = packed[2:].split((self.mean.numel(), self.moments.numel()))
            part = _Statistics(
                packed[0], packed[1], mean.view_as(self.mean), moments.view_as(self.moments)
            )
            total = total.merge(part)
        return total


def _wide(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def _at_least_one(rows: int | Tensor) -> int | Tensor:
    return rows.clamp(min=1) if isinstance(rows, Tensor) else max(rows, 1)


def _blocks(x: Tensor) -> Iterator[Any]:
    """Indices that cut the rows of ``(R, C)`` or ``(N, C, S)`` into blocks of about equal size."""
    limit = _BLOCK_CPU if x.device.type == "cpu" else _BLOCK_ACCELERATOR
    if torch.compiler.is_compiling():  # one block: the compiler fuses and tiles by itself
        yield slice(None)
        return
    rows = max(limit // x.shape[1], 1)
    if x.dim() == 2:
        yield from _slices(x.shape[0], rows)
        return
    samples, _, spatial = x.shape
    for part in _slices(samples, max(rows // max(spatial, 1), 1)):
        for pixels in _slices(spatial, rows):
            yield part, slice(None), pixels


def _slices(length: int, most: int) -> Iterator[slice]:
    parts = -(-length // most)
    for i in range(parts):
        yield slice(i * length // parts, (i + 1) * length // parts)


def _activate(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    block: Any,
    tau: float,
    activation: Activation,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """The pair of a block after the activation, and the block's mask as numbers."""
    pair = torch.stack((student[block].to(dtype), teacher[block].to(dtype)))
    if tau != 1:
        pair = pair / tau
    keep = None
    if mask is not None:  # what is left out may be anything, NaN included
        pair = pair.masked_fill(~mask[block], 0)
        keep = mask[block].to(dtype)
    if activation == "softmax":
        pair = pair.softmax(2)
    elif activation == "sigmoid":
        pair = pair.sigmoid()
    return pair, keep


def _moments(
    pair: Tensor, mean: Tensor | float, keep: Tensor | None, over: tuple[int, ...]
) -> Tensor:
    """Centred sums of s*s, t*t and s*t, stacked in front."""
    deviation = pair - mean
    if keep is not None:
        deviation = deviation * keep
    squares = (deviation * deviation).sum(over, keepdim=True)
    cross = (deviation[:1] * deviation[1:]).sum(over, keepdim=True)
    return torch.cat((squares, cross))


def _correlate(moments: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Pearson's correlation from its moments, and (Q, -P): its negative gradient's coefficients."""
    norms = moments[:2].sqrt()
    reciprocal = 1 / (norms[:1] * norms[1:] + eps)
    rho = moments[2:] * reciprocal
    q = torch.where(norms[:1] > 0, rho * reciprocal * norms[1:] / norms[:1], 0)
    return rho, torch.cat((q, -reciprocal))
