"""DeepLabV3 and PSPNet on dilated timm backbones, and the reader of their published checkpoints."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.segmentation.deeplabv3 import ASPP
from torchvision.models.segmentation.fcn import FCNHead

from lightning_dist.weights import load_weights, refuse_unknown

_DEEP_STEM = {"stem_type": "deep", "stem_width": 64}  # three 3 x 3 convolutions, 64-64-128


class SegmentationNetwork(nn.Module):
    """A backbone and two heads, which return logits at the backbone's resolution.

    Args:
        backbone: returns a list of feature maps, the last two of which have one resolution.
        classifier: makes the logits from the last one.
        aux_classifier: makes the auxiliary logits from the one before, or ``None``.

    Shape:
        images ``(N, 3, H, W)``; ``{"out": (N, C, h, w), "aux": (N, C, h, w)}``, in training and in
        evaluation, where ``h`` is ``H`` over the output stride, rounded up.
    """

    def __init__(
        self, backbone: nn.Module, classifier: nn.Module, aux_classifier: nn.Module | None
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.classifier = classifier
        self.aux_classifier = aux_classifier

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        *_, third, fourth = self.backbone(images)
        outputs = {"out": self.classifier(fourth)}
        if self.aux_classifier is not None:
            outputs["aux"] = self.aux_classifier(third)
        return outputs

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """These networks' names for those of a published checkpoint; others stay as they are."""
        state = {name.removeprefix("module."): value for name, value in state_dict.items()}
        if not any(name.startswith("pretrained.") for name in state):
            return dict(state_dict)
        return convert_published(state)


class PyramidPooling(nn.Module):
    """A map beside its averages over grids of several sizes, each a quarter of the channels."""

    def __init__(self, channels: int, bins: Sequence[int]) -> None:
        super().__init__()
        reduced = channels // len(bins)
        self.branches = nn.ModuleList(
            nn.Sequential(
                nn.AdaptiveAvgPool2d(size),
                nn.Conv2d(channels, reduced, 1, bias=False),
                nn.BatchNorm2d(reduced),
                nn.ReLU(inplace=True),
            )
            for size in bins
        )

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[2:]
        pooled = [
            F.interpolate(branch(x), size, mode="bilinear", align_corners=True)
            for branch in self.branches
        ]
        return torch.cat([x, *pooled], dim=1)


def deeplabv3(
    backbone: str = "resnet18",
    num_classes: int = 19,
    width: int = 128,
    *,
    rates: Sequence[int] = (12, 24, 36),
    aux: bool = True,
    backbone_weights: str | Path | None = None,
    **options: Any,
) -> SegmentationNetwork:
    """DeepLabV3 (Chen et al., 2017).

    Args:
        backbone: timm's name. A ResNet gets the deep stem of the published networks.
        num_classes: number of classes.
        width: channels of the head; as published 128 on ResNet-18 and 256 on ResNet-101.
        rates: dilations of the atrous pyramid, in feature-map pixels.
        aux: add an FCN head on the third stage.
        backbone_weights: file with weights of the backbone, from training on ImageNet: under timm's
            names or those of the published deep-stem ResNets. Its classifier (``fc``) is left out.
        options: of ``timm.create_model``, such as ``pretrained`` and ``output_stride`` (8).

    Returns:
        The network; see :class:`SegmentationNetwork`.

    Raises:
        ValueError: if timm's backbone cannot be dilated so, or the weights are of another.
        FileNotFoundError: if there are no such weights.
    """
    features, third, fourth = _backbone(backbone, backbone_weights, options)
    pyramid = ASPP(fourth, list(rates), out_channels=width)
    head = nn.Sequential(pyramid, *_head(width, width, num_classes))
    return SegmentationNetwork(features, head, FCNHead(third, num_classes) if aux else None)


def pspnet(
    backbone: str = "resnet18",
    num_classes: int = 19,
    width: int = 128,
    *,
    bins: Sequence[int] = (1, 2, 3, 6),
    aux: bool = True,
    backbone_weights: str | Path | None = None,
    **options: Any,
) -> SegmentationNetwork:
    """PSPNet (Zhao et al., 2017).

    Args:
        backbone: timm's name. A ResNet gets the deep stem of the published networks.
        num_classes: number of classes.
        width: channels of the head.
        bins: sides of the pooled grids.
        aux: add an FCN head on the third stage.
        backbone_weights: file with weights of the backbone, from training on ImageNet: under timm's
            names or those of the published deep-stem ResNets. Its classifier (``fc``) is left out.
        options: of ``timm.create_model``, such as ``pretrained`` and ``output_stride`` (8).

    Returns:
        The network; see :class:`SegmentationNetwork`.

    Raises:
        ValueError: if timm's backbone cannot be dilated so, or the weights are of another.
        FileNotFoundError: if there are no such weights.
    """
    features, third, fourth = _backbone(backbone, backbone_weights, options)
    pyramid = PyramidPooling(fourth, bins)
    channels = fourth + len(bins) * (fourth // len(bins))
    head = nn.Sequential(pyramid, *_head(channels, width, num_classes))
    return SegmentationNetwork(features, head, FCNHead(third, num_classes) if aux else None)


# Published name, as a pattern, and ours. The stem's layers are timm's Sequential and its bn1.
_NAMES = [
    (r"pretrained\.conv([123])\.", lambda m: f"backbone.conv1.{3 * (int(m[1]) - 1)}."),
    (r"pretrained\.bn([12])\.", lambda m: f"backbone.conv1.{3 * int(m[1]) - 2}."),
    (r"pretrained\.bn3\.", lambda m: "backbone.bn1."),
    (r"pretrained\.(layer[1-4])\.", lambda m: f"backbone.{m[1]}."),
    (r"head\.aspp\.b0\.", lambda m: "classifier.0.convs.0."),
    (r"head\.aspp\.b([123])\.block\.", lambda m: f"classifier.0.convs.{m[1]}."),
    (r"head\.aspp\.b4\.gap\.", lambda m: "classifier.0.convs.4."),
    (r"head\.aspp\.project\.", lambda m: "classifier.0.project."),
    (r"head\.psp\.conv([1-4])\.", lambda m: f"classifier.0.branches.{int(m[1]) - 1}.1+"),
    (r"head\.block\.", lambda m: "classifier.1+"),
    (r"head\.classifier\.", lambda m: "classifier.5."),
    (r"auxlayer\.block\.", lambda m: "aux_classifier."),
]


def convert_published(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a published Cityscapes checkpoint under the names of these networks.

    Args:
        state_dict: of DeepLabV3 or PSPNet on a deep-stem ResNet, as published with DIST.

    Returns:
        The same tensors, for ``load_state_dict`` of :func:`deeplabv3` or :func:`pspnet`.

    Raises:
        ValueError: if it has other names; they are listed.
    """
    converted, unknown = {}, []
    for name, value in state_dict.items():
        for pattern, ours in _NAMES:
            match = re.match(pattern, name)
            if match:
                converted[_counted(ours(match), name[match.end() :])] = value
                break
        else:
            unknown.append(name)
    refuse_unknown(unknown, "a published DeepLabV3 or PSPNet")
    return converted


def _counted(prefix: str, rest: str) -> str:
    """Join, adding to the layer's number in ``rest`` where the prefix ends in ``NUMBER+``."""
    if not prefix.endswith("+"):
        return prefix + rest
    parent, offset = prefix[:-1].rsplit(".", 1)
    number, name = rest.split(".", 1)
    return f"{parent}.{int(offset) + int(number)}.{name}"


def _backbone(
    name: str, weights: str | Path | None, options: Mapping[str, Any]
) -> tuple[nn.Module, int, int]:
    """A dilated timm network that returns its feature maps, and the channels of the last two."""
    options = {"output_stride": 8, **options}
    if name.partition(".")[0].startswith("resnet"):
        options = _DEEP_STEM | options
    try:
        features = timm.create_model(name, features_only=True, **options)
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        raise ValueError(f"timm cannot build the backbone {name!r} with {options}: {error}") from (
            error
        )
    if weights is not None:
        load_weights(features, weights, _without_classifier)
    info: Any = features.feature_info
    *_, third, fourth = info.channels()
    return features, third, fourth


def _without_classifier(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A backbone's weights under timm's names."""
    state = {name.removeprefix("module."): value for name, value in state_dict.items()}
    state = {name: value for name, value in state.items() if not name.startswith("fc.")}
    if "conv2.weight" not in state:
        return state
    published = convert_published({f"pretrained.{name}": x for name, x in state.items()})
    return {name.removeprefix("backbone."): x for name, x in published.items()}


def _head(channels: int, width: int, num_classes: int) -> list[nn.Module]:
    return [
        nn.Conv2d(channels, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        nn.Dropout(0.1),
        nn.Conv2d(width, num_classes, 1),
    ]
