"""Data modules for segmentation: Cityscapes, Pascal VOC 2012, and folders like ADE20K's."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torchvision.datasets import Cityscapes, VOCSegmentation
from torchvision.models.segmentation import DeepLabV3_ResNet50_Weights

from lightning_dist.data.image_files import abbreviate, find_images
from lightning_dist.data.segmentation_base import IGNORED, Pair, SegmentationDataModule
from lightning_dist.files.text import read_bounded

# torchvision stores the names of Pascal VOC's classes with the weights trained on that data set.
_VOC_CLASSES = DeepLabV3_ResNet50_Weights.DEFAULT.meta["categories"][1:]  # without the background


class CityscapesDataModule(SegmentationDataModule):
    """A data module of Cityscapes with 19 classes, which torchvision's data set finds.

    The test set is the validation set, because the test masks are not public. Published
    numbers are from the validation set too.

    Args:
        root: the folder that contains `leftImg8bit/SPLIT/CITY/*_leftImg8bit.png` and
            `gtFine/SPLIT/CITY/*_gtFine_labelIds.png`.
        **settings: the arguments of SegmentationDataModule and ImageDataModule.

    Raises:
        FileNotFoundError: when a data set is created, if folders, images or masks are missing.
    """

    _trained = sorted((c for c in Cityscapes.classes if 0 <= c.train_id < 255), key=lambda c: c[2])

    num_classes = len(_trained)
    tests_on_validation = True

    def __init__(self, *, root: str | Path = "data/cityscapes", **settings: Any) -> None:
        super().__init__(**settings)
        self.root = Path(root)
        self.location = str(self.root)
        self.class_names = [c.name for c in self._trained]
        self.class_colors = [c.color for c in self._trained]

    @property
    def class_ids(self) -> list[int]:
        """The mask id of each of the 19 classes, in the order of the classes."""
        return [c.id for c in self._trained]

    @property
    def ignored_ids(self) -> list[int]:
        """All other mask ids; the masks store the id -1 of licence plates as 255."""
        return [c.id % 256 for c in Cityscapes.classes if c not in self._trained] + [IGNORED]

    def pairs(self, split: str) -> list[Pair]:
        """Return the sorted files of a split; "test" is the validation split.

        Raises:
            FileNotFoundError: if the data set, an image or a mask is missing.
        """
        split = "train" if split == "train" else "val"
        missing = {
            str(folder)
            for folder in (self.root / kind / split for kind in ("leftImg8bit", "gtFine"))
            if not folder.is_dir()
        }
        if missing:  # torchvision would unpack archives in the folder, also through a link
            raise FileNotFoundError(
                f"{self.root} has no Cityscapes: expected {abbreviate(missing)}: unpack "
                "leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip there"
            )
        try:
            data = Cityscapes(str(self.root), split, target_type="semantic")
        except (RuntimeError, OSError) as error:
            raise FileNotFoundError(
                f"{self.root} has no Cityscapes: expected leftImg8bit/{split}/CITY and "
                f"gtFine/{split}/CITY ({error})"
            ) from error
        found = zip(data.images, data.targets, strict=True)
        pairs = sorted(Pair(Path(image), Path(mask)) for image, (mask,) in found)
        have = {pair.mask for pair in pairs}
        masks = (self.root / "gtFine" / split).glob("*/*_gtFine_labelIds.png")
        _refuse_unpaired({str(mask) for mask in masks if mask not in have})
        return pairs


class VOC2012DataModule(SegmentationDataModule):
    """A data module of Pascal VOC 2012, which torchvision finds: 20 classes and the background.

    The test set is the validation set, because the test masks are not public.

    Args:
        root: the folder that contains `VOCdevkit/VOC2012`.
        download: download the data set (2 GB) if it is missing.
        **settings: the arguments of SegmentationDataModule and ImageDataModule.

    Raises:
        FileNotFoundError: when a data set is created, if folders, images or masks are missing.
    """

    num_classes = 21
    tests_on_validation = True

    def __init__(
        self, *, root: str | Path = "data/voc", download: bool = False, **settings: Any
    ) -> None:
        super().__init__(**settings)
        self.root = Path(root)
        self.download = download
        self.location = str(self.root)
        self.class_names = ["background", *_VOC_CLASSES]

    def prepare_data(self) -> None:
        """Download the data set if `download` is set and the data set is missing."""
        if self.download and not (self.root / "VOCdevkit" / "VOC2012").is_dir():
            VOCSegmentation(self.root, "2012", download=True)

    def pairs(self, split: str) -> list[Pair]:
        """Return the files that `ImageSets/Segmentation` lists for a split.

        Raises:
            FileNotFoundError: if the data set is missing.
        """
        split = "train" if split == "train" else "val"
        try:
            # torchvision would wait for a pipe and read a device without end.
            read_bounded(self.root / f"VOCdevkit/VOC2012/ImageSets/Segmentation/{split}.txt")
            data = VOCSegmentation(self.root, "2012", split)
        except (RuntimeError, OSError) as error:
            raise FileNotFoundError(
                f"{self.root} has no Pascal VOC 2012: expected VOCdevkit/VOC2012 with "
                f"ImageSets/Segmentation in it, or set download=true ({error})"
            ) from error
        return [Pair(Path(i), Path(m)) for i, m in zip(data.images, data.masks, strict=True)]


class MaskFolderDataModule(SegmentationDataModule):
    """A data module of images and masks with the same names in two folders, as in ADE20K.

    Args:
        root: the folder that contains `images/SPLIT/NAME.jpg` and `annotations/SPLIT/NAME.png`; a
            split may have subfolders.
        num_classes: the number of classes.
        class_names: the names of the classes in the order of the labels; None if they have no
            names.
        reduce_zero_label: if true, the classes have the mask ids 1 to `num_classes` and id 0 is
            ignored, as in ADE20K. By default the classes have the mask ids 0 to `num_classes` - 1.
            Id 255 is always ignored.
        class_ids: the mask id of each class, in the order of the classes, instead of
            `reduce_zero_label`: [0, 255] for masks of black and white. Id 255 is ignored unless it
            is listed.
        images: the name of the folder of the images.
        masks: the name of the folder of the masks.
        train: the name of the training split's folder, under `images` and `masks`.
        val: the name of the validation split's folder.
        test: the name of the test split's folder; by default the validation split's folder.
        **settings: the arguments of SegmentationDataModule and ImageDataModule.

    Raises:
        FileNotFoundError: when a data set is created, if folders, images or masks are missing.
        ValueError: if there are not `num_classes` `class_names` or `class_ids`; when a data set is
            created, if two files have the same name without suffix.
    """

    def __init__(
        self,
        *,
        root: str | Path,
        num_classes: int,
        class_names: Sequence[str] | None = None,
        reduce_zero_label: bool = False,
        class_ids: Sequence[int] | None = None,
        images: str = "images",
        masks: str = "annotations",
        train: str = "training",
        val: str = "validation",
        test: str | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        if class_names is not None and len(class_names) != num_classes:
            raise ValueError(
                f"there are {len(class_names)} class_names, but num_classes is {num_classes}"
            )
        if class_ids is not None and (len(set(class_ids)) != num_classes or reduce_zero_label):
            raise ValueError(
                f"class_ids is {list(class_ids)} and num_classes is {num_classes}: give one id for "
                "each class, without reduce_zero_label"
            )
        self.root = Path(root)
        self.location = str(self.root)
        self.num_classes = num_classes
        self.ids = None if class_ids is None else list(class_ids)
        self.class_names = None if class_names is None else list(class_names)
        self.reduce_zero_label = reduce_zero_label
        self.folders = images, masks
        self.splits = {"train": train, "val": val, "test": test or val}
        self.tests_on_validation = self.splits["test"] == val

    @property
    def class_ids(self) -> Sequence[int]:
        """The mask ids of the classes: from 1 with `reduce_zero_label`, by default from 0."""
        if self.ids is not None:
            return self.ids
        first = int(self.reduce_zero_label)
        return range(first, first + self.num_classes)

    @property
    def ignored_ids(self) -> Sequence[int]:
        """The mask ids of the pixels to ignore: 255, and 0 with `reduce_zero_label`."""
        ignored = (0, IGNORED) if self.reduce_zero_label else (IGNORED,)
        return [number for number in ignored if number not in self.class_ids]

    def pairs(self, split: str) -> list[Pair]:
        """Return the files of a split, sorted by name.

        Raises:
            FileNotFoundError: if a folder is missing, or if an image or a mask has no counterpart.
            ValueError: if two files have the same name without suffix.
        """
        images, masks = (self._files(name, self.splits[split]) for name in self.folders)
        _refuse_unpaired({str(path) for name, path in images.items() if name not in masks})
        _refuse_unpaired({str(path) for name, path in masks.items() if name not in images})
        return [Pair(images[name], masks[name]) for name in sorted(images)]

    def _files(self, kind: str, split: str) -> dict[str, Path]:
        """Return a dict from names without suffix to the image files under a folder."""
        folder = self.root / kind / split
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{folder} is missing: expected {self.folders[0]}/{split}/NAME.jpg and "
                f"{self.folders[1]}/{split}/NAME.png in {self.root}"
            )
        files: dict[str, Path] = {}
        for path in find_images(folder):
            name = str(path.relative_to(folder).with_suffix(""))
            if name in files:
                raise ValueError(f"{files[name]} and {path} have the same name: remove one")
            files[name] = path
        return files


def _refuse_unpaired(paths: set[str]) -> None:
    if paths:
        raise FileNotFoundError(
            f"{len(paths)} of the images and masks have no counterpart: {abbreviate(paths)}: "
            "add the counterparts, or remove these files"
        )
