"""Distillation losses as modules: options in the constructor, tensors in the call."""

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_dist.checks import check_logits_options, check_number
from lightning_dist.losses.functional import Activation, dist_loss, kd_loss


class DISTLoss(nn.Module):
    """DIST: match the teacher's relations between classes and between samples.

    Args:
        tau: temperature.
        beta: weight of the inter-class term (correlation over classes, row by row).
        gamma: weight of the intra-class term (correlation over the batch, class by class).
        activation: ``"softmax"``, ``"sigmoid"`` for one-vs-all heads, or ``"identity"``. ``None``
            leaves it to the task: sigmoid for one-stage detectors, softmax for everything else.
        sync: take the correlations over the global batch of all ranks. The authors' code takes
            them over each rank's own batch: that is ``sync=False``.
        eps: added to the denominator of each correlation.

    Shape:
        student and teacher logits ``(N, C)`` or ``(N, C, *spatial)``; the loss is a scalar.

    Raises:
        ValueError: if an option is out of range; when called, as
            :func:`lightning_dist.functional.dist_loss`.

    Example:
        >>> import torch
        >>> loss = DISTLoss(tau=4.0)
        >>> logits = torch.tensor([[2.0, 0.0, 1.0], [0.0, 1.0, 3.0]])
        >>> abs(loss(logits, 3 * logits).item()) < 1
        True

    Reference:
        Huang et al., Knowledge Distillation from A Stronger Teacher, NeurIPS 2022.
    """

    def __init__(
        self,
        tau: float = 1.0,
        beta: float = 1.0,
        gamma: float = 1.0,
        activation: Activation | None = "softmax",
        sync: bool = False,
        eps: float = 1e-8,
    ) -> None:
        super().__init__()
        self.activation_is_chosen = activation is not None
        activation = "softmax" if activation is None else activation
        numbers = {"tau": tau, "beta": beta, "gamma": gamma, "eps": eps}
        for name, value in numbers.items():
            check_number(name, value)
        check_logits_options(tau, activation, eps=eps)
        self.tau = tau
        self.beta = beta
        self.gamma = gamma
        self.activation = activation
        self.sync = sync
        self.eps = eps

    def forward(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        return dist_loss(
            student,
            teacher,
            tau=self.tau,
            beta=self.beta,
            gamma=self.gamma,
            activation=self.activation,
            eps=self.eps,
            mask=mask,
            sync=self.sync,
        )

    def extra_repr(self) -> str:
        return (
            f"tau={self.tau}, beta={self.beta}, gamma={self.gamma}, "
            f"activation={self.activation!r}, sync={self.sync}, eps={self.eps}"
        )


class KDLoss(nn.Module):
    """Hinton's knowledge distillation: Kullback-Leibler divergence of softened probabilities.

    Args:
        tau: temperature.

    Shape:
        student and teacher logits ``(N, C)`` or ``(N, C, *spatial)``; the loss is a scalar.

    Raises:
        ValueError: if ``tau`` is not above 0; when called, as
            :func:`lightning_dist.functional.kd_loss`.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[2.0, 0.0, 1.0]])
        >>> KDLoss(tau=4.0)(logits, logits).item()
        0.0

    Reference:
        Hinton et al., Distilling the Knowledge in a Neural Network, 2015.
    """

    def __init__(self, tau: float = 4.0) -> None:
        super().__init__()
        check_number("tau", tau)
        check_logits_options(tau)
        self.tau = tau

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return kd_loss(student, teacher, tau=self.tau)

    def extra_repr(self) -> str:
        return f"tau={self.tau}"


class FeatureMimic(nn.Module):
    """Mean squared error between a projection of the student's feature map and the teacher's.

    The projection, a 1x1 convolution, trains with the student and is no part of it.

    Args:
        student_channels: channels of the student's map.
        teacher_channels: channels of the teacher's map.

    Shape:
        maps ``(N, student_channels, H, W)`` and ``(N, teacher_channels, H, W)``; the loss is a
        scalar.

    Raises:
        ValueError: when called, if the projection and the teacher's map differ in shape.
    """

    def __init__(self, student_channels: int, teacher_channels: int) -> None:
        super().__init__()
        self.projection = nn.Conv2d(student_channels, teacher_channels, 1)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        projected = self.projection(student)
        if projected.shape != teacher.shape:
            raise ValueError(
                f"the student's map is projected to {tuple(projected.shape)} and the teacher's is "
                f"{tuple(teacher.shape)}: compare maps of one size, with teacher_channels="
                f"{teacher.shape[1]}"
            )
        return F.mse_loss(projected.float(), teacher.float())
