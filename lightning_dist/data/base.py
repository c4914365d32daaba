"""`ImageDataModule`, the base class with the settings and loaders of all data modules."""

import signal
from collections.abc import Sequence, Sized
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from PIL import Image
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import pil_to_tensor

from lightning_dist.checks import UNLABELED, check_labels, check_number
from lightning_dist.data.few_labels import choose_labels, without_other_labels
from lightning_dist.data.image_files import Transform, to_rgb
from lightning_dist.data.seeding import (
    EpochSampler,
    RepeatingSampler,
    ResumableLoader,
    SeededDataset,
    seeded,
)
from lightning_dist.data.shared_memory import refuse_small_shared_memory
from lightning_dist.data.tensor_images import TensorImages, per_channel
from lightning_dist.data.unlabeled import JoinedImages, SharedBatches, unlabeled_files
from lightning_dist.data.views import Views
from lightning_dist.files.card import Card

IGNORED = 255  # the label of the pixels that the loss and the metrics ignore
SPLIT_SEED = 0  # constant, so that runs with different seeds hold out the same images
SPLITS_OF_STAGE = {
    "fit": ("train", "val"),
    "validate": ("val",),
    "test": ("test",),
    "predict": ("predict",),
    None: ("train", "val", "test"),
}


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


def stratified_split(labels: Tensor, fraction: float) -> tuple[Tensor, Tensor]:
    """Split sample indices into two parts with the same proportions of classes.

    The split depends on `labels` and `fraction` alone, so it is the same in all runs.

    Args:
        labels: the class of each sample, shape (N,).
        fraction: the fraction of the samples to hold out, at least 0 and less than 1.

    Returns:
        The indices of the remaining samples and of the held-out samples, int64 and ascending.

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
    """Ignore SIGINT and SIGTERM in a loader's worker process.

    A terminal and SLURM send these signals to every process, but the main process decides when to
    stop, and it needs its workers until then.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class ImageDataModule(LightningDataModule):
    """A base class of data modules whose runs with the same seed get the same pixels.

    The training order depends only on (seed, epoch), and the augmentation of a sample depends only
    on (seed, epoch, index). The number of workers or processes and earlier epochs have no effect.
    Therefore a run that is resumed, even within an epoch, gets the same batches as a run without
    interruption. Loading does not change the global random generators.

    A subclass sets the attributes below and defines `train_dataset`, `val_dataset` and
    `test_dataset`. A subclass that downloads its data also defines `prepare_data`.

    Args:
        global_batch_size: the number of samples in a training batch, summed over all processes.
        eval_batch_size: the number of samples in an evaluation batch of each process; by default
            the same as in a training batch of each process.
        num_workers: the number of worker processes of each loader; 0 loads in the main process.
        seed: the seed of the training order and of the augmentation; it does not change the split
            into training and validation images.
        pin_memory: whether to copy batches into pinned memory; by default true if CUDA is
            available.
        drop_last: drop the last training batch if it is smaller than the others; timm's Mixup needs
            this if the last batch has an odd number of samples.
        mean: one value per channel, for pixels scaled to 0..1; by default the class attribute.
        std: one value per channel, for pixels scaled to 0..1; by default the class attribute.
        labels: the number of training images that keep their label, or a fraction of them; the
            others get the label -100 and are only distilled. `seed` chooses them, in the
            proportions of the classes. By default all images keep their label.
        unlabeled: a folder of images without labels, or several folders; the images, at any depth,
            are distilled in addition to the training set. Only data modules of image files support
            it.
        unlabeled_share: the share of images without a label in each batch of each process. An epoch
            is then one pass over the images with a label. By default an epoch is one pass over all
            images.

    Raises:
        ValueError: if a setting is out of range.

    Attributes:
        num_classes: the number of classes.
        class_names: the names of the classes in the order of the labels, or None if the classes
            have no names.
        mean: one value per channel, for pixels scaled to 0..1; the loaders subtract it.
        std: one value per channel, for pixels scaled to 0..1; the loaders then divide by it.
        class_colors: a colour (red, green, blue) in 0..255 for each class, or None for default
            colours.
        image_size: the height and width in pixels, if all images are squares of one size.
        in_channels: the number of channels of an image.
        tests_on_validation: whether validation and test use the same images.
        views: the number of fixed augmentations of each sample, which are the same in every run.
            Each epoch uses the next one, and training batches are KeyedBatches. If it is None, each
            epoch draws a new augmentation.
    """

    num_classes: int
    class_names: list[str] | None
    class_colors: list[tuple[int, int, int]] | None = None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int
    in_channels: int = 3
    tests_on_validation: bool = False
    views: int | None = None  # set by a cached teacher, which needs the same images again
    random_transforms: bool = True  # False skips the seeding; set it if no transform is random
    location: str  # the folder or the name of the data set, for error messages

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
        labels: float | None = None,
        unlabeled: str | Path | Sequence[str | Path] | None = None,
        unlabeled_share: float | None = None,
    ) -> None:
        super().__init__()
        check_number("global_batch_size", global_batch_size, int, least=1)
        check_number("num_workers", num_workers, int, least=0)
        check_number("seed", seed, int, least=0)
        if isinstance(labels, int):
            check_number("labels", labels, int, least=1)
        elif labels is not None:
            check_number("labels", labels, least=0, most=1)
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
        self.labels = labels
        self.unlabeled = unlabeled
        self.unlabeled_share = unlabeled_share
        self._labeled: Tensor | None = None  # which training images have a label, if not all
        self._datasets: dict[str, Dataset] = {}

    def train_dataset(self) -> Dataset:
        """Return the training set, which is read by index, or by Key if it is a TensorImages."""
        raise NotImplementedError

    def val_dataset(self) -> Dataset:
        """Return the data set for validation during training."""
        raise NotImplementedError

    def test_dataset(self) -> Dataset:
        """Return the data set for the final test."""
        raise NotImplementedError

    def predict_dataset(self) -> Dataset:
        """Return the data set for `predict_dataloader`, by default the test set."""
        return self._dataset("test")

    def setup(self, stage: str | None = None) -> None:
        """Create the data sets of a stage, so that their errors are raised before training.

        Args:
            stage: "fit", "validate", "test" or "predict"; None creates all data sets.

        Raises:
            ValueError: if a data set is empty, or has labels that are not classes.
        """
        for split in SPLITS_OF_STAGE[stage]:
            self._dataset(split)
        # A test set that cannot be used must not be noticed only when all training is done.
        if stage == "fit" and type(self).test_dataset is not ImageDataModule.test_dataset:
            self._dataset("test")

    def check_dataset(self, split: str, dataset: Dataset) -> None:
        """Refuse a data set that cannot be trained on or evaluated, before training starts.

        It checks only what can be read fast: labels in memory. A subclass checks its own kind of
        data too.

        Args:
            split: "train", "val" or "test".
            dataset: the data set of this split.

        Raises:
            ValueError: if a label is not a class.
        """
        labels = _labels_in(dataset)
        has_classes = getattr(self, "num_classes", None) is not None
        if has_classes and isinstance(labels, Tensor) and not labels.is_floating_point():
            ignored = IGNORED if labels.dim() > 1 else UNLABELED
            where = f"the {split} set of {self.location}"
            check_labels(labels, self.num_classes, where, ignored=ignored)
            if split != "train" and (labels == ignored).all():
                raise ValueError(f"{where} has no label: metrics need labelled images")

    def _with_unlabeled(self, dataset: Dataset) -> Dataset:
        """Return the training set with the images that have no label."""
        labeled = torch.ones(len(cast(Sized, dataset)), dtype=torch.bool)
        if self.labels is not None:
            labeled = choose_labels(self.train_labels(dataset), self.labels, self.seed)
            dataset = without_other_labels(dataset, labeled)
        if self.unlabeled:
            transform = self.unlabeled_transform()
            evaluated = getattr(self._dataset("val"), "samples", ())
            files = unlabeled_files(self.unlabeled, (str(path) for path, _ in evaluated))
            dataset = JoinedImages(dataset, files, transform)
            labeled = torch.cat([labeled, torch.zeros(len(files), dtype=torch.bool)])
        self._labeled = labeled
        return dataset

    def unlabeled_transform(self) -> Transform:
        """Return the function that converts images of the folder `unlabeled` for training.

        Raises:
            ValueError: if a data module of this kind reads no image files.
        """
        raise ValueError(
            f"unlabeled={self.unlabeled} is for data modules that read image files with timm's "
            f"transforms, such as data=image_folder, but this is a {type(self).__name__}"
        )

    def train_labels(self, dataset: Dataset) -> Tensor:
        """Return the classes of the training images, int64 (N,); only the option `labels` needs it.

        Args:
            dataset: the training set.

        Raises:
            ValueError: if the data set has no such list of classes.
        """
        labels = _labels_in(dataset)
        if not isinstance(labels, Tensor) or labels.dim() != 1 or labels.is_floating_point():
            raise ValueError(
                f"labels={self.labels} needs the classes of the training images in one list, which "
                f"a {type(self).__name__} does not have: leave it out"
            )
        return labels

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

    def prepare(self, image: Image.Image) -> Tensor:
        """Convert an image of any size as the evaluation loaders do, to a tensor (C, H, W)."""
        size = (self.image_size, self.image_size)
        return self._to_tensor(to_rgb(image).resize(size, Image.Resampling.BILINEAR))

    def card(self) -> Card:
        """Return the card of these data: their images and classes.

        The names of the classes can come from files: call this after `setup`.
        """
        names = getattr(self, "class_names", None)
        return Card(
            **self.image_facts(),
            num_classes=getattr(self, "num_classes", None),
            class_names=None if names is None else tuple(names),
        )

    def image_facts(self) -> dict[str, Any]:
        """Return the fields of a Card that describe what `prepare` returns, without any file."""
        size = getattr(self, "image_size", None)
        facts: dict[str, Any] = {"size": None if size is None else (size, size)}
        if size is not None:
            facts |= {"crop_mode": "squash", "crop_pct": 1.0, "interpolation": "bilinear"}
        # The subclass may be a user's, with other inputs than images, such as tokens.
        if not hasattr(self, "mean"):
            return facts
        channels = self.in_channels
        mean, std = (
            tuple(float(x) for x in (values if len(values) == channels else values * channels))
            for values in (self.mean, self.std)
        )
        return facts | {"mean": mean, "std": std, "channels": "gray" if channels == 1 else "rgb"}

    def _to_tensor(self, image: Image.Image) -> Tensor:
        """Convert an image to a normalised tensor (C, H, W) without resizing it."""
        image = to_rgb(image)
        pixels = pil_to_tensor(image.convert("L") if self.in_channels == 1 else image)
        return self._normalise(pixels)

    def _normalise(self, pixels: Tensor) -> Tensor:
        """Normalise a uint8 image (C, H, W) by `mean` and `std`."""
        pixels = pixels.float().div_(255)
        return pixels.sub_(per_channel(self.mean)).div_(per_channel(self.std))

    def to_pixels(self, images: Tensor) -> Tensor:
        """Undo the normalisation of a batch (N, C, H, W), and return uint8 pixels in 0..255."""
        mean, std = (per_channel(x).to(images) for x in (self.mean, self.std))
        return (255 * (images * std + mean)).round().clamp(0, 255).to(torch.uint8)

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
            settings["collate_fn"] = dataset.collate
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

    def view_dataloader(self, view: int, indices: Sequence[int]) -> DataLoader:
        """Return a loader of one view of some training samples, in the given order.

        Args:
            view: the number of the view, from 0.
            indices: the positions of the samples in the training set.
        """
        views = self.train_views()
        return DataLoader(
            views,
            batch_size=self.batch_size,
            sampler=[(index, view) for index in indices],
            **self._loader_settings(views) | {"persistent_workers": False},
        )

    def sample_settings(self) -> dict[str, Any]:
        """Return the settings that can change a sample's pixels: all except the loader settings."""
        loaders = {"global_batch_size", "eval_batch_size", "num_workers", "seed", "pin_memory"}
        others = (
            loaders
            | {"drop_last", "views", "labels", "unlabeled_share"}
            | vars(LightningDataModule()).keys()
        )
        return {
            name: value
            for name, value in vars(self).items()
            if not (name in others or name.startswith("_"))
            and not isinstance(getattr(type(self), name, None), cached_property)
        }

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
                sample = loader.dataset[0]
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
            "worker_init_fn": _leave_signals_to_the_run,
        }

    def _dataset(self, split: str) -> Dataset:
        """Return the data set of a split, which is created on first use.

        Raises:
            ValueError: if the data set is empty, or has labels that are not classes.
        """
        if split not in self._datasets:
            dataset: Dataset = getattr(self, f"{split}_dataset")()
            if not len(cast(Sized, dataset)):
                raise ValueError(f"the {split} set of {self.location} is empty")
            if split != "predict":  # The predict data set needs no labels.
                self.check_dataset(split, dataset)
            self._datasets[split] = self._with_unlabeled(dataset) if split == "train" else dataset
        return self._datasets[split]

    def _replica(self) -> dict[str, int]:
        """Return the number of processes that share the data, and the rank of this process.

        The strategy sets both, because processes that share one split network read the same data.
        """
        kwargs = self.trainer.distributed_sampler_kwargs if self.trainer is not None else None
        return kwargs or {"num_replicas": 1, "rank": 0}


def _labels_in(dataset: Dataset) -> Any:
    """Return the labels that a data set has in memory, as a tensor if they are whole numbers."""
    labels = getattr(dataset, "labels", getattr(dataset, "targets", None))
    if isinstance(labels, list) and all(isinstance(label, int) for label in labels):
        return torch.tensor(labels)
    return labels
