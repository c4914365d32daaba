"""A data module for image classification with Hugging Face's `datasets`, from the hub or disk."""

from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from lightning_dist.data.image_files import Transform
from lightning_dist.data.timm_transform import TimmTransformDataModule


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
        test_split: the name of the test split; by default the validation split.
        **settings: the arguments of TimmTransformDataModule and ImageDataModule.

    Raises:
        ImportError: when a data set is created, if `datasets` is not installed.
        ValueError: when a data set is created, if a split or column is missing, or if the labels
            are words.
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
        return max(self._rows(self.train_split)[self.label_column]) + 1

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
        """Return the test split, by default the validation split."""
        return self._images(self.test_split, self.eval_transform())

    def _images(self, split: str, transform: Transform) -> "RowImages":
        return RowImages(
            self._rows(split),
            transform,
            image_column=self.image_column,
            label_column=self.label_column,
            location=f"{self.path}, split {split}",
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
                "numbers with the method class_encode_column of the data set"
            )
        return rows.select_columns(columns)

    def _load_split(self, split: str) -> Any:
        datasets = import_datasets()
        if not (Path(self.path) / "dataset_dict.json").is_file():
            return datasets.load_dataset(self.path, self.config, split=split)
        splits = datasets.load_from_disk(self.path)
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
    ) -> None:
        self.rows = rows
        self.transform = transform
        self.image_column = image_column
        self.label_column = label_column
        self.location = location

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        try:
            row = self.rows[index]
            image = row[self.image_column].convert("RGB")
        except (OSError, SyntaxError) as error:
            raise OSError(
                f"row {index} of {self.location} cannot be read as an image: {error}"
            ) from error
        return self.transform(image), row[self.label_column]


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
