"""``DISTFunction``: the DIST loss computed block by block, with its gradient in closed form."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed
from torch import Tensor

Activation = Literal["softmax", "sigmoid", "identity"]

# The number of logits that a block contains of the student; it contains as many of the teacher. On
# a CPU, a block and its temporary tensors fit into the processor's cache. On an accelerator, a
# block is so large that the time to launch kernels does not matter; its temporary tensors take
# 0.4 GB.
_BLOCK_CPU = 2**17
_BLOCK_ACCELERATOR = 2**24
# The least number of rows of a block: merging the statistics of a block takes as long as a few of
# its rows. So blocks of more than 8,192 classes are larger than a processor's cache.
_LEAST_ROWS = 16
# With more classes than this, an accelerator's softmax over a dimension that is not the last one is
# slow, and it is faster to copy the block transposed first. Measured on an H100: the copy is faster
# with 720 classes and slower with 150.
_MOST_STRIDED_CLASSES = 256
# With more classes than this, a CPU's softmax over a dimension that is not the last one loses
# digits, because torch 2.14 adds the classes one after the other, also in the backward pass.
_MOST_SUMMED_CLASSES = 64
# With fewer classes than this, a CPU's softmax and sums over the last dimension are slow, because
# torch uses no vector instructions for them. They are up to seven times as fast on a transposed
# copy of a block, whose last dimension is the rows.
_LEAST_CLASSES_IN_ROWS = 16
# Activations and means have rounding errors of a few units in the last place of the dtype in which
# the loss is computed. So equal logits may give values that differ by this many units.
_ROUNDING_UNITS = 8


def compute_dtype(student: Tensor, teacher: Tensor) -> torch.dtype:
    """Return the dtype in which a loss of two tensors is computed.

    Args:
        student: a floating-point tensor of any shape.
        teacher: another floating-point tensor.

    Returns:
        float32, or float64 if one of the tensors has that dtype.
    """
    return torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)


class DISTFunction(torch.autograd.Function):
    """The DIST loss as an autograd function, with its gradient in closed form.

    Each pass reads the logits once, block by block. Logits are ``(R, C)`` or ``(N, C, S)``:
    dimension 1 is the classes, and every index into the other dimensions is a row. For a small
    batch the time is the number of operations, so a single block is neither cut out nor merged.

    The gradient of one correlation ``a / (b c + eps)``, ``a = <u, v>``, ``b = |u|``, ``c = |v|``,
    of centred ``u`` (student) and ``v`` (teacher) is ``P v - Q u``, ``P = 1 / (b c + eps)``,
    ``Q = a c P^2 / b``. So the forward pass returns two coefficients and the means of each row and
    of each column. The backward pass computes a weighted sum of the deviations of student and
    teacher from these means, and applies the derivative of the activation. It subtracts the mean
    from each value before it multiplies by the coefficient. In a nearly constant row or column the
    coefficients are so large that the products with uncentred values would cancel.
    """

    # torch.func.vmap can call forward and backward with batched tensors, without a special rule.
    generate_vmap_rule = True

    @staticmethod
    def forward(
        student: Tensor,
        teacher: Tensor,
        mask: Tensor | None,
        tau: float,
        beta: float,
        gamma: float,
        activation: Activation,
        eps: float,
        sync: bool,
    ) -> tuple[Tensor, ...]:
        """Return the loss, a scalar, and the tensors that the backward pass needs.

        Args:
            student: logits of shape ``(R, C)`` or ``(N, C, S)``.
            teacher: logits of the same shape.
            mask: a boolean tensor of shape ``(R, 1)`` or ``(N, 1, S)``; rows where it is ``False``
                are left out.
            tau: the temperature.
            beta: the weight of the inter-class term.
            gamma: the weight of the intra-class term.
            activation: ``"softmax"``, ``"sigmoid"`` or ``"identity"``.
            eps: a number that is added to the denominator of each correlation.
            sync: compute the loss over the batches of all ranks.

        Returns:
            The loss in float32 or float64 (see :func:`lightning_dist.functional.dist_loss`). Then,
            for the backward pass, the data of the columns and of the rows of each block, see
            :func:`_backward_data`.

        Raises:
            RuntimeError: if ``sync`` needs communication inside ``torch.func.vmap``.
        """
        dtype = compute_dtype(student, teacher)
        tolerances = tolerance(student, dtype), tolerance(teacher, dtype)
        local_rows = _at_least_one(_count_rows(student) if mask is None else mask.sum(dtype=dtype))
        total, row_data = _correlate_rows(
            student, teacher, mask, tau, activation, eps, dtype, tolerances, tau * beta / local_rows
        )
        world = processes_of(sync)
        if world > 1:
            total = total.all_reduce()
            share = torch.as_tensor(local_rows / _at_least_one(total.rows) * world).to(dtype)
            row_data = [_scaled(data, share) for data in row_data]
        loss, columns = loss_and_columns(
            total, world, tolerances, tau, beta, gamma, activation, eps, dtype
        )
        return loss, *columns, *(x for data in row_data for x in data)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Store the tensors and options that the backward pass needs.

        Args:
            ctx: the context of autograd.
            inputs: the arguments of :meth:`forward`.
            output: the values that :meth:`forward` returned.
        """
        tau, activation = inputs[3], inputs[6]
        ctx.save_for_backward(*inputs[:3], *output[1:])
        ctx.options = (tau, activation, output[0].dtype)
        if torch.compiler.is_compiling():
            ctx.mark_non_differentiable(*output[1:])
        else:
            # A second derivative inside torch.func needs the gradients of these outputs. They are
            # not marked as non-differentiable, and missing gradients are not replaced by zeros, so
            # that the backward pass can detect a second derivative and raise an error.
            ctx.set_materialize_grads(False)

    @staticmethod
    def backward(
        ctx: Any, grad_output: Tensor | None, *others: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Return the gradient of the student's logits, and None for every other argument.

        Args:
            ctx: the context that :meth:`setup_context` filled.
            grad_output: the gradient of the loss, a scalar.
            *others: the gradients of the other outputs; all of them are None, except for a second
                derivative.

        Returns:
            Nine values, one for each argument of :meth:`forward`.

        Raises:
            RuntimeError: if a second derivative is requested (``create_graph=True``).
        """
        refuse_second_derivative(others)
        if grad_output is None:  # The differentiated value does not depend on the loss.
            return (None,) * 9
        tau, activation, dtype = ctx.options
        student, teacher, mask, *data = ctx.saved_tensors
        # Multiply the small tensors by grad_output first. torch.compile may move operations that do
        # not depend on grad_output into the forward pass, and would then store tensors as large as
        # the logits.
        n_columns = 5 if activation == "identity" else 4
        columns = _scaled(data[:n_columns], grad_output)
        n_rows = 2 if activation == "softmax" else n_columns
        starts = range(n_columns, len(data), n_rows)
        rows = [_scaled(data[start : start + n_rows], grad_output) for start in starts]
        as_rows, whole = _as_rows(student), len(rows) == 1
        transposed = as_rows or is_transposed(student)
        gradient = None if whole and not transposed else torch.empty_like(student)
        for index, block in enumerate(blocks_of(student, whole)):
            y_student, y_teacher, keep = _activate(
                student, teacher, mask, block, tau, activation, dtype
            )
            slope = _weighted_deviations(y_student, y_teacher, columns, rows[index])
            if keep is not None:
                slope.mul_(keep)
            slope = _before_activation(slope, y_student, activation)
            if gradient is None:  # There is only one block, so its gradient is the whole gradient.
                gradient = slope.to(student.dtype)
            elif as_rows:
                part = block_of(gradient, block).transpose(1, 2)
                part.copy_(slope.view_as(part))
            else:
                block_of(gradient, block).copy_(slope)
        return gradient, *[None] * 8


class EagerDISTFunction(torch.autograd.Function):
    """:class:`DISTFunction` for eager execution outside torch.func, where it is faster.

    With ``setup_context``, what the backward pass needs must be an output of the forward pass, and
    autograd wraps each output. For a small batch this takes a sixth of the time.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        """Return the loss; the arguments are those of :meth:`DISTFunction.forward`."""
        output = DISTFunction.forward(*inputs)
        DISTFunction.setup_context(ctx, inputs, output)
        return output[0]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return what :meth:`DISTFunction.backward` returns."""
        return DISTFunction.backward(ctx, grad_output)


class Statistics(NamedTuple):
    """The statistics of a set of rows: O(C) numbers, which are merged without cancellation.

    Attributes:
        rows: the number of rows.
        inter: the sum of the rows' correlations, a scalar.
        mean: the mean of each column of student and teacher, two tensors of shape ``(1, C)`` or
            ``(1, C, 1)``, stacked if the statistics are those of several blocks.
        moments: the sums of s*s, t*t and s*t over each column, where s and t are the deviations of
            student and teacher from their means; three tensors of the same shape.
    """

    rows: int | Tensor
    inter: Tensor
    mean: Sequence[Tensor] | Tensor
    moments: Sequence[Tensor] | Tensor

    @classmethod
    def zero(cls, like: Tensor) -> "Statistics":
        """Return the statistics of an empty set of rows.

        Args:
            like: a tensor on the logits' device, with as many dimensions and classes as the logits.

        Returns:
            Zeros in float64 (float32 on Apple's MPS).
        """
        columns = (1, like.shape[1], 1)[: like.dim()]
        zeros = torch.zeros(5, *columns, dtype=wide_dtype(like.device), device=like.device)
        return cls(0, zeros.new_zeros(()), zeros[:2], zeros[2:])

    @classmethod
    def of_block(
        cls,
        y_student: Tensor,
        y_teacher: Tensor,
        keep: Tensor | None,
        inter: Tensor,
        activation: Activation,
    ) -> "Statistics":
        """Return the statistics of one block.

        Args:
            y_student: values after the activation, of shape ``(R, C)`` or ``(N, C, S)``.
            y_teacher: values of the same shape.
            keep: a tensor of shape ``(R, 1)`` or ``(N, 1, S)`` in the dtype of the values, with 0
                for the rows that are left out and 1 for the other rows; ``None`` keeps all rows.
            inter: the sum of the rows' correlations, a scalar.
            activation: the activation that was applied to the logits.

        Returns:
            The statistics in the dtype of the values. For the identity, the means are in float64
            (float32 on Apple's MPS).
        """
        over = (0, 2)[: y_student.dim() - 1]
        if keep is None:
            rows: int | Tensor = _count_rows(y_student)
            means = [_mean(x, over, None, activation) for x in (y_student, y_teacher)]
        else:
            rows = keep.sum()
            means = [_mean(x * keep, over, rows, activation) for x in (y_student, y_teacher)]
        rounded = [mean.to(y_student.dtype) for mean in means]
        moments = _moments(y_student, y_teacher, rounded[0], rounded[1], keep, over)
        return cls(rows, inter, means, moments)

    def merge(self, other: "Statistics") -> "Statistics":
        """Return the statistics of the union of two sets of rows.

        Args:
            other: the statistics of rows that are not in this set.

        Returns:
            The statistics in float64 (float32 on Apple's MPS).

        Reference:
            Chan, Golub, LeVeque, Updating Formulae and a Pairwise Algorithm for Computing Sample
            Variances, 1979.
        """
        wide = wide_dtype(self.inter.device)
        mean = _stacked(self.mean).to(wide)
        rows = self.rows + other.rows
        share = other.rows / _at_least_one(rows)
        shift = _stacked(other.mean) - mean
        between = torch.cat((shift * shift, shift[:1] * shift[1:])) * (self.rows * share)
        return Statistics(
            rows,
            self.inter.to(wide) + other.inter,
            mean + shift * share,
            _stacked(self.moments).to(wide) + _stacked(other.moments) + between,
        )

    def all_reduce(self) -> "Statistics":
        """Return the statistics of the rows of all ranks; they are bitwise equal on every rank.

        First the ranks add up their rows and means. Then each rank shifts its moments to the common
        mean, as in :meth:`merge`, and they add up these. So a rank receives O(C) numbers, however
        many ranks there are.

        Returns:
            The statistics in float64 (float32 on Apple's MPS).
        """
        wide = wide_dtype(self.inter.device)
        rows = torch.as_tensor(self.rows, dtype=wide, device=self.inter.device)
        mean, moments = _stacked(self.mean).to(wide), _stacked(self.moments).to(wide)
        sums = torch.cat((rows.view(1), self.inter.to(wide).view(1), (mean * rows).flatten()))
        torch.distributed.all_reduce(sums)
        total = sums[2:].view_as(mean) / _at_least_one(sums[0])
        shift = mean - total
        moments = moments + torch.cat((shift * shift, shift[:1] * shift[1:])) * rows
        torch.distributed.all_reduce(moments)
        return Statistics(sums[0], sums[1], total, moments)


def processes_of(sync: bool) -> int:
    """Return the number of processes over whose batches a loss is computed.

    Args:
        sync: whether the loss is computed over the batches of all ranks.

    Raises:
        RuntimeError: if communication is needed inside ``torch.func.vmap``.
    """
    if not (sync and torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 1
    if not torch.compiler.is_compiling() and inside_torch_func():
        raise RuntimeError(
            "dist_loss with sync=True cannot gather inside torch.func.vmap: use sync=False"
        )
    return torch.distributed.get_world_size()


def loss_and_columns(
    total: Statistics,
    world: int,
    tolerances: tuple[float, float],
    tau: float,
    beta: float,
    gamma: float,
    activation: Activation,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, list[Tensor]]:
    """Return the loss of a set of rows, and the data of the columns for the backward pass.

    Args:
        total: the statistics of all rows of all ranks.
        world: the number of ranks.
        tolerances: of student and teacher, see :func:`tolerance`.
        tau: the temperature.
        beta: the weight of the inter-class term.
        gamma: the weight of the intra-class term.
        activation: the activation that was applied to the logits.
        eps: a number that is added to the denominator of each correlation.
        dtype: the dtype of the results.
    """
    rows, classes = _at_least_one(total.rows), total.mean[0].numel()
    floors = _floors(total.mean, rows, tolerances, activation)
    rho, *coefficients = _correlate(total.moments, floors, eps, world * tau * gamma / classes)
    columns = _backward_data(coefficients, *_rounded(total.mean, activation, dtype), dtype)
    correlation = torch.add(total.inter * (beta / rows), rho.sum(), alpha=gamma / classes)
    # Multiply after .to(dtype): if the last operation is a conversion that changes nothing,
    # torch.compile (torch 2.11) returns a gradient of 0.
    loss = (beta + gamma - correlation).to(dtype) * tau**2
    if isinstance(total.rows, Tensor) or total.rows == 0:
        loss = loss * (total.rows > 0)
    return loss, columns


def _correlate_rows(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    tau: float,
    activation: Activation,
    eps: float,
    dtype: torch.dtype,
    tolerances: tuple[float, float],
    weight: float | Tensor,
) -> tuple[Statistics, list[Sequence[Tensor]]]:
    """Return the statistics of the logits, and the backward pass's data of each block's rows.

    The function reads the logits once.
    """
    total = None
    row_data: list[Sequence[Tensor]] = []
    classes = student.shape[1]
    # Do not cut tensors of torch.func into blocks: a batched tensor of torch.func.vmap cannot be
    # written into the blocks of a tensor that is not batched.
    whole = torch.compiler.is_compiling() or inside_torch_func()
    for block in blocks_of(student, whole):
        y_student, y_teacher, keep = _activate(
            student, teacher, mask, block, tau, activation, dtype
        )
        means: Any = (1 / classes,) * 2
        errors: list[Tensor] = []
        if activation != "softmax":
            means = [_mean(y, (1,), None, activation) for y in (y_student, y_teacher)]
            means, errors = _rounded(means, activation, dtype)
        moments = _moments(y_student, y_teacher, means[0], means[1], keep, (1,))
        floors = _floors(means, classes, tolerances, activation)
        rho, *data = _correlate(moments, floors, eps, weight)
        row_data.append(
            data if activation == "softmax" else _backward_data(data, means, errors, dtype)
        )
        part = Statistics.of_block(y_student, y_teacher, keep, rho.sum(), activation)
        total = part if total is None else total.merge(part)
    return Statistics.zero(student) if total is None else total, row_data


def _rounded(
    means: Sequence[Tensor] | Tensor, activation: Activation, dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor]]:
    """Return means in a dtype, and the errors of this rounding (none if they do not matter).

    For the identity, the values are exact, but they may be far from 0, and then the rounding error
    of their mean limits the accuracy.
    """
    rounded = [mean.to(dtype) for mean in means]
    if activation != "identity":
        return rounded, []
    return rounded, [(x - r).to(dtype) for x, r in zip(means, rounded, strict=True)]


def _backward_data(
    coefficients: Sequence[Tensor], means: list[Tensor], errors: list[Tensor], dtype: torch.dtype
) -> list[Tensor]:
    """Return the coefficients Q and P of rows or columns, and the means of student and teacher.

    If the means have errors, a fifth tensor is the offset of the gradient that corrects them.
    """
    q, p = (x.to(dtype) for x in coefficients)
    return [q, p, *means, *([p * errors[1] - q * errors[0]] if errors else [])]


def _scaled(data: Sequence[Tensor], factor: Tensor) -> list[Tensor]:
    """Return what :func:`_backward_data` returned for a gradient that is larger by a factor."""
    return [x if index in (2, 3) else x * factor for index, x in enumerate(data)]


def _weighted_deviations(
    y_student: Tensor, y_teacher: Tensor, columns: list[Tensor], rows: list[Tensor]
) -> Tensor:
    """Return the weighted sum of the deviations from the means of columns and rows.

    Columns and rows are what :func:`_backward_data` returned. Without means, the rows are those of
    a softmax. Then the function overwrites y_teacher, because one tensor less in the cache is
    faster.
    """
    q, p, student_mean, teacher_mean, *offset = columns
    slope = y_student - student_mean
    slope = torch.addcmul(offset[0], slope, q) if offset else slope * q
    slope.addcmul_(y_teacher - teacher_mean, p, value=-1)
    if len(rows) == 2:
        mean = 1 / y_student.shape[1]
        deviations = y_student - mean, y_teacher.sub_(mean)
    else:
        deviations = y_student - rows[2], y_teacher - rows[3]
    slope.addcmul_(deviations[0], rows[0]).addcmul_(deviations[1], rows[1], value=-1)
    return slope.add_(rows[4]) if offset else slope


def _before_activation(slope: Tensor, y: Tensor, activation: Activation) -> Tensor:
    """Return the gradient of the logits from the gradient of the activation's values y."""
    if activation == "identity":
        return slope
    if activation == "sigmoid":
        return torch.ops.aten.sigmoid_backward(slope, y)
    compiled = torch.compiler.is_compiling() and y.device.type == "cpu"  # See _sum.
    if compiled or loses_digits(y):
        slope.mul_(y)
        return slope.addcmul_(y, _sum(slope, (1,)), value=-1)
    return torch._softmax_backward_data(slope, y, 1, y.dtype)


def tolerance(logits: Tensor, dtype: torch.dtype) -> float:
    """Return the largest standard deviation, relative to the mean, that counts as rounding."""
    return max(torch.finfo(logits.dtype).eps, _ROUNDING_UNITS * torch.finfo(dtype).eps)


def inside_torch_func() -> bool:
    """Return True if the caller runs inside torch.func.grad, vmap or another such transform."""
    return torch._C._are_functorch_transforms_active()  # torch 2.14 has no public function for it.


def refuse_second_derivative(others: tuple[Tensor | None, ...]) -> None:
    """Raise an error if a second derivative is requested, or is possible outside torch.func."""
    if torch.compiler.is_compiling():
        return
    # With create_graph=True, autograd records the operations of the backward pass as well. Inside
    # torch.func it always records them, so there the error is raised only if the other outputs of
    # the forward pass have a gradient.
    recorded = torch.is_grad_enabled() and not inside_torch_func()
    if recorded or any(other is not None for other in others):
        raise RuntimeError(
            "dist_loss has no second derivative: call backward() or grad() without create_graph"
        )


def wide_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype in which statistics are merged; Apple's MPS has no float64.

    Args:
        device: the device of the statistics.
    """
    return torch.float32 if device.type == "mps" else torch.float64


def _count_rows(x: Tensor) -> int:
    return x.numel() // x.shape[1]


def _stacked(tensors: Sequence[Tensor] | Tensor) -> Tensor:
    return tensors if isinstance(tensors, Tensor) else torch.stack(tuple(tensors))


def _at_least_one(rows: int | Tensor) -> int | Tensor:
    return rows.clamp(min=1) if isinstance(rows, Tensor) else max(rows, 1)


def blocks_of(x: Tensor, whole: bool) -> Iterator[Any]:
    """Yield indices that cut ``(R, C)`` or ``(N, C, S)`` into blocks of rows of similar size.

    The index of a single block is None: an index that selects everything would cost time.

    Args:
        x: a tensor of this shape.
        whole: whether a single block is enough.
    """
    limit = _BLOCK_CPU if x.device.type == "cpu" else _BLOCK_ACCELERATOR
    # For compiled code one block is enough, because the compiler cuts it into blocks.
    if whole or 0 < x.numel() <= limit:
        yield None
        return
    rows = max(limit // x.shape[1], _LEAST_ROWS)
    if x.dim() == 2:
        yield from _slices(x.shape[0], rows)
        return
    samples, _, spatial = x.shape
    for part in _slices(samples, max(rows // max(spatial, 1), 1)):
        for pixels in _slices(spatial, rows):
            yield part, slice(None), pixels


def _as_rows(x: Tensor) -> bool:
    """Return True if blocks of ``(N, C, S)`` are copied to matrices ``(R, C)``."""
    eager = x.device.type != "cpu" and not torch.compiler.is_compiling()
    return eager and x.dim() == 3 and x.shape[1] > _MOST_STRIDED_CLASSES


def with_few_classes_first(tensors: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """Return matrices ``(R, C)`` with few classes as views ``(1, C, R)``, if this is faster.

    The blocks of such views are copied to a memory layout in which the rows are the last dimension.

    Args:
        tensors: the logits of student and teacher, and the mask ``(R, 1)`` or ``None``; or
            ``(N, C, S)``, which are returned unchanged.
    """
    student = tensors[0]
    assert student is not None
    few = student.dim() == 2 and student.shape[1] < _LEAST_CLASSES_IN_ROWS
    if not few or student.device.type != "cpu":
        return tensors
    return [x if x is None else x.t()[None] for x in tensors]


def is_transposed(x: Tensor) -> bool:
    """Return True for logits ``(N, C, S)`` whose classes are next to each other in memory."""
    eager = x.device.type == "cpu" and not torch.compiler.is_compiling()
    return eager and x.dim() == 3 and x.stride(1) == 1 and x.shape[1] < _LEAST_CLASSES_IN_ROWS


def loses_digits(x: Tensor) -> bool:
    """Return True if torch's softmax adds many classes of a block one after the other.

    Args:
        x: a block of logits.
    """
    eager = x.device.type == "cpu" and not torch.compiler.is_compiling()
    return eager and x.dim() == 3 and x.shape[1] > _MOST_SUMMED_CLASSES


def block_of(x: Tensor, block: Any) -> Tensor:
    """Return a block of a tensor.

    Args:
        x: a tensor of shape ``(R, C)`` or ``(N, C, S)``.
        block: an index that :func:`blocks_of` yielded for a tensor of this shape.
    """
    return x if block is None else x[block]


def _slices(length: int, most: int) -> Iterator[slice]:
    """Yield slices of similar length that cut a range; none is longer than `most`."""
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
    """Return one block of the student and the teacher after the activation, and of the mask."""
    as_rows = _as_rows(student)

    def part_of(x: Tensor) -> Tensor:
        x = block_of(x, block)
        if as_rows:
            return x.transpose(1, 2).flatten(0, 1)
        return x.contiguous() if is_transposed(x) else x

    keep = None if mask is None else part_of(mask)

    def activated(logits: Tensor) -> Tensor:
        x = part_of(logits).to(dtype)
        if tau != 1:
            x = x / tau
        if keep is not None:  # Rows that are left out may contain any value, including NaN.
            x = x.masked_fill(~keep, 0)
        if activation == "softmax":
            y = x.softmax(1)
            return y.div_(y.sum(1, keepdim=True)) if loses_digits(y) else y
        return x.sigmoid() if activation == "sigmoid" else x

    return activated(student), activated(teacher), None if keep is None else keep.to(dtype)


def _moments(
    student: Tensor,
    teacher: Tensor,
    student_mean: Tensor | float,
    teacher_mean: Tensor | float,
    keep: Tensor | None,
    over: tuple[int, ...],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sums of s*s, t*t and s*t, where s and t are deviations from the means."""
    s, t = student - student_mean, teacher - teacher_mean
    if keep is not None:
        s, t = s * keep, t * keep
    product = _sum(s * t, over)
    return _sum(s.mul_(s), over), _sum(t.mul_(t), over), product


def _mean(
    x: Tensor, over: tuple[int, ...], rows: int | Tensor | None, activation: Activation
) -> Tensor:
    """Return the mean over some dimensions, which are kept with size 1.

    If some rows are left out, `rows` is the number of the other rows, by which the sum is divided.
    For the identity the mean is in float64 (float32 on Apple's MPS), otherwise in the dtype of x.
    """
    compiled = torch.compiler.is_compiling() and x.device.type == "cpu"  # See _sum.
    wide = activation == "identity" or compiled
    dtype = torch.promote_types(x.dtype, wide_dtype(x.device)) if wide else x.dtype
    if rows is None:
        mean = x.mean(over, keepdim=True, dtype=dtype)
    else:
        mean = x.sum(over, keepdim=True, dtype=dtype) / _at_least_one(rows)
    return mean if activation == "identity" else mean.to(x.dtype)


def _sum(x: Tensor, over: tuple[int, ...]) -> Tensor:
    """Return the sum over some dimensions, which are kept with size 1."""
    # Eager torch adds pairwise, but the code that torch.compile (torch 2.11) generates for a CPU
    # adds one number after the other and so loses digits in float32.
    if torch.compiler.is_compiling() and x.device.type == "cpu":
        return x.sum(over, keepdim=True, dtype=torch.float64).to(x.dtype)
    return x.sum(over, keepdim=True)


def _floors(
    means: Sequence[Any] | Tensor,
    count: int | Tensor,
    tolerances: tuple[float, float],
    activation: Activation,
) -> list[Any]:
    """Return the largest norms of student and teacher that count as rounding."""
    if activation == "identity":  # Other activations have no negative values.
        means = [mean.abs() for mean in means]
    root = count**0.5
    return [mean * (root * x) for mean, x in zip(means, tolerances, strict=True)]


def _correlate(
    moments: Sequence[Tensor] | Tensor,
    floors: Sequence[Any],
    eps: float,
    weight: float | Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return Pearson's correlation, and Q and P: Q and -P are coefficients of its gradient.

    The gradient is multiplied by -`weight`. All three are 0 if the student or the teacher is
    constant up to rounding: its norm is at most its floor. The deviations are then rounding errors,
    and coefficients of up to ``1 / eps`` would amplify them.
    """
    student_square, teacher_square, product = moments
    student_norm, teacher_norm = student_square.sqrt(), teacher_square.sqrt()
    # A comparison with NaN is False, so NaN is not replaced. The norm of a constant student becomes
    # infinite, because 1 / infinity is 0, and 0 / infinity is not NaN.
    student_norm = student_norm.masked_fill(student_norm <= floors[0], math.inf)
    reciprocal = (student_norm * teacher_norm).add_(eps).reciprocal_()
    reciprocal.masked_fill_(teacher_norm <= floors[1], 0)
    rho = product * reciprocal
    p = reciprocal * weight
    return rho, (rho * p).mul_(teacher_norm).div_(student_norm), p
