"""A data module for ImageNet, or any data set with a folder per class, with timm's transforms."""

from functools import cached_property
from pathlib import Path
from typing import Any

from torchvision.datasets import ImageFolder

from lightning_dist.data.image_files import Transform, class_folders, open_image_folder
from lightning_dist.data.timm_transform import TimmTransformDataModule


class ImageFolderDataModule(TimmTransformDataModule):
    """A data module of ROOT/train/CLASS/FILE and ROOT/val/CLASS/FILE, for ImageNet and the like.

    The labels number the names of the class folders in sorted order.

    Args:
        root: the folder that contains the folders below.
        train_dir: the folder of the training images, with a folder per class.
        val_dir: the folder of the validation images, with a folder per class.
        test_dir: the folder of the test images, with a folder per class; by default `val_dir`,
            because ImageNet's published numbers are validation accuracies.
        **settings: the arguments of TimmTransformDataModule and ImageDataModule.

    Raises:
        FileNotFoundError: when a data set is created, if a folder is missing, or if a class has no
            images.
        ValueError: when a data set is created, if its classes differ from the training classes.
        OSError: when a sample is read, if the image cannot be decoded.
    """

    def __init__(
        self,
        *,
        root: str | Path = "data/imagenet",
        train_dir: str = "train",
        val_dir: str = "val",
        test_dir: str | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self.root = Path(root)
        self.train_dir = train_dir
        self.val_dir = val_dir
        self.test_dir = test_dir or val_dir
        self.tests_on_validation = self.test_dir == val_dir
        self.location = str(self.root)

    @cached_property
    def class_names(self) -> list[str]:  # type: ignore[override]
        """The sorted names of the class folders of the training images."""
        return class_folders(self.root / self.train_dir)

    @property
    def num_classes(self) -> int:  # type: ignore[override]
        """The number of class folders of the training images."""
        return len(self.class_names)

    def train_dataset(self) -> ImageFolder:
        """Return the training images with augmentation."""
        return self._images(self.train_dir, self.train_transform())

    def val_dataset(self) -> ImageFolder:
        """Return the validation images."""
        return self._images(self.val_dir, self.eval_transform())

    def test_dataset(self) -> ImageFolder:
        """Return the test images, by default the validation images."""
        return self._images(self.test_dir, self.eval_transform())

    def _images(self, name: str, transform: Transform) -> ImageFolder:
        return open_image_folder(
            self.root / name, transform, self.class_names, expected_by=self.root / self.train_dir
        )
