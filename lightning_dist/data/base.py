"""What all data modules share: their settings, their loaders, and how they split."""

import signal
from collections.abc import Sequence, Sized
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from PIL import Image
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import pil_to_tensor

from lightning_dist.checks import check_number
from lightning_dist.data.seeding import EpochSampler, ResumableLoader, SeededDataset
from lightning_dist.data.tensor_images import TensorImages, of_channels
from lightning_dist.data.views import Views

SPLIT_SEED = 0  # which images are held out never depends on a run's seed
SPLITS_OF_STAGE = {
    "fit": ("train", "val"),
    "validate": ("val",),
    "test": ("test",),
    "predict": ("test",),
    None: ("train", "val", "test"),
}


def list_collate(samples: Sequence[tuple[Any, Any]]) -> tuple[list[Any], list[Any]]:
    """A batch of images of unlike sizes and their targets, as lists."""
    images, targets = zip(*samples, strict=True)
    return list(images), list(targets)


def count_samples(batch: tuple[Any, Any]) -> int:
    """How many samples a batch of inputs and targets has.

    Example:
        >>> count_samples((torch.zeros(8, 3, 4, 4), torch.zeros(8)))
        8
    """
    return len(batch[0])


def stratified_split(labels: Tensor, fraction: float) -> tuple[Tensor, Tensor]:
    """Indices of (the rest, a stratified `fraction`); always the same ones; in ascending order.

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


def _leave_signals_to_the_run(worker: int) -> None:
    """A terminal and SLURM send them to the workers too, whom the run still needs to end well."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class ImageDataModule(LightningDataModule):
    """Loaders over the three data sets that a subclass provides, repeatable to the pixel.

    The training order is a function of (seed, epoch) alone, a sample's augmentation of (seed,
    epoch, index) alone: not of the number of workers or processes, nor of what ran before. Also a
    run that resumes, at an epoch's start or within it, sees what it would have seen. The global
    random streams stay as they are.

    A subclass sets the attributes below and defines `train_dataset`, `val_dataset` and
    `test_dataset`, and `prepare_data` where there is something to download.

    Args:
        global_batch_size: training batch over all processes.
        eval_batch_size: evaluation batch of each process; by default its training batch.
        num_workers: processes that load, for each loader; 0 loads in the main process.
        seed: of the training order and the augmentation, not of the split.
        pin_memory: copy batches into pinned memory; by default where there is CUDA.
        drop_last: drop the last training batch where it is smaller (timm's Mixup needs even ones).
        mean: of each channel, for pixels scaled to 0..1, instead of the data set's own.
        std: of each channel, likewise.

    Raises:
        ValueError: if a setting is out of range.

    Attributes:
        num_classes: number of classes.
        class_names: their names in the order of the labels, or None where they have none.
        mean: of each channel, which the loaders have subtracted from pixels scaled to 0..1.
        std: of each channel, by which they have then divided.
        class_colors: a colour (red, green, blue) of each, in 0..255, or None to choose some.
        image_size: side in pixels, where all images are squares of one size.
        in_channels: channels of an image.
        views: train on so many fixed augmentations of each sample, which are the same in every run,
            in turn; the batches are then KeyedBatches. None draws another one each epoch.
    """

    num_classes: int
    class_names: list[str] | None
    class_colors: list[tuple[int, int, int]] | None = None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int
    in_channels: int = 3
    views: int | None = None  # train on so many fixed views, as a cached teacher needs it
    random_transforms: bool = True  # a subclass whose training set draws none saves the seeding
    location: str  # where the images are, for error messages

    def __init__(
        self,
        *,
        global_batch_size: int = 64,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        pin_memory: bool | None = None,
        drop_last: bool = False,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        check_number("global_batch_size", global_batch_size, int, least=1)
        check_number("num_workers", num_workers, int, least=0)
        check_number("seed", seed, int, least=0)
        if eval_batch_size is not None:
            check_number("eval_batch_size", eval_batch_size, int, least=1)
        for name, values in (("mean", mean), ("std", std)):
            if values is not None and len(values) not in (1, self.in_channels):
                raise ValueError(
                    f"{name} has {len(values)} values and an image {self.in_channels} channels: "
                    f"give one or {self.in_channels}"
                )
            if values is not None:
                setattr(self, name, tuple(values))
        for value in std or ():
            if not value > 0:
                raise ValueError(f"std has {value}: give deviations above 0")
        self.global_batch_size = global_batch_size
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.pin_memory = torch.cuda.is_available() if pin_memory is None else pin_memory
        self.drop_last = drop_last
        self._datasets: dict[str, Dataset] = {}

    def train_dataset(self) -> Dataset:
        """The training set, read by index, or by Key if it is a TensorImages."""
        raise NotImplementedError

    def val_dataset(self) -> Dataset:
        """The set on which runs are compared while they train."""
        raise NotImplementedError

    def test_dataset(self) -> Dataset:
        """The set that gives the published number; also predicted on."""
        raise NotImplementedError

    def setup(self, stage: str | None = None) -> None:
        """Open what the stage ("fit", "validate", "test", "predict" or None for all) reads."""
        for split in SPLITS_OF_STAGE[stage]:
            self._dataset(split)

    @property
    def batch_size(self) -> int:
        """Training batch of each process.

        Raises:
            ValueError: if the processes cannot share `global_batch_size` evenly.
        """
        processes = self._share()["num_replicas"]
        if self.global_batch_size % processes:
            raise ValueError(
                f"global_batch_size={self.global_batch_size} cannot be shared by {processes} "
                f"processes: set it to a multiple of {processes}"
            )
        return self.global_batch_size // processes

    def prepare(self, image: Image.Image) -> Tensor:
        """Any image as evaluation shows it to the network: (C, H, W)."""
        size = (self.image_size, self.image_size)
        return self._normalised(image.resize(size, Image.Resampling.BILINEAR))

    def _normalised(self, image: Image.Image) -> Tensor:
        """An image (C, H, W) at its own size."""
        return self._scaled(pil_to_tensor(image.convert("L" if self.in_channels == 1 else "RGB")))

    def _scaled(self, pixels: Tensor) -> Tensor:
        """What the network is given of a uint8 image (C, H, W)."""
        pixels = pixels.float().div_(255)
        return pixels.sub_(of_channels(self.mean)).div_(of_channels(self.std))

    def to_pixels(self, images: Tensor) -> Tensor:
        """The uint8 images (N, C, H, W) that a batch of the loaders was made from."""
        mean, std = (of_channels(x).to(images) for x in (self.mean, self.std))
        return (255 * (images * std + mean)).round().clamp(0, 255).to(torch.uint8)

    def train_dataloader(self) -> DataLoader:
        """Shuffled, augmented batches of the training set."""
        dataset = self._dataset("train")
        sampler = EpochSampler(dataset, self.seed, drop_last=self.drop_last, **self._share())
        if self.drop_last and len(sampler) < self.batch_size:
            raise ValueError(
                f"the training set of {self.location} has {len(cast(Sized, dataset))} images, and "
                f"drop_last drops a batch of less than global_batch_size={self.global_batch_size}: "
                "set that to less, or drop_last=False"
            )
        settings = self._loader_settings(dataset)
        if self.views is not None:
            dataset = self.train_views()
            settings["collate_fn"] = dataset.collate
        elif not isinstance(dataset, TensorImages):
            dataset = SeededDataset(dataset, self.seed if self.random_transforms else None)
        return ResumableLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=sampler,
            drop_last=self.drop_last,
            **settings,
        )

    def train_views(self) -> Views:
        """The training set in its `views`."""
        return Views(self._dataset("train"), self.views or 1, self.random_transforms)

    def view_dataloader(self, view: int, indices: Sequence[int]) -> DataLoader:
        """Batches of some training samples, in order, in one view."""
        views = self.train_views()
        return DataLoader(
            views,
            batch_size=self.batch_size,
            sampler=[(index, view) for index in indices],
            **self._loader_settings(views) | {"persistent_workers": False},
        )

    def sample_settings(self) -> dict[str, Any]:
        """The settings that may decide what a sample looks like: all but those of the loaders."""
        loaders = {"global_batch_size", "eval_batch_size", "num_workers", "seed", "pin_memory"}
        others = loaders | {"drop_last", "views"} | vars(LightningDataModule()).keys()
        return {
            name: value
            for name, value in vars(self).items()
            if not (name in others or name.startswith("_"))
            and not isinstance(getattr(type(self), name, None), cached_property)
        }

    def val_dataloader(self) -> DataLoader:
        """Batches of the validation set in order."""
        return self._eval_dataloader("val")

    def test_dataloader(self) -> DataLoader:
        """Batches of the test set in order."""
        return self._eval_dataloader("test")

    def predict_dataloader(self) -> DataLoader:
        """Batches of the test set in order."""
        return self._eval_dataloader("test")

    def _eval_dataloader(self, split: str) -> DataLoader:
        dataset = self._dataset(split)
        batch_size = self.eval_batch_size or self.batch_size
        return DataLoader(dataset, batch_size=batch_size, **self._loader_settings(dataset))

    def _loader_settings(self, dataset: Dataset) -> dict[str, Any]:
        return {
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "pin_memory": self.pin_memory,
            "collate_fn": getattr(dataset, "collate", None),
            # A loader draws its workers' base seed: from the global stream, were this not given.
            "generator": torch.Generator().manual_seed(self.seed),
            "worker_init_fn": _leave_signals_to_the_run,
        }

    def _dataset(self, split: str) -> Dataset:
        """The data set of a split, opened on first use.

        Raises:
            ValueError: if it is empty.
        """
        if split not in self._datasets:
            dataset: Dataset = getattr(self, f"{split}_dataset")()
            if not len(cast(Sized, dataset)):
                raise ValueError(f"the {split} set of {self.location} is empty")
            self._datasets[split] = dataset
        return self._datasets[split]

    def _share(self) -> dict[str, int]:
        """How many processes share the data, and which one this is.

        The strategy knows best: processes that split one network between them read the same data.
        """
        kwargs = self.trainer.distributed_sampler_kwargs if self.trainer is not None else None
        return kwargs or {"num_replicas": 1, "rank": 0}
