"""Distillation losses as pure functions of student and teacher logits."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_dist.checks import check_logits_options
from lightning_dist.losses.streaming import Activation, RelationLoss, compute_dtype


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
    the gradient plus O(N + C) statistics and a block (on a GPU up to 0.4 GB). The computation runs
    in float32 or wider. The teacher is a constant: no gradient flows to it. A constant row or
    column has correlation 0.

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
    inputs: tuple[Tensor | None, ...] = (student, teacher, mask)
    if classes_last:  # channels_last: the rows lie in memory as a matrix already
        inputs = tuple(x if x is None else x.movedim(1, -1).flatten(0, -2) for x in inputs)
    elif student.dim() > 2:
        inputs = tuple(x if x is None else x.flatten(2) for x in inputs)
    return RelationLoss.apply(*inputs, tau, beta, gamma, activation, eps, sync)


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
    check_logits_options(tau)
    dtype = compute_dtype(student, teacher)
    log_student = F.log_softmax(student.to(dtype) / tau, dim=1)
    log_teacher = F.log_softmax(teacher.detach().to(dtype) / tau, dim=1)
    rows = max(student.numel() // student.shape[1], 1)
    # A class that the teacher rules out (-inf) adds 0, and not 0 * inf.
    ruled_out = log_teacher == -math.inf
    log_student, log_teacher = (x.masked_fill(ruled_out, 0) for x in (log_student, log_teacher))
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
            "give both a head of the same classes, or set class_map of the teacher"
        )
    if student.shape != teacher.shape:
        raise ValueError(f"logits differ in shape ({shapes}): they must pair element by element")
    if student.device != teacher.device:
        raise ValueError(f"student is on {student.device} and teacher on {teacher.device}")
