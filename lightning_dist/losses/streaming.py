"""``DISTFunction``: the DIST loss computed block by block, with its gradient in closed form."""

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed
from torch import Tensor

Activation = Literal["softmax", "sigmoid", "identity"]

# The number of logits in a block, for the student and again for the teacher. On a CPU, a block and
# its temporary tensors fit into the processor's cache. On an accelerator, a block is so large that
# the time to launch kernels does not matter; its temporary tensors take 0.4 GB.
_BLOCK_CPU = 2**17
_BLOCK_ACCELERATOR = 2**24
# With more classes than this, an accelerator's softmax over a dimension that is not the last is
# slow, and copying the block transposed is faster. Measured on an H100: the copy is faster with
# 720 classes and slower with 150.
_MOST_STRIDED_CLASSES = 256


def compute_dtype(student: Tensor, teacher: Tensor) -> torch.dtype:
    """Return the dtype in which a loss of two tensors is computed.

    Args:
        student: a floating-point tensor of any shape.
        teacher: another one.

    Returns:
        float32, or float64 where one of the tensors has that dtype.
    """
    return torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)


class DISTFunction(torch.autograd.Function):
    """Compute the DIST loss in the forward pass and its gradient in the backward pass.

    Each pass reads the logits once, block by block. Logits are ``(R, C)`` or ``(N, C, S)``:
    dimension 1 holds the classes, and every index into the other dimensions is a row. Small tensors
    of size O(N) or O(C) are stacked along a new first dimension: two for student and teacher, three
    for the moments. The logits are not stacked, because torch.compile could then not fuse the
    operations that read them.

    The gradient of one correlation ``a / (b c + eps)``, ``a = <u, v>``, ``b = |u|``, ``c = |v|``,
    of centred ``u`` (student) and ``v`` (teacher) is ``P v - Q u``, ``P = 1 / (b c + eps)``,
    ``Q = a c P^2 / b``. So the forward pass saves two coefficients for each row and two for each
    column. The backward pass is a weighted sum of student and teacher, followed by the derivative
    of the activation.
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
        """Return the loss, a scalar; see :func:`lightning_dist.functional.dist_loss`.

        Args:
            ctx: the context of autograd, which stores tensors for the backward pass.
            student: logits of shape ``(R, C)`` or ``(N, C, S)``.
            teacher: logits of the same shape.
            mask: boolean, shape ``(R, 1)`` or ``(N, 1, S)``; ``False`` leaves a row out.
            tau: temperature.
            beta: weight of the inter-class term.
            gamma: weight of the intra-class term.
            activation: ``"softmax"``, ``"sigmoid"`` or ``"identity"``.
            eps: added to the denominator of each correlation.
            sync: compute the loss over the batches of all ranks.

        Returns:
            The loss, a scalar in float32 or float64.
        """
        dtype = compute_dtype(student, teacher)
        total, row_coefficients, row_offsets = _correlate_rows(
            student, teacher, mask, tau, activation, eps, dtype
        )
        world = 1
        if sync and torch.distributed.is_available() and torch.distributed.is_initialized():
            world = torch.distributed.get_world_size()
            total = total.all_gather(world)

        rows = _at_least_one(total.rows)
        rho, column_coefficients = _correlate(total.moments, eps)
        correlation = total.inter * (beta / rows) + rho.sum() * (gamma / rho.numel())
        # Multiply after .to(dtype): with torch 2.11, torch.compile turns a last conversion that
        # changes nothing into a gradient of 0.
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
        """Return the gradient of the student's logits, and None for every other argument.

        Args:
            ctx: the context that :meth:`forward` filled.
            grad_output: the gradient of the loss, a scalar.

        Returns:
            Nine values, one for each argument of :meth:`forward`.

        Raises:
            RuntimeError: if a second derivative is requested (``create_graph=True``).
        """
        # With create_graph=True, autograd records the operations of this function too.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "dist_loss has no second derivative: call backward() or grad() without create_graph"
            )
        tau, activation, dtype, n_blocks = ctx.options
        student, teacher, mask, column_coefficients, column_offset, *kept = ctx.saved_tensors
        # Multiply the small tensors by grad_output first. torch.compile may move whatever does not
        # depend on grad_output into the forward pass, and would then store tensors as large as the
        # logits.
        column_coefficients, column_offset, *kept = (
            x * grad_output for x in (column_coefficients, column_offset, *kept)
        )
        row_coefficients, row_offsets = kept[:n_blocks], kept[n_blocks:]
        as_rows = _as_rows(student)
        gradient = torch.empty_like(student) if n_blocks != 1 or as_rows else None
        for index, block in enumerate(_blocks(student)):
            y_student, y_teacher, keep = _activate(
                student, teacher, mask, block, tau, activation, dtype
            )
            columns, offset = column_coefficients, column_offset
            if keep is not None:
                columns, offset = columns * keep, offset * keep
            rows = row_coefficients[index]
            slope = (rows[0] + columns[0]).mul_(y_student)
            slope.addcmul_(rows[1] + columns[1], y_teacher).sub_(offset)
            if row_offsets:
                slope.sub_(row_offsets[index])
            if activation == "softmax":
                slope.mul_(y_student)
                slope.addcmul_(y_student, _sum(slope, (1,)), value=-1)
            elif activation == "sigmoid":
                slope.mul_(y_student * (1 - y_student))
            if gradient is None:  # There is one block, so its gradient is the whole.
                gradient = slope.to(student.dtype)
            elif as_rows:
                part = gradient[block].transpose(1, 2)
                part.copy_(slope.view_as(part))
            else:
                gradient[block] = slope
        return gradient, *[None] * 8


class Statistics(NamedTuple):
    """The contribution of a set of rows to the loss: O(C) numbers, merged without cancellation.

    Attributes:
        rows: the number of rows.
        inter: the sum of the rows' correlations, a scalar.
        mean: the mean of each column of student and teacher, of shape ``(2, 1, C)`` or
            ``(2, 1, C, 1)``.
        moments: the sums of s*s, t*t and s*t over each column, where s and t are the deviations of
            student and teacher from their means; of shape ``(3, 1, C)`` or ``(3, 1, C, 1)``.
    """

    rows: int | Tensor
    inter: Tensor
    mean: Tensor
    moments: Tensor

    @classmethod
    def zero(cls, like: Tensor) -> "Statistics":
        """Return the statistics of no rows.

        Args:
            like: a tensor of as many dimensions and classes as the logits, on their device.

        Returns:
            Zeros in float64 (float32 on Apple's MPS).
        """
        columns = (1, like.shape[1], 1)[: like.dim()]
        zeros = torch.zeros(5, *columns, dtype=_wide(like.device), device=like.device)
        return cls(0, zeros.new_zeros(()), zeros[:2], zeros[2:])

    @classmethod
    def of_block(
        cls, y_student: Tensor, y_teacher: Tensor, keep: Tensor | None, inter: Tensor
    ) -> "Statistics":
        """Return the statistics of one block.

        Args:
            y_student: values after the activation, of shape ``(R, C)`` or ``(N, C, S)``.
            y_teacher: values of the same shape.
            keep: 1 for the rows that count and 0 for the others, in the dtype of the values, of
                shape ``(R, 1)`` or ``(N, 1, S)``; ``None`` if all rows count.
            inter: the sum of the rows' correlations, a scalar.

        Returns:
            The statistics, in the dtype of the values.
        """
        over = (0, 2)[: y_student.dim() - 1]
        rows: int | Tensor
        if keep is None:
            rows = y_student.numel() // y_student.shape[1]
            means = [x.mean(over, keepdim=True) for x in (y_student, y_teacher)]
        else:
            rows = keep.sum()
            means = [
                (x * keep).sum(over, keepdim=True) / _at_least_one(rows)
                for x in (y_student, y_teacher)
            ]
        moments = _moments(y_student, y_teacher, means[0], means[1], keep, over)
        return cls(rows, inter, torch.stack(means), moments)

    def merge(self, other: "Statistics") -> "Statistics":
        """Return the statistics of two sets of rows together.

        Args:
            other: the statistics of rows that are not in this set.

        Returns:
            The statistics in float64 (float32 on Apple's MPS).

        Reference:
            Chan, Golub, LeVeque, Updating Formulae and a Pairwise Algorithm for Computing Sample
            Variances, 1979.
        """
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
        """Return the statistics of the rows of all ranks: the same on every rank, bit by bit.

        Args:
            world: the number of ranks in the default process group.

        Returns:
            The statistics in float64 (float32 on Apple's MPS).
        """
        zero = self.zero(self.mean[0])
        rows = torch.as_tensor(self.rows, dtype=zero.mean.dtype, device=zero.mean.device)
        local = torch.cat(
            (rows.view(1), self.inter.view(1), self.mean.flatten(), self.moments.flatten())
        )
        gathered = [torch.empty_like(local) for _ in range(world)]
        torch.distributed.all_gather(gathered, local)
        total = zero
        for packed in gathered:
            mean, moments = packed[2:].split((self.mean.numel(), self.moments.numel()))
            part = Statistics(
                packed[0], packed[1], mean.view_as(self.mean), moments.view_as(self.moments)
            )
            total = total.merge(part)
        return total


def _correlate_rows(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    tau: float,
    activation: Activation,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Statistics, list[Tensor], list[Tensor]]:
    """Read the logits once; return their statistics and, for each block, data of its rows.

    These data are the coefficients of the gradient, and an offset for activations but softmax.
    """
    total = None
    row_coefficients, row_offsets = [], []
    for block in _blocks(student):
        y_student, y_teacher, keep = _activate(
            student, teacher, mask, block, tau, activation, dtype
        )
        means: tuple[Any, Any] = (1 / y_student.shape[1],) * 2
        if activation != "softmax":
            means = y_student.mean(1, keepdim=True), y_teacher.mean(1, keepdim=True)
        rho, coefficients = _correlate(_moments(y_student, y_teacher, *means, keep, (1,)), eps)
        if keep is not None:
            coefficients = coefficients * keep
        row_coefficients.append(coefficients)
        # Softmax's Jacobian maps a constant in a row to 0, so only the other activations need it.
        if activation != "softmax":
            row_offsets.append(coefficients[0] * means[0] + coefficients[1] * means[1])
        part = Statistics.of_block(y_student, y_teacher, keep, rho.sum())
        total = part if total is None else total.merge(part)
    return Statistics.zero(student) if total is None else total, row_coefficients, row_offsets


def _wide(device: torch.device) -> torch.dtype:
    """Return the dtype in which statistics are merged; Apple's MPS has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def _at_least_one(rows: int | Tensor) -> int | Tensor:
    return rows.clamp(min=1) if isinstance(rows, Tensor) else max(rows, 1)


def _blocks(x: Tensor) -> Iterator[Any]:
    """Yield indices that cut the rows of ``(R, C)`` or ``(N, C, S)`` into blocks of like size."""
    limit = _BLOCK_CPU if x.device.type == "cpu" else _BLOCK_ACCELERATOR
    if torch.compiler.is_compiling():  # One block is enough: the compiler cuts it by itself.
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
    """Return whether blocks of ``(N, C, S)`` are copied to matrices ``(R, C)``."""
    eager = x.device.type != "cpu" and not torch.compiler.is_compiling()
    return eager and x.dim() == 3 and x.shape[1] > _MOST_STRIDED_CLASSES


def _slices(length: int, most: int) -> Iterator[slice]:
    """Cut a range into slices of like length, each of at most `most`."""
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
    """Return student and teacher after the activation, and the mask as numbers, of one block."""
    as_rows = _as_rows(student)

    def part_of(x: Tensor) -> Tensor:
        x = x[block]
        return x.transpose(1, 2).flatten(0, 1) if as_rows else x

    keep = None if mask is None else part_of(mask)

    def activated(logits: Tensor) -> Tensor:
        x = part_of(logits).to(dtype)
        if tau != 1:
            x = x / tau
        if keep is not None:  # Rows that do not count may hold any value, NaN included.
            x = x.masked_fill(~keep, 0)
        if activation == "softmax":
            return x.softmax(1)
        return x.sigmoid() if activation == "sigmoid" else x

    return activated(student), activated(teacher), None if keep is None else keep.to(dtype)


def _moments(
    student: Tensor,
    teacher: Tensor,
    student_mean: Tensor | float,
    teacher_mean: Tensor | float,
    keep: Tensor | None,
    over: tuple[int, ...],
) -> Tensor:
    """Return the sums of s*s, t*t and s*t, stacked, where s and t are deviations from the means."""
    s, t = student - student_mean, teacher - teacher_mean
    if keep is not None:
        s, t = s * keep, t * keep
    return torch.stack([_sum(x, over) for x in (s * s, t * t, s * t)])


def _sum(x: Tensor, over: tuple[int, ...]) -> Tensor:
    """Return the sum over some dimensions, which stay with size 1."""
    # Eager torch adds pairwise. The code that torch.compile (2.11) generates for a CPU adds one
    # number after the other, which loses digits in float32.
    if torch.compiler.is_compiling() and x.device.type == "cpu":
        return x.sum(over, keepdim=True, dtype=torch.float64).to(x.dtype)
    return x.sum(over, keepdim=True)


def _correlate(moments: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return Pearson's correlation, and (Q, -P): the coefficients of its negative gradient."""
    norms = moments[:2].sqrt()
    reciprocal = (norms[:1] * norms[1:] + eps).reciprocal()
    rho = moments[2:] * reciprocal
    # A constant row or column has norm 0 and rho 0. The clamp avoids 0 / 0, so that q is 0 there.
    tiny = torch.finfo(norms.dtype).tiny
    q = rho * reciprocal * norms[1:] / norms[:1].clamp(min=tiny)
    # Where the teacher is constant, P is set to 0. Its deviations are 0 as well, but the backward
    # pass computes them with rounding errors, which P = 1 / eps would amplify to noise.
    return rho, torch.cat((q, torch.where(norms[1:] > 0, -reciprocal, 0)))
