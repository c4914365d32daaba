"""The DIST loss as one operator that streams over blocks of rows, its gradient in closed form."""

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed
from torch import Tensor

Activation = Literal["softmax", "sigmoid", "identity"]

# Logits a block of the streaming pass holds, per side. On CPU a block and its temporaries stay in
# the cache; on an accelerator a block is large enough that kernel launches do not count, and its
# temporaries take 0.4 GB.
_BLOCK_CPU = 2**17
_BLOCK_ACCELERATOR = 2**24
# With more classes a transposed copy of the block is worth it: an accelerator's softmax over a
# dimension that is not the last is then slow. On an H100, at 720 classes but not at 150.
_MOST_STRIDED_CLASSES = 256


def compute_dtype(student: Tensor, teacher: Tensor) -> torch.dtype:
    """The dtype in which a loss of two tensors is computed: float32 or wider."""
    return torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)


class RelationLoss(torch.autograd.Function):
    """The DIST loss in two streaming passes over blocks of rows.

    Tensors are ``(R, C)`` or ``(N, C, S)``: the class dimension is 1, all others are rows. Small
    tensors, O(N) or O(C), are stacked in front: two for student and teacher, three for moments.
    The logits are not: a compiler could not fuse what reads them.

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
        dtype = compute_dtype(student, teacher)
        total = None
        row_coefficients, row_offsets = [], []
        for block in _blocks(student):
            ours, theirs, keep = _activate(student, teacher, mask, block, tau, activation, dtype)
            means: tuple[Any, Any] = (1 / ours.shape[1],) * 2
            if activation != "softmax":
                means = ours.mean(1, keepdim=True), theirs.mean(1, keepdim=True)
            rho, coefficients = _correlate(_moments(ours, theirs, *means, keep, over=(1,)), eps)
            if keep is not None:
                coefficients = coefficients * keep
            row_coefficients.append(coefficients)
            if activation != "softmax":  # a constant a row vanishes in the softmax's derivative
                row_offsets.append(coefficients[0] * means[0] + coefficients[1] * means[1])
            part = Statistics.of_block(ours, theirs, keep, rho.sum())
            total = part if total is None else total.merge(part)
        if total is None:
            total = Statistics.zero(student)
        world = 1
        if sync and torch.distributed.is_available() and torch.distributed.is_initialized():
            world = torch.distributed.get_world_size()
            total = total.all_gather(world)

        rows = _at_least_one(total.rows)
        rho, column_coefficients = _correlate(total.moments, eps)
        correlation = total.inter * (beta / rows) + rho.sum() * (gamma / rho.numel())
        # The conversion is not last: torch 2.11 compiles one that does nothing to a gradient of 0.
        loss = (beta + gamma - correlation).to(dtype) * tau**2
        if isinstance(total.rows, Tensor) or total.rows == 0:
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
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            raise RuntimeError(
                "dist_loss has no second derivative: call backward() or grad() without create_graph"
            )
        tau, activation, dtype, n_blocks = ctx.options
        student, teacher, mask, column_coefficients, column_offset, *kept = ctx.saved_tensors
        # Scaled before they meet the logits: a compiler then leaves all of it to the backward pass.
        column_coefficients, column_offset, *kept = (
            x * grad_output for x in (column_coefficients, column_offset, *kept)
        )
        row_coefficients, row_offsets = kept[:n_blocks], kept[n_blocks:]
        as_rows = _as_rows(student)
        gradient = torch.empty_like(student) if n_blocks != 1 or as_rows else None
        for index, block in enumerate(_blocks(student)):
            ours, theirs, keep = _activate(student, teacher, mask, block, tau, activation, dtype)
            columns, offset = column_coefficients, column_offset
            if keep is not None:
                columns, offset = columns * keep, offset * keep
            rows = row_coefficients[index]
            slope = (rows[0] + columns[0]).mul_(ours)
            slope.addcmul_(rows[1] + columns[1], theirs).sub_(offset)
            if row_offsets:
                slope.sub_(row_offsets[index])
            if activation == "softmax":
                slope.mul_(ours)
                slope.addcmul_(ours, _sum(slope, (1,)), value=-1)
            elif activation == "sigmoid":
                slope.mul_(ours * (1 - ours))
            if gradient is None:  # the only block
                gradient = slope.to(student.dtype)
            elif as_rows:
                part = gradient[block].transpose(1, 2)
                part.copy_(slope.view_as(part))
            else:
                gradient[block] = slope
        return gradient, *[None] * 8


class Statistics(NamedTuple):
    """What a set of rows contributes: O(C) numbers, merged without cancellation."""

    rows: int | Tensor  # how many
    inter: Tensor  # sum of the row correlations
    mean: Tensor  # (2, 1, C[, 1]) column means of student and teacher
    moments: Tensor  # (3, 1, C[, 1]) centred column sums of s*s, t*t and s*t

    @classmethod
    def zero(cls, like: Tensor) -> "Statistics":
        columns = (1, like.shape[1], 1)[: like.dim()]
        zeros = torch.zeros(5, *columns, dtype=_wide(like.device), device=like.device)
        return cls(0, zeros.new_zeros(()), zeros[:2], zeros[2:])

    @classmethod
    def of_block(
        cls, ours: Tensor, theirs: Tensor, keep: Tensor | None, inter: Tensor
    ) -> "Statistics":
        over = (0, 2)[: ours.dim() - 1]
        rows: int | Tensor
        if keep is None:
            rows = ours.numel() // ours.shape[1]
            means = [x.mean(over, keepdim=True) for x in (ours, theirs)]
        else:
            rows = keep.sum()
            means = [
                (x * keep).sum(over, keepdim=True) / _at_least_one(rows) for x in (ours, theirs)
            ]
        moments = _moments(ours, theirs, means[0], means[1], keep, over)
        return cls(rows, inter, torch.stack(means), moments)

    def merge(self, other: "Statistics") -> "Statistics":
        """Join two disjoint sets of rows (Chan, Golub, LeVeque 1979)."""
        wide = _wide(self.mean.device)
        mean = self.mean.to(wide)
        rows = self.rows + other.rows
        share = other.rows / _at_least_one(rows)
        shift = other.mean - mean
        between = torch.cat((shift * shift, shift[:1] * shift[1:])) * (self.rows * share)
        return Statistics(
            rows,
            self.inter.to(wide) + other.inter,
            mean + shift * share,
            self.moments.to(wide) + other.moments + between,
        )

    def all_gather(self, world: int) -> "Statistics":
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
            part = Statistics(
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


def _as_rows(x: Tensor) -> bool:
    """Whether blocks of ``(N, C, S)`` are computed as matrices ``(R, C)``."""
    eager = x.device.type != "cpu" and not torch.compiler.is_compiling()
    return eager and x.dim() == 3 and x.shape[1] > _MOST_STRIDED_CLASSES


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
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Student and teacher of a block after the activation, and the block's mask as numbers."""

    as_rows = _as_rows(student)

    def part_of(x: Tensor) -> Tensor:
        x = x[block]
        return x.transpose(1, 2).flatten(0, 1) if as_rows else x

    keep = None if mask is None else part_of(mask)

    def activated(logits: Tensor) -> Tensor:
        x = part_of(logits).to(dtype)
        if tau != 1:
            x = x / tau
        if keep is not None:  # what is left out may be anything, NaN included
            x = x.masked_fill(~keep, 0)
        if activation == "softmax":
            return x.softmax(1)
        return x.sigmoid() if activation == "sigmoid" else x

    return activated(student), activated(teacher), None if keep is None else keep.to(dtype)


def _moments(
    ours: Tensor,
    theirs: Tensor,
    our_mean: Tensor | float,
    their_mean: Tensor | float,
    keep: Tensor | None,
    over: tuple[int, ...],
) -> Tensor:
    """Centred sums of s*s, t*t and s*t, stacked in front."""
    ours, theirs = ours - our_mean, theirs - their_mean
    if keep is not None:
        ours, theirs = ours * keep, theirs * keep
    return torch.stack([_sum(x, over) for x in (ours * ours, theirs * theirs, ours * theirs)])


def _sum(x: Tensor, over: tuple[int, ...]) -> Tensor:
    # Eager sums are pairwise; those that inductor makes for the CPU are not, and lose digits.
    if torch.compiler.is_compiling() and x.device.type == "cpu":
        return x.sum(over, keepdim=True, dtype=torch.float64).to(x.dtype)
    return x.sum(over, keepdim=True)


def _correlate(moments: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Pearson's correlation from its moments, and (Q, -P): its negative gradient's coefficients."""
    norms = moments[:2].sqrt()
    reciprocal = (norms[:1] * norms[1:] + eps).reciprocal()
    rho = moments[2:] * reciprocal
    # A constant row or column has norm 0 and rho 0: q is 0 there, whatever divides.
    tiny = torch.finfo(norms.dtype).tiny
    q = rho * reciprocal * norms[1:] / norms[:1].clamp(min=tiny)
    # A constant teacher's deviations are 0 too, but not in float32's digits of the backward pass:
    # times 1 / eps they would be noise.
    return rho, torch.cat((q, torch.where(norms[1:] > 0, -reciprocal, 0)))
