"""A training set in which only some images keep their label, for experiments with few labels."""

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_dist.checks import IGNORED, UNLABELED
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
        dataset: a data set of images and classes, masks or boxes.
        chosen: a bool tensor (N,) that is true for the images that keep their label.
    """
    if isinstance(dataset, TensorImages):
        other = copy.copy(dataset)
        of_each = chosen.view(-1, *[1] * (dataset.labels.dim() - 1))
        other.labels = torch.where(of_each, dataset.labels, dataset.no_label)
        return other
    return FewLabels(dataset, chosen)


def without_label(target: Any) -> Any:
    """Return a target of the same kind that marks an image without a label.

    Args:
        target: a class, as an int or a tensor of no dimension; a mask of classes (H, W); or a dict
            of boxes and labels.

    Returns:
        -100; a mask that is ignored everywhere; or None.

    Raises:
        TypeError: if the target is of another kind.

    Example:
        >>> without_label(3), without_label({"boxes": torch.zeros(1, 4)})
        (-100, None)
        >>> without_label(torch.zeros(1, 2, dtype=torch.int64))
        tensor([[255, 255]])
    """
    if isinstance(target, Mapping):
        return None
    if isinstance(target, (int, np.integer)):
        return UNLABELED
    if not isinstance(target, Tensor) or target.dim() not in (0, 2) or target.is_floating_point():
        raise TypeError(
            f"the target of a training image is a {type(target).__name__}, for which the option "
            "labels has no mark for images without a label: give a class, a mask or boxes"
        )
    return torch.full_like(target, IGNORED if target.dim() else UNLABELED)


class FewLabels(Dataset):
    """A wrapper of a data set that removes the labels of the images that are not chosen.

    Args:
        dataset: the wrapped data set of images and targets, which is read by index.
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
        image, target = self.dataset[index]
        return image, target if self.chosen[index] else without_label(target)


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
