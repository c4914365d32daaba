"""`TrainingLabels`, the part of a data module that decides which training images have a label."""

from collections.abc import Iterable, Sequence, Sized
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import Dataset

from lightning_dist.checks import UNLABELED
from lightning_dist.data.few_labels import choose_labels, without_other_labels
from lightning_dist.data.image_files import load_image
from lightning_dist.data.tensor_images import TensorImages
from lightning_dist.data.unlabeled import (
    JoinedImages,
    Sample,
    image_paths,
    unlabeled_files,
    without_known_files,
)

SPLIT_SEED = 0  # constant, so that runs with different seeds hold out the same images


class TrainingLabels:
    """A base class that removes labels from a training set, and adds images without a label.

    Attributes:
        labels: the number of training images that keep their label, or a fraction of them.
        unlabeled: a folder of images without labels, or several folders.
        unlabeled_share: the share of images without a label in each batch, if it is fixed.
        seed: the seed that chooses the images that keep their label.
        location: the folder or the name of the data set, for error messages.
    """

    labels: float | None
    unlabeled: str | Path | Sequence[str | Path] | None
    unlabeled_share: float | None
    seed: int
    location: str
    _labeled: Tensor | None = None  # which training images have a label, once they are read

    def _dataset(self, split: str) -> Dataset:
        """Return the data set of a split."""
        raise NotImplementedError

    def _evaluated_splits(self) -> Sequence[str]:
        """Return the names of the splits for evaluation."""
        raise NotImplementedError

    def _to_square(self, image: Image.Image) -> Tensor:
        """Convert an image to uint8 pixels (C, H, W) of the size of the training images."""
        raise NotImplementedError

    def with_unlabeled(self, dataset: Dataset) -> Dataset:
        """Return the training set with the images that have no label."""
        labeled = torch.ones(len(cast(Sized, dataset)), dtype=torch.bool)
        if self.labels is not None or self.unlabeled_share is not None:
            classes = self.train_labels(dataset)
            if classes is None:
                classes = torch.zeros(len(labeled), dtype=torch.int64)
            labeled = classes != UNLABELED
            if self.labels is not None:
                chosen = choose_labels(classes[labeled], self.labels, self.seed)
                labeled[labeled.clone()] = chosen
                dataset = without_other_labels(dataset, labeled)
        if self.unlabeled:
            files = unlabeled_files(self.unlabeled)
            files = without_known_files(files, self.location, *self._known_files(dataset))
            dataset = self._joined(dataset, files)
            labeled = torch.cat([labeled, torch.zeros(len(files), dtype=torch.bool)])
        self._labeled = labeled
        return dataset

    def _known_files(self, dataset: Dataset) -> tuple[Iterable[str], Iterable[str]]:
        """Return the paths of the training images, and those of the images for evaluation."""
        evaluated = (self._dataset(split) for split in self._evaluated_splits())
        return image_paths(dataset), (path for other in evaluated for path in image_paths(other))

    def _joined(self, dataset: Dataset, files: Sequence[str]) -> Dataset:
        """Return a training set with the images of some files, which have no label, at its end."""
        if not isinstance(dataset, TensorImages):
            return JoinedImages(dataset, files, self.unlabeled_transform())
        pixels = torch.empty(len(files), *dataset.images.shape[1:], dtype=torch.uint8)
        for place, file in zip(pixels, files, strict=True):
            place.copy_(self._to_square(load_image(file)))
        return dataset.with_unlabeled(pixels)

    def unlabeled_transform(self) -> Sample:
        """Return the function that makes a training sample of an image without a label.

        It augments the image as the training images. A data set in memory (TensorImages) does not
        need it.

        Raises:
            ValueError: if a data module of this kind defines no such function.
        """
        raise ValueError(
            f"unlabeled={self.unlabeled} needs the method unlabeled_transform, which a "
            f"{type(self).__name__} does not define: define it, or leave out unlabeled"
        )

    def train_labels(self, dataset: Dataset) -> Tensor | None:
        """Return the classes of the training images, int64 (N,), or None if there is no such list.

        Args:
            dataset: the training set.
        """
        labels = labels_in(dataset)
        has_list = isinstance(labels, Tensor) and labels.dim() == 1
        return labels if has_list and not labels.is_floating_point() else None


def stratified_split(labels: Tensor, fraction: float) -> tuple[Tensor, Tensor]:
    """Split sample indices into two parts with the same proportions of classes.

    The split depends on `labels` and `fraction` alone, so it is the same in all runs.

    Args:
        labels: the class of each sample, shape (N,).
        fraction: the fraction of the samples to hold out, at least 0 and less than 1.

    Returns:
        The indices of the remaining samples and of the held-out samples, int64 and ascending.

    Example:
        >>> rest, held_out = stratified_split(torch.tensor([0, 1] * 10), fraction=0.2)
        >>> len(rest), len(held_out)
        (16, 4)
    """
    everything = np.arange(len(labels))
    if not fraction:
        return torch.from_numpy(everything), torch.empty(0, dtype=torch.int64)
    parts = train_test_split(
        everything, test_size=fraction, stratify=labels.numpy(), random_state=SPLIT_SEED
    )
    rest, held_out = (torch.from_numpy(np.sort(part)) for part in parts)
    return rest, held_out


def labels_in(dataset: Dataset) -> Any:
    """Return the labels that a data set has in memory, as a tensor if they are whole numbers."""
    labels = getattr(dataset, "labels", getattr(dataset, "targets", None))
    if isinstance(labels, list) and all(isinstance(label, int) for label in labels):
        return torch.tensor(labels)
    return labels
