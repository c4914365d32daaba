"""The distillation losses as modules: options go to the constructor, tensors go to the call."""

from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_dist.checks import check_logits_options, check_number
from lightning_dist.losses.functional import Activation, dist_loss, kd_loss, without_inference


class DISTLoss(nn.Module):
    """The DIST loss: student and teacher shall correlate over the classes and over the samples.

    Args:
        tau: the temperature, above 0.
        beta: the weight of the inter-class term (correlation over classes, for each sample).
        gamma: the weight of the intra-class term (correlation over the batch, for each class).
        activation: ``"softmax"``, ``"sigmoid"`` for heads with one binary decision for each class,
            or ``"identity"``. ``None`` means softmax, but
            :class:`DetectionModule` replaces it by sigmoid for one-stage detectors.
        sync: compute the correlations over the joined batch of all ranks. The paper's code computes
            them over the batch of each rank (``sync=False``).
        eps: a number that is added to the denominator of each correlation.
        class_dim: the dimension of the classes; by default 1. Logits with three dimensions need
            it: ``1`` for ``(N, C, L)``, ``-1`` for the ``(B, T, V)`` of language models.

    Shape:
        The student's and the teacher's logits have the shape ``(N, C)`` or ``(N, C, *spatial)``,
        or with ``class_dim`` any other. The loss is a scalar.

    Raises:
        ValueError: if an option is out of range. A call raises it if the logits are not
            floating-point tensors of one shape and device.

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
        class_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.activation_is_chosen = activation is not None
        activation = "softmax" if activation is None else activation
        for name, value in {"tau": tau, "beta": beta, "gamma": gamma, "eps": eps}.items():
            check_number(name, value)  # A config may contain a word instead of a number.
        check_logits_options(tau, activation, eps=eps)
        _check_class_dim(class_dim)
        self.tau = tau
        self.beta = beta
        self.gamma = gamma
        self.activation = activation
        self.sync = sync
        self.eps = eps
        self.class_dim = class_dim

    def forward(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the loss of the logits of a batch.

        Args:
            student: logits of shape ``(N, C)`` or ``(N, C, *spatial)``.
            teacher: logits of the same shape.
            mask: a boolean tensor of shape ``(N,)`` or ``(N, *spatial)``; samples where it is
                ``False`` are left out.

        Returns:
            The loss, a scalar in float32 or float64.
        """
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
            class_dim=self.class_dim,
        )

    def extra_repr(self) -> str:
        return (
            f"tau={self.tau}, beta={self.beta}, gamma={self.gamma}, "
            f"activation={self.activation!r}, sync={self.sync}, eps={self.eps}, "
            f"class_dim={self.class_dim}"
        )


class KDLoss(nn.Module):
    """The loss of knowledge distillation: the student learns the teacher's probabilities.

    Args:
        tau: the temperature, above 0.
        activation: ``"softmax"``, or ``"sigmoid"`` for heads with one binary decision for each
            class. With ``None`` the task chooses: sigmoid for one-stage detectors, softmax for
            everything else.
        class_dim: the dimension of the classes; by default 1. Logits with three dimensions need
            it: ``1`` for ``(N, C, L)``, ``-1`` for the ``(B, T, V)`` of language models.

    Shape:
        The student's and the teacher's logits have the shape ``(N, C)`` or ``(N, C, *spatial)``,
        or with ``class_dim`` any other. The loss is a scalar.

    Raises:
        ValueError: if an option is out of range. A call raises it if the logits are
            not floating-point tensors of one shape and device.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[2.0, 0.0, 1.0]])
        >>> KDLoss(tau=4.0)(logits, logits).item()
        0.0

    Reference:
        Hinton et al., Distilling the Knowledge in a Neural Network, 2015.
    """

    def __init__(
        self,
        tau: float = 4.0,
        activation: Literal["softmax", "sigmoid"] | None = "softmax",
        class_dim: int | None = None,
    ) -> None:
        super().__init__()
        check_number("tau", tau)
        check_logits_options(tau)
        _check_class_dim(class_dim)
        if activation not in ("softmax", "sigmoid", None):
            raise ValueError(f"activation is {activation!r}: use 'softmax' or 'sigmoid'")
        self.tau = tau
        self.activation_is_chosen = activation is not None
        self.activation: Literal["softmax", "sigmoid"] = activation or "softmax"
        self.class_dim = class_dim

    def forward(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the loss of the logits of a batch.

        Args:
            student: logits of shape ``(N, C)`` or ``(N, C, *spatial)``.
            teacher: logits of the same shape.
            mask: a boolean tensor of shape ``(N,)`` or ``(N, *spatial)``; samples where it is
                ``False`` are left out.

        Returns:
            The loss, a scalar in float32 or float64.
        """
        options: dict[str, Any] = {
            "tau": self.tau,
            "activation": self.activation,
            "class_dim": self.class_dim,
        }
        return kd_loss(student, teacher, mask=mask, **options)

    def extra_repr(self) -> str:
        return f"tau={self.tau}, activation={self.activation!r}, class_dim={self.class_dim}"


class FeatureMimic(nn.Module):
    """The mean squared error between the student's projected feature map and the teacher's.

    The projection, a 1x1 convolution, is trained with the student but does not belong to it.

    Args:
        student_channels: the number of channels of the student's map.
        teacher_channels: the number of channels of the teacher's map.

    Shape:
        The student's map has the shape ``(N, student_channels, H, W)``, and the teacher's map has
        the shape ``(N, teacher_channels, H, W)``. The loss is a scalar.

    Raises:
        ValueError: at a call, if the projected map and the teacher's map differ in shape.
    """

    def __init__(self, student_channels: int, teacher_channels: int) -> None:
        super().__init__()
        self.projection = nn.Conv2d(student_channels, teacher_channels, 1)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the loss of the feature maps of a batch.

        Args:
            student: the student's map, ``(N, student_channels, H, W)``.
            teacher: the teacher's map, ``(N, teacher_channels, H, W)``.

        Returns:
            The loss, a scalar in float32.

        Raises:
            ValueError: if the projected map and the teacher's map differ in shape.
        """
        projected = self.projection(student)
        if projected.shape != teacher.shape:
            raise ValueError(
                f"the student's map has the shape {tuple(projected.shape)} after the projection, "
                f"but the teacher's map has {tuple(teacher.shape)}: choose maps of the same height "
                f"and width, and teacher_channels={teacher.shape[1]}"
            )
        return F.mse_loss(projected.float(), without_inference(teacher).float())


def _check_class_dim(class_dim: int | None) -> None:
    if class_dim is not None:
        check_number("class_dim", class_dim, int)
