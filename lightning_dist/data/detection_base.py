"""`DetectionDataModule`, the base class that reads, checks and mirrors image files with boxes."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tvf

from lightning_dist.checks import check_labels
from lightning_dist.data.annotations import Annotated, AnnotatedFiles
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
        self, entries: Iterable[Annotated], transform: Any, crowd: bool, relative: bool = False
    ) -> None:
        if not isinstance(entries, AnnotatedFiles):
            entries = AnnotatedFiles.pack(entries)
        missing = {path for path in entries.images if not os.path.isfile(path)}
        if missing:
            raise FileNotFoundError(
                f"{len(missing)} of {len(entries)} images are missing: {abbreviate(missing)}: "
                "restore them, or remove their annotations"
            )
        self.transform = transform
        self.relative = relative
        self.entries = entries if crowd else entries.with_boxes(~entries.crowd)
        self._clip_all()

    def _clip_all(self) -> None:
        """Leave out boxes without area in images whose size is known, with one warning for all."""
        owners = self.entries.owners()
        sizes = np.ones((1, 2), np.int32) if self.relative else self.entries.sizes[owners]
        known = np.broadcast_to(sizes.all(1), len(owners))
        if not known.any():
            return
        boxes = torch.from_numpy(self.entries.boxes[known])
        limits = torch.from_numpy(np.broadcast_to(sizes, (len(owners), 2))[known])
        clipped, kept = clip_boxes(boxes, limits, *[_LEAST_FRACTION] if self.relative else [])
        moved = (clipped - boxes).abs().amax(1) > _ROUNDING * limits.amax(1)
        for some, what in (
            (~kept, "without area in their image are left out"),
            (moved & kept, "reach beyond their image and are clipped to it"),
        ):
            if some.any():
                files = {self.entries.images[index] for index in np.unique(owners[known][some])}
                warn_once(f"{int(some.sum())} boxes {what}: {abbreviate(files)}")
        if not kept.all():
            chosen = np.ones(len(owners), dtype=bool)
            chosen[known] = kept.numpy()
            self.entries = self.entries.with_boxes(chosen)

    @property
    def paths(self) -> Sequence[str]:
        """The path of each image."""
        return self.entries.images

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        entries, rows = self.entries, self.entries.rows(index)
        file = entries.images[index]
        image = tv_tensors.Image(tvf.pil_to_tensor(load_image(file)))
        height, width = image.shape[1:]
        refuse_other_size(file, entries.size(index), (width, height))
        boxes = torch.from_numpy(entries.boxes[rows])
        if self.relative:
            boxes = boxes * torch.tensor([width, height, width, height])
        boxes, kept = clip_boxes(boxes, torch.tensor([width, height]))
        if not kept.all():
            warn_once(f"{file} has boxes without area, which are left out")
        target = {
            "boxes": tv_tensors.BoundingBoxes(
                boxes[kept], format="XYXY", canvas_size=(height, width)
            ),
            "labels": torch.from_numpy(entries.labels[rows]).long()[kept],
            "iscrowd": torch.from_numpy(entries.crowd[rows]).long()[kept],
        }
        if entries.areas is not None:
            target["area"] = torch.from_numpy(entries.areas[rows])[kept]
        image, target = self.transform(image, target)
        plain = {name: value.as_subclass(Tensor) for name, value in target.items()}
        return image.as_subclass(Tensor), plain

    collate = staticmethod(collate_as_lists)


def refuse_other_size(file: str, annotated: tuple[int, int] | None, size: tuple[int, int]) -> None:
    """Refuse an image whose file has another size than its annotations give.

    Args:
        file: the image file.
        annotated: the width and height that its annotations give, or None.
        size: the width and height of the upright image in pixels.

    Raises:
        ValueError: if the annotations give another size; without a size nothing is refused.
    """
    if annotated is not None and annotated != size:
        raise ValueError(
            f"{file} has {size[0]} x {size[1]} pixels (width x height), upright by its EXIF "
            f"orientation, and its annotations say {annotated[0]} x {annotated[1]}: the boxes "
            "are of another image; annotate this one, or restore the annotated one"
        )


class WithoutBoxes:
    """A function that transforms an image and gives it the target None, which is no label.

    Args:
        transform: the transform of an image and its target; see `AnnotatedImages`.
    """

    def __init__(self, transform: Any) -> None:
        self.transform = transform

    def __call__(self, image: Image.Image) -> tuple[Tensor, None]:
        none = torch.zeros(0, 4)
        size = (image.height, image.width)
        boxes = tv_tensors.BoundingBoxes(none, format="XYXY", canvas_size=size)
        target = {"boxes": boxes, "labels": torch.zeros(0, dtype=torch.int64)}
        pixels, _ = self.transform(tv_tensors.Image(tvf.pil_to_tensor(image)), target)
        return pixels.as_subclass(Tensor), None


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

    def entries(self, split: str) -> Iterable[Annotated]:
        """Return the images and boxes of a split: "train", "val" or "test"."""
        raise NotImplementedError

    def train_transform(self) -> v2.Compose:
        """Return the training transform, which takes and returns an image and its target."""
        return v2.Compose([v2.RandomHorizontalFlip(self.flip), *self._last_steps()])

    def unlabeled_transform(self) -> "WithoutBoxes":
        """Return the function that makes a training sample of an image without a label."""
        return WithoutBoxes(self.train_transform())

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
            data.entries = data.entries.without_empty()
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
        labels = torch.from_numpy(dataset.entries.labels)
        if not len(labels):
            raise ValueError(
                f"{where} has {len(dataset)} images and no box: every image would be background. "
                "Look whether the annotations are where they are expected"
            )
        check_labels(labels, self.num_classes, where)
        self._refuse_other_unit(dataset, where)
        for index in pick_evenly(len(dataset), SIZES_TO_CHECK):
            size, file = dataset.entries.size(index), dataset.entries.images[index]
            if size is not None:
                refuse_other_size(file, size, image_size(Path(file)))

    def _refuse_other_unit(self, dataset: AnnotatedImages, where: str) -> None:
        if self.relative_boxes:
            return
        if dataset.entries.boxes.max() <= 1:
            raise ValueError(
                f"all boxes in {where} lie within the first pixel of their image: they are "
                "fractions of its size; multiply them by its width and height"
            )

    def _evaluated(self, split: str) -> AnnotatedImages:
        return AnnotatedImages(
            self.entries(split), self.eval_transform(), True, self.relative_boxes
        )
