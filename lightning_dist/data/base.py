"""`ImageDataModule`, the base class with the settings and data sets of all data modules."""

from collections.abc import Sequence, Sized
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import Dataset

from lightning_dist.checks import IGNORED, UNLABELED, check_labels, check_number
from lightning_dist.data.labels import TrainingLabels, labels_in, stratified_split
from lightning_dist.data.loaders import Loaders, collate_as_lists, count_samples
from lightning_dist.data.pixels import Pixels

__all__ = ["IGNORED", "ImageDataModule", "collate_as_lists", "count_samples", "stratified_split"]

SPLITS_OF_STAGE = {
    "fit": ("train", "val"),
    "validate": ("val",),
    "test": ("test",),
    "predict": ("predict",),
    None: ("train", "val", "test"),
}


class ImageDataModule(Pixels, TrainingLabels, Loaders):
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
            others are only distilled. `seed` chooses them, in the proportions of the classes if
            each image has one class. By default all images keep their label.
        unlabeled: a folder of images without labels, or several folders; the images, at any depth,
            are distilled in addition to the training set, with the same augmentation. Training
            images among them are left out.
        unlabeled_share: the share of images without a label in each batch of each process; 0 leaves
            them out. An epoch is then one pass over the images with a label. By default an epoch is
            one pass over all images.

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
        trains_labels: whether training images have labels.
        evaluates_labels: whether validation and test images have labels.
        views: the number of fixed augmentations of each sample, which are the same in every run.
            Each epoch uses the next one, and training batches are KeyedBatches. If it is None, each
            epoch draws a new augmentation.
    """

    num_classes: int
    class_names: list[str] | None
    class_colors: list[tuple[int, int, int]] | None = None
    tests_on_validation: bool = False
    trains_labels: bool = True
    evaluates_labels: bool = True

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
        for split in self._evaluated_splits() if stage == "fit" else ():
            self._dataset(split)

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
        labels = labels_in(dataset)
        has_classes = getattr(self, "num_classes", None) is not None
        if has_classes and isinstance(labels, Tensor) and not labels.is_floating_point():
            ignored = IGNORED if labels.dim() > 1 else UNLABELED
            where = f"the {split} set of {self.location}"
            check_labels(labels, self.num_classes, where, ignored=ignored)
            if split != "train" and (labels == ignored).all():
                raise ValueError(f"{where} has no label: metrics need labelled images")

    def _evaluated_splits(self) -> Sequence[str]:
        """Return the names of the splits for evaluation; a subclass may have no test set."""
        has_test = type(self).test_dataset is not ImageDataModule.test_dataset
        return ("val", "test") if has_test else ("val",)

    def sample_settings(self) -> dict[str, Any]:
        """Return the settings that can change a sample's pixels: all except the loader settings."""
        loaders = {"global_batch_size", "eval_batch_size", "num_workers", "seed", "pin_memory"}
        others = (
            loaders
            | {"drop_last", "views", "add_answers", "labels", "unlabeled_share"}
            | vars(LightningDataModule()).keys()
        )
        return {
            name: value
            for name, value in vars(self).items()
            if not (name in others or name.startswith("_"))
            and not isinstance(getattr(type(self), name, None), cached_property)
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
            if split == "train":
                dataset = self.with_unlabeled(dataset)
            self._datasets[split] = dataset
        return self._datasets[split]
