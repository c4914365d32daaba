"""Deterministic sampling: order and augmentation as a function of (seed, epoch, index)."""

import random
from collections.abc import Iterator, Sized
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler

Key = tuple[int, int]  # (index, epoch); the augmentation of a sample depends on both


def derive_seeds(*parts: int, count: int = 1) -> list[int]:
    """Return `count` independent 32-bit seeds that depend on all given numbers and their order.

    Args:
        *parts: whole numbers from 0, such as a seed, an epoch and an index.
        count: number of seeds.

    Example:
        >>> derive_seeds(0, 1) == derive_seeds(1, 0)
        False
    """
    return np.random.SeedSequence(parts).generate_state(count).tolist()


@contextmanager
def seeded(*parts: int) -> Iterator[None]:
    """Seed torch, NumPy and random from `parts`, and restore their states afterwards.

    Of torch only the CPU generator is seeded. `torch.manual_seed` would seed the GPUs too, and so
    change the dropout of the network that trains in this process.
    """
    states = torch.default_generator.get_state(), np.random.get_state(), random.getstate()
    for_torch, for_numpy, for_random = derive_seeds(*parts, count=3)
    torch.default_generator.manual_seed(for_torch)
    np.random.seed(for_numpy)
    random.seed(for_random)
    try:
        yield
    finally:
        torch.default_generator.set_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])


class EpochSampler(DistributedSampler):
    """A sampler that shuffles by (seed, epoch) alone and yields Keys.

    It is a DistributedSampler, because Lightning replaces any other sampler in distributed runs.

    Args:
        dataset: the data set to sample.
        seed: seed of the run; no two seeds share an order, whatever the epochs.
        num_replicas: number of processes that share the samples of each epoch.
        rank: number of this process among them, from 0.
        drop_last: if the samples cannot be shared evenly, drop the rest instead of repeating some.
    """

    def __init__(
        self,
        dataset: Dataset,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
        drop_last: bool = False,
    ) -> None:
        super().__init__(
            dataset, num_replicas, rank, seed=derive_seeds(seed)[0], drop_last=drop_last
        )
        self.skip = 0

    def __iter__(self) -> Iterator[Key]:
        for index in list(super().__iter__())[self.skip :]:
            yield index, self.epoch


class ResumableLoader(DataLoader):
    """A loader that a checkpoint from the middle of an epoch resumes at the next batch.

    Lightning creates the iterator before it calls the sampler's `set_epoch`, and worker processes
    fetch their first batches at once: on a resume they would repeat the order of epoch 0.
    Therefore `__iter__` is a generator, which does nothing until the first batch is requested.
    """

    _position: dict[str, int] | None = None
    _resume_at: dict[str, int] | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        sampler = self.sampler
        if not isinstance(sampler, EpochSampler):  # Lightning replaced it: overfit_batches
            yield from super().__iter__()
            return
        resume_at, self._resume_at = self._resume_at, None
        # A state saved at an epoch's end is of the epoch just finished; the next starts at batch 0.
        resumes = resume_at is not None and resume_at["epoch"] == sampler.epoch
        done = resume_at["batches"] if resume_at is not None and resumes else 0
        sampler.skip = done * cast(int, self.batch_size)
        for batches, batch in enumerate(super().__iter__(), start=done + 1):
            self._position = {"epoch": sampler.epoch, "batches": batches}
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the epoch and its number of finished batches; Lightning saves them."""
        return dict(self._position or {})

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Skip the batches that `state_dict` counts, if the next epoch is the one it names."""
        self._resume_at = state_dict or None


class SeededDataset(Dataset):
    """A data set read by Key, whose random transforms depend on (seed, Key) alone.

    Args:
        dataset: a map-style data set, read by index.
        seed: seed of the run; None if no transform is random, which saves the seeding, about 30 us
            for each sample.
    """

    def __init__(self, dataset: Dataset, seed: int | None) -> None:
        self.dataset = dataset
        self.seed = seed

    def __len__(self) -> int:
        return len(cast(Sized, self.dataset))

    def __getitem__(self, key: Key | int) -> Any:
        index, epoch = key if isinstance(key, tuple) else (key, 0)
        if self.seed is None:
            return self.dataset[index]
        with seeded(self.seed, epoch, index):
            return self.dataset[index]
