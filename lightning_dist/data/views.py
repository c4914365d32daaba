"""`Views`: a training set in a fixed number of augmentations, the same in every run."""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from lightning_dist.data.seeding import Key, SeededDataset
from lightning_dist.data.tensor_images import TensorImages

VIEW_SEED = 0  # of the augmentation; fixed, so that runs with different seeds share the views


@dataclass
class KeyedBatch:
    """A batch ``(inputs, target)``, as which it unpacks, that knows which samples it holds.

    Args:
        inputs: images ``(N, C, H, W)``.
        target: whatever belongs to them.
        indices: int64 ``(N,)``, of the samples in the training set.
        view: in which of the views they are.
        fingerprints: float64 ``(N,)``, the images' :func:`fingerprints`.
    """

    inputs: Tensor
    target: Any
    indices: np.ndarray
    view: int
    fingerprints: np.ndarray

    def __iter__(self) -> Iterator[Any]:
        yield self.inputs
        yield self.target

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Any:
        return (self.inputs, self.target)[index]

    def pin_memory(self) -> "KeyedBatch":
        """The same in pinned memory, for DataLoaders that pin."""
        target = self.target.pin_memory() if isinstance(self.target, Tensor) else self.target
        return KeyedBatch(
            self.inputs.pin_memory(), target, self.indices, self.view, self.fingerprints
        )


class Views(Dataset):
    """A training set that uses view `e` modulo `count` in epoch `e`, and returns KeyedBatches.

    A view is an augmentation of every sample that depends on (VIEW_SEED, view, index) alone.

    Args:
        dataset: the training set, read by index, or by Key if it is a TensorImages.
        count: number of views; there is one view if no transform is random.
        random: whether the transforms of the data set are random; ignored for a TensorImages, which
            has the attribute `random`.
    """

    def __init__(self, dataset: Dataset, count: int, random: bool = True) -> None:
        self.collate_samples = getattr(dataset, "collate", default_collate)
        self.samples: TensorImages | SeededDataset
        if isinstance(dataset, TensorImages):
            random = dataset.random
            self.samples = dataset.with_seed(VIEW_SEED)
        else:
            self.samples = SeededDataset(dataset, VIEW_SEED if random else None)
        self.count = count if random else 1

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: Key | int) -> Any:
        index, epoch = key if isinstance(key, tuple) else (key, 0)
        return self.samples[index, epoch % self.count]

    def __getitems__(self, keys: Sequence[Key | int]) -> KeyedBatch:
        """Return the batch of some Keys, which must all have the same epoch.

        Raises:
            TypeError: if the images differ in size, so that they are not one tensor.
        """
        pairs = [key if isinstance(key, tuple) else (key, 0) for key in keys]
        view = pairs[0][1] % self.count
        chosen = [(index, view) for index, _ in pairs]
        if isinstance(self.samples, TensorImages):
            inputs, target = self.samples.__getitems__(chosen)
        else:
            inputs, target = self.collate_samples([self.samples[key] for key in chosen])
        if not isinstance(inputs, Tensor):
            raise TypeError(
                f"the batch's images are a {type(inputs).__name__}, no tensor: a cached teacher "
                "needs images of one size (distill.cache=off asks the teacher itself)"
            )
        indices = np.array([index for index, _ in chosen])
        return KeyedBatch(inputs, target, indices, view, fingerprints(inputs))

    @staticmethod
    def collate(batch: KeyedBatch) -> KeyedBatch:
        """Return the batch as it is, since `__getitems__` has collated it."""
        return batch


def fingerprints(images: Tensor) -> np.ndarray:
    """One number an image, by which other images are told apart: a sum of pixels with fixed signs.

    Args:
        images: ``(N, ...)``, on the CPU.

    Returns:
        float64 ``(N,)``.

    Example:
        >>> here, there = fingerprints(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
        >>> bool(here == there)
        False
    """
    rows = images.flatten(1)
    signs = _signs(rows.shape[1])
    some = max(1, 2**20 // rows.shape[1])  # a double of every pixel at once would be large
    return torch.cat([part.double() @ signs for part in rows.split(some)]).numpy()


@functools.lru_cache(maxsize=4)
def _signs(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(2, (count,), generator=generator).double().mul_(2).sub_(1)
