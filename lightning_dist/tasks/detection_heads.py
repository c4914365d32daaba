"""What a student asks of a detector that teaches it: maps and class logits, but no boxes."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class OneStageClassifier(nn.Module):
    """Backbone and classification head of a detector such as RetinaNet or FCOS.

    ``logits`` is called once a pyramid level: its output is what the student's ``cls_logits``
    learns from. Neither boxes nor detections are computed.

    Args:
        detector: of torchvision, or one with ``backbone`` and ``head.classification_head``.
        class_map: the detector's class for each of the student's; by default the same.

    Shape:
        normalised images ``(N, 3, H, W)``; the backbone's maps, by level.
    """

    def __init__(self, detector: nn.Module, class_map: Sequence[int] | None = None) -> None:
        super().__init__()
        head = detector.get_submodule("head.classification_head")
        self.backbone = detector.get_submodule("backbone")
        self.classifier = head
        self.logits = _Columns(class_map, int(head.num_classes))  # type: ignore[arg-type]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps = _by_level(self.backbone(images))
        for level in maps.values():
            features = self.classifier.get_submodule("conv")(level)
            self.logits(self.classifier.get_submodule("cls_logits")(features))
        return maps


class TwoStageClassifier(nn.Module):
    """Backbone and box classifier of a detector such as Faster R-CNN.

    Its own maps of the images are classified in the boxes that the student sampled, by ``roi``.
    Neither the region proposal network nor box regression runs.

    Args:
        detector: of torchvision, or one with ``backbone`` and ``roi_heads``, which has
            ``box_roi_pool``, ``box_head`` and ``box_predictor.cls_score``.
        class_map: the detector's class for each of the student's, background included.

    Shape:
        normalised images ``(N, 3, H, W)``; the backbone's maps, by level.
    """

    def __init__(self, detector: nn.Module, class_map: Sequence[int] | None = None) -> None:
        super().__init__()
        self.backbone = detector.get_submodule("backbone")
        self.roi = BoxClassifier(detector.get_submodule("roi_heads"), class_map)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps = _by_level(self.backbone(images))
        self.roi.maps = maps
        return maps


class BoxClassifier(nn.Module):
    """Class logits ``(R, C)`` of boxes, from the teacher's maps instead of the given ones.

    Args:
        heads: the detector's ``roi_heads``.
        class_map: see :class:`TwoStageClassifier`.
    """

    def __init__(self, heads: nn.Module, class_map: Sequence[int] | None) -> None:
        super().__init__()
        self.box_roi_pool = heads.get_submodule("box_roi_pool")
        self.box_head = heads.get_submodule("box_head")
        self.cls_score = heads.get_submodule("box_predictor.cls_score")
        self.columns = _Columns(class_map, int(self.cls_score.out_features))  # type: ignore[arg-type]
        self.maps: dict[str, Tensor] | None = None  # until the boxes of these images are asked for

    def forward(
        self,
        maps: dict[str, Tensor],
        boxes: list[Tensor],
        image_sizes: list[tuple[int, int]],
    ) -> Tensor:
        own, self.maps = self.maps, None
        assert own is not None
        # In the boxes' dtype: half precision would move them by pixels.
        wide = {name: level.to(boxes[0].dtype) for name, level in own.items()}
        pooled = self.box_roi_pool(wide, boxes, image_sizes)
        features = self.box_head(pooled.to(self.cls_score.weight.dtype))
        return self.columns(self.cls_score(features.flatten(1)))


class _Columns(nn.Module):
    """Picks classes along dimension 1, for each anchor where there are several."""

    def __init__(self, class_map: Sequence[int] | None, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        chosen = None if class_map is None else torch.tensor(list(class_map))
        if chosen is not None and not 0 <= int(chosen.min()) <= int(chosen.max()) < num_classes:
            raise ValueError(
                f"class_map has indices from {int(chosen.min())} to {int(chosen.max())} and the "
                f"teacher {num_classes} classes: give indices into the teacher's classes"
            )
        self.register_buffer("class_map", chosen, persistent=False)

    def forward(self, logits: Tensor) -> Tensor:
        if self.class_map is None:
            return logits
        by_anchor = logits.unflatten(1, (-1, self.num_classes))
        return by_anchor.index_select(2, self.class_map).flatten(1, 2)


def _by_level(maps: Tensor | dict[str, Tensor]) -> dict[str, Tensor]:
    return {"0": maps} if isinstance(maps, Tensor) else maps
