"""Samplers and loaders whose order and augmentation depend only on (seed, epoch, index)."""

import random
from collections.abc import Iterator, Sized
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, SequentialSampler

from lightning_dist.checks import check_number

Key = tuple[int, int]  # A Key is (index, epoch); the augmentation of a sample depends on both.


def derive_seeds(*parts: int, count: int = 1) -> list[int]:
    """Return `count` independent 32-bit seeds that depend on all given numbers and their order.

    Args:
        *parts: whole numbers of at least 0, such as a seed, an epoch and an index.
        count: the number of seeds to return.

    Example:
        >>> derive_seeds(0, 1) == derive_seeds(1, 0)
        False
    """
    return np.random.SeedSequence(parts).generate_state(count).tolist()


@contextmanager
def seeded(*parts: int) -> Iterator[None]:
    """Seed torch, NumPy and random from `parts`, and restore their states afterwards.

    In torch, only the CPU generator is seeded. `torch.manual_seed` would also seed the GPUs, which
    would change the dropout of the network that trains in this process.
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
    """A sampler that yields Keys in an order that depends only on (seed, epoch).

    It is a DistributedSampler, because Lightning replaces any other sampler in distributed runs.

    Args:
        dataset: the data set to sample.
        seed: the seed of the run; two seeds have different orders in all their epochs.
        num_replicas: the number of processes that share the samples of each epoch.
        rank: the number of this process, from 0.
        drop_last: if the processes cannot share the samples evenly, drop the rest instead of
            repeating some samples.
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


class RepeatingSampler(EpochSampler, SequentialSampler):
    """An EpochSampler that yields the same Keys in the same order in every epoch.

    It is for Lightning's `overfit_batches`, and it is a SequentialSampler, because with
    `overfit_batches` Lightning replaces any other sampler by one that cannot continue within an
    epoch.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.shuffle = False

    def __iter__(self) -> Iterator[Key]:  # type: ignore[override]
        for index, _ in super().__iter__():
            yield index, 0


class ResumableLoader(DataLoader):
    """A loader that continues at the next batch after a checkpoint from the middle of an epoch.

    Lightning creates the iterator before it calls the sampler's `set_epoch`, and worker processes
    load their first batches immediately. After a resume, they would repeat the order of epoch 0.
    Therefore `__iter__` is a generator, because a generator runs no code before the first batch is
    requested.
    """

    _position: dict[str, int] | None = None
    _resume_at: dict[str, int] | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        sampler = self.sampler
        if not isinstance(sampler, EpochSampler):
            rank_zero_warn(
                f"Lightning replaced the sampler of the training loader by a "
                f"{type(sampler).__name__}, with which an interrupted run cannot continue within "
                "an epoch: give Trainer.fit the data module instead of its loader"
            )
            yield from super().__iter__()
            return
        resume_at, self._resume_at = self._resume_at, None
        # At an epoch's end, the state contains the finished epoch: the next one starts at batch 0.
        resumes = resume_at is not None and resume_at["epoch"] == sampler.epoch
        done = resume_at["batches"] if resume_at is not None and resumes else 0
        sampler.skip = done * cast(int, self.batch_size)
        for batches, batch in enumerate(super().__iter__(), start=done + 1):
            self._position = {"epoch": sampler.epoch, "batches": batches}
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the epoch and its number of finished batches, which Lightning saves."""
        return dict(self._position or {})

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Skip the finished batches in `state_dict`, if the next epoch is its epoch.

        Raises:
            ValueError: if the state is not one of :meth:`state_dict`.
        """
        for name in ("epoch", "batches") if state_dict else ():
            check_number(f"{name} in the state of the loader", state_dict.get(name), int, least=0)
        self._resume_at = state_dict or None


class SeededDataset(Dataset):
    """A data set that is read by Key and whose random transforms depend only on (seed, Key).

    Args:
        dataset: a map-style data set, which is read by index.
        seed: the seed of the run. None skips the seeding, which takes about 30 us for each sample
            and is not needed if no transform is random.
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
