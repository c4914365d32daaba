"""`TrainingLabels`, the part of a data module that decides which training images have a label."""

from collections.abc import Sequence, Sized
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import Dataset

from lightning_dist.data.few_labels import choose_labels, without_other_labels
from lightning_dist.data.image_files import Transform
from lightning_dist.data.unlabeled import JoinedImages, unlabeled_files

IGNORED = 255  # the label of the pixels that the loss and the metrics ignore
SPLIT_SEED = 0  # constant, so that runs with different seeds hold out the same images


class TrainingLabels:
    """A base class that removes labels from a training set, and adds images without a label.

    Attributes:
        labels: the number of training images that keep their label, or a fraction of them.
        unlabeled: a folder of images without labels, or several folders.
        seed: the seed that chooses the images that keep their label.
    """

    labels: float | None
    unlabeled: str | Path | Sequence[str | Path] | None
    seed: int
    _labeled: Tensor | None = None  # which training images have a label, once they are read

    def _dataset(self, split: str) -> Dataset:
        """Return the data set of a split."""
        raise NotImplementedError

    def with_unlabeled(self, dataset: Dataset) -> Dataset:
        """Return the training set with the images that have no label.

        Args:
            dataset: the training set, in which all images have a label.
        """
        labeled = torch.ones(len(cast(Sized, dataset)), dtype=torch.bool)
        if self.labels is not None:
            labeled = choose_labels(self.train_labels(dataset), self.labels, self.seed)
            dataset = without_other_labels(dataset, labeled)
        if self.unlabeled:
            transform = self.unlabeled_transform()
            evaluated = getattr(self._dataset("val"), "samples", ())
            files = unlabeled_files(self.unlabeled, (str(path) for path, _ in evaluated))
            dataset = JoinedImages(dataset, files, transform)
            labeled = torch.cat([labeled, torch.zeros(len(files), dtype=torch.bool)])
        self._labeled = labeled
        return dataset

    def unlabeled_transform(self) -> Transform:
        """Return the function that converts images of the folder `unlabeled` for training.

        Raises:
            ValueError: if a data module of this kind reads no image files.
        """
        raise ValueError(
            f"unlabeled={self.unlabeled} is for data modules that read image files with timm's "
            f"transforms, such as data=image_folder, but this is a {type(self).__name__}"
        )

    def train_labels(self, dataset: Dataset) -> Tensor:
        """Return the classes of the training images, int64 (N,); only the option `labels` needs it.

        Args:
            dataset: the training set.

        Raises:
            ValueError: if the data set has no such list of classes.
        """
        labels = labels_in(dataset)
        if not isinstance(labels, Tensor) or labels.dim() != 1 or labels.is_floating_point():
            raise ValueError(
                f"labels={self.labels} needs the classes of the training images in one list, which "
                f"a {type(self).__name__} does not have: leave it out"
            )
        return labels


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
