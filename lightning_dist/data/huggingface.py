"""A data module for image classification with Hugging Face's `datasets`, from the hub or disk."""

import io
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from lightning_dist.checks import UNLABELED, check_labels
from lightning_dist.data.hub_description import refuse_other_places
from lightning_dist.data.image_files import (
    UNREADABLE,
    Transform,
    decode_image,
    open_image,
    to_rgb,
    warn_once,
)
from lightning_dist.data.timm_transform import TimmTransformDataModule
from lightning_dist.files.text import error_line

# The advice is not class_encode_column, which would number the classes of each split separately.
_SHARED_LABELS = (
    "Give all splits one ClassLabel: names = sorted({name for split in data.values() for name in "
    "split['label']}); data = data.cast_column('label', datasets.ClassLabel(names=names))"
)


class HuggingFaceDataModule(TimmTransformDataModule):
    """A data module of an image column and a label column; it needs `lightning-dist[datasets]`.

    Args:
        path: the name on the hub, a folder for `load_dataset`, or a folder to which `save_to_disk`
            saved a DatasetDict.
        config: the name of the configuration, if the data set has several.
        image_column: the name of the column with the images.
        label_column: the name of the column with the labels, a ClassLabel or whole numbers from 0.
        train_split: the name of the training split.
        val_split: the name of the validation split.
        test_split: the name of the test split; by default the validation split. If all its labels
            are -1, which is common on the hub, a warning says so, and the validation split is used
            instead. `predict_dataloader` reads its images in any case.
        **settings: the arguments of TimmTransformDataModule and ImageDataModule.

    Raises:
        ImportError: when a data set is created, if `datasets` is not installed.
        ValueError: when a data set is created, if a split or column is missing, if the labels are
            words or are not classes, or if two splits number their classes differently.
        OSError: when a sample is read, if the image cannot be decoded.
    """

    def __init__(
        self,
        *,
        path: str,
        config: str | None = None,
        image_column: str = "image",
        label_column: str = "label",
        train_split: str = "train",
        val_split: str = "validation",
        test_split: str | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self.path = path
        self.config = config
        self.image_column = image_column
        self.label_column = label_column
        self.train_split = train_split
        self.val_split = val_split
        self.test_split = test_split or val_split
        self.location = path

    @cached_property
    def class_names(self) -> list[str] | None:  # type: ignore[override]
        """The names of the classes in the order of the labels; None if they have none."""
        return getattr(self._rows(self.train_split).features[self.label_column], "names", None)

    @cached_property
    def num_classes(self) -> int:  # type: ignore[override]
        """The number of classes; without class names, the largest training label plus 1."""
        if self.class_names is not None:
            return len(self.class_names)
        return int(self._labels(self.train_split).max()) + 1

    def prepare_data(self) -> None:
        """Download the splits from the hub, unless they are in the cache of `datasets`."""
        for split in {self.train_split, self.val_split, self.test_split}:
            self._rows(split)

    def train_dataset(self) -> "RowImages":
        """Return the training split with augmentation."""
        return self._images(self.train_split, self.train_transform())

    def val_dataset(self) -> "RowImages":
        """Return the validation split."""
        return self._images(self.val_split, self.eval_transform())

    def test_dataset(self) -> "RowImages":
        """Return the test split, or the validation split if the test split has no labels."""
        if self.test_split != self.val_split and (self._labels(self.test_split) == -1).all():
            warn_once(
                f"split {self.test_split} of {self.path} has no labels (all are -1), so the test "
                f"uses split {self.val_split}"
            )
            return self.val_dataset()
        return self._images(self.test_split, self.eval_transform())

    def predict_dataset(self) -> "RowImages":
        """Return the test split, which needs no labels."""
        return self._images(self.test_split, self.eval_transform())

    def check_dataset(self, split: str, dataset: Dataset) -> None:
        """Refuse labels that are not classes, and a split that numbers its classes in its own way.

        Raises:
            ValueError: if a label is missing or not a class, or if the class names of this split
                differ from those of the training split.
        """
        if not isinstance(dataset, RowImages):
            return super().check_dataset(split, dataset)
        name = dataset.split
        labels = self._labels(name)
        names = getattr(self._rows(name).features[self.label_column], "names", None)
        try:
            num_classes, trained = self.num_classes, self.class_names
        except ValueError:  # Evaluation works without a training split.
            num_classes, trained = len(names or []) or int(labels.max()) + 1, names
        if names and trained and names != trained:
            raise ValueError(
                f"{self.path} numbers its classes differently in two splits: {self.train_split} "
                f"has {', '.join(trained)} and {name} has {', '.join(names)}. "
                f"{_SHARED_LABELS}"
            )
        ignored = UNLABELED if split == "train" else None
        check_labels(labels, max(num_classes, 1), dataset.location, ignored=ignored)

    def train_labels(self, dataset: Dataset) -> Tensor:
        """Return the classes of the training split, int64 (N,)."""
        return self._labels(self.train_split)

    def _labels(self, split: str) -> Tensor:
        """Return the labels of a split, int64 (N,).

        Raises:
            ValueError: if they are not whole numbers.
        """
        labels = np.asarray(self._rows(split).with_format(None)[self.label_column][:])
        if labels.ndim != 1 or labels.dtype.kind not in "biu":
            raise ValueError(
                f"column {self.label_column} of {self.path}, split {split}, has labels that are no "
                f"whole numbers, such as {next((x for x in labels if type(x) is not int), None)}: "
                "give one class per row, or remove the rows without a label"
            )
        return torch.from_numpy(labels.astype(np.int64))

    def _images(self, split: str, transform: Transform) -> "RowImages":
        return RowImages(
            self._rows(split),
            transform,
            image_column=self.image_column,
            label_column=self.label_column,
            location=f"{self.path}, split {split}",
            split=split,
        )

    def _rows(self, split: str) -> Any:
        """Return only two columns of a split, because `datasets` would decode the others too."""
        rows = self._load_split(split)
        columns = [self.image_column, self.label_column]
        if missing := set(columns) - set(rows.column_names):
            raise ValueError(
                f"{self.path} has no column {' nor '.join(sorted(missing))} but "
                f"{', '.join(rows.column_names)}: set image_column and label_column"
            )
        if getattr(rows.features[self.label_column], "dtype", "") == "string":
            raise ValueError(
                f"column {self.label_column} of {self.path} contains words: convert them to "
                f"numbers. {_SHARED_LABELS}"
            )
        rows = rows.select_columns(columns)
        datasets = import_datasets()
        if isinstance(rows.features[self.image_column], datasets.Image):
            # `datasets` would decode every format that Pillow knows, and open addresses.
            return rows.cast_column(self.image_column, datasets.Image(decode=False))
        return rows

    def _load_split(self, split: str) -> Any:
        datasets = import_datasets()
        folder = Path(self.path)
        refuse_other_places(folder)
        # By the name of one of its readers, `datasets` would read the files in the working folder;
        # the reader "pandas" unpickles them.
        path = str(folder.absolute()) if folder.is_dir() else self.path
        if path in getattr(datasets.packaged_modules, "_PACKAGED_DATASETS_MODULES", {}):
            raise ValueError(f"there is no folder {path}: give one, or OWNER/NAME of the hub")
        is_saved = (folder / "dataset_dict.json").is_file()
        try:
            if not is_saved:
                return datasets.load_dataset(path, self.config, split=split)
            splits = datasets.load_from_disk(path)
        except (FileNotFoundError, ImportError):
            raise
        except Exception as error:  # damaged files cause errors of many kinds
            raise ValueError(
                f"{self.path} cannot be read as a data set with the split {split}: "
                f"{error_line(error)}"
            ) from error
        if split not in splits:
            raise ValueError(
                f"{self.path} has no split {split} but {', '.join(splits)}: "
                "set train_split, val_split and test_split"
            )
        return splits[split]


class RowImages(Dataset):
    """A data set of images and labels from the rows of a Hugging Face data set.

    Args:
        rows: one split of the Hugging Face data set.
        transform: a function that converts a PIL image to a tensor (3, H, W).
        image_column: the name of the column with the images.
        label_column: the name of the column with the labels.
        location: the name of the data set and the split, for error messages.
        split: the name of the split.

    Raises:
        OSError: when a sample is read, if the image cannot be decoded.
    """

    def __init__(
        self,
        rows: Any,
        transform: Transform,
        *,
        image_column: str,
        label_column: str,
        location: str,
        split: str,
    ) -> None:
        self.rows = rows
        self.transform = transform
        self.image_column = image_column
        self.label_column = label_column
        self.location = location
        self.split = split

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        row, name = self.rows[index], f"row {index} of {self.location}"
        image = row[self.image_column]
        try:
            if isinstance(image, dict):  # an image that `datasets` has not decoded
                contents = image["bytes"]
                path = None if contents is not None else Path(image["path"])
                image = open_image(path) if path else decode_image(io.BytesIO(contents))
            elif not isinstance(image, Image.Image):
                raise ValueError(f"it is a {type(image).__name__}")
        except UNREADABLE as error:
            raise OSError(f"{name} cannot be read as an image: {error}") from error
        image = to_rgb(image, name)
        return self.transform(image), int(row[self.label_column])


def import_datasets() -> ModuleType:
    """Import and return the optional package `datasets`.

    Raises:
        ImportError: if the package is not installed; the message contains the pip command.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            "Hugging Face data sets need the package datasets: "
            "pip install 'lightning-dist[datasets]'"
        ) from error
    return datasets
