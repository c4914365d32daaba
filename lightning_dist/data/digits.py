"""A data module for the 1,797 handwritten digits of 8x8 pixels that scikit-learn contains."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from lightning_dist.checks import check_number
from lightning_dist.data.base import ImageDataModule, stratified_split
from lightning_dist.data.few_labels import stratified_order
from lightning_dist.data.tensor_images import TensorImages

TEST_FRACTION = 0.2
WHITE = 16  # the brightest pixel value in scikit-learn's images


class DigitsDataModule(ImageDataModule):
    """A data module of digits (1, 8, 8) in memory: 1,437 images for training and 360 for the test.

    All splits have the same proportions of classes and do not depend on `seed`.

    Args:
        val_fraction: the fraction of the training images to hold out for validation, from 0 to 0.9;
            with 0, validation uses the test set.
        train_size: the number of training images to use, with the same proportions of classes; None
            uses all. The images of a smaller size are also in every larger set.
        augment: shift each training image at random by up to one pixel.
        **settings: the arguments of ImageDataModule.

    Raises:
        ValueError: if `train_size` is larger than the number of training images, or if another
            setting is out of range.

    Example:
        >>> data = DigitsDataModule(global_batch_size=32, train_size=300)
        >>> images, labels = next(iter(data.train_dataloader()))
        >>> tuple(images.shape), images.dtype, len(data.train_dataset())
        ((32, 1, 8, 8), torch.float32, 300)
    """

    num_classes = 10
    mean = (0.3054,)
    std = (0.3761,)
    image_size = 8
    in_channels = 1
    location = "scikit-learn's digits"

    def __init__(
        self,
        *,
        val_fraction: float = 0.1,
        train_size: int | None = None,
        augment: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        check_number("val_fraction", val_fraction, least=0, most=0.9)
        if train_size is not None:
            check_number("train_size", train_size, int, least=1)
        self.val_fraction = val_fraction
        self.tests_on_validation = not val_fraction
        self.train_size = train_size
        self.augment = augment
        self.class_names = [str(digit) for digit in range(10)]

    def train_dataset(self) -> TensorImages:
        """Return `train_size` of the training images that are not held out, by default all.

        Raises:
            ValueError: if there are fewer than `train_size` such images.
        """
        train, _, _ = self._splits
        if self.train_size is not None:
            if self.train_size > len(train):
                raise ValueError(
                    f"train_size={self.train_size}: {self.location} leave {len(train)} images for "
                    f"training with val_fraction={self.val_fraction}"
                )
            train = train[stratified_order(self._labels[train])[: self.train_size]]
        return self._images(train, padding=int(self.augment), seed=self.seed)

    def val_dataset(self) -> TensorImages:
        """Return the held-out training images, or the test set if no images are held out."""
        _, val, test = self._splits
        return self._images(val if len(val) else test)

    def test_dataset(self) -> TensorImages:
        """Return the 360 test images."""
        return self._images(self._splits[2])

    @cached_property
    def _pixels(self) -> Tensor:
        images: np.ndarray = load_digits().images
        return torch.from_numpy(images.astype(np.uint8)).unsqueeze(1)

    @cached_property
    def _labels(self) -> Tensor:
        return torch.from_numpy(load_digits().target).long()

    @cached_property
    def _splits(self) -> Sequence[Tensor]:
        """The indices of the training, validation and test images."""
        train, test = stratified_split(self._labels, TEST_FRACTION)
        rest, val = stratified_split(self._labels[train], self.val_fraction)
        return train[rest], train[val], test

    def _images(self, indices: Tensor, padding: int = 0, seed: int = 0) -> TensorImages:
        return TensorImages(
            self._pixels[indices],
            self._labels[indices],
            mean=self.mean,
            std=self.std,
            white=WHITE,
            padding=padding,
            seed=seed,
        )
