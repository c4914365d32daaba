"""MMDetection's published teachers, as far as distillation asks them, and their names."""

import re
from collections.abc import Callable, Mapping
from types import SimpleNamespace

import torch
import torchvision
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.ops import roi_align
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from lightning_dist.weights import refuse_unknown

_CHANNELS = {"layer1": 256, "layer2": 512, "layer3": 1024, "layer4": 2048}


class MMDetector(nn.Module):
    """The backbone and the classifying head of a detector; it is asked in parts and has no forward.

    Its images are normalised as ImageNet's, as torchvision's detectors normalise them.
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
        """These networks' names for MMDetection's; others stay as they are."""
        if not any(name.startswith("neck.") for name in state_dict):
            return dict(state_dict)
        return convert_mmdetection(state_dict)


def cascade_rcnn(
    backbone: str = "resnext101_64x4d", num_classes: int = 80, width: int = 1024
) -> MMDetector:
    """Cascade (Mask) R-CNN with an FPN, up to the classes of its first stage.

    Args:
        backbone: torchvision's name of a ResNet with bottlenecks.
        num_classes: number of classes; the background is in front of them, as in torchvision.
        width: of the box head's two layers.
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
    """RetinaNet with an FPN, up to the classes.

    Args:
        backbone: torchvision's name of a ResNet with bottlenecks.
        num_classes: number of classes.
        num_anchors: anchors a place.
    """
    head = nn.ModuleDict({"classification_head": _ClassMaps(num_anchors, num_classes)})
    return MMDetector(_pyramid(backbone, 2), head=head)


class _ClassMaps(nn.Module):
    """RetinaNet's classifying layers."""

    def __init__(self, num_anchors: int, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        convs = [nn.Sequential(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU()) for _ in range(4)]
        self.conv = nn.Sequential(*convs)
        self.cls_logits = nn.Conv2d(256, num_anchors * num_classes, 3, padding=1)


class AlignedRoIPool(nn.Module):
    """RoIAlign with half-pixel alignment, which torchvision's MultiScaleRoIAlign does not have.

    A box of side 56 to 112 is read from stride 4, twice that from stride 8, and so on up to 32.
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
    """Two more levels on the last stage, without the ReLU that torchvision has between them."""

    def forward(
        self, p: list[Tensor], c: list[Tensor], names: list[str]
    ) -> tuple[list[Tensor], list[str]]:
        sixth = self.p6(c[-1])
        return [*p, sixth, self.p7(sixth)], [*names, "p6", "p7"]


# MMDetection's name, as a pattern, and ours.
_NAMES: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [
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
# What distillation does not ask: proposals, boxes, masks, later stages.
_LEFT_OUT = re.compile(
    r"rpn_head\.|roi_head\.mask_head\.|roi_head\.semantic_head\.|roi_head\.bbox_head\.[12]\."
    r"|roi_head\.bbox_head\.(?:0\.)?fc_reg\.|bbox_head\.reg_convs\.|bbox_head\.retina_reg\."
)


def convert_mmdetection(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A published detector's weights under the names of :func:`cascade_rcnn` or :func:`retinanet`.

    MMDetection has the background behind the classes of a two-stage detector, these networks in
    front of them. What distillation does not ask is left out: proposals, box regression, masks, and
    the cascade's later stages.

    Args:
        state_dict: of a two-stage detector or a RetinaNet with an FPN.

    Returns:
        Its tensors, for ``load_state_dict``.

    Raises:
        ValueError: if it has other names; they are listed.
    """
    converted, unknown = {}, []
    one_stage = any(name.startswith("bbox_head.") for name in state_dict)
    for name, value in state_dict.items():
        if _LEFT_OUT.match(name):
            continue
        for pattern, ours in _NAMES:
            renamed, count = re.subn(f"^{pattern}", ours, name)
            if count:
                break
        else:
            unknown.append(name)
            continue
        if one_stage:  # the pyramid's last two levels have names of their own here
            renamed = renamed.replace("fpn.layer_blocks.3.0", "fpn.extra_blocks.p6")
            renamed = renamed.replace("fpn.layer_blocks.4.0", "fpn.extra_blocks.p7")
        if ".cls_score." in renamed:
            value = value.roll(1, 0)
        converted[renamed] = value
    refuse_unknown(unknown, "a two-stage detector or RetinaNet of MMDetection")
    return converted


def _pyramid(backbone: str, first: int) -> BackboneWithFPN:
    """A feature pyramid of 256 channels on the stages from the first one on, and what follows."""
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
