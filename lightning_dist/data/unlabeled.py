"""Images without labels beside a training set, and batches with a given share of them."""

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder

from lightning_dist.checks import check_number
from lightning_dist.data.image_files import (
    Transform,
    abbreviate,
    find_images,
    load_image,
    warn_once,
)
from lightning_dist.data.packed import PackedPaths
from lightning_dist.data.seeding import EpochSampler, Key, derive_seeds

log = logging.getLogger(__name__)

Sample = Callable[[Image.Image], tuple[Tensor, Any]]


def unlabeled_files(folders: str | Path | Sequence[str | Path]) -> list[str]:
    """Return the paths of the images in some folders, at any depth, sorted folder by folder.

    Args:
        folders: the folder, or several.

    Raises:
        FileNotFoundError: if a folder is missing or has no images.
    """
    files: list[str] = []
    for folder in [folders] if isinstance(folders, (str, Path)) else folders:
        found = find_images(Path(folder))
        if not found:
            raise FileNotFoundError(f"unlabeled={folder}: there is no such folder with images")
        files += real_paths(found)
    return list(dict.fromkeys(files))


def without_known_files(
    files: Sequence[str], location: str, trained: Iterable[str], evaluated: Iterable[str]
) -> list[str]:
    """Return the files that are not training images; warn of those that are for evaluation.

    Args:
        files: the paths of the images without a label, with no links in them.
        location: the name of the data set, for the messages.
        trained: the paths of the training images.
        evaluated: the paths of the validation and test images.

    Raises:
        ValueError: if all files are training images.
    """
    if both := set(files) & set(real_paths(evaluated)):
        warn_once(
            f"images of the validation set or the test set of {location} are also among the "
            f"unlabelled ones: {abbreviate(both)}: the student then trains on what it is evaluated "
            "on; give another folder"
        )
    known = set(real_paths(trained))
    others = [file for file in files if file not in known]
    if len(others) < len(files):
        left_out = (
            f"{len(files) - len(others)} of {len(files)} unlabelled images are also training "
        )
        left_out += f"images of {location}"
        if not others:
            raise ValueError(f"{left_out}: leave out unlabeled, or give a folder with other images")
        log.info("%s, and are used only once", left_out)
    return others


def image_paths(dataset: Dataset) -> Iterable[str]:
    """Return the paths of the images of a data set, or nothing if it has no list of files."""
    if isinstance(dataset, ImageFolder):
        return (path for path, _ in dataset.samples)
    return getattr(dataset, "paths", ())


def real_paths(paths: Iterable[str | Path]) -> Iterator[str]:
    """Yield the absolute path of each file, with no links in it."""
    folders: dict[str, str] = {}
    for path in paths:
        folder, name = os.path.split(path)
        if folder not in folders:
            folders[folder] = os.path.realpath(folder)
        file = os.path.join(folders[folder], name)
        yield os.path.realpath(file) if os.path.islink(file) else file


class WithTarget:
    """A function that transforms an image and gives it a constant target.

    Args:
        transform: a function that converts a PIL image to a tensor (C, H, W).
        target: the target, such as -100.
    """

    def __init__(self, transform: Transform, target: Any) -> None:
        self.transform = transform
        self.target = target

    def __call__(self, image: Image.Image) -> tuple[Tensor, Any]:
        return self.transform(image), self.target


class JoinedImages(Dataset):
    """A data set with the samples of another one, and after them images without a label.

    Args:
        dataset: a data set of images and targets, which is read by index.
        files: the paths of the images without a label.
        sample: a function that makes a sample of an RGB image.
    """

    def __init__(self, dataset: Dataset, files: Sequence[str], sample: Sample) -> None:
        self.dataset = dataset
        self.files = PackedPaths(files)
        self.sample = sample
        self._first = len(cast(Sized, dataset))
        if hasattr(dataset, "collate"):
            self.collate = dataset.collate

    def __len__(self) -> int:
        return self._first + len(self.files)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        if index < self._first:
            return self.dataset[index]
        return self.sample(load_image(self.files[index - self._first]))


class SharedBatches(EpochSampler):
    """An EpochSampler whose batches have a given share of samples without a label.

    An epoch is one pass over the samples with a label. The samples without a label come in a random
    order. The next epoch continues in this order where the last one ended, and a new order begins
    when all have been used. So all are used equally often.

    Args:
        dataset: the data set to sample.
        labeled: a bool tensor (N,) that is true for the samples with a label.
        share: the share of samples without a label in each batch of each process, from 0 (no such
            sample is used) to below 1.
        batch_size: the number of samples in a batch of each process.
        seed: the seed of the run.
        num_replicas: the number of processes that share the samples of each epoch.
        rank: the number of this process, from 0.
        drop_last: see :class:`lightning_dist.data.seeding.EpochSampler`.

    Raises:
        ValueError: if a batch would have no sample with a label, or, with a share above 0, no
            sample without one, or if the data set has no such samples.
    """

    def __init__(
        self,
        dataset: Dataset,
        labeled: Tensor,
        share: float,
        batch_size: int,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
        drop_last: bool = False,
    ) -> None:
        super().__init__(dataset, seed, num_replicas, rank, drop_last)
        check_number("unlabeled_share", share, least=0, most=1)
        self.others = round(share * batch_size)  # The number of samples without a label in a batch.
        self.own = batch_size - self.others
        self.with_label, self.without = (torch.nonzero(x)[:, 0] for x in (labeled, ~labeled))
        for name, each, all_of_them in (
            ("with", self.own, self.with_label),
            ("without", self.others, self.without),
        ):
            if name == "without" and not share:
                continue
            if not each or not len(all_of_them):
                raise ValueError(
                    f"unlabeled_share={share} of {batch_size} samples in a batch leaves {each} "
                    f"{name} a label, and the training set has {len(all_of_them)} of them: give "
                    "another share, or leave it out"
                )
        self.count = -(-len(self.with_label) // num_replicas)
        self.batches = -(-self.count // self.own)

    def __len__(self) -> int:
        return self.count + self.batches * self.others

    def __iter__(self) -> Iterator[Key]:
        own = self._order(self.with_label, 0, self.epoch)
        # Some samples are repeated, so that all processes have the same number.
        places = torch.arange(self.rank, self.count * self.num_replicas, self.num_replicas)
        own = own[places % len(own)]
        others = self._others()
        indices: list[int] = []
        for batch in range(self.batches):
            parts = (
                own[batch * self.own : (batch + 1) * self.own],
                others[batch * self.others : (batch + 1) * self.others],
            )
            # The samples of a batch are shuffled, because Mixup pairs them by their positions in
            # the batch.
            indices += self._order(torch.cat(parts), 2, self.epoch, batch).tolist()
        for index in indices[self.skip :]:
            yield index, self.epoch

    def _others(self) -> Tensor:
        """Return the indices of this epoch and process that have no label."""
        if not self.others:
            return self.without[:0]
        size, total = len(self.without), self.batches * self.others * self.num_replicas
        places = torch.arange(self.epoch * total, (self.epoch + 1) * total)
        places = places[self.rank :: self.num_replicas]
        passes = (places // size).unique().tolist()
        orders = torch.cat([self._order(self.without, 1, number) for number in passes])
        return orders[places - passes[0] * size]

    def _order(self, indices: Tensor, *parts: int) -> Tensor:
        """Return the indices in a random order that depends on the seed and some numbers."""
        (seed,) = derive_seeds(self.seed, *parts)
        return indices[torch.randperm(len(indices), generator=torch.Generator().manual_seed(seed))]
