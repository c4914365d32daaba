"""A training set in which only some images keep their label, for experiments with few labels."""

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_dist.checks import UNLABELED
from lightning_dist.data.seeding import derive_seeds
from lightning_dist.data.tensor_images import TensorImages


def choose_labels(labels: Tensor, amount: float, seed: int) -> Tensor:
    """Choose the images that keep their label, with the class proportions of the whole data set.

    The images that are chosen for a smaller amount are also chosen for every larger one.

    Args:
        labels: the class of each image, int64 of shape (N,).
        amount: the number of images if it is an int, or a fraction of them.
        seed: the seed of the choice. The same labels, amount and seed always give the same choice.

    Returns:
        A bool tensor (N,) that is true for the chosen images.

    Raises:
        ValueError: if the amount is less than one image or more than all images.
    """
    count = amount if isinstance(amount, int) else round(amount * len(labels))
    if not 0 < count <= len(labels):
        raise ValueError(
            f"labels={amount} would keep the labels of {count} images: use a number that keeps "
            f"from 1 to {len(labels)} of the training images"
        )
    (mixing,) = derive_seeds(seed)
    order = torch.from_numpy(np.random.default_rng(mixing).permutation(len(labels)))
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    chosen[order[stratified_order(labels[order])[:count]]] = True
    return chosen


def without_other_labels(dataset: Dataset, chosen: Tensor) -> Dataset:
    """Return a data set whose images have no label, except the chosen ones.

    Args:
        dataset: a data set of images and classes.
        chosen: a bool tensor (N,) that is true for the images that keep their label.
    """
    if isinstance(dataset, TensorImages):
        other = copy.copy(dataset)
        other.labels = torch.where(chosen, dataset.labels, UNLABELED)
        return other
    return FewLabels(dataset, chosen)


class FewLabels(Dataset):
    """A wrapper of a data set that replaces the labels of the images that are not chosen by -100.

    Args:
        dataset: the wrapped data set of images and classes, which is read by index.
        chosen: a bool tensor (N,) that is true for the images that keep their label.
    """

    def __init__(self, dataset: Dataset, chosen: Tensor) -> None:
        self.dataset = dataset
        self.chosen = chosen
        if hasattr(dataset, "collate"):
            self.collate = dataset.collate

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        image, label = self.dataset[index]
        return image, label if self.chosen[index] else UNLABELED


def stratified_order(labels: Tensor) -> Tensor:
    """Return an order (N,) of the samples in which every class is spread evenly.

    So for every K, the first K samples have about the class proportions of all N samples.

    Args:
        labels: the class of each sample, shape (N,).

    Example:
        >>> labels = torch.tensor([0, 0, 0, 0, 1, 1])
        >>> labels[stratified_order(labels)].tolist()
        [0, 1, 0, 0, 1, 0]
    """
    place = torch.empty(len(labels))
    for label in labels.unique():
        members = labels == label
        count = int(members.sum())
        place[members] = (torch.arange(count) + 0.5) / count
    return place.argsort(stable=True)
