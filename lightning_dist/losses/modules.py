"""The losses of logits as modules: options go to the constructor, tensors go to the call."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from lightning_dist.checks import check_logits_options, check_number, class_axis
from lightning_dist.losses.decoupling import dkd_loss, standardise
from lightning_dist.losses.divergences import (
    Probability,
    jeffreys_loss,
    jsd_loss,
    kd_loss,
    reverse_kd_loss,
)
from lightning_dist.losses.functional import dist_loss
from lightning_dist.losses.inputs import check_logits
from lightning_dist.losses.streaming import Activation


class DISTLoss(nn.Module):
    """The DIST loss: 0 if student and teacher fully correlate over classes and over samples.

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

    compares_classes = True

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

    def check_first_batch(
        self, logits: Sequence[Tensor], *, processes: int, is_last: bool
    ) -> str | None:
        """Refuse a first batch of one sample; :class:`lightning_dist.Term` calls this method.

        Args:
            logits: the student's logits, of each of its calls in the step.
            processes: the number of processes that train.
            is_last: whether the batch is also the last one of its epoch.

        Returns:
            A warning if there are two softmax classes, and otherwise ``None``.

        Raises:
            ValueError: if the batch has one sample, but the loss compares several.
        """
        logits = [x for x in logits if x.dim() > 1]
        classes = [x.shape[class_axis(x.shape, self.class_dim)] for x in logits]
        one = bool(logits) and all(x.numel() == n for x, n in zip(logits, classes, strict=True))
        if one and self.gamma and not (self.sync and processes > 1) and not is_last:
            raise ValueError(
                "the batch has one sample, but an intra-class relation needs several: use larger "
                "batches, sync=True over several processes, or gamma=0"
            )
        if self.activation == "softmax" and self.beta and 2 in classes:
            return (
                "DIST compares two softmax classes: its inter-class term is a correlation of two "
                "numbers, which is 1 or -1, so it has no gradient. Only the intra-class term "
                "trains the student: set beta=0, and choose gamma for it alone"
            )
        return None

    def extra_repr(self) -> str:
        return (
            f"tau={self.tau}, beta={self.beta}, gamma={self.gamma}, "
            f"activation={self.activation!r}, sync={self.sync}, eps={self.eps}, "
            f"class_dim={self.class_dim}"
        )


class ProbabilityLoss(nn.Module):
    """The base class of the losses of probabilities, which have the same options.

    Args:
        tau: the temperature, above 0.
        activation: ``"softmax"``, or ``"sigmoid"`` for heads with one binary decision for each
            class. With ``None`` the task chooses: sigmoid for one-stage detectors, softmax for
            everything else.
        class_dim: the dimension of the classes; by default 1. Logits with three dimensions need
            it: ``1`` for ``(N, C, L)``, ``-1`` for the ``(B, T, V)`` of language models.

    Raises:
        ValueError: if an option is out of range.
    """

    function: Callable[..., Tensor]
    compares_classes = True

    def __init__(
        self,
        tau: float = 4.0,
        activation: Probability | None = "softmax",
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
        self.activation: Probability = activation or "softmax"
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
        return type(self).function(student, teacher, mask=mask, **options)

    def extra_repr(self) -> str:
        return f"tau={self.tau}, activation={self.activation!r}, class_dim={self.class_dim}"


class KDLoss(ProbabilityLoss):
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

    function = staticmethod(kd_loss)


class ReverseKDLoss(ProbabilityLoss):
    """KD with the divergence in the other direction, see :func:`reverse_kd_loss`."""

    function = staticmethod(reverse_kd_loss)


class JeffreysLoss(ProbabilityLoss):
    """The sum of KD's divergences in both directions, see :func:`jeffreys_loss`."""

    function = staticmethod(jeffreys_loss)


class JSDLoss(ProbabilityLoss):
    """The Jensen-Shannon divergence, see :func:`jsd_loss`."""

    function = staticmethod(jsd_loss)


class DKDLoss(nn.Module):
    """Decoupled KD: separate weights for the target class and the others, see :func:`dkd_loss`.

    It needs the labels: a :class:`lightning_dist.tasks.classification.ClassificationModule` gives
    them, and a :class:`lightning_dist.Term` by ``from_batch``, as ``target``.

    Args:
        tau: the temperature, above 0.
        alpha: the weight of the target class against all others.
        beta: the weight of the other classes among themselves.
        class_dim: the dimension of the classes; by default 1. Logits with three dimensions need it.
        ignore_index: the label of samples that are left out.

    Raises:
        ValueError: if an option is out of range.

    Reference:
        Zhao et al., Decoupled Knowledge Distillation, CVPR 2022.
    """

    compares_classes = True
    needs_target = True

    def __init__(
        self,
        tau: float = 4.0,
        alpha: float = 1.0,
        beta: float = 8.0,
        class_dim: int | None = None,
        ignore_index: int = -100,
    ) -> None:
        super().__init__()
        for name, value in {"tau": tau, "alpha": alpha, "beta": beta}.items():
            check_number(name, value)
        check_logits_options(tau)
        _check_class_dim(class_dim)
        check_number("ignore_index", ignore_index, int)
        self.tau, self.alpha, self.beta = tau, alpha, beta
        self.class_dim, self.ignore_index = class_dim, ignore_index

    def forward(
        self, student: Tensor, teacher: Tensor, target: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """Return the loss of the logits of a batch.

        Args:
            student: logits of shape ``(N, C)`` or ``(N, C, *spatial)``.
            teacher: logits of the same shape.
            target: the label of each sample, int64 of shape ``(N,)`` or ``(N, *spatial)``.
            mask: a boolean tensor of the target's shape; samples where it is ``False`` are left
                out.

        Returns:
            The loss, a scalar in float32 or float64.
        """
        return dkd_loss(
            student,
            teacher,
            target,
            alpha=self.alpha,
            beta=self.beta,
            tau=self.tau,
            ignore_index=self.ignore_index,
            mask=mask,
            class_dim=self.class_dim,
        )

    def extra_repr(self) -> str:
        return f"tau={self.tau}, alpha={self.alpha}, beta={self.beta}, class_dim={self.class_dim}"


class StandardisedLogits(nn.Module):
    """A loss of logits that are standardised over the classes first, see :func:`standardise`.

    Args:
        loss: the loss, such as ``KDLoss(tau=2.0)``. The further arguments of a call, ``mask`` and
            ``target``, go to it.

    Raises:
        ValueError: if the loss is not a module.

    Reference:
        Sun et al., Logit Standardization in Knowledge Distillation, CVPR 2024.
    """

    compares_classes = True

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        if not isinstance(loss, nn.Module):
            raise ValueError(f"loss is {loss!r}: give a loss of logits, such as KDLoss(tau=2.0)")
        self.loss = loss
        self.needs_target: bool = getattr(loss, "needs_target", False)

    def forward(self, student: Tensor, teacher: Tensor, **further: Any) -> Tensor:
        """Return the loss of the standardised logits of a batch.

        Args:
            student: logits of shape ``(N, C)`` or ``(N, C, *spatial)``.
            teacher: logits of the same shape.
            further: the further arguments of the loss.
        """
        axis = getattr(self.loss, "class_dim", None)
        check_logits(student, teacher, axis)
        mask = further.get("mask")
        logits = (standardise(x, class_dim=axis, mask=mask) for x in (student, teacher))
        return self.loss(*logits, **further)


def _check_class_dim(class_dim: int | None) -> None:
    if class_dim is not None:
        check_number("class_dim", class_dim, int)
