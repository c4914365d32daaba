"""Any image classification data set of Hugging Face's `datasets`, from the hub or from disk."""

from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from lightning_dist.data.image_files import Transform
from lightning_dist.data.timm_transform import TimmTransformDataModule


class HuggingFaceDataModule(TimmTransformDataModule):
    """A data set with an image column and a label column; needs `lightning-dist[datasets]`.

    Args:
        path: name on the hub, folder that `load_dataset` understands, or folder that a DatasetDict
            was saved in by `save_to_disk`.
        config: name of the configuration, where a data set has several.
        image_column: column of the images.
        label_column: column of the labels: a ClassLabel, or whole numbers from 0 on.
        train_split: split to train on.
        val_split: split to validate on.
        test_split: split to test on; by default the one to validate on.
        **settings: see TimmTransformDataModule and ImageDataModule.

    Raises:
        ImportError: when a data set is opened and `datasets` is not installed.
        ValueError: when it is opened and a split or column is missing, or labels are words.
        OSError: when an image cannot be decoded; names the row.
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
        """Names of the label column's classes; None if it holds mere numbers."""
        return getattr(self._rows(self.train_split).features[self.label_column], "names", None)

    @cached_property
    def num_classes(self) -> int:  # type: ignore[override]
        """Number of classes; where they have no names, from the largest training label."""
        if self.class_names is not None:
            return len(self.class_names)
        return max(self._rows(self.train_split)[self.label_column]) + 1

    def prepare_data(self) -> None:
        """Download what is on the hub and not yet in the cache."""
        for split in {self.train_split, self.val_split, self.test_split}:
            self._rows(split)

    def train_dataset(self) -> "RowImages":
        """The training split, augmented."""
        return self._images(self.train_split, self.train_transform())

    def val_dataset(self) -> "RowImages":
        """The validation split."""
        return self._images(self.val_split, self.eval_transform())

    def test_dataset(self) -> "RowImages":
        """The test split, or the validation split where no other is given."""
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
        """A split, reduced to the two columns: others would be decoded for nothing."""
        rows = self._open(split)
        columns = [self.image_column, self.label_column]
        if missing := set(columns) - set(rows.column_names):
            raise ValueError(
                f"{self.path} has no column {' nor '.join(sorted(missing))} but "
                f"{', '.join(rows.column_names)}: set image_column and label_column"
            )
        if getattr(rows.features[self.label_column], "dtype", "") == "string":
            raise ValueError(
                f"column {self.label_column} of {self.path} holds words: make them numbers with "
                "its class_encode_column"
            )
        return rows.select_columns(columns)

    def _open(self, split: str) -> Any:
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
    """Images and labels from the rows of a Hugging Face data set.

    Args:
        rows: the data set.
        transform: makes the tensor of an image.
        image_column: column of the images.
        label_column: column of the labels.
        location: where the rows are, for error messages.
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
    """The `datasets` package, which is optional.

    Raises:
        ImportError: if it is not installed; says how to install it.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            "Hugging Face data sets need the package datasets: "
            "pip install 'lightning-dist[datasets]'"
        ) from error
    return datasets
