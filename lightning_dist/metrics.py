"""torchmetrics that compare the logits of a student with those of its teacher."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from lightning_dist.checks import check_logits_options, check_number, class_axis
from lightning_dist.losses.functional import dist_loss
from lightning_dist.losses.inputs import check_logits, mask_for, refuse_one_class
from lightning_dist.losses.streaming import Activation

_BLOCK = 2**16  # rows that are converted to float64 at a time
_FLAT = 8 * torch.finfo(torch.float64).eps


def teacher_metrics(num_classes: int, class_dim: int | None = None) -> MetricCollection:
    """Return ``agreement``, ``inter_class_correlation`` and ``intra_class_correlation``.

    Args:
        num_classes: the number of classes.
        class_dim: the dimension of the classes, as in :func:`lightning_dist.functional.dist_loss`.

    Example:
        >>> metrics = teacher_metrics(3)
        >>> logits = torch.tensor([[1.0, 2.0, 3.0], [3.0, 1.0, 0.0]])
        >>> {name: round(x.item(), 3) for name, x in metrics(logits, logits).items()}
        {'agreement': 1.0, 'inter_class_correlation': 1.0, 'intra_class_correlation': 1.0}
    """
    return MetricCollection(
        {
            "agreement": TeacherAgreement(class_dim),
            "inter_class_correlation": InterClassCorrelation(class_dim=class_dim),
            "intra_class_correlation": IntraClassCorrelation(num_classes, class_dim=class_dim),
        }
    )


class _Wide(Metric):
    """A metric whose states are in float64, or in float32 on a device that has no float64."""

    is_differentiable = False
    full_state_update = False

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Any:
        try:
            fn(torch.zeros((), dtype=torch.float64))
        except TypeError:  # Apple's MPS
            for states in (self._defaults, self.__dict__):
                for name in self._defaults:
                    value = states[name]
                    if isinstance(value, Tensor) and value.dtype == torch.float64:
                        states[name] = value.float()
        return super()._apply(fn, *args, **kwargs)


class TeacherAgreement(Metric):
    """The share of samples for which student and teacher have the same most probable class.

    In dense logits every pixel is a sample.

    Args:
        class_dim: the dimension of the classes, as in :func:`lightning_dist.functional.dist_loss`.
        kwargs: the options of ``torchmetrics.Metric``.

    Example:
        >>> agreement = TeacherAgreement()
        >>> student = torch.tensor([[1.0, 2.0], [3.0, 1.0]])
        >>> agreement(student, torch.tensor([[0.0, 9.0], [1.0, 2.0]]))
        tensor(0.5000)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    same: Tensor
    samples: Tensor

    def __init__(self, class_dim: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.class_dim = class_dim
        self.add_state("same", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("samples", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> None:
        """Count the samples of a batch.

        Args:
            student: logits of shape ``(N, C)`` or ``(N, C, *spatial)``.
            teacher: logits of the same shape.
            mask: a boolean tensor ``(N,)`` or ``(N, *spatial)``; samples where it is ``False`` are
                left out.

        Raises:
            ValueError: if the inputs are not logits of one shape with at least two classes.
        """
        axis = check_logits(student, teacher, self.class_dim)
        refuse_one_class(student.shape[axis], "torchmetrics' BinaryAccuracy of both decisions")
        same = student.argmax(axis) == teacher.argmax(axis)
        keep = mask_for(student, mask, axis)
        if keep is not None:
            same = same[keep.squeeze(axis)]
        self.same += same.sum()
        self.samples += same.numel()

    def compute(self) -> Tensor:
        """Return the share of samples, from 0 to 1; NaN without samples."""
        return self.same / self.samples


class InterClassCorrelation(_Wide):
    """The mean over samples of the correlation of student and teacher over the classes.

    This is the inter-class relation of DIST: Pearson's correlation of the two probabilities of a
    sample, as in :func:`lightning_dist.functional.dist_loss`.

    Args:
        tau: the temperature, above 0.
        activation: ``"softmax"``, ``"sigmoid"`` or ``"identity"``.
        class_dim: the dimension of the classes, as in :func:`lightning_dist.functional.dist_loss`.
        kwargs: the options of ``torchmetrics.Metric``.

    Raises:
        ValueError: if an option is out of range.

    Example:
        >>> correlation = InterClassCorrelation()
        >>> student = torch.tensor([[1.0, 2.0, 3.0], [3.0, 1.0, 0.0]])
        >>> round(correlation(student, 2 * student).item(), 3)
        0.993
    """

    higher_is_better = True
    total: Tensor
    samples: Tensor

    def __init__(
        self,
        tau: float = 1.0,
        activation: Activation = "softmax",
        class_dim: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_logits_options(tau, activation)
        self.tau, self.activation, self.class_dim = tau, activation, class_dim
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("samples", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> None:
        """Add the correlations of the samples of a batch; see :meth:`TeacherAgreement.update`."""
        options: dict[str, Any] = {"tau": self.tau, "activation": self.activation}
        loss = dist_loss(
            *(student.detach(), teacher.detach()),
            **(options | {"gamma": 0.0, "mask": mask, "class_dim": self.class_dim}),
        )
        classes = student.shape[class_axis(student.shape, self.class_dim)]
        samples = student.numel() // classes if mask is None else mask.sum()
        self.total += (1 - loss / self.tau**2) * samples
        self.samples += samples

    def compute(self) -> Tensor:
        """Return the mean correlation, from -1 to 1; NaN without samples."""
        return (self.total / self.samples).float()


class IntraClassCorrelation(_Wide):
    """The mean over classes of the correlation of student and teacher over all samples.

    This is the intra-class relation of DIST, over the whole evaluation set instead of one batch:
    means and moments of all batches and processes are merged, so that their sizes do not matter. A
    class whose probability is constant up to rounding has correlation 0, as in
    :func:`lightning_dist.functional.dist_loss`.

    Args:
        num_classes: the number of classes.
        tau: the temperature, above 0.
        activation: ``"softmax"``, ``"sigmoid"`` or ``"identity"``.
        class_dim: the dimension of the classes, as in :func:`lightning_dist.functional.dist_loss`.
        kwargs: the options of ``torchmetrics.Metric``.

    Raises:
        ValueError: if an option is out of range.

    Example:
        >>> correlation = IntraClassCorrelation(num_classes=2)
        >>> student = torch.tensor([[1.0, 2.0], [3.0, 1.0], [0.0, 0.0]])
        >>> round(correlation(student, -student).item(), 3)
        -1.0

    Reference:
        Chan, Golub, LeVeque, Updating Formulae and a Pairwise Algorithm for Computing Sample
        Variances, 1979.
    """

    higher_is_better = True
    moments: Tensor
    rounding: Tensor

    def __init__(
        self,
        num_classes: int,
        tau: float = 1.0,
        activation: Activation = "softmax",
        class_dim: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_number("num_classes", num_classes, int, least=1)
        check_logits_options(tau, activation)
        if activation == "softmax":
            refuse_one_class(num_classes, "activation='sigmoid'")
        self.num_classes, self.tau = num_classes, tau
        self.activation, self.class_dim = activation, class_dim
        moments = torch.zeros(6, num_classes, dtype=torch.float64)
        self.add_state("moments", moments, dist_reduce_fx=_merged)
        # The largest deviation, relative to the mean, that is only rounding in the logits' dtype.
        self.add_state("rounding", torch.tensor(_FLAT), dist_reduce_fx="max")

    def update(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> None:
        """Merge the moments of a batch; see :meth:`TeacherAgreement.update`.

        Raises:
            ValueError: if the logits do not have ``num_classes`` classes of one shape.
        """
        axis = check_logits(student, teacher, self.class_dim)
        if student.shape[axis] != self.num_classes:
            raise ValueError(
                f"the logits have {student.shape[axis]} classes and num_classes is "
                f"{self.num_classes}: give both the same number"
            )
        keep = mask_for(student, mask, axis)
        rows = [x.detach().movedim(axis, -1).flatten(0, -2) for x in (student, teacher)]
        if keep is not None:
            rows = [x[keep.flatten()] for x in rows]
        eps = max(torch.finfo(x.dtype).eps for x in rows)
        self.rounding = self.rounding.clamp(min=eps)
        for block in zip(*(x.split(_BLOCK) for x in rows), strict=True):
            values = [self._activated(x.to(self.moments.dtype) / self.tau) for x in block]
            self.moments = _merged(torch.stack([self.moments, _moments(*values)]))

    def compute(self) -> Tensor:
        """Return the mean correlation, from -1 to 1; NaN without samples."""
        count, mean_s, mean_t, square_s, square_t, product = self.moments
        rho = product / (square_s * square_t).sqrt()
        for mean, square in ((mean_s, square_s), (mean_t, square_t)):
            constant = (square / count).sqrt() <= self.rounding * mean.abs()
            rho = rho.masked_fill(constant, 0)
        return torch.where(count[0] > 0, rho.mean(), torch.nan).float()

    def _activated(self, z: Tensor) -> Tensor:
        if self.activation == "identity":
            return z
        return z.softmax(1) if self.activation == "softmax" else z.sigmoid()


class PredictionEntropy(_Wide):
    """The mean entropy of the predictions of one network, in nats.

    It is 0 for a network that is always certain, and ``log(C)`` for one that knows nothing.

    Args:
        tau: the temperature, above 0.
        class_dim: the dimension of the classes, as in :func:`lightning_dist.functional.dist_loss`.
        kwargs: the options of ``torchmetrics.Metric``.

    Raises:
        ValueError: if ``tau`` is out of range.

    Example:
        >>> round(PredictionEntropy()(torch.zeros(5, 4)).item(), 4)
        1.3863
    """

    total: Tensor
    samples: Tensor

    def __init__(self, tau: float = 1.0, class_dim: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_logits_options(tau)
        self.tau, self.class_dim = tau, class_dim
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("samples", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, logits: Tensor, mask: Tensor | None = None) -> None:
        """Add the entropies of the samples of a batch.

        Args:
            logits: logits of shape ``(N, C)`` or ``(N, C, *spatial)``.
            mask: a boolean tensor ``(N,)`` or ``(N, *spatial)``; samples where it is ``False`` are
                left out.

        Raises:
            ValueError: if the input is not a tensor of logits with at least two classes.
        """
        axis = check_logits(logits, logits, self.class_dim)
        refuse_one_class(logits.shape[axis], "the entropy of its probability")
        dtype = torch.promote_types(logits.dtype, torch.float32)
        log_p = (logits.detach().to(dtype) / self.tau).log_softmax(axis)
        entropy = torch.special.entr(log_p.exp()).sum(axis)
        keep = mask_for(logits, mask, axis)
        if keep is not None:
            entropy = entropy[keep.squeeze(axis)]
        self.total += entropy.sum()
        self.samples += entropy.numel()

    def compute(self) -> Tensor:
        """Return the mean entropy in nats, from 0 to ``log(C)``; NaN without samples."""
        return (self.total / self.samples).float()


def _moments(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the number of rows, the means, and the sums of products of deviations.

    Args:
        student: shape (R, C).
        teacher: shape (R, C).

    Returns:
        A tensor (6, C): the number, the means of student and teacher, the sums of the squared
        deviations of student and teacher, and the sum of their products.
    """
    count = torch.full_like(student[:1].sum(0), len(student))
    means = [x.sum(0) / count.clamp(min=1) for x in (student, teacher)]
    s, t = student - means[0], teacher - means[1]
    return torch.stack([count, *means, (s * s).sum(0), (t * t).sum(0), (s * t).sum(0)])


def _merged(parts: Tensor) -> Tensor:
    """Return the moments (6, C) of the union of parts (P, 6, C), each from :func:`_moments`."""
    count, means, products = parts[:, :1], parts[:, 1:3], parts[:, 3:]
    total = count.sum(0)
    mean = (means * count).sum(0) / total.clamp(min=1)
    shift = means - mean
    between = torch.cat([shift * shift, shift[:, :1] * shift[:, 1:]], dim=1)
    return torch.cat([total, mean, (products + between * count).sum(0)])
