"""The parts of MMDetection's published teachers that distillation calls, and their weights."""

import re
from collections.abc import Mapping
from types import SimpleNamespace

import torch
import torchvision
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.ops import roi_align
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from lightning_dist.models.renaming import Replacement, rename_entries

_CHANNELS = {"layer1": 256, "layer2": 512, "layer3": 1024, "layer4": 2048}


class MMDetector(nn.Module):
    """The backbone and the classification head of a detector.

    It has no `forward`, because distillation calls its parts. As in torchvision's detectors, the
    attribute `transform` has the mean and standard deviation of the images, here ImageNet's.

    Args:
        backbone: a network that maps images (N, 3, H, W) to a dict of the feature pyramid's levels.
        **parts: the other sub-modules, under the names of their attributes.
    """

    def __init__(self, backbone: nn.Module, **parts: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        for name, part in parts.items():
            self.add_module(name, part)
        self.transform = SimpleNamespace(
            image_mean=IMAGENET_DEFAULT_MEAN, image_std=IMAGENET_DEFAULT_STD
        )

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename MMDetection's weights for these networks; return other weights unchanged."""
        if not any(name.startswith("neck.") for name in state_dict):
            return dict(state_dict)
        return convert_mmdetection(state_dict)


def cascade_rcnn(
    backbone: str = "resnext101_64x4d", num_classes: int = 80, width: int = 1024
) -> MMDetector:
    """Build a Cascade (Mask) R-CNN with an FPN, up to the class logits of its first stage.

    Args:
        backbone: the name of a ResNet with bottlenecks in torchvision.
        num_classes: the number of classes without the background; logit 0 is the background, as in
            torchvision.
        width: the number of output features of the box head's two layers.
    """
    heads = nn.Module()
    heads.box_roi_pool = AlignedRoIPool()
    heads.box_head = TwoMLPHead(256 * 7 * 7, width)
    heads.box_predictor = nn.Module()
    heads.box_predictor.cls_score = nn.Linear(width, num_classes + 1)
    return MMDetector(_pyramid(backbone, 1), roi_heads=heads)


def retinanet(
    backbone: str = "resnext101_64x4d", num_classes: int = 80, num_anchors: int = 9
) -> MMDetector:
    """Build a RetinaNet with an FPN, up to the class logits.

    Args:
        backbone: the name of a ResNet with bottlenecks in torchvision.
        num_classes: the number of classes.
        num_anchors: the number of anchors at each pixel of a feature map.
    """
    head = nn.ModuleDict({"classification_head": _ClassMaps(num_anchors, num_classes)})
    return MMDetector(_pyramid(backbone, 2), head=head)


class _ClassMaps(nn.Module):
    """RetinaNet's layers for class logits, under the names of torchvision's classification head."""

    def __init__(self, num_anchors: int, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        convs = [nn.Sequential(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU()) for _ in range(4)]
        self.conv = nn.Sequential(*convs)
        self.cls_logits = nn.Conv2d(256, num_anchors * num_classes, 3, padding=1)


class AlignedRoIPool(nn.Module):
    """A RoIAlign with half-pixel alignment, because torchvision 0.29's MultiScaleRoIAlign has none.

    The square root of a box's area selects the map: stride 4 below 112 pixels, stride 8 below 224,
    stride 16 below 448, and otherwise stride 32.

    Shape:
        A dict of maps (N, 256, h, w), the first four with strides 4 to 32, and N tensors of boxes
        (K, 4) in pixels, to (sum of all K, 256, 7, 7).
    """

    def forward(
        self, maps: dict[str, Tensor], boxes: list[Tensor], image_sizes: list[tuple[int, int]]
    ) -> Tensor:
        index = torch.cat([box.new_full((len(box), 1), i) for i, box in enumerate(boxes)])
        rois = torch.cat([index, torch.cat(boxes)], dim=1)
        side = ((rois[:, 3] - rois[:, 1]) * (rois[:, 4] - rois[:, 2])).sqrt()
        level = torch.floor(torch.log2(side / 56 + 1e-6)).clamp(0, 3)
        pooled = rois.new_zeros(len(rois), 256, 7, 7)
        for i, features in enumerate(list(maps.values())[:4]):
            chosen = (level == i).nonzero().flatten()
            part = roi_align(features, rois[chosen], 7, 1 / 2 ** (i + 2), 0, aligned=True)
            pooled[chosen] = part.to(pooled.dtype)
        return pooled


class _ExtraLevels(LastLevelP6P7):
    """Two extra pyramid levels after the last stage, without torchvision's ReLU between them."""

    def forward(
        self, p: list[Tensor], c: list[Tensor], names: list[str]
    ) -> tuple[list[Tensor], list[str]]:
        sixth = self.p6(c[-1])
        return [*p, sixth, self.p7(sixth)], [*names, "p6", "p7"]


# Each pattern matches names in MMDetection, and its replacement is a name in the networks above.
_RENAMES: list[tuple[str, Replacement]] = [
    (r"backbone\.", "backbone.body."),
    (r"neck\.lateral_convs\.(\d)\.conv\.", r"backbone.fpn.inner_blocks.\1.0."),
    (r"neck\.fpn_convs\.(\d)\.conv\.", r"backbone.fpn.layer_blocks.\1.0."),
    (
        r"roi_head\.bbox_head\.(?:0\.)?shared_fcs\.([01])\.",
        lambda m: f"roi_heads.box_head.fc{6 + int(m[1])}.",
    ),
    (r"roi_head\.bbox_head\.(?:0\.)?fc_cls\.", "roi_heads.box_predictor.cls_score."),
    (r"bbox_head\.cls_convs\.(\d)\.conv\.", r"head.classification_head.conv.\1.0."),
    (r"bbox_head\.retina_cls\.", "head.classification_head.cls_logits."),
]
# Distillation does not call these parts: proposals, box regression, masks and later stages.
_UNUSED = re.compile(
    r"rpn_head\.|roi_head\.mask_head\.|roi_head\.semantic_head\.|roi_head\.bbox_head\.[12]\."
    r"|roi_head\.bbox_head\.(?:0\.)?fc_reg\.|bbox_head\.reg_convs\.|bbox_head\.retina_reg\."
)


def convert_mmdetection(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert a published detector's weights for :func:`cascade_rcnn` or :func:`retinanet`.

    MMDetection's two-stage detectors have the background as the last class, but these networks have
    it as the first. Proposals, box regression, masks and the cascade's later stages are left out,
    because distillation does not call them.

    Args:
        state_dict: the weights of a two-stage detector or a RetinaNet with an FPN.

    Returns:
        The tensors under these networks' names, for ``load_state_dict``.

    Raises:
        ValueError: if some names belong to another network; the message lists the first ones.
    """
    renames = rename_entries(
        (name for name in state_dict if not _UNUSED.match(name)),
        _RENAMES,
        "a two-stage detector or RetinaNet of MMDetection",
    )
    one_stage = any(name.startswith("bbox_head.") for name in state_dict)
    converted = {}
    for name, renamed in renames.items():
        if one_stage:  # torchvision names the last two levels of RetinaNet's pyramid p6 and p7
            renamed = renamed.replace("fpn.layer_blocks.3.0", "fpn.extra_blocks.p6")
            renamed = renamed.replace("fpn.layer_blocks.4.0", "fpn.extra_blocks.p7")
        value = state_dict[name]
        converted[renamed] = value.roll(1, 0) if ".cls_score." in renamed else value
    return converted


def _pyramid(backbone: str, first: int) -> BackboneWithFPN:
    """Build a feature pyramid of 256 channels from the stages `layer{first}` to `layer4`.

    If `first` is 2, it is the pyramid of RetinaNet, which has two extra levels.
    """
    body = torchvision.models.get_model(backbone, weights=None)
    del body.fc
    stages = list(_CHANNELS)[first - 1 :]
    return BackboneWithFPN(
        body,
        return_layers={name: str(level) for level, name in enumerate(stages)},
        in_channels_list=[_CHANNELS[name] for name in stages],
        out_channels=256,
        extra_blocks=_ExtraLevels(2048, 256) if first == 2 else None,
    )
