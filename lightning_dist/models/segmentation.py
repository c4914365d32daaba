"""DeepLabV3 and PSPNet on dilated timm backbones, and conversion of published checkpoints."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.segmentation.deeplabv3 import ASPP
from torchvision.models.segmentation.fcn import FCNHead

from lightning_dist.models.renaming import Replacement, rename_entries
from lightning_dist.weights import load_weights

_DEEP_STEM = {"stem_type": "deep", "stem_width": 64}  # 3x3 convolutions to 64, 64, 128 channels


class SegmentationNetwork(nn.Module):
    """A backbone and two heads, which return logits at the backbone's resolution.

    Args:
        backbone: returns a list of feature maps, of which the last two have the same resolution.
        classifier: computes the logits from the last map.
        aux_classifier: computes the auxiliary logits from the map before, or ``None``.

    Shape:
        Images ``(N, 3, H, W)`` to ``{"out": (N, C, h, w), "aux": (N, C, h, w)}``, in training and
        in evaluation, where ``h`` is ``H`` divided by the output stride, rounded up.
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
        """Return a published checkpoint under these networks' names, and all others unchanged."""
        state = {name.removeprefix("module."): value for name, value in state_dict.items()}
        if not any(name.startswith("pretrained.") for name in state):
            return dict(state_dict)
        return convert_published(state)


class PyramidPooling(nn.Module):
    """Append to a feature map its averages over grids of several sizes.

    Args:
        channels: number of channels of the map.
        bins: height and width of each grid, in cells; a branch has ``channels // len(bins)``
            channels.

    Shape:
        ``(N, channels, H, W)`` to ``(N, channels + len(bins) * (channels // len(bins)), H, W)``.
    """

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
    """Build a DeepLabV3 (Chen et al., 2017).

    Args:
        backbone: timm's name of the backbone; a ResNet gets the published networks' deep stem.
        num_classes: number of classes.
        width: channels of the head; the published networks have 128 on ResNet-18 and 256 on
            ResNet-101.
        rates: dilations of the atrous pyramid, in pixels of the feature map.
        aux: add an FCN head on the third stage.
        backbone_weights: file with the backbone's weights from ImageNet, under timm's names or the
            names of the published deep-stem ResNets; a classifier (``fc``) in it is left out.
        options: arguments of ``timm.create_model``, such as ``pretrained`` and ``output_stride``
            (8 by default).

    Returns:
        The network.

    Raises:
        ValueError: if timm cannot build or dilate the backbone, or the weights do not fit it.
        FileNotFoundError: if there is no such weight file.
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
    """Build a PSPNet (Zhao et al., 2017).

    Args:
        backbone: as in :func:`deeplabv3`.
        num_classes: number of classes.
        width: channels of the head.
        bins: height and width of the pooled grids, in cells.
        aux: add an FCN head on the third stage.
        backbone_weights: as in :func:`deeplabv3`.
        options: as in :func:`deeplabv3`.

    Returns:
        The network.

    Raises:
        ValueError: as in :func:`deeplabv3`.
        FileNotFoundError: if there is no such weight file.
    """
    features, third, fourth = _backbone(backbone, backbone_weights, options)
    pyramid = PyramidPooling(fourth, bins)
    channels = fourth + len(bins) * (fourth // len(bins))
    head = nn.Sequential(pyramid, *_head(channels, width, num_classes))
    return SegmentationNetwork(features, head, FCNHead(third, num_classes) if aux else None)


# Patterns of the published names, and the names of the networks above. timm has the deep stem's
# convolutions and first two batch norms in one Sequential, conv1, and the third norm in bn1.
_RENAMES: list[tuple[str, Replacement]] = [
    (r"pretrained\.conv([123])\.", lambda m: f"backbone.conv1.{3 * (int(m[1]) - 1)}."),
    (r"pretrained\.bn([12])\.", lambda m: f"backbone.conv1.{3 * int(m[1]) - 2}."),
    (r"pretrained\.bn3\.", "backbone.bn1."),
    (r"pretrained\.(layer[1-4])\.", r"backbone.\1."),
    (r"head\.aspp\.b0\.", "classifier.0.convs.0."),
    (r"head\.aspp\.b([123])\.block\.", r"classifier.0.convs.\1."),
    (r"head\.aspp\.b4\.gap\.", "classifier.0.convs.4."),
    (r"head\.aspp\.project\.", "classifier.0.project."),
    (
        r"head\.psp\.conv([1-4])\.(\d+)\.",
        lambda m: f"classifier.0.branches.{int(m[1]) - 1}.{1 + int(m[2])}.",
    ),
    (r"head\.block\.(\d+)\.", lambda m: f"classifier.{1 + int(m[1])}."),
    (r"head\.classifier\.", "classifier.5."),
    (r"auxlayer\.block\.", "aux_classifier."),
]


def convert_published(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert a published Cityscapes checkpoint for :func:`deeplabv3` or :func:`pspnet`.

    Args:
        state_dict: weights of DeepLabV3 or PSPNet on a deep-stem ResNet, as published with DIST.

    Returns:
        The same tensors under these networks' names, for ``load_state_dict``.

    Raises:
        ValueError: if some names are of another network; the message lists them.
    """
    renames = rename_entries(state_dict, _RENAMES, "a published DeepLabV3 or PSPNet")
    return {renamed: state_dict[name] for name, renamed in renames.items()}


def _backbone(
    name: str, weights: str | Path | None, options: Mapping[str, Any]
) -> tuple[nn.Module, int, int]:
    """Build a dilated timm backbone; return it and the channels of its last two feature maps."""
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
    """Return a backbone's weights under timm's names, without the classifier."""
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
