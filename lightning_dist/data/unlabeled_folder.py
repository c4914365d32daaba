"""A data module for a folder of images without labels, from which only a teacher can teach."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from lightning_dist.checks import UNLABELED, check_number
from lightning_dist.data.image_files import (
    Transform,
    class_folders,
    load_image,
    open_image_folder,
)
from lightning_dist.data.labels import SPLIT_SEED
from lightning_dist.data.packed import PackedPaths
from lightning_dist.data.timm_transform import TimmTransformDataModule
from lightning_dist.data.unlabeled import image_paths, unlabeled_files, without_known_files


class UnlabeledFolderDataModule(TimmTransformDataModule):
    """A data module of images without labels, at any depth of a folder.

    Some of the images are held out for validation, the same ones in every run, or the labelled
    images of another folder are. Validation and test use the same images.

    Args:
        root: the folder of the images, or several folders.
        val_fraction: the fraction of the images to hold out; without effect if `val_root` is given.
        val_root: a folder VAL_ROOT/CLASS/FILE of labelled images for validation. The labels number
            the names of the class folders in sorted order, and the student has these classes.
        **settings: the arguments of TimmTransformDataModule and ImageDataModule, except `labels`,
            `unlabeled` and `unlabeled_share`.

    Raises:
        FileNotFoundError: when a data set is created, if a folder is missing or has no images.
        ValueError: if a setting is out of range.
        OSError: when a sample is read, if the image cannot be decoded.
    """

    tests_on_validation = True
    trains_labels = False

    def __init__(
        self,
        *,
        root: str | Path | Sequence[str | Path],
        val_fraction: float = 0.1,
        val_root: str | Path | None = None,
        **settings: Any,
    ) -> None:
        for name in ("labels", "unlabeled", "unlabeled_share"):
            if settings.get(name) is not None:
                raise ValueError(
                    f"{name} is for data with labels, and no image of root has one: leave it out "
                    "(root takes several folders)"
                )
        super().__init__(**settings)
        check_number("val_fraction", val_fraction, least=0, most=1)
        self.root = root
        self.val_fraction = val_fraction
        self.val_root = None if val_root is None else Path(val_root)
        self.evaluates_labels = val_root is not None
        self.location = str(root)

    @cached_property
    def class_names(self) -> list[str] | None:  # type: ignore[override]
        """The sorted names of the class folders of `val_root`, or None without them."""
        return None if self.val_root is None else class_folders(self.val_root)

    @property
    def num_classes(self) -> int | None:  # type: ignore[override]
        """The number of class folders of `val_root`, or None: the teacher's number."""
        return None if self.class_names is None else len(self.class_names)

    def train_dataset(self) -> Dataset:
        """Return the images that are not held out, with augmentation and the label -100."""
        return UnlabeledImages(self._files[0], self.train_transform())

    def val_dataset(self) -> Dataset:
        """Return the labelled images of `val_root`, or the held-out images with the label -100."""
        if self.val_root is None:
            return UnlabeledImages(self._files[1], self.eval_transform())
        assert self.class_names is not None
        return open_image_folder(
            self.val_root, self.eval_transform(), self.class_names, self.val_root
        )

    def test_dataset(self) -> Dataset:
        """Return the validation images."""
        return self._dataset("val")

    @cached_property
    def _files(self) -> tuple[PackedPaths, PackedPaths]:
        """The paths of the images for training, and of those that are held out."""
        files = unlabeled_files(self.root)
        if self.val_root is not None:
            evaluated = image_paths(self._dataset("val"))
            files = without_known_files(files, self.location, (), evaluated)
            return PackedPaths(files), PackedPaths([])
        held_out = round(self.val_fraction * len(files))
        if not 0 < held_out < len(files):
            raise ValueError(
                f"val_fraction={self.val_fraction} of {len(files)} images in {self.location} holds "
                f"out {held_out}: give a fraction that leaves images for training and validation, "
                "or val_root"
            )
        order = np.random.default_rng(SPLIT_SEED).permutation(len(files))
        parts = np.sort(order[held_out:]), np.sort(order[:held_out])
        return PackedPaths(files[i] for i in parts[0]), PackedPaths(files[i] for i in parts[1])


class UnlabeledImages(Dataset):
    """Images of files, each with the label -100.

    Args:
        files: the paths of the images.
        transform: a function that converts a PIL image to a tensor (C, H, W).
    """

    def __init__(self, files: Sequence[str], transform: Transform) -> None:
        self.files = files
        self.transform = transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(load_image(self.files[index])), UNLABELED
