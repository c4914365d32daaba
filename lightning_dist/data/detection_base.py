"""`DetectionDataModule`, the base class that reads, checks and mirrors image files with boxes."""

import logging
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

from lightning_dist.data.base import ImageDataModule, collate_as_lists
from lightning_dist.data.image_files import abbreviate, load_image

log = logging.getLogger(__name__)


class Annotated(NamedTuple):
    """An image file with its boxes.

    A box is [x1, y1, x2, y2], in pixels or as fractions of the image's width and height.
    """

    image: Path
    boxes: list[list[float]]
    labels: list[int]
    crowd: list[bool]  # COCO's iscrowd: such boxes affect neither training nor the metrics
    areas: list[float] | None = None  # in square pixels; None if they are the areas of the boxes


class AnnotatedImages(Dataset):
    """A data set that reads images and boxes, and applies one transform to both.

    It leaves out boxes without area, and a warning lists their images.

    Args:
        entries: the images and their boxes.
        transform: a function that takes an image (3, H, W), a uint8 tv_tensor, and its target dict,
            and returns both transformed.
        crowd: whether to keep the crowd regions; only evaluation needs them.
        relative: whether the boxes are fractions of the image's width and height, not pixels.

    Raises:
        FileNotFoundError: if images are missing; the message counts all of them.
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
        self.entries = [self._kept(entry, crowd) for entry in entries]
        flat = [str(e.image) for e in entries for box in e.boxes if not _has_area(box)]
        if flat:
            log.warning("%d boxes without area are left out: %s", len(flat), abbreviate(set(flat)))
        self.transform = transform
        self.relative = relative

    @staticmethod
    def _kept(entry: Annotated, crowd: bool) -> Annotated:
        kept = [
            index
            for index, box in enumerate(entry.boxes)
            if _has_area(box) and (crowd or not entry.crowd[index])
        ]
        return Annotated(
            entry.image,
            [entry.boxes[index] for index in kept],
            [entry.labels[index] for index in kept],
            [entry.crowd[index] for index in kept],
            None if entry.areas is None else [entry.areas[index] for index in kept],
        )

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        entry = self.entries[index]
        image = tv_tensors.Image(tvf.pil_to_tensor(load_image(str(entry.image))))
        height, width = image.shape[1:]
        boxes = torch.tensor(entry.boxes, dtype=torch.float32).reshape(-1, 4)
        if self.relative:
            boxes *= torch.tensor([width, height, width, height])
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


def _has_area(box: Sequence[float]) -> bool:
    return box[2] > box[0] and box[3] > box[1]


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

    def _evaluated(self, split: str) -> AnnotatedImages:
        return AnnotatedImages(
            self.entries(split), self.eval_transform(), True, self.relative_boxes
        )
