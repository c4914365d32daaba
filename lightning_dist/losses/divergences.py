"""KD and its relatives: divergences between the probabilities of student and teacher.

All have the same arguments, which :func:`kd_loss` describes.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_dist.checks import check_logits_options
from lightning_dist.losses.fused import runs_kernels
from lightning_dist.losses.inputs import (
    as_rows_and_classes,
    check_logits,
    mask_for,
    refuse_one_class,
    without_inference,
)
from lightning_dist.losses.streaming import inside_torch_func, with_few_classes_first
from lightning_dist.losses.streaming_kd import (
    KDFunction,
    Probability,
    count_samples,
    divergence,
    pairs_of_logarithms,
    scaled_logits,
)

_SMALL = 2**14  # the number of logits up to which copying them to another layout takes longer


def kd_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    tau: float = 4.0,
    activation: Probability = "softmax",
    mask: Tensor | None = None,
    class_dim: int | None = None,
) -> Tensor:
    """Return the loss of knowledge distillation, ``tau**2 * KL(teacher || student)``.

    KL is the Kullback-Leibler divergence of the probabilities ``softmax(logits / tau)``. With
    ``activation="sigmoid"``, each class is a separate binary decision: the divergences of
    ``sigmoid(logits / tau)`` are summed over the classes. Triton kernels or blocks compute it as in
    :func:`dist_loss`, so the peak memory is the gradient, O(N) numbers and one block.

    Args:
        student: logits of shape ``(N, C)`` or ``(N, C, *spatial)``. With ``class_dim``, the classes
            are in another dimension, as in ``(B, T, V)``.
        teacher: logits of the same shape; no gradient flows to them. A class with the logit
            -infinity has probability 0 and adds 0 to the loss, also if the student's logit is
            -infinity.
        tau: the temperature, above 0.
        activation: ``"softmax"`` or ``"sigmoid"``.
        mask: a boolean tensor with the logits' shape without the classes. Samples where it is
            ``False`` are left out. If no sample is left, the loss is 0.
        class_dim: the dimension of the classes, as in :func:`dist_loss`.

    Returns:
        The mean over samples (and pixels), a scalar in float32 (float64 for float64 logits).

    Raises:
        ValueError: if the inputs are not floating-point tensors of one shape and device, or
            an option is out of range.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0, 1.0]])
        >>> kd_loss(logits, logits).item()
        0.0

    Reference:
        Hinton et al., Distilling the Knowledge in a Neural Network, 2015.
    """
    axis, mask = _checked(student, teacher, tau, activation, mask, class_dim)
    teacher = without_inference(teacher.detach())
    inputs = student, teacher, mask if mask is None else without_inference(mask)
    if runs_kernels(student, teacher) and not inside_torch_func():
        from lightning_dist.losses.fused.kd import FusedKDFunction

        return FusedKDFunction.apply(*inputs, axis, tau, activation)
    if torch.compiler.is_compiling() or inside_torch_func():
        pairs, factor = log_probabilities(student, teacher, tau, activation, mask, class_dim)
        return torch.stack([divergence(*pair) for pair in pairs]).sum() * factor
    rows: Sequence[Tensor | None] = as_rows_and_classes(inputs, axis)
    if student.numel() > _SMALL:
        rows = with_few_classes_first(rows)
    return KDFunction.apply(*rows, tau, activation)


def reverse_kd_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    tau: float = 4.0,
    activation: Probability = "softmax",
    mask: Tensor | None = None,
    class_dim: int | None = None,
) -> Tensor:
    """Return ``tau**2 * KL(student || teacher)``, the divergence in the other direction.

    With this direction, the student concentrates on the classes to which the teacher gives a high
    probability. The loss is infinite if the teacher rules out a class (logit -infinity) that the
    student does not.

    The arguments, the mean over samples and the errors are those of :func:`kd_loss`.

    Example:
        >>> student, teacher = torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([[1.0, 0.0, 2.0]])
        >>> round(reverse_kd_loss(student, teacher, tau=1.0).item(), 4)
        0.4205

    Reference:
        Gu et al., MiniLLM: Knowledge Distillation of Large Language Models, ICLR 2024.
    """
    pairs, factor = log_probabilities(student, teacher, tau, activation, mask, class_dim)
    return torch.stack([divergence(y, x) for x, y in pairs]).sum() * factor


def jeffreys_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    tau: float = 4.0,
    activation: Probability = "softmax",
    mask: Tensor | None = None,
    class_dim: int | None = None,
) -> Tensor:
    """Return the sum of :func:`kd_loss` and :func:`reverse_kd_loss`, Jeffreys' divergence.

    The arguments, the mean over samples and the errors are those of :func:`kd_loss`.

    Reference:
        Jeffreys, An Invariant Form for the Prior Probability in Estimation Problems, 1946.
    """
    pairs, factor = log_probabilities(student, teacher, tau, activation, mask, class_dim)
    return torch.stack([divergence(x, y) + divergence(y, x) for x, y in pairs]).sum() * factor


def jsd_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    tau: float = 4.0,
    activation: Probability = "softmax",
    mask: Tensor | None = None,
    class_dim: int | None = None,
) -> Tensor:
    """Return ``tau**2`` times the Jensen-Shannon divergence of student and teacher.

    It is the mean of the two divergences from the average of the two distributions, so it is
    finite for all probabilities, and at most ``tau**2 * log(2)`` for the softmax.

    The arguments, the mean over samples and the errors are those of :func:`kd_loss`.

    Reference:
        Lin, Divergence Measures Based on the Shannon Entropy, 1991.
    """
    pairs, factor = log_probabilities(student, teacher, tau, activation, mask, class_dim)
    total = student.new_zeros((), dtype=pairs[0][0].dtype)
    for of_student, of_teacher in pairs:
        # Where both are -inf, the gradient of logaddexp would be NaN.
        impossible = (of_student == -math.inf) & (of_teacher == -math.inf)
        x, y = (z.masked_fill(impossible, 0) for z in (of_student, of_teacher))
        middle = torch.logaddexp(x, y) - math.log(2)
        total = total + divergence(middle, x) + divergence(middle, y)
    return total * (factor / 2)


def log_probabilities(
    student: Tensor,
    teacher: Tensor,
    tau: float,
    activation: Probability,
    mask: Tensor | None,
    class_dim: int | None,
) -> tuple[list[tuple[Tensor, Tensor]], float | Tensor]:
    """Return pairs of the student's and the teacher's log-probabilities, and ``tau**2 / rows``.

    The softmax has one pair; the sigmoid has one for "yes" and one for "no".

    The arguments and the errors are those of :func:`kd_loss`.
    """
    axis, mask = _checked(student, teacher, tau, activation, mask, class_dim)
    x, y = scaled_logits(student, without_inference(teacher.detach()), mask, tau)
    factor = tau**2 / count_samples(student, mask, axis)
    return pairs_of_logarithms(x, y, axis, activation), factor


def _checked(
    student: Tensor,
    teacher: Tensor,
    tau: float,
    activation: Probability,
    mask: Tensor | None,
    class_dim: int | None,
) -> tuple[int, Tensor | None]:
    """Return the dimension of the classes, and the mask with this dimension; check all options."""
    axis = check_logits(student, teacher, class_dim)
    check_logits_options(tau)
    if activation not in ("softmax", "sigmoid"):
        raise ValueError(f"activation is {activation!r}: use 'softmax' or 'sigmoid'")
    if activation == "softmax":
        refuse_one_class(student.shape[axis], "activation='sigmoid'")
    return axis, mask_for(student, mask, axis)
