"""ImageNet, and any other data set in a folder for each class, with timm's augmentation."""

from functools import cached_property
from pathlib import Path
from typing import Any

from torchvision.datasets import ImageFolder

from lightning_dist.data.image_files import Transform, class_folders, open_folder
from lightning_dist.data.timm_transform import TimmTransformDataModule


class ImageFolderDataModule(TimmTransformDataModule):
    """Images as ROOT/train/CLASS/FILE and ROOT/val/CLASS/FILE: ImageNet, or any data set like it.

    The labels follow the class folders' names in order.

    Args:
        root: folder that holds the three below.
        train_dir: training images, a folder for each class.
        val_dir: validation images, likewise.
        test_dir: test images, likewise; by default the validation images, as ImageNet's published
            numbers are on them.
        **settings: see TimmTransformDataModule and ImageDataModule.

    Raises:
        FileNotFoundError: when a data set is opened and a folder, or a class's images, are missing.
        ValueError: when it is opened and its classes are not those of the training images.
        OSError: when an image cannot be decoded; names the file.
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
        self.location = str(self.root)

    @cached_property
    def class_names(self) -> list[str]:  # type: ignore[override]
        """Names of the training images' class folders, in order."""
        return class_folders(self.root / self.train_dir)

    @property
    def num_classes(self) -> int:  # type: ignore[override]
        """Number of class folders."""
        return len(self.class_names)

    def train_dataset(self) -> ImageFolder:
        """The training images, augmented."""
        return self._folder(self.train_dir, self.train_transform())

    def val_dataset(self) -> ImageFolder:
        """The validation images."""
        return self._folder(self.val_dir, self.eval_transform())

    def test_dataset(self) -> ImageFolder:
        """The test images, or the validation images where there are no others."""
        return self._folder(self.test_dir, self.eval_transform())

    def _folder(self, name: str, transform: Transform) -> ImageFolder:
        return open_folder(
            self.root / name, transform, self.class_names, expected_by=self.root / self.train_dir
        )
