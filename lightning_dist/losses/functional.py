"""DIST and its two correlations as pure functions of the logits of student and teacher."""

from collections.abc import Sequence
from typing import Any

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
from lightning_dist.losses.streaming import (
    Activation,
    DISTFunction,
    EagerDISTFunction,
    inside_torch_func,
    with_few_classes_first,
)


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
    class_dim: int | None = None,
) -> Tensor:
    r"""Return the DIST loss, which correlates student and teacher over classes and over samples.

    With :math:`y = \mathrm{softmax}(z / \tau)` and :math:`\rho` the Pearson correlation,

    .. math:: L = \tau^2 \big(\beta (1 - \overline{\rho(y^s_{i,:}, y^t_{i,:})})
        + \gamma (1 - \overline{\rho(y^s_{:,j}, y^t_{:,j})})\big)

    The first mean runs over the samples *i* (inter-class term), the second mean runs over the
    classes *j* (intra-class term). In dense logits every pixel is a sample. The forward and the
    backward pass each read the logits once: on an NVIDIA GPU by Triton kernels (except for float64
    and inside ``torch.func``), elsewhere in blocks. The peak memory is the gradient, O(N + C)
    statistics and, in blocks, one block (up to 0.4 GB on an accelerator). The computation runs in
    float32 or float64. No gradient flows to the teacher.

    A row or column that is constant up to rounding has correlation 0 and gradient 0. A row or
    column is constant up to rounding if, after the activation, its standard deviation in the
    student or in the teacher is at most :math:`\epsilon` times the absolute value of its mean.
    :math:`\epsilon` is the machine epsilon of the logits' dtype (0.008 for bfloat16), but at least
    8 times the machine epsilon of the dtype of the computation. So a zero-initialised head gets no
    gradient from this loss until another loss has changed its weights.

    In all other rows and columns, before the multiplication by the derivative of the activation,
    each entry of the gradient is at most ``tau * (beta + gamma) / floor``. Here ``floor`` is the
    smallest value, over the student's rows and columns, of :math:`\sqrt{n} \epsilon` times the
    absolute value of the mean, where n is the number of entries.

    Args:
        student: logits of shape ``(N, C)`` or ``(N, C, *spatial)``, any floating dtype and layout.
            With ``class_dim``, the classes are in another dimension, as in ``(B, T, V)``.
        teacher: logits of the same shape.
        tau: the temperature, above 0.
        beta: the weight of the inter-class term.
        gamma: the weight of the intra-class term.
        activation: ``"softmax"`` over classes, ``"sigmoid"`` for heads with one binary decision for
            each class, or ``"identity"`` to correlate the given values as they are. With one class,
            only the intra-class term of sigmoid or identity has a gradient.
        eps: a number that is added to the denominator of each correlation.
        mask: a boolean tensor with the logits' shape without the classes, so ``(N,)``,
            ``(N, *spatial)`` or ``(B, T)``. Both terms leave out the samples where it is ``False``
            (``mask=target != ignore_index``). If no sample is left, the loss is 0.
        sync: compute both means over the batches of all ranks of the default process group. The
            forward pass then gathers ``40 * C + 16`` bytes from each rank; the backward pass does
            not communicate. Every rank gets the same value. The gradient is scaled so that its
            average over the ranks, as DDP and FSDP compute it, is the gradient of the joined batch.
        class_dim: the dimension of the classes; by default 1. With three dimensions it must be
            given: ``1`` for ``(N, C, L)``, ``-1`` for the ``(B, T, V)`` of language models.

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
    axis = check_logits(student, teacher, class_dim)
    check_logits_options(tau, activation, beta=beta, gamma=gamma, eps=eps)
    if activation == "softmax":
        refuse_one_class(student.shape[axis], "activation='sigmoid' and beta=0")
    mask = mask_for(student, mask, axis)
    inputs: Sequence[Tensor | None] = (
        student,
        without_inference(teacher),
        mask if mask is None else without_inference(mask),
    )
    if runs_kernels(student, teacher) and not inside_torch_func():
        from lightning_dist.losses.fused.dist import FusedDISTFunction

        return FusedDISTFunction.apply(*inputs, axis, tau, beta, gamma, activation, eps, sync)
    if student.dim() > 2 or axis != 1:
        inputs = as_rows_and_classes(inputs, axis)
    options = tau, beta, gamma, activation, eps, sync
    if torch.compiler.is_compiling() or inside_torch_func():
        return DISTFunction.apply(*inputs, *options)[0]
    return EagerDISTFunction.apply(*with_few_classes_first(inputs), *options)


def inter_class_correlation(
    student: Tensor,
    teacher: Tensor,
    *,
    eps: float = 1e-8,
    mask: Tensor | None = None,
    class_dim: int | None = None,
) -> Tensor:
    """Return the mean over samples of the Pearson correlation over classes.

    Args:
        student: values, usually probabilities, of shape ``(N, C)`` or ``(N, C, *spatial)``.
        teacher: values of the same shape; no gradient flows to them.
        eps: a number that is added to the denominator of each correlation.
        mask: a boolean tensor of shape ``(N,)`` or ``(N, *spatial)``; samples where it is ``False``
            are left out.
        class_dim: the dimension of the classes, as in :func:`dist_loss`.

    Returns:
        A scalar from -1 to 1.

    Raises:
        ValueError: if the inputs are not floating-point tensors of one shape and device, or an
            option is out of range.

    Example:
        >>> rows = torch.tensor([[0.1, 0.2, 0.7], [0.6, 0.3, 0.1]])
        >>> round(inter_class_correlation(rows, 2 * rows + 1).item(), 4)
        1.0
    """
    options: dict[str, Any] = {"eps": eps, "mask": mask, "class_dim": class_dim}
    return 1 - dist_loss(student, teacher, beta=1.0, gamma=0.0, activation="identity", **options)


def intra_class_correlation(
    student: Tensor,
    teacher: Tensor,
    *,
    eps: float = 1e-8,
    mask: Tensor | None = None,
    class_dim: int | None = None,
) -> Tensor:
    """Return the mean over classes of the Pearson correlation over the samples of the batch.

    Args:
        student: values, usually probabilities, of shape ``(N, C)`` or ``(N, C, *spatial)``. The
            samples are the N rows, or the pixels of all N images.
        teacher: values of the same shape; no gradient flows to them.
        eps: a number that is added to the denominator of each correlation.
        mask: a boolean tensor of shape ``(N,)`` or ``(N, *spatial)``; samples where it is ``False``
            are left out.
        class_dim: the dimension of the classes, as in :func:`dist_loss`.

    Returns:
        A scalar from -1 to 1.

    Raises:
        ValueError: if the inputs are not floating-point tensors of one shape and device, or an
            option is out of range.

    Example:
        >>> rows = torch.tensor([[0.1, 0.9], [0.6, 0.4], [0.3, 0.7]])
        >>> round(intra_class_correlation(rows, 1 - rows).item(), 4)
        -1.0
    """
    options: dict[str, Any] = {"eps": eps, "mask": mask, "class_dim": class_dim}
    return 1 - dist_loss(student, teacher, beta=0.0, gamma=1.0, activation="identity", **options)
