"""Data modules for CIFAR-10 and CIFAR-100, with the augmentation of the published recipes."""

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100

from lightning_dist.data.base import ImageDataModule, stratified_split
from lightning_dist.data.tensor_images import TensorImages


class CIFAR10DataModule(ImageDataModule):
    """A data module of CIFAR-10: images (3, 32, 32), cropped with padding 4 and mirrored at random.

    All images are kept in memory, and batches are float32. Validation uses the official test
    images, unless `val_fraction` holds out training images. The published numbers are test
    accuracies too; they are from the last epoch, not from the best epoch.

    Args:
        root: the folder that contains torchvision's folder of the data set; a download creates it.
        download: download the data set if it is missing.
        val_fraction: the fraction of the training images to hold out for validation, with the same
            proportions of classes; the split does not depend on `seed`.
        **settings: the arguments of ImageDataModule.

    Raises:
        FileNotFoundError: when a data set is created, if its files are missing or damaged.
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
        self.tests_on_validation = not val_fraction
        self.location = str(self.root / self.source.base_folder)

    @cached_property
    def class_names(self) -> list[str]:  # type: ignore[override]
        """The names of the classes in the order of the labels, read from the data set."""
        return self._torchvision_dataset(train=False).classes

    def prepare_data(self) -> None:
        """Download the data set if `download` is set."""
        if self.download:
            self.source(self.root, download=True)

    def train_dataset(self) -> TensorImages:
        """Return the official training images except the held-out ones, with augmentation."""
        images, labels = pixels_and_labels(self._torchvision_dataset(train=True))
        rest, _ = stratified_split(labels, self.val_fraction)
        return self._images(images[rest], labels[rest], padding=4, flip=True, seed=self.seed)

    def val_dataset(self) -> TensorImages:
        """Return the held-out training images, or the test set if no images are held out."""
        if not self.val_fraction:
            return self.test_dataset()
        images, labels = pixels_and_labels(self._torchvision_dataset(train=True))
        _, held_out = stratified_split(labels, self.val_fraction)
        return self._images(images[held_out], labels[held_out])

    def test_dataset(self) -> TensorImages:
        """Return the official test images."""
        return self._images(*pixels_and_labels(self._torchvision_dataset(train=False)))

    def _torchvision_dataset(self, train: bool) -> CIFAR10:
        try:
            return self.source(self.root, train=train)
        except RuntimeError as error:  # torchvision's message names no folder
            raise FileNotFoundError(
                f"{self.location}: files of {self.source.__name__} are missing or damaged "
                "(torchvision checks their md5 sums): set root, or download=true"
            ) from error

    def _images(self, images: Tensor, labels: Tensor, **augmentation: Any) -> TensorImages:
        return TensorImages(images, labels, mean=self.mean, std=self.std, **augmentation)


class CIFAR100DataModule(CIFAR10DataModule):
    """A data module of CIFAR-100, with the settings of CIFAR10DataModule."""

    source = CIFAR100
    num_classes = 100
    mean = (0.5071, 0.4867, 0.4408)
    std = (0.2675, 0.2565, 0.2761)


def pixels_and_labels(dataset: CIFAR10) -> tuple[Tensor, Tensor]:
    """Return all images as uint8 (N, 3, 32, 32) and all labels as int64 (N,)."""
    images = torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous()
    return images, torch.tensor(dataset.targets)
