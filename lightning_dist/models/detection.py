"""Backbones with a feature pyramid for torchvision's detectors, and detectors for small images."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import timm
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from lightning_dist.models.small import conv_block


class SmallPyramid(nn.Module):
    """A backbone of 3x3 convolutions with batch norm, and a feature pyramid of strides 4 and 8.

    Args:
        channels: the number of channels of the three stages, which have strides 2, 4 and 8.
        out_channels: the number of channels of each pyramid level.

    Shape:
        ``(N, 3, H, W)`` to ``{"0": (N, out_channels, H / 4, W / 4), "1": (N, ..., H / 8, W / 8)}``.
    """

    def __init__(self, channels: Sequence[int], out_channels: int) -> None:
        super().__init__()
        first, second, third = channels
        self.out_channels = out_channels
        self.stem = nn.Sequential(conv_block(3, first, stride=2), conv_block(first, first))
        self.stage1 = nn.Sequential(conv_block(first, second, stride=2), conv_block(second, second))
        self.stage2 = nn.Sequential(conv_block(second, third, stride=2), conv_block(third, third))
        self.fpn = FeaturePyramidNetwork([second, third], out_channels)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        fine = self.stage1(self.stem(images))
        return self.fpn(OrderedDict([("0", fine), ("1", self.stage2(fine))]))


class TimmPyramid(nn.Module):
    """A timm backbone with a feature pyramid, for torchvision's detectors.

    Args:
        name: the name of the backbone in timm.
        levels: the numbers of the feature maps that the pyramid uses, from 0. The maps 1 to 4 of a
            ResNet have strides 4 to 32.
        out_channels: the number of channels of each pyramid level.
        extra_levels: the coarser levels to add: ``"pool"`` adds the one level of Faster R-CNN, and
            ``"p6p7"`` adds the two levels of RetinaNet.
        options: other arguments of ``timm.create_model``, such as ``pretrained``.

    Shape:
        ``(N, 3, H, W)`` to maps ``(N, out_channels, h, w)`` named ``"0"``, ``"1"``, ... and then
        ``"pool"``, or ``"p6"`` and ``"p7"``.

    Raises:
        ValueError: if ``extra_levels`` is neither ``"pool"`` nor ``"p6p7"``.

    Example:
        >>> backbone = TimmPyramid("resnet18", levels=(1, 2, 3, 4))
        >>> detector = FasterRCNN(backbone, num_classes=91)
    """

    def __init__(
        self,
        name: str,
        levels: Sequence[int] = (1, 2, 3, 4),
        out_channels: int = 256,
        extra_levels: str = "pool",
        **options: Any,
    ) -> None:
        super().__init__()
        self.body = timm.create_model(
            name, features_only=True, out_indices=tuple(levels), **options
        )
        info: Any = self.body.feature_info
        channels = info.channels()
        if extra_levels not in ("pool", "p6p7"):
            raise ValueError(f"extra_levels is {extra_levels!r}: use 'pool' or 'p6p7'")
        extra: Any = LastLevelMaxPool()
        if extra_levels == "p6p7":
            extra = LastLevelP6P7(channels[-1], out_channels)
        self.out_channels = out_channels
        self.fpn = FeaturePyramidNetwork(channels, out_channels, extra)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps = self.body(images)
        return self.fpn(OrderedDict((str(level), x) for level, x in enumerate(maps)))


def small_faster_rcnn(
    channels: Sequence[int],
    out_channels: int,
    width: int,
    num_classes: int,
    image_size: int = 64,
) -> FasterRCNN:
    """Build torchvision's Faster R-CNN for small images and objects.

    Args:
        channels: the number of channels of the backbone's stages; see :class:`SmallPyramid`.
        out_channels: the number of channels of each pyramid level.
        width: the number of output features of the box head's two layers.
        num_classes: the number of classes without the background.
        image_size: the length in pixels to which the detector resizes the shorter side of images.
    """
    return FasterRCNN(
        SmallPyramid(channels, out_channels),
        min_size=image_size,
        max_size=2 * image_size,
        size_divisible=8,
        image_mean=[0.5] * 3,
        image_std=[0.25] * 3,
        rpn_anchor_generator=_anchors(),
        rpn_pre_nms_top_n_train=200,
        rpn_post_nms_top_n_train=100,
        rpn_pre_nms_top_n_test=100,
        rpn_post_nms_top_n_test=50,
        rpn_batch_size_per_image=64,
        box_roi_pool=MultiScaleRoIAlign(["0", "1"], output_size=5, sampling_ratio=2),
        box_head=TwoMLPHead(25 * out_channels, width),
        box_predictor=FastRCNNPredictor(width, num_classes + 1),
        box_batch_size_per_image=32,
        box_detections_per_img=20,
    )


def small_retinanet(
    channels: Sequence[int], out_channels: int, num_classes: int, image_size: int = 64
) -> RetinaNet:
    """Build torchvision's RetinaNet for small images and objects.

    Args:
        channels: the number of channels of the backbone's stages; see :class:`SmallPyramid`.
        out_channels: the number of channels of each pyramid level and of the heads.
        num_classes: the number of classes.
        image_size: the length in pixels to which the detector resizes the shorter side of images.
    """
    anchors = _anchors()
    (per_pixel, *_) = anchors.num_anchors_per_location()
    return RetinaNet(
        SmallPyramid(channels, out_channels),
        num_classes,
        min_size=image_size,
        max_size=2 * image_size,
        size_divisible=8,
        image_mean=[0.5] * 3,
        image_std=[0.25] * 3,
        anchor_generator=anchors,
        head=RetinaNetHead(out_channels, per_pixel, num_classes, norm_layer=_group_norm),
        detections_per_img=20,
        topk_candidates=100,
    )


def _group_norm(channels: int) -> nn.GroupNorm:
    """Build a head's norm: a group norm, because a head sees all pyramid levels."""
    return nn.GroupNorm(4, channels)


def _anchors() -> AnchorGenerator:
    return AnchorGenerator(((12, 16), (20, 28)), ((1.0, 2.0),) * 2)
