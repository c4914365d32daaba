"""BoxAveragePrecision: COCO's mean average precision of boxes, with bounded memory and traffic."""

import itertools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from faster_coco_eval import COCO, COCOeval_faster
from torch import Tensor, distributed
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

# Without this line, faster_coco_eval prints its table in each epoch if logging is configured, as
# Hydra does.
logging.getLogger("faster_coco_eval").setLevel(logging.WARNING)
SIZES = ("small", "medium", "large")
NAMES = ("map", "map_50", "map_75", *(f"map_{size}" for size in SIZES))
# The thresholds of torchmetrics, which are rounded to float32, so that the values are the same.
_IOUS = np.array(torch.linspace(0.5, 0.95, 10).tolist())
_RECALLS = np.array(torch.linspace(0, 1, 101).tolist())
_MOST_FOUND = 100  # boxes of a class in an image; COCO leaves out those with lower scores
_FOUND, _TARGET = 7, 8  # the numbers of columns, see the states


class BoxAveragePrecision(Metric):
    """COCO's mean average precision (mAP) of boxes, computed by faster_coco_eval.

    The values are those of torchmetrics' ``MeanAveragePrecision``, to the last bit. That metric
    stores an entry for each pair of image and class, and gathers each image's tensors one by one.
    This metric evaluates one class after the other and gathers two tensors in all, and only the
    first rank evaluates. A value is -1 if there are no boxes to find.

    With several processes, each rank should see every n-th image, as a DistributedSampler does it:
    then boxes with equal scores have the same order as in one process.

    Example:
        >>> metric = BoxAveragePrecision()
        >>> boxes, labels = torch.tensor([[0.0, 0.0, 50.0, 60.0]]), torch.tensor([3])
        >>> found = {"boxes": boxes + 2, "labels": labels, "scores": torch.tensor([0.9])}
        >>> metric.update([found], [{"boxes": boxes, "labels": labels}])
        >>> values = metric.compute()
        >>> [round(values[name].item(), 2) for name in ("map", "map_50", "map_small")]
        [0.8, 1.0, -1.0]
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    found: list[Tensor]
    targets: list[Tensor]
    images: Tensor

    def __init__(self) -> None:
        super().__init__()
        # A row of a found box: image, label, x, y, width, height, score.
        self.add_state("found", default=[], dist_reduce_fx="cat")
        # A row of a box to find: image, label, x, y, width, height, area, crowd.
        self.add_state("targets", default=[], dist_reduce_fx="cat")
        self.add_state("images", default=torch.tensor(0), dist_reduce_fx="sum")

    def update(
        self, preds: Sequence[Mapping[str, Tensor]], target: Sequence[Mapping[str, Tensor]]
    ) -> None:
        """Add the boxes of some images.

        Args:
            preds: for each image the found ``boxes``, float ``(K, 4)`` as x1, y1, x2, y2, and their
                ``labels`` and ``scores``, ``(K,)``.
            target: for each image its ``boxes`` and ``labels``, and optionally ``iscrowd`` and
                ``area`` in square pixels, ``(K,)``.

        Raises:
            ValueError: if the numbers of images differ.
        """
        world, rank = 1, 0
        if distributed.is_available() and distributed.is_initialized():
            world, rank = distributed.get_world_size(), distributed.get_rank()
        found, targets = [self._no_rows(_FOUND)], [self._no_rows(_TARGET)]
        for index, (one, true) in enumerate(zip(preds, target, strict=True), int(self.images)):
            image, zeros = index * world + rank, torch.zeros_like(true["labels"])
            extra = true.get("area", zeros), true.get("iscrowd", zeros)
            found.append(self._rows(image, one, one["scores"]))
            targets.append(self._rows(image, true, *extra))
        self.found.append(torch.cat(found))
        self.targets.append(torch.cat(targets))
        self.images = self.images + len(target)

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Gather the rows of all ranks, also if this rank has seen no image.

        Args:
            args: the positional arguments of ``torchmetrics.Metric.sync``.
            kwargs: its keyword arguments.
        """
        self.found = self.found or [self._no_rows(_FOUND)]
        self.targets = self.targets or [self._no_rows(_TARGET)]
        super().sync(*args, **kwargs)

    def compute(self) -> dict[str, Tensor]:
        """Return the values by their names, scalars in float32, which the first rank computes."""
        values = torch.full((len(NAMES),), -1.0, device=self.device)
        if self.images > 0 and (not self._is_synced or distributed.get_rank() == 0):
            found, targets = (dim_zero_cat(x).cpu().numpy() for x in (self.found, self.targets))
            values.copy_(torch.from_numpy(_evaluate(found, targets)))
        if self._is_synced:
            distributed.broadcast(values, src=0)
        return dict(zip(NAMES, values, strict=True))

    def _no_rows(self, columns: int) -> Tensor:
        # Apple's MPS has no float64.
        wide = torch.float32 if self.device.type == "mps" else torch.float64
        return torch.empty(0, columns, dtype=wide, device=self.device)

    def _rows(self, image: int, boxes: Mapping[str, Tensor], *last: Tensor) -> Tensor:
        """Return a row for each box of an image."""
        corners, labels = boxes["boxes"].reshape(-1, 4), boxes["labels"].reshape(-1, 1)
        sides = corners[:, 2:] - corners[:, :2]
        parts = labels, corners[:, :2], sides, *(x.reshape(-1, 1) for x in last)
        numbers = [x.to(self._no_rows(0)) for x in parts]
        return torch.cat([torch.full_like(numbers[0], image), *numbers], dim=1)


def _evaluate(found: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Return the values of :data:`NAMES`.

    Args:
        found: the rows of the found boxes, see the states of :class:`BoxAveragePrecision`.
        targets: the rows of the boxes to find.
    """
    # Sorted by label and image; the sort is stable, so the boxes of an image keep their order.
    found, targets = (rows[np.lexsort((rows[:, 0], rows[:, 1]))] for rows in (found, targets))
    classes = [
        _precision(_rows_of(label, found), _rows_of(label, targets))
        for label in np.unique(targets[:, 1])
    ]
    if not classes:
        return np.full(len(NAMES), -1.0)
    # IoU thresholds, recall thresholds, classes, sizes; the first size is any size.
    precision = np.concatenate(classes, axis=2)
    every = precision[..., 0]
    chosen = [every, every[_IOUS == 0.5], every[_IOUS == 0.75]]
    chosen += [precision[..., index] for index in range(1, 1 + len(SIZES))]
    # The precision is -1 where a class has no box to find.
    return np.array([x[x > -1].mean() if (x > -1).any() else -1.0 for x in chosen])


def _rows_of(label: float, rows: np.ndarray) -> np.ndarray:
    """Return the rows of a class, from rows that are sorted by label."""
    first, last = (np.searchsorted(rows[:, 1], label, side) for side in ("left", "right"))
    return rows[first:last]


def _precision(found: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Return the precision of one class at all thresholds, as faster_coco_eval computes it.

    Args:
        found: the rows of the class's found boxes, sorted by image.
        targets: the rows of the class's boxes to find, sorted by image.

    Returns:
        The precision, of shape (IoU thresholds, recall thresholds, 1, sizes).
    """
    images = np.union1d(found[:, 0], targets[:, 0]).astype(int).tolist()
    area = np.where(targets[:, 6] > 0, targets[:, 6], targets[:, 4] * targets[:, 5])
    crowd = targets[:, 7].astype(int)
    evaluation = COCOeval_faster(
        _as_coco(images, targets, area=area, iscrowd=crowd),
        _as_coco(images, found, area=found[:, 4] * found[:, 5], score=found[:, 6]),
        iouType="bbox",
    )
    evaluation.params.iouThrs = _IOUS
    evaluation.params.recThrs = _RECALLS
    evaluation.params.maxDets = [_MOST_FOUND]
    evaluation.evaluate()
    evaluation.accumulate()
    precision: np.ndarray = evaluation.eval["precision"]
    return precision[..., -1]


def _as_coco(images: list[int], rows: np.ndarray, **columns: np.ndarray) -> COCO:
    """Return the boxes of one class in COCO's form, with further columns."""
    names = ("id", "image_id", "category_id", "bbox", *columns)
    values = zip(
        range(1, len(rows) + 1),
        rows[:, 0].astype(int).tolist(),
        itertools.repeat(1),
        rows[:, 2:6].tolist(),
        *(column.tolist() for column in columns.values()),
        strict=False,
    )
    coco = COCO()
    coco.dataset = {
        "images": [{"id": image} for image in images],
        "categories": [{"id": 1}],
        "annotations": [dict(zip(names, one, strict=True)) for one in values],
    }
    coco.createIndex()
    return coco
