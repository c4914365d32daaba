"""`Views`, a training set with a fixed number of augmentations, the same in every run."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from lightning_dist.data.seeding import Key, SeededDataset
from lightning_dist.data.tensor_images import TensorImages

VIEW_SEED = 0  # constant, so that runs with different seeds use the same augmentations


@dataclass
class KeyedBatch:
    """A batch that unpacks to ``(inputs, target)`` and also stores the indices of its samples.

    Args:
        inputs: the images ``(N, C, H, W)``.
        target: the labels or other targets of the images.
        indices: the positions of the samples in the training set, int64 ``(N,)``.
        view: the number of the view, from 0.
        fingerprints: the :func:`fingerprints` of the images, float64 ``(N,)``.
        answers: what a cached teacher has added to the batch in the process that loaded it: a dict
            from names to the bytes of numbers, uint8 ``(N, bytes)``, whose dtype no precision of
            the Trainer changes. None if it has added nothing.
    """

    inputs: Tensor
    target: Any
    indices: np.ndarray
    view: int
    fingerprints: np.ndarray
    answers: dict[str, Tensor] | None = None

    def __iter__(self) -> Iterator[Any]:
        yield self.inputs
        yield self.target

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Any:
        return (self.inputs, self.target)[index]

    def pin_memory(self) -> "KeyedBatch":
        """Return a copy in pinned memory, for a DataLoader with ``pin_memory=True``."""
        target = self.target.pin_memory() if isinstance(self.target, Tensor) else self.target
        answers = self.answers and {name: x.pin_memory() for name, x in self.answers.items()}
        return KeyedBatch(
            self.inputs.pin_memory(), target, self.indices, self.view, self.fingerprints, answers
        )


class Views(Dataset):
    """A training set that returns KeyedBatches, in epoch `e` from view `e` modulo `count`.

    A view is an augmentation of every sample that depends only on (VIEW_SEED, view, index).

    Args:
        dataset: the training set, which is read by index, or by Key if it is a TensorImages.
        count: the number of views; there is only one view if no transform is random.
        random: whether the transforms of the data set are random; ignored for a TensorImages,
            because it has an attribute `random`.
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
            TypeError: if a batch is a dict, or if the images differ in size, because they are then
                a list.
        """
        pairs = [key if isinstance(key, tuple) else (key, 0) for key in keys]
        view = pairs[0][1] % self.count
        chosen = [(index, view) for index, _ in pairs]
        if isinstance(self.samples, TensorImages):
            inputs, target = self.samples.__getitems__(chosen)
        else:
            batch = self.collate_samples([self.samples[key] for key in chosen])
            if isinstance(batch, Mapping):
                raise TypeError(
                    f"the training batch is a dict of {', '.join(map(str, batch))}: for a cached "
                    "teacher, a sample must be (input, target) with one tensor as input "
                    "(distill.cache=off runs the teacher itself)"
                )
            inputs, target = batch
        if not isinstance(inputs, Tensor):
            raise TypeError(
                f"the batch's images are a {type(inputs).__name__}, no tensor: a cached teacher "
                "needs images of one size (distill.cache=off runs the teacher itself)"
            )
        indices = np.array([index for index, _ in chosen])
        return KeyedBatch(inputs, target, indices, view, fingerprints(inputs))

    @staticmethod
    def collate(batch: KeyedBatch) -> KeyedBatch:
        """Return the batch unchanged, because `__getitems__` has collated it."""
        return batch


def fingerprints(images: Tensor) -> np.ndarray:
    """Return a fingerprint of each image: a sum of its pixels with fixed random signs.

    Two different images have different sums, except by an improbable chance.

    Args:
        images: the images ``(N, ...)``, on the CPU.

    Returns:
        The numbers, float64 ``(N,)``.

    Example:
        >>> here, there = fingerprints(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
        >>> bool(here == there)
        False
    """
    rows = images.flatten(1)
    signs = _signs(rows.shape[1])
    # The images are summed in parts, because a float64 copy of all pixels would be large.
    some = max(1, 2**20 // rows.shape[1])
    return torch.cat([part.double() @ signs for part in rows.split(some)]).numpy()


@functools.lru_cache(maxsize=4)
def _signs(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(2, (count,), generator=generator).double().mul_(2).sub_(1)
