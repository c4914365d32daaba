"""DeepLabV3 and PSPNet on dilated timm backbones, and the conversion of published checkpoints."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.segmentation.deeplabv3 import ASPP
from torchvision.models.segmentation.fcn import FCNHead

from lightning_dist.files.weights import load_weights
from lightning_dist.models.renaming import Replacement, rename_entries

_DEEP_STEM = {"stem_type": "deep", "stem_width": 64}  # three 3x3 convolutions: 64, 64, 128 channels


class SegmentationNetwork(nn.Module):
    """A backbone with one or two heads, which return logits at the backbone's resolution.

    Args:
        backbone: a network that returns a list of feature maps; the last two maps must have the
            same resolution.
        classifier: the head that computes the logits from the last map.
        aux_classifier: the head that computes the auxiliary logits from the second to last map, or
            ``None``.

    Shape:
        Images ``(N, 3, H, W)`` to ``{"out": (N, C, h, w), "aux": (N, C, h, w)}``, in training and
        in evaluation. ``h`` is ``H`` divided by the output stride, rounded up.
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
        """Rename a published checkpoint for these networks; return other weights unchanged."""
        state = {name.removeprefix("module."): value for name, value in state_dict.items()}
        if not any(name.startswith("pretrained.") for name in state):
            return dict(state_dict)
        return convert_published(state)


class PyramidPooling(nn.Module):
    """A layer that appends to a feature map its averages over grids of several sizes.

    Args:
        channels: the number of channels of the map.
        bins: the height and width of each grid, in cells. Each grid adds ``channels // len(bins)``
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
        backbone: the name of the backbone in timm. A ResNet gets a deep stem, like the published
            networks.
        num_classes: the number of classes.
        width: the number of channels of the head; the published networks have 128 on ResNet-18 and
            256 on ResNet-101.
        rates: the dilations of the atrous pyramid, in pixels of the feature map.
        aux: add an FCN head after the third stage.
        backbone_weights: a file of ImageNet weights for the backbone, with the names of timm or of
            the published deep-stem ResNets. A classifier (``fc``) in the file is ignored.
        options: other arguments of ``timm.create_model``, such as ``pretrained`` and
            ``output_stride`` (8 by default).

    Returns:
        The network.

    Raises:
        ValueError: if timm cannot build or dilate the backbone, or the weights do not fit it.
        FileNotFoundError: if the file of weights is missing.
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
        backbone: the name of the backbone, as in :func:`deeplabv3`.
        num_classes: the number of classes.
        width: the number of channels of the head.
        bins: the height and width of each pooled grid, in cells.
        aux: add an FCN head after the third stage.
        backbone_weights: a file of ImageNet weights, as in :func:`deeplabv3`.
        options: other arguments of ``timm.create_model``, as in :func:`deeplabv3`.

    Returns:
        The network.

    Raises:
        ValueError: if timm cannot build or dilate the backbone, or the weights do not fit it.
        FileNotFoundError: if the file of weights is missing.
    """
    features, third, fourth = _backbone(backbone, backbone_weights, options)
    pyramid = PyramidPooling(fourth, bins)
    channels = fourth + len(bins) * (fourth // len(bins))
    head = nn.Sequential(pyramid, *_head(channels, width, num_classes))
    return SegmentationNetwork(features, head, FCNHead(third, num_classes) if aux else None)


# Each pattern matches published names, and its replacement is a name in the networks above. timm
# has the deep stem's convolutions and first two batch norms in the Sequential conv1, and the third
# batch norm in bn1.
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
        state_dict: the weights of DeepLabV3 or PSPNet on a deep-stem ResNet, published with DIST.

    Returns:
        The same tensors under the names of these networks, for ``load_state_dict``.

    Raises:
        ValueError: if some names belong to another network; the message lists the first ones.
    """
    renames = rename_entries(state_dict, _RENAMES, "a published DeepLabV3 or PSPNet")
    return {renamed: state_dict[name] for name, renamed in renames.items()}


def _backbone(
    name: str, weights: str | Path | None, options: Mapping[str, Any]
) -> tuple[nn.Module, int, int]:
    """Build a dilated timm backbone, and return it with the channels of its last two maps."""
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
    """Rename a backbone's weights for timm, and remove the classifier."""
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
