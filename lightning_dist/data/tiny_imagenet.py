"""A data module for Tiny-ImageNet-200 that reads the unpacked archive without changes."""

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import transforms
from torchvision.datasets import ImageFolder

from lightning_dist.checks import UNLABELED, check_number
from lightning_dist.data.base import ImageDataModule
from lightning_dist.data.image_files import abbreviate, load_image, open_image_folder
from lightning_dist.data.packed import LabelledPaths
from lightning_dist.data.unlabeled import WithTarget
from lightning_dist.files.text import read_bounded

LAYOUT = (
    "expected Tiny-ImageNet-200's own layout: wnids.txt, words.txt, train/CLASS/images/*.JPEG, "
    "val/val_annotations.txt, val/images/*.JPEG"
)


class TinyImageNetDataModule(ImageDataModule):
    """A data module of Tiny-ImageNet: (3, 64, 64), cropped, turned and mirrored at random.

    The labels number the sorted WordNet ids. The test set is the validation set, because the
    archive's test images have no labels. Published numbers are from the validation set too.

    Args:
        root: the folder that contains wnids.txt, words.txt, train and val.
        padding: the padding in pixels of the random crops of training images; 0 does not crop.
        rotation: the largest angle in degrees by which training images are turned at random.
        **settings: the arguments of ImageDataModule.

    Raises:
        FileNotFoundError: when a data set is created, if a file or folder is missing.
        ValueError: when a data set is created, if its classes differ from wnids.txt.
        OSError: when a sample is read, if the image cannot be decoded.
    """

    mean = (0.4802, 0.4481, 0.3975)
    std = (0.2770, 0.2691, 0.2821)
    image_size = 64
    tests_on_validation = True

    def __init__(
        self,
        *,
        root: str | Path = "data/tiny-imagenet-200",
        padding: int = 8,
        rotation: float = 0.0,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        check_number("padding", padding, int, least=0)
        check_number("rotation", rotation, least=0, most=180)
        self.padding, self.rotation = padding, rotation
        self.root = Path(root)
        self.location = str(self.root)

    @cached_property
    def wnids(self) -> list[str]:
        """The WordNet ids of the classes, in the order of the labels."""
        return sorted(self._read("wnids.txt").split())

    @cached_property
    def class_names(self) -> list[str]:  # type: ignore[override]
        """The names of the classes in the order of the labels, from words.txt."""
        lines = self._read("words.txt").splitlines()
        words = dict(line.split("\t", maxsplit=1) for line in lines if "\t" in line)
        return [words.get(wnid, wnid) for wnid in self.wnids]

    @property
    def num_classes(self) -> int:  # type: ignore[override]
        """The number of WordNet ids, which is 200 in the archive."""
        return len(self.wnids)

    def train_dataset(self) -> ImageFolder:
        """Return the training images with augmentation."""
        return open_image_folder(
            self.root / "train",
            self._train_transform(),
            self.wnids,
            expected_by=self.root / "wnids.txt",
        )

    def unlabeled_transform(self) -> WithTarget:
        """Return the function that makes a training sample of an image without a label.

        It resizes the image to `image_size` before the augmentation, because all images of
        Tiny-ImageNet have this size.
        """
        size = (self.image_size, self.image_size)
        steps = [transforms.Resize(size), self._train_transform()]
        return WithTarget(transforms.Compose(steps), UNLABELED)

    def _train_transform(self) -> transforms.Compose:
        augment: list[Any] = [transforms.RandomHorizontalFlip()]
        if self.rotation:
            augment.insert(0, transforms.RandomRotation(self.rotation))
        if self.padding:
            augment.insert(0, transforms.RandomCrop(self.image_size, padding=self.padding))
        return transforms.Compose([*augment, self._eval_transform()])

    def val_dataset(self) -> "ListedImages":
        """Return the validation images with the labels from val_annotations.txt."""
        return ListedImages(self._annotated(), self._eval_transform())

    def test_dataset(self) -> "ListedImages":
        """Return the validation images, because the test images have no labels."""
        return self.val_dataset()

    def _eval_transform(self) -> transforms.Compose:
        return transforms.Compose(
            [transforms.ToTensor(), transforms.Normalize(self.mean, self.std)]
        )

    def _annotated(self) -> list[tuple[Path, int]]:
        """Return the path and the label of each validation image."""
        annotations = self.root / "val" / "val_annotations.txt"
        lines = self._read("val/val_annotations.txt").splitlines()
        rows = [line.split("\t")[:2] for line in lines if line.strip()]
        label_of = {wnid: label for label, wnid in enumerate(self.wnids)}
        if unknown := {wnid for _, wnid in rows} - label_of.keys():
            raise ValueError(
                f"{annotations} has classes that are not in wnids.txt: {abbreviate(unknown)}"
            )
        images = self.root / "val" / "images"
        present = {path.name for path in images.iterdir()} if images.is_dir() else set()
        if absent := {file for file, _ in rows} - present:
            raise FileNotFoundError(
                f"{images} lacks {len(absent)} files that {annotations} lists: {abbreviate(absent)}"
            )
        return [(images / file, label_of[wnid]) for file, wnid in rows]

    def _read(self, name: str) -> str:
        try:
            return read_bounded(self.root / name).decode("utf-8")
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{self.root / name} is missing: {LAYOUT}") from error


class ListedImages(Dataset):
    """A data set of image files and labels from a list.

    Args:
        samples: the path and the label of each image.
        transform: a function that converts a PIL image to a tensor (C, H, W).
    """

    def __init__(
        self, samples: list[tuple[Path, int]], transform: Callable[[Image.Image], Tensor]
    ) -> None:
        self.samples = LabelledPaths([path for path, _ in samples], [label for _, label in samples])
        self.paths, self.targets = self.samples.paths, self.samples.labels
        self.transform = transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.samples[index]
        return self.transform(load_image(path)), label
