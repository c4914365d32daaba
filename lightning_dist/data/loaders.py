"""`Loaders`, the part of a data module that makes its loaders, the same for any worker number."""

from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import suppress
from typing import Any, cast

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from lightning_dist.data.seeding import (
    EpochSampler,
    Key,
    RepeatingSampler,
    ResumableLoader,
    SeededDataset,
    seeded,
)
from lightning_dist.data.shared_memory import refuse_small_shared_memory
from lightning_dist.data.tensor_images import TensorImages
from lightning_dist.data.unlabeled import SharedBatches
from lightning_dist.data.views import KeyedBatch, Views
from lightning_dist.data.workers import start_worker


def collate_as_lists(samples: Sequence[tuple[Any, Any]]) -> tuple[list[Any], list[Any]]:
    """Collate samples into lists of images and targets, because images differ in size."""
    images, targets = zip(*samples, strict=True)
    return list(images), list(targets)


def count_samples(batch: tuple[Any, Any]) -> int:
    """Return the number of samples in a batch of inputs and targets.

    Example:
        >>> count_samples((torch.zeros(8, 3, 4, 4), torch.zeros(8)))
        8
    """
    return len(batch[0])


class Loaders(LightningDataModule):
    """A base class of data modules that makes loaders of the data sets of a subclass.

    Attributes:
        views: the number of fixed augmentations of each sample, which are the same in every run.
            Each epoch uses the next one, and training batches are KeyedBatches. If it is None, each
            epoch draws a new augmentation.
        add_answers: a function that is called with each KeyedBatch of the training loader, in the
            process that loads it, and returns the batch.
        random_transforms: False skips the seeding; a subclass sets it if no transform is random.
        location: the folder or the name of the data set, for error messages.
    """

    global_batch_size: int
    eval_batch_size: int | None
    num_workers: int
    seed: int
    pin_memory: bool
    drop_last: bool
    unlabeled_share: float | None
    views: int | None = None  # set by a cached teacher, which needs the same images again
    # set by a cached teacher, which reads its outputs with the images
    add_answers: Callable[[KeyedBatch], KeyedBatch] | None = None
    random_transforms: bool = True
    location: str
    _labeled: Tensor | None

    def _dataset(self, split: str) -> Dataset:
        """Return the data set of a split."""
        raise NotImplementedError

    @property
    def batch_size(self) -> int:
        """The number of samples in a training batch of each process.

        Raises:
            ValueError: if the processes cannot share `global_batch_size` evenly.
        """
        processes = self._replica()["num_replicas"]
        if self.global_batch_size % processes:
            raise ValueError(
                f"global_batch_size={self.global_batch_size} cannot be shared by {processes} "
                f"processes: set it to a multiple of {processes}"
            )
        return self.global_batch_size // processes

    @batch_size.setter
    def batch_size(self, size: int) -> None:  # Lightning's BatchSizeFinder sets it
        self.global_batch_size = size * self._replica()["num_replicas"]

    def train_dataloader(self) -> DataLoader:
        """Return a loader of shuffled, augmented batches of the training set.

        Raises:
            ValueError: if the training set is empty, or if `drop_last` would drop all its images.
        """
        dataset = self._dataset("train")
        sampler = self._train_sampler(dataset)
        if self.drop_last and len(sampler) < self.batch_size:
            raise ValueError(
                f"the training set of {self.location} has {len(cast(Sized, dataset))} images, and "
                f"drop_last drops a batch smaller than global_batch_size={self.global_batch_size}: "
                "reduce global_batch_size, or set drop_last=False"
            )
        settings = self._loader_settings(dataset)
        if self.views is not None:
            dataset = self.train_views()
            settings["collate_fn"] = self.add_answers or dataset.collate
        elif not isinstance(dataset, TensorImages):
            dataset = SeededDataset(dataset, self.seed if self.random_transforms else None)
        loader = ResumableLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=sampler,
            drop_last=self.drop_last,
            **settings,
        )
        return self._with_room(loader)

    def _train_sampler(self, dataset: Dataset) -> EpochSampler:
        repeats = getattr(self.trainer, "overfit_batches", 0)
        options: Any = {"seed": self.seed, "drop_last": self.drop_last, **self._replica()}
        if self.unlabeled_share is None:
            return (RepeatingSampler if repeats else EpochSampler)(dataset, **options)
        if repeats:
            raise ValueError("overfit_batches repeats some batches: leave out unlabeled_share")
        assert self._labeled is not None
        shares = (self._labeled, self.unlabeled_share, self.batch_size)
        return SharedBatches(dataset, *shares, **options)

    def train_views(self) -> Views:
        """Return the training set with `views` fixed augmentations of each sample."""
        return Views(self._dataset("train"), self.views or 1, self.random_transforms)

    def view_dataloader(self, view: int, batches: Sequence[Sequence[int]]) -> DataLoader:
        """Return a loader of one view of some training samples.

        Args:
            view: the number of the view, from 0.
            batches: the positions in the training set of the samples of each batch.
        """
        views = self.train_views()
        loader = DataLoader(
            views,
            batch_sampler=_KeysOfView(view, batches),
            **self._loader_settings(views) | {"persistent_workers": False},
        )
        return self._with_room(loader)

    def val_dataloader(self) -> DataLoader:
        """Return a loader of the validation set, in order."""
        return self._eval_dataloader("val")

    def test_dataloader(self) -> DataLoader:
        """Return a loader of the test set, in order."""
        return self._eval_dataloader("test")

    def predict_dataloader(self) -> DataLoader:
        """Return a loader of `predict_dataset`, in order."""
        return self._eval_dataloader("predict")

    def _eval_dataloader(self, split: str) -> DataLoader:
        dataset = self._dataset(split)
        batch_size = self.eval_batch_size or self.batch_size
        loader = DataLoader(dataset, batch_size=batch_size, **self._loader_settings(dataset))
        return self._with_room(loader)

    def _with_room(self, loader: DataLoader) -> DataLoader:
        """Return the loader, if there is room for the batches of its workers."""
        if loader.num_workers:
            sample = None
            # An unreadable sample is reported when its batch is loaded.
            with suppress(Exception), seeded(self.seed):
                sample = [loader.dataset[0], getattr(loader.collate_fn, "adds", None)]
            refuse_small_shared_memory(loader, sample, getattr(self.trainer, "num_devices", 1))
        return loader

    def _loader_settings(self, dataset: Dataset) -> dict[str, Any]:
        return {
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "pin_memory": self.pin_memory,
            "collate_fn": getattr(dataset, "collate", None),
            # Without a generator, a DataLoader draws its base seed from torch's global generator.
            "generator": torch.Generator().manual_seed(self.seed),
            "worker_init_fn": start_worker,
        }

    def _replica(self) -> dict[str, int]:
        """Return the number of processes that share the data, and the rank of this process.

        The strategy sets both, because processes that share one split network read the same data.
        """
        kwargs = self.trainer.distributed_sampler_kwargs if self.trainer is not None else None
        return kwargs or {"num_replicas": 1, "rank": 0}


class _KeysOfView(Sampler[list[Key]]):
    """A batch sampler that yields the Keys of given samples in one view."""

    def __init__(self, view: int, batches: Sequence[Sequence[int]]) -> None:
        self.view, self.batches = view, batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[Key]]:
        for batch in self.batches:
            yield [(index, self.view) for index in batch]
