"""`DetectionDataModule`, the base class that reads, checks and mirrors image files with boxes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tvf

from lightning_dist.checks import check_labels
from lightning_dist.data.base import ImageDataModule, collate_as_lists
from lightning_dist.data.boxes import clip_boxes
from lightning_dist.data.image_files import (
    abbreviate,
    image_size,
    load_image,
    pick_evenly,
    warn_once,
)

SIZES_TO_CHECK = 32  # the number of images of a split whose sizes are read before training starts
_LEAST_FRACTION = 1e-6  # of the side of an image whose size is not known yet
_ROUNDING = 1e-4  # a part of the image; fractions and pixels in text files are rounded


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


class AnnotatedImages(Dataset):
    """A data set that reads images and boxes, and applies one transform to both.

    Boxes are clipped to their image, and boxes without area in it are left out. A warning counts
    both and lists their images.

    Args:
        entries: the images and their boxes.
        transform: a function that takes an image (3, H, W), a uint8 tv_tensor, and its target dict,
            and returns both transformed.
        crowd: whether to keep the crowd regions; only evaluation needs them.
        relative: whether the boxes are fractions of the image's width and height, not pixels.

    Raises:
        FileNotFoundError: if images are missing; the message counts all of them.
        ValueError: when a sample is read, if the image has another size than its annotations give.
        OSError: when a sample is read, if the image cannot be decoded.
    """

    def __init__(
        self, entries: Sequence[Annotated], transform: Any, crowd: bool, relative: bool = False
    ) -> None:
        missing = {str(entry.image) for entry in entries if not entry.image.is_file()}
        if missing:
            raise FileNotFoundError(
                f"{len(missing)} of {len(entries)} images are missing: {abbreviate(missing)}: "
                "restore them, or remove their annotations"
            )
        self.transform = transform
        self.relative = relative
        self.entries = [entry if crowd else _without_crowd(entry) for entry in entries]
        self._clip_all()

    def _clip_all(self) -> None:
        """Clip the boxes of images whose size is known, so that one warning counts them all."""
        sizes: dict[int, tuple[int, int]] = {}
        for index, entry in enumerate(self.entries):
            size = (1, 1) if self.relative else entry.size
            if entry.boxes and size is not None:
                sizes[index] = size
        of_box = [index for index in sizes for _ in self.entries[index].boxes]
        if not of_box:
            return
        boxes = torch.tensor([box for index in sizes for box in self.entries[index].boxes])
        limits = torch.tensor([sizes[index] for index in of_box])
        clipped, kept = clip_boxes(boxes, limits, *[_LEAST_FRACTION] if self.relative else [])
        moved = (clipped - boxes).abs().amax(1) > _ROUNDING * limits.amax(1)
        dropped: dict[int, list[bool]] = {of_box[i]: [] for i in (~kept).nonzero().flatten()}
        for index, keep in zip(of_box, kept.tolist(), strict=True):
            if index in dropped:
                dropped[index].append(keep)
        for index, keeps in dropped.items():
            chosen = [position for position, keep in enumerate(keeps) if keep]
            self.entries[index] = _chosen(self.entries[index], chosen)
        for some, what in (
            (~kept, "without area in their image are left out"),
            (moved & kept, "reach beyond their image and are clipped to it"),
        ):
            if some.any():
                files = {str(self.entries[of_box[i]].image) for i in some.nonzero().flatten()}
                warn_once(f"{int(some.sum())} boxes {what}: {abbreviate(files)}")

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        entry = self.entries[index]
        image = tv_tensors.Image(tvf.pil_to_tensor(load_image(str(entry.image))))
        height, width = image.shape[1:]
        refuse_other_size(entry, (width, height))
        boxes = torch.tensor(entry.boxes, dtype=torch.float32).reshape(-1, 4)
        if self.relative:
            boxes *= torch.tensor([width, height, width, height])
        boxes, kept = clip_boxes(boxes, torch.tensor([width, height]))
        if not kept.all():
            warn_once(f"{entry.image} has boxes without area, which are left out")
            entry, boxes = _chosen(entry, kept.nonzero().flatten().tolist()), boxes[kept]
        target = {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width)),
            "labels": torch.tensor(entry.labels, dtype=torch.int64),
            "iscrowd": torch.tensor(entry.crowd, dtype=torch.int64),
        }
        if entry.areas is not None:
            target["area"] = torch.tensor(entry.areas, dtype=torch.float32)
        image, target = self.transform(image, target)
        plain = {name: value.as_subclass(Tensor) for name, value in target.items()}
        return image.as_subclass(Tensor), plain

    collate = staticmethod(collate_as_lists)


def _without_crowd(entry: Annotated) -> Annotated:
    return _chosen(entry, [index for index, crowd in enumerate(entry.crowd) if not crowd])


def _chosen(entry: Annotated, indices: Sequence[int]) -> Annotated:
    """Return an image with only some of its boxes."""
    return entry._replace(
        boxes=[entry.boxes[index] for index in indices],
        labels=[entry.labels[index] for index in indices],
        crowd=[entry.crowd[index] for index in indices],
        areas=None if entry.areas is None else [entry.areas[index] for index in indices],
    )


def refuse_other_size(entry: Annotated, size: tuple[int, int]) -> None:
    """Refuse an image whose file has another size than its annotations give.

    Args:
        entry: the image and its annotations.
        size: the width and height of the upright image in pixels.

    Raises:
        ValueError: if the annotations give another size; without a size nothing is refused.
    """
    if entry.size is not None and entry.size != size:
        raise ValueError(
            f"{entry.image} has {size[0]} x {size[1]} pixels (width x height), upright by its EXIF "
            f"orientation, and its annotations say {entry.size[0]} x {entry.size[1]}: the boxes "
            "are of another image; annotate this one, or restore the annotated one"
        )


class DetectionDataModule(ImageDataModule):
    """A base class for image files with boxes: pixels in 0..1, mirrored at random in training.

    It neither resizes nor normalises images, because torchvision's detectors do both. A subclass
    defines `entries`.

    Args:
        flip: the probability of mirroring a training image horizontally with its boxes.
        skip_empty: leave out the training images that have no boxes except crowd regions.
        **settings: the arguments of ImageDataModule.
    """

    mean = (0.0, 0.0, 0.0)
    std = (1.0, 1.0, 1.0)
    relative_boxes = False

    def __init__(self, *, flip: float = 0.5, skip_empty: bool = False, **settings: Any) -> None:
        super().__init__(**settings)
        self.flip = flip
        self.skip_empty = skip_empty

    def entries(self, split: str) -> list[Annotated]:
        """Return the images and boxes of a split: "train", "val" or "test"."""
        raise NotImplementedError

    def train_transform(self) -> v2.Compose:
        """Return the training transform, which takes and returns an image and its target."""
        return v2.Compose([v2.RandomHorizontalFlip(self.flip), *self._last_steps()])

    def eval_transform(self) -> v2.Compose:
        """Return the evaluation transform, which takes and returns an image and its target."""
        return v2.Compose(self._last_steps())

    def _last_steps(self) -> list[Any]:
        return [v2.ClampBoundingBoxes(), v2.ToDtype(torch.float32, scale=True)]

    def prepare(self, image: Image.Image) -> Tensor:
        """Convert an image to a tensor (3, H, W) in 0..1 without resizing it."""
        return self._to_tensor(image)

    def train_dataset(self) -> AnnotatedImages:
        """Return the training images with augmentation and without crowd regions."""
        data = AnnotatedImages(
            self.entries("train"), self.train_transform(), False, self.relative_boxes
        )
        if self.skip_empty:
            data.entries = [entry for entry in data.entries if entry.boxes]
        return data

    def val_dataset(self) -> AnnotatedImages:
        """Return the validation images."""
        return self._evaluated("val")

    def test_dataset(self) -> AnnotatedImages:
        """Return the test images."""
        return self._evaluated("test")

    def check_dataset(self, split: str, dataset: Dataset) -> None:
        """Refuse a split without boxes, labels that are not classes, and boxes of other images.

        Raises:
            ValueError: if no image has a box, a label is not a class, or an image has another size
                than its annotations give.
        """
        if not isinstance(dataset, AnnotatedImages):
            return super().check_dataset(split, dataset)
        where = f"the {split} set of {self.location}"
        labels = [label for entry in dataset.entries for label in entry.labels]
        if not labels:
            raise ValueError(
                f"{where} has {len(dataset)} images and no box: every image would be background. "
                "Look whether the annotations are where they are expected"
            )
        check_labels(torch.tensor(labels), self.num_classes, where)
        self._refuse_other_unit(dataset, where)
        for index in pick_evenly(len(dataset), SIZES_TO_CHECK):
            entry = dataset.entries[index]
            if entry.size is not None:
                refuse_other_size(entry, image_size(entry.image))

    def _refuse_other_unit(self, dataset: AnnotatedImages, where: str) -> None:
        if self.relative_boxes:
            return
        longest = max(max(box) for entry in dataset.entries for box in entry.boxes)
        if longest <= 1:
            raise ValueError(
                f"all boxes in {where} lie within the first pixel of their image: they are "
                "fractions of its size; multiply them by its width and height"
            )

    def _evaluated(self, split: str) -> AnnotatedImages:
        return AnnotatedImages(
            self.entries(split), self.eval_transform(), True, self.relative_boxes
        )
