"""Losses that compare feature maps place by place or channel by channel, as pure functions."""

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from lightning_dist.checks import check_logits_options, check_number
from lightning_dist.losses.functional import inter_class_correlation
from lightning_dist.losses.inputs import (
    check_logits,
    features_of,
    mask_for,
    without_inference,
)
from lightning_dist.losses.streaming import compute_dtype
from lightning_dist.losses.streaming_kd import divergence


def cwd_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    tau: float = 4.0,
    mask: Tensor | None = None,
    class_dim: int | None = None,
) -> Tensor:
    """Return the loss of channel-wise distillation, for dense logits or feature maps.

    A softmax over all places of an image turns each channel into a distribution. The loss is
    ``tau**2 * KL(teacher || student)`` of these distributions.

    Args:
        student: a map of shape ``(N, C, *spatial)`` with at least two places.
        teacher: a map of the same shape; no gradient flows to it.
        tau: the temperature, above 0.
        mask: a boolean tensor of shape ``(N, *spatial)``; places where it is ``False`` have
            probability 0. An image that the mask leaves out completely adds 0 to the loss.
        class_dim: the dimension of the channels; by default 1. Three dimensions need it.

    Returns:
        The mean over images and channels, a scalar in float32 (float64 for float64 maps).

    Raises:
        ValueError: if the inputs are not floating-point maps of one shape and device, or have only
            one place.

    Reference:
        Shu et al., Channel-wise Knowledge Distillation for Dense Prediction, ICCV 2021.
    """
    axis = check_logits(student, teacher, class_dim)
    check_logits_options(tau)
    mask = mask_for(student, mask, axis)
    dtype = compute_dtype(student, teacher)
    x, y = (z.to(dtype) / tau for z in (student, without_inference(teacher.detach())))
    x, y = (z.movedim(axis, 1).flatten(2) if z.dim() > 2 else z.unsqueeze(2) for z in (x, y))
    _refuse_one_place(x.shape[2], "cwd_loss", student)
    rows: int | Tensor = max(x.shape[0] * x.shape[1], 1)
    if mask is not None:
        places = mask.movedim(axis, 1).flatten(2)
        used = places.any(2, keepdim=True)
        x, y = (z.masked_fill(~places, -math.inf).masked_fill(~used, 0) for z in (x, y))
        rows = (used.sum(dtype=dtype) * x.shape[1]).clamp(min=1)
    return tau**2 / rows * divergence(F.log_softmax(x, dim=2), F.log_softmax(y, dim=2))


def at_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the loss of attention transfer: the mean squared difference of attention maps.

    The attention at a place is the mean over channels of the squared features; a map of attention
    has norm 1. If the maps differ in size, both are averaged to the smaller height and width.

    Args:
        student: a map of shape ``(N, C, *spatial)`` with at least two places.
        teacher: a map ``(N, D, *spatial)`` of as many dimensions; no gradient flows to it.

    Returns:
        The mean over images and places, a scalar in float32 (float64 for float64 maps).

    Raises:
        ValueError: if the inputs are not floating-point maps of as many images and dimensions, or
            have only one place.

    Reference:
        Zagoruyko and Komodakis, Paying More Attention to Attention, ICLR 2017, as in its code,
        which squares the norm of equation 2 and takes the mean over the places.
    """
    x, y = to_common_size(*features_of(student, teacher, dimensions=(4, 5)))
    _refuse_one_place(x[0, 0].numel(), "at_loss", student)
    x, y = (F.normalize(z.square().mean(1).flatten(1)) for z in (x, y))
    return F.mse_loss(x, y)


def mimic_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean squared error between two feature maps or embeddings.

    Args:
        student: features of any shape.
        teacher: features of the same shape; no gradient flows to them.

    Returns:
        The mean over all entries, a scalar in float32 (float64 for float64 features).

    Raises:
        ValueError: if the inputs are not floating-point features of one shape.

    Reference:
        Romero et al., FitNets: Hints for Thin Deep Nets, ICLR 2015.
    """
    x, y = features_of(student, teacher)
    _refuse_other_shape(student, teacher)
    return F.mse_loss(x, y)


def dist_feature_loss(
    student: Tensor, teacher: Tensor, *, channels: float = 1.0, places: float = 1.0
) -> Tensor:
    """Return the DIST loss of two feature maps, which correlates channels and places.

    The term of the channels is 1 - the mean over all places of all images of the correlation over
    the channels. The term of the places is 1 - the mean over all channels of all images of the
    correlation over the places of the image. This is this project's reading of the feature-level
    loss that DIST+ adds for dense tasks; the paper's equations were not available.

    Args:
        student: a map of shape ``(N, C, *spatial)`` with at least two channels and two places.
        teacher: a map of the same shape; no gradient flows to it.
        channels: the weight of the term of the channels.
        places: the weight of the term of the places.

    Returns:
        A scalar from 0 to ``2 * (channels + places)`` in float32 (float64 for float64 maps).

    Raises:
        ValueError: if the inputs are not floating-point maps of one shape, or have only one channel
            or place.

    Reference:
        Huang et al., DIST+: Knowledge Distillation From a Stronger Adaptive Teacher, TPAMI 2025.
    """
    for name, weight in (("channels", channels), ("places", places)):
        check_number(name, weight)
    x, y = features_of(student, teacher, dimensions=(4, 5))
    _refuse_other_shape(student, teacher)
    _refuse_one_place(x[0, 0].numel(), "dist_feature_loss", student)
    if x.shape[1] == 1:
        raise ValueError("a map of one channel has no relation of channels: use at_loss")
    x, y = x.flatten(2), y.flatten(2)
    of_channels = 1 - inter_class_correlation(x, y, class_dim=1)
    of_places = 1 - inter_class_correlation(x, y, class_dim=2)
    return channels * of_channels + places * of_places


def to_common_size(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Return two maps, averaged to one size: the smaller of both heights, and of both widths.

    Args:
        student: a map of shape ``(N, C, *spatial)`` with two or three spatial dimensions.
        teacher: a map ``(N, D, *spatial)`` with as many dimensions.

    Returns:
        Both maps with the smaller size; each place is the average of the places that it covers.
    """
    size = tuple(min(pair) for pair in zip(student.shape[2:], teacher.shape[2:], strict=True))
    pool: Any = F.adaptive_avg_pool2d if len(size) == 2 else F.adaptive_avg_pool3d
    x, y = (z if z.shape[2:] == size else pool(z, size) for z in (student, teacher))
    return x, y


def _refuse_one_place(places: int, loss: str, given: Tensor) -> None:
    if places < 2:
        raise ValueError(
            f"{loss} compares the places of a map, and {tuple(given.shape)} has one: choose a part "
            "of the network before its pooling"
        )


def _refuse_other_shape(student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise ValueError(
            f"the student's features have the shape {tuple(student.shape)}, but the teacher's have "
            f"{tuple(teacher.shape)}: choose parts of one size, project the student's channels, or "
            "resize the maps"
        )
