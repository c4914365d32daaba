"""The distillation losses as pure functions of the logits of student and teacher."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_dist.checks import check_logits_options
from lightning_dist.losses.streaming import (
    Activation,
    DISTFunction,
    EagerDISTFunction,
    compute_dtype,
    inside_torch_func,
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
) -> Tensor:
    r"""Return the DIST loss, which correlates student and teacher by samples and by classes.

    With :math:`y = \mathrm{softmax}(z / \tau)` and :math:`\rho` the Pearson correlation,

    .. math:: L = \tau^2 \big(\beta (1 - \overline{\rho(y^s_{i,:}, y^t_{i,:})})
        + \gamma (1 - \overline{\rho(y^s_{:,j}, y^t_{:,j})})\big)

    The first mean runs over the samples *i* (inter-class term), the second mean runs over the
    classes *j* (intra-class term). In dense logits every pixel is a sample. The forward and the
    backward pass each read the logits once, in blocks: the peak memory is the gradient, O(N + C)
    statistics and one block (up to 0.4 GB on a GPU). The computation runs in float32 or float64. No
    gradient flows to the teacher.

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
        teacher: logits of the same shape.
        tau: the temperature, above 0.
        beta: the weight of the inter-class term.
        gamma: the weight of the intra-class term.
        activation: ``"softmax"`` over classes, ``"sigmoid"`` for heads with one binary decision for
            each class, or ``"identity"`` to correlate the given values as they are.
        eps: a number that is added to the denominator of each correlation.
        mask: a boolean tensor of shape ``(N,)`` or ``(N, *spatial)``. Both terms leave out the
            samples where it is ``False`` (``mask=target != ignore_index``). If no sample is left,
            the loss is 0.
        sync: compute both means over the batches of all ranks of the default process group. The
            forward pass then gathers ``40 * C + 16`` bytes from each rank; the backward pass does
            not communicate. Every rank gets the same value. The gradient is scaled so that its
            average over the ranks, as DDP and FSDP compute it, is the gradient of the joined batch.

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
    check_logits_options(tau, activation, beta=beta, gamma=gamma, eps=eps)
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
    inputs: tuple[Tensor | None, ...] = (
        student,
        without_inference(teacher),
        mask if mask is None else without_inference(mask),
    )
    if classes_last:  # In the memory format channels_last, the rows already are a matrix.
        inputs = tuple(x if x is None else x.movedim(1, -1).flatten(0, -2) for x in inputs)
    elif student.dim() > 2:
        inputs = tuple(x if x is None else x.flatten(2) for x in inputs)
    options = tau, beta, gamma, activation, eps, sync
    if torch.compiler.is_compiling() or inside_torch_func():
        return DISTFunction.apply(*inputs, *options)[0]
    return EagerDISTFunction.apply(*inputs, *options)


def inter_class_correlation(
    student: Tensor, teacher: Tensor, *, eps: float = 1e-8, mask: Tensor | None = None
) -> Tensor:
    """Return the mean over samples of the Pearson correlation over classes.

    Args:
        student: values, usually probabilities, of shape ``(N, C)`` or ``(N, C, *spatial)``.
        teacher: values of the same shape; no gradient flows to them.
        eps: a number that is added to the denominator of each correlation.
        mask: a boolean tensor of shape ``(N,)`` or ``(N, *spatial)``; samples where it is ``False``
            are left out.

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
    return 1 - dist_loss(
        student, teacher, beta=1.0, gamma=0.0, activation="identity", eps=eps, mask=mask
    )


def intra_class_correlation(
    student: Tensor, teacher: Tensor, *, eps: float = 1e-8, mask: Tensor | None = None
) -> Tensor:
    """Return the mean over classes of the Pearson correlation over the samples of the batch.

    Args:
        student: values, usually probabilities, of shape ``(N, C)`` or ``(N, C, *spatial)``. The
            samples are the N rows, or the pixels of all N images.
        teacher: values of the same shape; no gradient flows to them.
        eps: a number that is added to the denominator of each correlation.
        mask: a boolean tensor of shape ``(N,)`` or ``(N, *spatial)``; samples where it is ``False``
            are left out.

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
    return 1 - dist_loss(
        student, teacher, beta=0.0, gamma=1.0, activation="identity", eps=eps, mask=mask
    )


def kd_loss(student: Tensor, teacher: Tensor, *, tau: float = 4.0) -> Tensor:
    """Return the loss of knowledge distillation, ``tau**2 * KL(teacher || student)``.

    KL is the Kullback-Leibler divergence of the probabilities ``softmax(logits / tau)``.

    Args:
        student: logits of shape ``(N, C)`` or ``(N, C, *spatial)``.
        teacher: logits of the same shape; no gradient flows to them.
        tau: the temperature, above 0.

    Returns:
        The mean over samples (and pixels), a scalar in float32 (float64 for float64 logits).

    Raises:
        ValueError: if the inputs are not floating-point tensors of one shape and device, or
            ``tau`` is out of range.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0, 1.0]])
        >>> kd_loss(logits, logits).item()
        0.0

    Reference:
        Hinton et al., Distilling the Knowledge in a Neural Network, 2015.
    """
    _check_logits(student, teacher)
    check_logits_options(tau)
    dtype = compute_dtype(student, teacher)
    log_student = F.log_softmax(student.to(dtype) / tau, dim=1)
    log_teacher = F.log_softmax(without_inference(teacher.detach()).to(dtype) / tau, dim=1)
    rows = max(student.numel() // student.shape[1], 1)
    # A class to which the teacher gives probability 0 must add 0, but F.kl_div would add 0 * inf,
    # which is NaN.
    impossible = log_teacher == -math.inf
    log_student, log_teacher = (x.masked_fill(impossible, 0) for x in (log_student, log_teacher))
    return F.kl_div(log_student, log_teacher, reduction="sum", log_target=True) * (tau**2 / rows)


def without_inference(x: Tensor) -> Tensor:
    """Return a tensor that autograd can save: a copy if `x` was created in inference mode.

    Args:
        x: a tensor of any shape and dtype.

    Returns:
        The tensor, or a copy that the student's backward pass may use.
    """
    # If gradients are off, no copy is needed. Inside torch.inference_mode() gradients are off, and
    # a copy would also be an inference tensor.
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not x.is_inference():
        return x
    return x.clone()


def _check_logits(student: Tensor, teacher: Tensor) -> None:
    """Raise a ValueError if the two tensors cannot be compared; the message says why."""
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
            "give both a head of the same classes, or set class_map of the teacher"
        )
    if student.shape != teacher.shape:
        raise ValueError(f"logits differ in shape ({shapes}): give logits of the same shape")
    if student.device != teacher.device:
        raise ValueError(f"student is on {student.device} and teacher on {teacher.device}")
