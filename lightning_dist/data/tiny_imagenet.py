"""Tiny-ImageNet-200, read from the files as they come out of its archive."""

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import transforms
from torchvision.datasets import ImageFolder

from lightning_dist.data.base import ImageDataModule
from lightning_dist.data.image_files import few, load_image, open_folder

LAYOUT = (
    "expected Tiny-ImageNet-200's own layout: wnids.txt, words.txt, train/CLASS/images/*.JPEG, "
    "val/val_annotations.txt, val/images/*.JPEG"
)


class TinyImageNetDataModule(ImageDataModule):
    """Tiny-ImageNet as (3, 64, 64) float32: random crops with 8 pixels of padding, random flips.

    The labels follow the WordNet ids in alphabetical order. The archive's test images have no
    labels, so that published numbers are on the validation images: validation and test are both.

    Args:
        root: folder with wnids.txt, words.txt, train and val.
        **settings: see ImageDataModule.

    Raises:
        FileNotFoundError: when a data set is opened and a file or folder is missing.
        ValueError: when it is opened and its classes are not those of wnids.txt.
        OSError: when an image cannot be decoded; names the file.
    """

    mean = (0.4802, 0.4481, 0.3975)
    std = (0.2770, 0.2691, 0.2821)
    image_size = 64

    def __init__(self, *, root: str | Path = "data/tiny-imagenet-200", **settings: Any) -> None:
        super().__init__(**settings)
        self.root = Path(root)
        self.location = str(self.root)

    @cached_property
    def wnids(self) -> list[str]:
        """WordNet ids of the classes, in the order of the labels."""
        return sorted(self._read("wnids.txt").split())

    @cached_property
    def class_names(self) -> list[str]:  # type: ignore[override]
        """The classes in words, from words.txt."""
        lines = self._read("words.txt").splitlines()
        words = dict(line.split("\t", maxsplit=1) for line in lines if "\t" in line)
        return [words.get(wnid, wnid) for wnid in self.wnids]

    @property
    def num_classes(self) -> int:  # type: ignore[override]
        """Number of WordNet ids, 200 in the archive."""
        return len(self.wnids)

    def train_dataset(self) -> ImageFolder:
        """The training images, augmented."""
        crop = transforms.RandomCrop(self.image_size, padding=self.image_size // 8)
        augment = [crop, transforms.RandomHorizontalFlip()]
        transform = transforms.Compose([*augment, self._to_tensor()])
        return open_folder(
            self.root / "train", transform, self.wnids, expected_by=self.root / "wnids.txt"
        )

    def val_dataset(self) -> "ListedImages":
        """The validation images with the labels of val_annotations.txt."""
        return ListedImages(self._annotated(), self._to_tensor())

    def test_dataset(self) -> "ListedImages":
        """The validation images, as no others have labels."""
        return self.val_dataset()

    def _to_tensor(self) -> transforms.Compose:
        return transforms.Compose(
            [transforms.ToTensor(), transforms.Normalize(self.mean, self.std)]
        )

    def _annotated(self) -> list[tuple[Path, int]]:
        """Path and label of each validation image."""
        annotations = self.root / "val" / "val_annotations.txt"
        lines = self._read("val/val_annotations.txt").splitlines()
        rows = [line.split("\t")[:2] for line in lines if line.strip()]
        label_of = {wnid: label for label, wnid in enumerate(self.wnids)}
        if unknown := {wnid for _, wnid in rows} - label_of.keys():
            raise ValueError(f"{annotations} has classes that wnids.txt has not: {few(unknown)}")
        images = self.root / "val" / "images"
        present = {path.name for path in images.iterdir()} if images.is_dir() else set()
        if absent := {file for file, _ in rows} - present:
            raise FileNotFoundError(
                f"{images} lacks {len(absent)} files that {annotations} lists: {few(absent)}"
            )
        return [(images / file, label_of[wnid]) for file, wnid in rows]

    def _read(self, name: str) -> str:
        try:
            return (self.root / name).read_text(encoding="utf-8")
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{self.root / name} is missing: {LAYOUT}") from error


class ListedImages(Dataset):
    """Images and labels from a list.

    Args:
        samples: path and label of each image.
        transform: makes the tensor of an image.
    """

    def __init__(
        self, samples: list[tuple[Path, int]], transform: Callable[[Image.Image], Tensor]
    ) -> None:
        self.samples = samples
        self.transform = transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.samples[index]
        return self.transform(load_image(str(path))), label
