"""Networks for detection teachers: the classifier of a detector, or the whole detector."""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


class OneStageClassifier(nn.Module):
    """The backbone and the classification head of a detector such as RetinaNet or FCOS.

    ``logits`` is called once for each pyramid level; the student's ``cls_logits`` learns from its
    output. Boxes and detections are not computed.

    Args:
        detector: a detector with ``backbone`` and ``head.classification_head``, as in torchvision.
        class_map: for each class of the student, the index of the detector's class; by default the
            classes are the same.

    Shape:
        Input: normalised images ``(N, 3, H, W)``. Output: the backbone's feature maps by level,
        each ``(N, C, H_level, W_level)``.
    """

    def __init__(self, detector: nn.Module, class_map: Sequence[int] | None = None) -> None:
        super().__init__()
        head = detector.get_submodule("head.classification_head")
        self.backbone = detector.get_submodule("backbone")
        self.classifier = head
        self.logits = _Columns(class_map, int(head.num_classes))  # type: ignore[arg-type]

    @property
    def class_map(self) -> Tensor | None:
        """For each class of the student, the index of the detector's class."""
        return self.logits.class_map

    def map_classes(self, class_map: Sequence[int] | None) -> None:
        """Set ``class_map``, unless the constructor was given one.

        Args:
            class_map: for each class of the student, the index of the detector's class,
                or ``None`` if the classes are the same.
        """
        self.logits.map_classes(class_map)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Compute the class logits of each level, and return the backbone's maps by level."""
        maps = _by_level(self.backbone(images))
        for level in maps.values():
            features = self.classifier.get_submodule("conv")(level)
            self.logits(self.classifier.get_submodule("cls_logits")(features))
        return maps


class TwoStageClassifier(nn.Module):
    """The backbone and the box classifier of a detector such as Faster R-CNN.

    ``roi`` classifies the boxes that the student has sampled. It pools their features from this
    detector's own feature maps, not from the student's. The region proposal network and the box
    regression do not run.

    Args:
        detector: a detector with ``backbone`` and ``roi_heads``, which has ``box_roi_pool``,
            ``box_head`` and ``box_predictor.cls_score``, as in torchvision.
        class_map: for each class of the student, background included, the index of the detector's
            class; by default the classes are the same.

    Shape:
        Input: normalised images ``(N, 3, H, W)``. Output: the backbone's feature maps by level,
        each ``(N, C, H_level, W_level)``.
    """

    def __init__(self, detector: nn.Module, class_map: Sequence[int] | None = None) -> None:
        super().__init__()
        self.backbone = detector.get_submodule("backbone")
        self.roi = BoxClassifier(detector.get_submodule("roi_heads"), class_map)

    @property
    def class_map(self) -> Tensor | None:
        """For each class of the student, background included, the index of the detector's class."""
        return self.roi.columns.class_map

    def map_classes(self, class_map: Sequence[int] | None) -> None:
        """Set ``class_map``, unless the constructor was given one.

        Args:
            class_map: for each class of the student without background, the index of the detector's
                class without background, or ``None`` if the classes are the same.
        """
        self.roi.columns.map_classes(class_map, background=1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Store the backbone's maps for ``roi``, and return them by level."""
        maps = _by_level(self.backbone(images))
        self.roi.maps = maps
        return maps


class TeacherDetector(nn.Module):
    """A teacher's whole detector, which gets images that the student's transform has prepared.

    Args:
        detector: the detector; it is not changed. If its weights have half precision, a float32
            copy is used, because not every device can select boxes in half precision.
        transform: the student's transform, which resizes and normalises images.
        inputs: the conversion from these images to the teacher's, or ``None``.
        class_map: for each class of the student, background included, the index of the detector's
            class, or ``None``. Detections of other classes are left out.

    Shape:
        Input: a list of images ``(3, H, W)`` in 0..1. Output: for each image a dict of ``boxes``,
        ``labels`` and ``scores``.
    """

    def __init__(
        self,
        detector: nn.Module,
        transform: nn.Module,
        inputs: Callable[[Tensor], Tensor] | None,
        class_map: Tensor | None,
    ) -> None:
        super().__init__()
        parameter = next(detector.parameters())
        if parameter.dtype != torch.float32:
            detector = copy.deepcopy(detector).float()
        self.detector = copy.copy(detector)
        self.detector._modules = dict(detector._modules)
        self.detector._modules["transform"] = copy.copy(transform)
        if inputs is not None:
            self.detector._modules["backbone"] = _Converted(
                detector.get_submodule("backbone"), inputs
            )
        if class_map is not None:
            self.detector = Relabelled(self.detector, class_map.tolist())
        self.eval()

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        return self.detector(images)


class Relabelled(nn.Module):
    """A detector in eval mode whose predicted labels are converted to the classes of a data set.

    Args:
        detector: the detector.
        class_map: for each class of the data set, background included if there is one, the index of
            the detector's class. Detections of other classes are left out.

    Shape:
        The same as that of the detector.
    """

    def __init__(self, detector: nn.Module, class_map: Sequence[int]) -> None:
        super().__init__()
        self.detector = detector
        self.label_of = {index: label for label, index in enumerate(class_map)}

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        return [self._relabelled(one) for one in self.detector(images)]

    def _relabelled(self, one: dict[str, Tensor]) -> dict[str, Tensor]:
        labels = torch.tensor([self.label_of.get(i, -1) for i in one["labels"].tolist()])
        labels = labels.to(one["labels"])
        return {name: x[labels >= 0] for name, x in (one | {"labels": labels}).items()}


class _Converted(nn.Module):
    """A backbone with a conversion of its input images."""

    def __init__(self, backbone: nn.Module, inputs: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.backbone = backbone
        self.inputs = inputs

    def forward(self, images: Tensor) -> Tensor | dict[str, Tensor]:
        return self.backbone(self.inputs(images))


class BoxClassifier(nn.Module):
    """A box classifier that uses the teacher's feature maps instead of the student's.

    Args:
        heads: the ``roi_heads`` of the teacher's detector.
        class_map: for each class of the student, background included, the index of the detector's
            class, or ``None`` if the classes are the same.
    """

    def __init__(self, heads: nn.Module, class_map: Sequence[int] | None) -> None:
        super().__init__()
        self.box_roi_pool = heads.get_submodule("box_roi_pool")
        self.box_head = heads.get_submodule("box_head")
        self.cls_score = heads.get_submodule("box_predictor.cls_score")
        self.columns = _Columns(class_map, int(self.cls_score.out_features))  # type: ignore[arg-type]
        # The teacher's maps of the current images; the next call takes and removes them.
        self.maps: dict[str, Tensor] | None = None

    def forward(
        self,
        maps: dict[str, Tensor],
        boxes: list[Tensor],
        image_sizes: list[tuple[int, int]],
    ) -> Tensor:
        """Return the class logits of the boxes.

        Args:
            maps: the student's feature maps, which are not used. The arguments are those of the
                student's ``box_roi_pool``.
            boxes: for each image, boxes ``(R_i, 4)`` as x1, y1, x2, y2 in pixels.
            image_sizes: height and width of each image in pixels.

        Returns:
            Logits ``(R, C)`` of the boxes of all images.
        """
        own, self.maps = self.maps, None
        assert own is not None
        # Pool in the dtype of the boxes: in half precision their coordinates would shift by pixels.
        wide = {name: level.to(boxes[0].dtype) for name, level in own.items()}
        pooled = self.box_roi_pool(wide, boxes, image_sizes)
        features = self.box_head(pooled.to(self.cls_score.weight.dtype))
        return self.columns(self.cls_score(features.flatten(1)))


class _Columns(nn.Module):
    """A selection of classes from logits, along dimension 1.

    If dimension 1 holds the logits of several anchors, the classes are selected for each anchor.
    """

    class_map: Tensor | None

    def __init__(self, class_map: Sequence[int] | None, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        chosen = None if class_map is None else torch.tensor(list(class_map))
        if chosen is not None and not 0 <= int(chosen.min()) <= int(chosen.max()) < num_classes:
            raise ValueError(
                f"class_map has indices from {int(chosen.min())} to {int(chosen.max())} but the "
                f"teacher has {num_classes} classes: give indices into the teacher's classes"
            )
        self.register_buffer("class_map", chosen, persistent=False)
        self.is_given = chosen is not None

    def map_classes(self, class_map: Sequence[int] | None, background: int = 0) -> None:
        """Set ``class_map``, unless the constructor was given one.

        Args:
            class_map: for each class of the student without background, the index of the detector's
                class without background, or ``None`` to keep all classes.
            background: the number of background classes, which come first and are always kept.
        """
        if self.is_given:
            return
        if class_map is None:
            self.class_map = None
            return
        chosen = [*range(background), *(background + index for index in class_map)]
        self.class_map = torch.tensor(chosen)

    def forward(self, logits: Tensor) -> Tensor:
        if self.class_map is None:
            return logits
        by_anchor = logits.unflatten(1, (-1, self.num_classes))
        return by_anchor.index_select(2, self.class_map).flatten(1, 2)


def _by_level(maps: Tensor | dict[str, Tensor]) -> dict[str, Tensor]:
    """Return feature maps by level; a single map becomes level "0"."""
    return {"0": maps} if isinstance(maps, Tensor) else maps
