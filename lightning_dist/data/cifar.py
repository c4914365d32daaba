"""CIFAR-10 and CIFAR-100, held in memory, with the augmentation of the published recipes."""

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100

from lightning_dist.data.base import ImageDataModule, stratified_split
from lightning_dist.data.tensor_images import TensorImages


class CIFAR10DataModule(ImageDataModule):
    """CIFAR-10 as (3, 32, 32) float32: random crops with 4 pixels of padding, and random flips.

    Validation is on the official test images, as in the published numbers (which are those of the
    last epoch, not of the best), unless `val_fraction` holds training images out.

    Args:
        root: folder that holds, or shall hold, torchvision's folder of the data set.
        download: fetch the data set if it is not there.
        val_fraction: part of the training images to hold out for validation, stratified; the same
            in every run, whatever `seed`.
        **settings: see ImageDataModule.

    Raises:
        FileNotFoundError: when a data set is opened and its files are missing or damaged.
    """

    source: type[CIFAR10] = CIFAR10
    num_classes = 10
    mean = (0.4914, 0.4822, 0.4465)
    std = (0.2470, 0.2435, 0.2616)
    image_size = 32

    def __init__(
        self,
        *,
        root: str | Path = "data",
        download: bool = False,
        val_fraction: float = 0.0,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self.root = Path(root)
        self.download = download
        self.val_fraction = val_fraction
        self.location = str(self.root / self.source.base_folder)

    @cached_property
    def class_names(self) -> list[str]:  # type: ignore[override]
        """Names of the classes in the order of the labels, read from the data set."""
        return self._open(train=False).classes

    def prepare_data(self) -> None:
        """Download the data set if that is asked for."""
        if self.download:
            self.source(self.root, download=True)

    def train_dataset(self) -> TensorImages:
        """The official training images that validation leaves, augmented."""
        images, labels = pixels_and_labels(self._open(train=True))
        rest, _ = stratified_split(labels, self.val_fraction)
        return self._images(images[rest], labels[rest], padding=4, flip=True, seed=self.seed)

    def val_dataset(self) -> TensorImages:
        """The held-out training images, or the test set if none are held out."""
        if not self.val_fraction:
            return self.test_dataset()
        images, labels = pixels_and_labels(self._open(train=True))
        _, held_out = stratified_split(labels, self.val_fraction)
        return self._images(images[held_out], labels[held_out])

    def test_dataset(self) -> TensorImages:
        """The official test images."""
        return self._images(*pixels_and_labels(self._open(train=False)))

    def _open(self, train: bool) -> CIFAR10:
        try:
            return self.source(self.root, train=train)
        except RuntimeError as error:  # torchvision's word for it, which names no folder
            raise FileNotFoundError(
                f"{self.location}: files of {self.source.__name__} are missing or damaged "
                "(torchvision checks their md5 sums): set root, or download=true"
            ) from error

    def _images(self, images: Tensor, labels: Tensor, **augmentation: Any) -> TensorImages:
        return TensorImages(images, labels, mean=self.mean, std=self.std, **augmentation)


class CIFAR100DataModule(CIFAR10DataModule):
    """CIFAR-100, with the published recipes' normalisation; see CIFAR10DataModule."""

    source = CIFAR100
    num_classes = 100
    mean = (0.5071, 0.4867, 0.4408)
    std = (0.2675, 0.2565, 0.2761)


def pixels_and_labels(dataset: CIFAR10) -> tuple[Tensor, Tensor]:
    """The whole data set as uint8 (N, 3, 32, 32) and int64 (N,)."""
    images = torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous()
    return images, torch.tensor(dataset.targets)
