"""The losses of features as modules: options go to the constructor, tensors go to the call."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from lightning_dist.checks import check_flag, check_logits_options, check_number
from lightning_dist.losses.features import (
    at_loss,
    cwd_loss,
    dist_feature_loss,
    mimic_loss,
    to_common_size,
)
from lightning_dist.losses.relations import cka_loss, rkd_loss, sp_loss


class ProjectedFeatures(nn.Module):
    """The base class of the losses that compare features entry by entry.

    A projection, a 1x1 convolution, gives the student's features as many channels as the teacher's.
    It is trained with the student but does not belong to it.

    Args:
        student_channels: the number of channels of the student's features.
        teacher_channels: the number of channels of the teacher's features.
        resize: average the larger map to the height and width of the smaller one. Without it, maps
            of two sizes are refused.

    Raises:
        ValueError: if an option is out of range. A call raises it if the projected features and the
            teacher's differ in shape.
    """

    compares_classes = False

    def __init__(self, student_channels: int, teacher_channels: int, resize: bool = False) -> None:
        super().__init__()
        for name, value in (
            ("student_channels", student_channels),
            ("teacher_channels", teacher_channels),
        ):
            check_number(name, value, int, least=1)
        check_flag("resize", resize)
        self.projection: nn.Module = nn.Conv2d(student_channels, teacher_channels, 1)
        self.resize = resize

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the loss of the features of a batch.

        Args:
            student: the student's features, ``(N, student_channels, H, W)`` or
                ``(N, student_channels)``.
            teacher: the teacher's features, ``(N, teacher_channels, H, W)`` or
                ``(N, teacher_channels)``.

        Returns:
            The loss, a scalar in float32.

        Raises:
            ValueError: if the projected features and the teacher's differ in shape.
        """
        if student.dim() == teacher.dim() == 2:
            student, teacher = student[..., None, None], teacher[..., None, None]
        projected = self.projection(student)
        if self.resize and projected.dim() == teacher.dim() == 4:
            projected, teacher = to_common_size(projected, teacher)
        if projected.shape != teacher.shape:
            raise ValueError(
                f"the student's map has the shape {tuple(projected.shape)} after the projection, "
                f"but the teacher's map has {tuple(teacher.shape)}: choose maps of the same height "
                f"and width or resize=True, and teacher_channels={teacher.shape[1]}"
            )
        return self.compare(projected, teacher)

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the loss of features of one shape; a subclass defines it.

        Args:
            student: the projected features.
            teacher: the teacher's features.
        """
        raise NotImplementedError


class FeatureMimic(ProjectedFeatures):
    """The mean squared error between the student's projected feature map and the teacher's.

    The projection, a 1x1 convolution, is trained with the student but does not belong to it.

    Args:
        student_channels: the number of channels of the student's map.
        teacher_channels: the number of channels of the teacher's map.
        resize: average the larger map to the height and width of the smaller one. Without it, maps
            of two sizes are refused.

    Shape:
        The student's map has the shape ``(N, student_channels, H, W)``, and the teacher's map has
        the shape ``(N, teacher_channels, H, W)``; or both are embeddings ``(N, channels)``. The
        loss is a scalar.

    Raises:
        ValueError: at a call, if the projected map and the teacher's map differ in shape.

    Reference:
        Romero et al., FitNets: Hints for Thin Deep Nets, ICLR 2015.
    """

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        return mimic_loss(student, teacher)


class DISTFeatureLoss(ProjectedFeatures):
    """The DIST loss of feature maps, over channels and over places; see :func:`dist_feature_loss`.

    It is this project's reading of the feature-level loss of DIST+.

    Args:
        student_channels: the number of channels of the student's map.
        teacher_channels: the number of channels of the teacher's map. If both numbers are equal,
            there is no projection.
        resize: average the larger map to the height and width of the smaller one. Without it, maps
            of two sizes are refused.
        channels: the weight of the correlation over the channels at each place.
        places: the weight of the correlation over the places of each image and channel.

    Raises:
        ValueError: if an option is out of range. A call raises it if the maps differ in shape.

    Reference:
        Huang et al., DIST+: Knowledge Distillation From a Stronger Adaptive Teacher, TPAMI 2025.
    """

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        resize: bool = False,
        channels: float = 1.0,
        places: float = 1.0,
    ) -> None:
        super().__init__(student_channels, teacher_channels, resize)
        if student_channels == teacher_channels:
            self.projection = nn.Identity()
        for name, value in {"channels": channels, "places": places}.items():
            check_number(name, value)
        self.channels, self.places = channels, places

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        return dist_feature_loss(student, teacher, channels=self.channels, places=self.places)


class CWDLoss(nn.Module):
    """Channel-wise distillation of dense logits or feature maps, see :func:`cwd_loss`.

    Args:
        tau: the temperature, above 0.
        class_dim: the dimension of the channels; by default 1. Three dimensions need it.

    Raises:
        ValueError: if an option is out of range.

    Reference:
        Shu et al., Channel-wise Knowledge Distillation for Dense Prediction, ICCV 2021.
    """

    def __init__(self, tau: float = 4.0, class_dim: int | None = None) -> None:
        super().__init__()
        check_number("tau", tau)
        check_logits_options(tau)
        if class_dim is not None:
            check_number("class_dim", class_dim, int)
        self.tau, self.class_dim = tau, class_dim

    def forward(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the loss of the maps of a batch.

        Args:
            student: a map of shape ``(N, C, *spatial)``.
            teacher: a map of the same shape.
            mask: a boolean tensor of shape ``(N, *spatial)``; places where it is ``False`` are left
                out.

        Returns:
            The loss, a scalar in float32 or float64.
        """
        return cwd_loss(student, teacher, tau=self.tau, mask=mask, class_dim=self.class_dim)

    def extra_repr(self) -> str:
        return f"tau={self.tau}, class_dim={self.class_dim}"


class FeatureLoss(nn.Module):
    """The base class of the losses of features whose call takes only the features."""

    function: Callable[..., Tensor]
    compares_classes = False
    relates_samples = True

    def __init__(self, **options: Any) -> None:
        super().__init__()
        for name, value in options.items():
            check_number(name, value)
        self.options = options

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the loss of the features of a batch.

        Args:
            student: features of shape ``(N, ...)``.
            teacher: features of as many samples.

        Returns:
            The loss, a scalar in float32 or float64.
        """
        return type(self).function(student, teacher, **self.options)

    def check_first_batch(
        self, features: Sequence[Tensor], *, processes: int, is_last: bool
    ) -> None:
        """Refuse a first batch of one sample, if the loss compares each two samples.

        Args:
            features: the student's features, of each of its calls in the step.
            processes: the number of processes that train.
            is_last: whether the batch is also the last one of its epoch.

        Raises:
            ValueError: if the batch has one sample.
        """
        if self.relates_samples and not is_last and all(len(x) == 1 for x in features):
            raise ValueError(
                f"the batch has one sample, but {type(self).__name__} compares each two samples of "
                "a batch: use larger batches"
            )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.options.items())


class ATLoss(FeatureLoss):
    """Attention transfer between two feature maps, see :func:`at_loss`."""

    function = staticmethod(at_loss)
    relates_samples = False

    def __init__(self) -> None:
        super().__init__()


class SPLoss(FeatureLoss):
    """The similarity-preserving loss, see :func:`sp_loss`."""

    function = staticmethod(sp_loss)

    def __init__(self) -> None:
        super().__init__()


class CKALoss(FeatureLoss):
    """1 - the centred kernel alignment of the features of a batch, see :func:`cka_loss`."""

    function = staticmethod(cka_loss)

    def __init__(self) -> None:
        super().__init__()


class RKDLoss(FeatureLoss):
    """Relational knowledge distillation of distances and angles, see :func:`rkd_loss`.

    Args:
        distance: the weight of the distances.
        angle: the weight of the angles; 0 leaves them out.

    Raises:
        ValueError: if a weight is no number.
    """

    function = staticmethod(rkd_loss)

    def __init__(self, distance: float = 25.0, angle: float = 50.0) -> None:
        super().__init__(distance=distance, angle=angle)
