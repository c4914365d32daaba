"""`AnnotatedFiles`: image files with their boxes, in a few arrays that worker processes share."""

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lightning_dist.data.packed import PackedPaths


class Annotated(NamedTuple):
    """An image file with its boxes.

    A box is [x1, y1, x2, y2], in pixels or as fractions of the image's width and height.
    """

    image: Path
    boxes: list[list[float]]
    labels: list[int]
    crowd: list[bool]  # COCO's iscrowd: such boxes affect neither training nor the metrics
    areas: list[float] | None = None  # in square pixels; None if they are the areas of the boxes
    size: tuple[int, int] | None = None  # width and height that the annotations give, in pixels


@dataclass(frozen=True)
class AnnotatedFiles(Sequence[Annotated]):
    """Image files with their boxes in arrays: 16 bytes an image, 25 a box, and the paths.

    An item is an :class:`Annotated` that is created when it is read.

    Args:
        images: the paths of the N images.
        ends: the number of boxes up to and with each image, int64 (N,).
        sizes: the width and height in pixels that the annotations give, int32 (N, 2); 0 if none.
        boxes: the boxes of all images as x1, y1, x2, y2, float32 (K, 4).
        labels: the class of each box, int32 (K,).
        crowd: whether a box is a crowd region, bool (K,).
        areas: the area of each box in square pixels, float32 (K,), or None.
    """

    images: PackedPaths
    ends: np.ndarray
    sizes: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    areas: np.ndarray | None = None

    @classmethod
    def pack(cls, entries: Iterable[Annotated]) -> "AnnotatedFiles":
        """Return images and boxes as arrays.

        Args:
            entries: the images with their boxes.

        Raises:
            ValueError: if only some of the images have areas.
        """
        images, ends, sizes = [], array("q"), array("i")
        boxes, labels, crowd, areas = array("f"), array("i"), array("b"), array("f")
        with_areas = 0
        for entry in entries:
            images.append(entry.image)
            labels.extend(entry.labels)
            crowd.extend(entry.crowd)
            boxes.extend(side for box in entry.boxes for side in box)
            with_areas += entry.areas is not None
            areas.extend(entry.areas or ())
            sizes.extend(entry.size or (0, 0))
            ends.append(len(labels))
        if with_areas not in (0, len(images)):
            raise ValueError(f"{with_areas} of {len(images)} images have areas: give all or none")
        return cls(
            PackedPaths(images),
            np.array(ends),
            np.array(sizes).reshape(-1, 2),
            np.array(boxes).reshape(-1, 4),
            np.array(labels),
            np.array(crowd, dtype=bool),
            np.array(areas) if with_areas else None,
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Any) -> Any:
        """Return the image at an index with its boxes."""
        path, rows = Path(self.images[index]), self.rows(index)
        return Annotated(
            path,
            self.boxes[rows].tolist(),
            self.labels[rows].tolist(),
            self.crowd[rows].tolist(),
            None if self.areas is None else self.areas[rows].tolist(),
            self.size(index),
        )

    def rows(self, index: int) -> slice:
        """Return the part of the arrays that contains the boxes of an image."""
        return slice(int(self.ends[index - 1]) if index else 0, int(self.ends[index]))

    def size(self, index: int) -> tuple[int, int] | None:
        """Return the width and height that the annotations of an image give, or None."""
        width, height = self.sizes[index].tolist()
        return (width, height) if width else None

    def owners(self) -> np.ndarray:
        """Return the index of the image of each box, int64 (K,)."""
        return np.repeat(np.arange(len(self)), np.diff(self.ends, prepend=0))

    def with_boxes(self, kept: np.ndarray) -> "AnnotatedFiles":
        """Return the same images with only some of the boxes.

        Args:
            kept: a mask of the boxes, bool (K,).
        """
        counts = np.concatenate([[0], np.cumsum(kept)])
        return replace(
            self,
            ends=counts[self.ends],
            boxes=self.boxes[kept],
            labels=self.labels[kept],
            crowd=self.crowd[kept],
            areas=None if self.areas is None else self.areas[kept],
        )

    def without_empty(self) -> "AnnotatedFiles":
        """Return the images that have boxes."""
        (kept,) = np.diff(self.ends, prepend=0).nonzero()
        images = PackedPaths(self.images[index] for index in kept)
        return replace(self, images=images, ends=self.ends[kept], sizes=self.sizes[kept])
