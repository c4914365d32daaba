"""An order of samples, and random transforms of them, that can be repeated to the pixel."""

import random
from collections.abc import Iterator, Sized
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler

Key = tuple[int, int]  # (index, epoch): a sample, and the epoch that decides its augmentation


def derive_seeds(*parts: int, count: int = 1) -> list[int]:
    """Mix whole numbers (a seed, an epoch, an index) into `count` unrelated 32-bit seeds.

    Example:
        >>> derive_seeds(0, 1) == derive_seeds(1, 0)
        False
    """
    return np.random.SeedSequence(parts).generate_state(count).tolist()


@contextmanager
def seeded(*parts: int) -> Iterator[None]:
    """Seed torch, NumPy and random from `parts`, and put their streams back afterwards.

    Only torch's CPU generator takes part: `torch.manual_seed` would reset the GPUs' too, and with
    them the dropout of the network that trains in this process.
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
    """Shuffles by (seed, epoch) alone and yields Keys; a DistributedSampler, so Lightning keeps it.

    Args:
        dataset: what is sampled.
        seed: of the run; two seeds never share an order, whatever the epochs.
        num_replicas: number of processes among which each epoch is dealt out.
        rank: which of them this is.
        drop_last: drop the samples that cannot be dealt out evenly, where some would be repeated.
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
    """A loader of Keys that a checkpoint taken in mid-epoch brings back to its next batch.

    Lightning makes the iterator before it tells the sampler the epoch, and worker processes ask for
    their first batches at once: on a resume they would repeat the order of epoch 0. So everything
    waits until the first batch is asked for.
    """

    _position: dict[str, int] | None = None
    _resume_at: dict[str, int] | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        sampler = self.sampler
        if not isinstance(sampler, EpochSampler):  # Lightning replaces it under overfit_batches
            yield from super().__iter__()
            return
        resume_at, self._resume_at = self._resume_at, None
        # A checkpoint at an epoch's end names the epoch before: nothing to skip then.
        resumes = resume_at is not None and resume_at["epoch"] == sampler.epoch
        done = resume_at["batches"] if resume_at is not None and resumes else 0
        sampler.skip = done * cast(int, self.batch_size)
        for batches, batch in enumerate(super().__iter__(), start=done + 1):
            self._position = {"epoch": sampler.epoch, "batches": batches}
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Epoch and number of its batches handed out; Lightning puts it into the checkpoint."""
        return dict(self._position or {})

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continue behind the batches that `state_dict` counts, if its epoch is the next to run."""
        self._resume_at = state_dict or None


class SeededDataset(Dataset):
    """Reads samples by Key; what their random transforms draw depends on (seed, Key) alone.

    Args:
        dataset: a map-style data set, read by index.
        seed: of the run; None where no transform is random, which saves the seeding (some 30 us).
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
