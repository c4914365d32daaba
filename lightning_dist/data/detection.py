"""Data modules for detection: COCO, Pascal VOC, and folders in YOLO's format."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from torchvision.datasets import VOCDetection
from torchvision.datasets.voc import DATASET_YEAR_DICT
from torchvision.models.segmentation import DeepLabV3_ResNet50_Weights

from lightning_dist.data.annotations import Annotated, AnnotatedFiles
from lightning_dist.data.boxes import as_numbers, check_fractions
from lightning_dist.data.coco_file import CocoFile, no_garbage_collection
from lightning_dist.data.detection_base import DetectionDataModule
from lightning_dist.data.image_files import abbreviate, find_files, find_images, warn_once
from lightning_dist.files.text import read_bounded

# torchvision stores the names of Pascal VOC's classes with the weights trained on that data set.
_VOC_CLASSES = DeepLabV3_ResNet50_Weights.DEFAULT.meta["categories"][1:]  # without the background
_SIDES = ("xmin", "ymin", "xmax", "ymax")


class CocoDataModule(DetectionDataModule):
    """A data module of COCO, or of any data set with `instances_*.json` and a folder of images.

    The sorted category ids become the labels 0, 1, ... Crowd regions are not used for training. The
    test set is the validation set, because COCO's test annotations are not public.

    Args:
        root: the folder to which all other paths are relative.
        num_classes: the number of categories that the annotations must have.
        train_images: the folder of the training images.
        val_images: the folder of the validation images.
        train_annotations: the file of the training annotations.
        val_annotations: the file of the validation annotations.
        **settings: the arguments of DetectionDataModule and ImageDataModule.

    Raises:
        FileNotFoundError: when a data set is created, if a file is missing.
        ValueError: when a data set is created, if the annotations are not JSON in COCO's format,
            have another number of categories, refer to an unknown image or category, or lack a
            bbox or an id; the message names the file and the annotation.
    """

    tests_on_validation = True

    def __init__(
        self,
        *,
        root: str | Path = "data/coco",
        num_classes: int = 80,
        train_images: str = "train2017",
        val_images: str = "val2017",
        train_annotations: str = "annotations/instances_train2017.json",
        val_annotations: str = "annotations/instances_val2017.json",
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self.root = Path(root)
        self.location = str(self.root)
        self.num_classes = num_classes
        self.class_names = None
        self.files = {
            "train": (train_images, train_annotations),
            "val": (val_images, val_annotations),
        }

    def entries(self, split: str) -> AnnotatedFiles:
        """Return the images of a split and their boxes, in the order of the annotation file.

        Raises:
            FileNotFoundError: if the annotation file is missing.
            ValueError: if the annotations are invalid; the docstring of the class lists the cases.
        """
        images, annotations = self.files["train" if split == "train" else "val"]
        with no_garbage_collection():
            file = CocoFile(self.root / annotations)
            self._take_names(file)
            return file.images(self.root / images)

    def _take_names(self, file: CocoFile) -> None:
        """Set `class_names`, or refuse the file if it has other categories."""
        if len(file.categories) != self.num_classes:
            raise ValueError(
                f"{file.path} has {len(file.categories)} categories and num_classes is "
                f"{self.num_classes}"
            )
        names = [category["name"] for category in file.categories]
        if self.class_names not in (None, names):
            raise ValueError(f"{file.path} and the training annotations differ in their categories")
        self.class_names = names


class VOCDetectionDataModule(DetectionDataModule):
    """A data module of Pascal VOC with boxes of 20 classes, which torchvision's data set finds.

    Objects marked as difficult are treated like COCO's crowd regions. The test set is the
    validation set.

    Args:
        root: the folder that contains `VOCdevkit/VOC<year>`.
        year: the year of the data set, "2007" or "2012".
        download: download the data set if it is missing.
        **settings: the arguments of DetectionDataModule and ImageDataModule.

    Raises:
        FileNotFoundError: when a data set is created, if a folder or file is missing.
        ValueError: when a data set is created, if an annotation is not XML, or if an object has an
            unknown class or no box.
    """

    num_classes = 20
    tests_on_validation = True

    def __init__(
        self,
        *,
        root: str | Path = "data/voc",
        year: str | int = "2012",
        download: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self.root = Path(root)
        self.location = str(self.root)
        self.year = str(year)
        self.download = download
        self.class_names = list(_VOC_CLASSES)

    def prepare_data(self) -> None:
        """Download the data set if `download` is set and the data set is missing."""
        if self.download and not (self.root / "VOCdevkit" / f"VOC{self.year}").is_dir():
            VOCDetection(self.root, self.year, download=True)

    def entries(self, split: str) -> Iterator[Annotated]:
        """Return the images that `ImageSets/Main` lists for a split, and their boxes.

        Raises:
            FileNotFoundError: if a folder or file is missing.
            ValueError: if an annotation is invalid; the docstring of the class lists the cases.
        """
        split = "train" if split == "train" else "val"
        base = DATASET_YEAR_DICT.get(self.year, {}).get("base_dir", "")
        try:
            # torchvision would wait for a pipe and read a device without end.
            read_bounded(self.root / base / f"ImageSets/Main/{split}.txt")
            data = VOCDetection(self.root, self.year, split)
        except (RuntimeError, OSError) as error:
            raise FileNotFoundError(
                f"{self.root} has no Pascal VOC {self.year}: expected VOCdevkit/VOC{self.year} "
                f"with ImageSets/Main in it, or set download=true ({error})"
            ) from error
        pairs = zip(data.images, data.annotations, strict=True)
        return (self._entry(Path(image), Path(file)) for image, file in pairs)

    def _entry(self, image: Path, file: Path) -> Annotated:
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing: restore it, or remove its image")
        try:
            root = ElementTree.fromstring(read_bounded(file))
        except ElementTree.ParseError as error:
            raise ValueError(f"{file} is no XML ({error}): restore it") from error
        assert self.class_names is not None
        width, height = (root.findtext(f"size/{side}", "0") for side in ("width", "height"))
        known = all(len(x) < 10 and x.isdecimal() and int(x) for x in (width, height))
        size = (int(width), int(height)) if known else None  # some programs write a size of 0
        entry = Annotated(image, [], [], [], size=size)
        for found in root.iter("object"):
            name = found.findtext("name", "")
            if name not in self.class_names:
                raise ValueError(f"{file} has an object of the unknown class {name!r}")
            box = found.find("bndbox")
            sides = [box.findtext(side) if box is not None else None for side in _SIDES]
            if None in sides:
                raise ValueError(f"{file} has a {name} without a box of {', '.join(_SIDES)}")
            try:
                x1, y1, x2, y2 = as_numbers([float(str(side)) for side in sides], 4, "the box")
            except ValueError as error:
                raise ValueError(f"{file} has a {name} with the box {sides}: {error}") from error
            entry.boxes.append([x1 - 1, y1 - 1, x2, y2])  # VOC counts pixels from 1
            entry.labels.append(self.class_names.index(name))
            entry.crowd.append(found.findtext("difficult", "0") == "1")
        return entry


class YoloDataModule(DetectionDataModule):
    """A data module of folders in YOLO's format: one text file per image, with one line per box.

    A line is `class x y width height`; x and y are the centre of the box. All four numbers are
    fractions of the image's width or height. An image without a text file has no boxes; a warning
    counts these images.

    Args:
        root: the folder that contains `images/SPLIT/NAME.jpg` and `labels/SPLIT/NAME.txt`.
        class_names: the names of the classes, in the order of their numbers.
        train: the name of the training split's folder, under `images` and `labels`.
        val: the name of the validation split's folder.
        test: the name of the test split's folder; by default the validation split's folder.
        **settings: the arguments of DetectionDataModule and ImageDataModule.

    Raises:
        FileNotFoundError: when a data set is created, if a folder is missing, or if a text file has
            no image.
        ValueError: when a data set is created, if a line is invalid or in pixels, if a split has no
            box, or if several images have the same text file.
    """

    relative_boxes = True

    def __init__(
        self,
        *,
        root: str | Path,
        class_names: Sequence[str],
        train: str = "train",
        val: str = "val",
        test: str | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self.root = Path(root)
        self.location = str(self.root)
        self.class_names = list(class_names)
        self.num_classes = len(self.class_names)
        self.splits = {"train": train, "val": val, "test": test or val}
        self.tests_on_validation = self.splits["test"] == val

    def entries(self, split: str) -> Iterator[Annotated]:
        """Return all images of the split's folder and their boxes, sorted by path.

        Raises:
            FileNotFoundError: if a folder is missing, or a text file has no image.
            ValueError: if a line is invalid; the message names the file and the line.
        """
        folder = self.root / "images" / self.splits[split]
        labels = self.root / "labels" / self.splits[split]
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{folder} is missing: expected images/{self.splits[split]}/NAME.jpg and "
                f"labels/{self.splits[split]}/NAME.txt in {self.root}"
            )
        if not labels.is_dir():
            raise FileNotFoundError(
                f"{labels} is missing: expected a text file with boxes for each image of {folder}"
            )
        images = find_images(folder)
        files = [labels / path.relative_to(folder).with_suffix(".txt") for path in images]
        texts = {str(path) for path in find_files(labels) if path.suffix == ".txt"}
        lone = texts - {str(path) for path in files} - {str(labels / "classes.txt")}
        if lone:
            raise FileNotFoundError(
                f"{abbreviate(lone)} have no image in {folder}: add or remove them"
            )
        twice = {str(path) for path, count in Counter(files).items() if count > 1}
        if twice:
            raise ValueError(f"several images share {abbreviate(twice)}: rename them")
        if absent := {str(path) for path in files} - texts:
            warn_once(
                f"{len(absent)} of {len(images)} images in {folder} have no text file and count as "
                f"images without objects: {abbreviate(absent)}"
            )
        return (self._entry(image, file) for image, file in zip(images, files, strict=True))

    def _entry(self, image: Path, file: Path) -> Annotated:
        entry = Annotated(image, [], [], [])
        lines = read_bounded(file).decode().splitlines() if file.exists() else []
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                label, x, y, width, height = int(line.split()[0]), *map(float, line.split()[1:])
            except ValueError as error:
                raise ValueError(
                    f"{file}, line {number}: {line!r} is not 'class x y width height'"
                ) from error
            if not 0 <= label < self.num_classes:
                raise ValueError(
                    f"{file}, line {number}: class {label} is not among the {self.num_classes}"
                )
            where = f"{file}, line {number}"
            if width < 0 or height < 0:
                raise ValueError(f"{where}: {line!r} has a negative width or height")
            box = [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
            check_fractions(box, where)
            entry.boxes.append(box)
            entry.labels.append(label)
            entry.crowd.append(False)
        return entry
