"""Images with boxes: COCO, Pascal VOC, and YOLO-format folders."""

import json
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.datasets import VOCDetection
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tvf

from lightning_dist.data.base import ImageDataModule, list_collate
from lightning_dist.data.imagenet import few, load_image

log = logging.getLogger(__name__)


class Annotated(NamedTuple):
    """An image and what is known of it.

    Boxes are x1, y1, x2, y2: in pixels, or as parts of the image's width and height.
    """

    image: Path
    boxes: list[list[float]]
    labels: list[int]
    crowd: list[bool]  # regions that neither reward nor punish a detector, and that none trains on
    areas: list[float] | None = None  # in pixels; by default those of the boxes


class AnnotatedImages(Dataset):
    """Reads images and boxes and transforms both alike.

    A box without area is dropped; how many there were, and where, is logged once.

    Args:
        entries: the images.
        transform: takes a tv_tensors image and a target, and returns both.
        crowd: keep the crowd regions, as evaluation wants them.
        relative: boxes are parts of the image's size.

    Raises:
        FileNotFoundError: if an image is missing; all are looked for at once.
        OSError: when an image cannot be decoded; names the file.
    """

    def __init__(
        self, entries: Sequence[Annotated], transform: Any, crowd: bool, relative: bool = False
    ) -> None:
        missing = {str(entry.image) for entry in entries if not entry.image.is_file()}
        if missing:
            raise FileNotFoundError(
                f"{len(missing)} of {len(entries)} images are missing: {few(missing)}: restore "
                "them, or remove their annotations"
            )
        self.entries = [self._kept(entry, crowd) for entry in entries]
        before = sum(len(entry.boxes) for entry in entries)
        flat = {str(e.image) for e in entries for box in e.boxes if not _has_area(box)}
        if flat:
            count = before - sum(sum(map(_has_area, entry.boxes)) for entry in entries)
            log.warning("%d boxes without area are left out: %s", count, few(flat))
        self.transform = transform
        self.relative = relative

    @staticmethod
    def _kept(entry: Annotated, crowd: bool) -> Annotated:
        kept = [
            index
            for index, box in enumerate(entry.boxes)
            if _has_area(box) and (crowd or not entry.crowd[index])
        ]
        return Annotated(
            entry.image,
            [entry.boxes[index] for index in kept],
            [entry.labels[index] for index in kept],
            [entry.crowd[index] for index in kept],
            None if entry.areas is None else [entry.areas[index] for index in kept],
        )

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        entry = self.entries[index]
        image = tv_tensors.Image(tvf.pil_to_tensor(load_image(str(entry.image))))
        height, width = image.shape[1:]
        boxes = torch.tensor(entry.boxes, dtype=torch.float32).reshape(-1, 4)
        if self.relative:
            boxes *= torch.tensor([width, height, width, height])
        target = {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width)),
            "labels": torch.tensor(entry.labels, dtype=torch.int64),
            "iscrowd": torch.tensor(entry.crowd, dtype=torch.int64),
        }
        if entry.areas is not None:
            target["area"] = torch.tensor(entry.areas, dtype=torch.float32)
        image, target = self.transform(image, target)
        plain = {name: value.as_subclass(Tensor) for name, value in target.items()}
        return image.as_subclass(Tensor), plain

    collate = staticmethod(list_collate)


def _has_area(box: Sequence[float]) -> bool:
    return box[2] > box[0] and box[3] > box[1]


class DetectionDataModule(ImageDataModule):
    """Image files with boxes, in 0..1, mirrored at random in training.

    The detector itself resizes and normalises. A subclass provides `entries`.

    Args:
        flip: probability of mirroring.
        skip_empty: leave out training images without a box to train on.
        **settings: see ImageDataModule.
    """

    mean = (0.0, 0.0, 0.0)
    std = (1.0, 1.0, 1.0)
    relative_boxes = False

    def __init__(self, *, flip: float = 0.5, skip_empty: bool = False, **settings: Any) -> None:
        super().__init__(**settings)
        self.flip = flip
        self.skip_empty = skip_empty

    def entries(self, split: str) -> list[Annotated]:
        """The images of "train", "val" or "test", and their boxes."""
        raise NotImplementedError

    def train_transform(self) -> v2.Compose:
        """Of an image and its target."""
        return v2.Compose([v2.RandomHorizontalFlip(self.flip), *self._finish()])

    def eval_transform(self) -> v2.Compose:
        """Of an image and its target."""
        return v2.Compose(self._finish())

    def _finish(self) -> list[Any]:
        return [v2.ClampBoundingBoxes(), v2.ToDtype(torch.float32, scale=True)]

    def prepare(self, image: Image.Image) -> Tensor:
        """An image as in evaluation, at its own size."""
        return self._normalised(image)

    def train_dataset(self) -> AnnotatedImages:
        """The training images, augmented; without crowd regions."""
        data = AnnotatedImages(
            self.entries("train"), self.train_transform(), False, self.relative_boxes
        )
        if self.skip_empty:
            data.entries = [entry for entry in data.entries if entry.boxes]
        return data

    def val_dataset(self) -> AnnotatedImages:
        """The validation images."""
        return self._evaluated("val")

    def test_dataset(self) -> AnnotatedImages:
        """The test images."""
        return self._evaluated("test")

    def _evaluated(self, split: str) -> AnnotatedImages:
        return AnnotatedImages(
            self.entries(split), self.eval_transform(), True, self.relative_boxes
        )


class CocoDataModule(DetectionDataModule):
    """COCO, or any data set annotated like it: `instances_*.json` and a folder of images.

    Category ids become labels 0, 1, ... in their order. Crowd regions are ignored. The test
    annotations are not public: the validation images are the test images here too.

    Args:
        root: folder that holds the rest.
        num_classes: number of categories, for a check.
        train_images: folder of the training images.
        val_images: folder of the validation images.
        train_annotations: file of the training annotations.
        val_annotations: file of the validation annotations.
        **settings: see DetectionDataModule and ImageDataModule.

    Raises:
        FileNotFoundError: when a data set is opened and a file is missing.
        ValueError: when it is opened and the annotations are broken: no JSON of this form, another
            number of categories, an annotation of an unknown image or category.
    """

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

    def entries(self, split: str) -> list[Annotated]:
        """Of the split's annotation file, in its order."""
        images, annotations = self.files["train" if split == "train" else "val"]
        path = self.root / annotations
        content = _read_json(path, ("images", "annotations", "categories"))
        categories = sorted(content["categories"], key=lambda category: category["id"])
        if len(categories) != self.num_classes:
            raise ValueError(
                f"{path} has {len(categories)} categories and num_classes is {self.num_classes}"
            )
        names = [category["name"] for category in categories]
        if self.class_names not in (None, names):
            raise ValueError(f"{path} and the training annotations differ in their categories")
        self.class_names = names
        label_of = {category["id"]: label for label, category in enumerate(categories)}
        found = {
            image["id"]: Annotated(self.root / images / image["file_name"], [], [], [], [])
            for image in content["images"]
        }
        for annotation in content["annotations"]:
            what = f"annotation {annotation['id']} in {path}"
            entry = found.get(annotation["image_id"])
            if entry is None:
                raise ValueError(
                    f"{what} is of image {annotation['image_id']}, which the file does not list: "
                    "remove it, or add the image"
                )
            if annotation["category_id"] not in label_of:
                raise ValueError(
                    f"{what}, of {entry.image.name}, has category {annotation['category_id']}, "
                    "which the file does not list: mend it, or add the category"
                )
            x, y, width, height = annotation["bbox"]
            entry.boxes.append([x, y, x + width, y + height])
            entry.labels.append(label_of[annotation["category_id"]])
            entry.crowd.append(bool(annotation.get("iscrowd", 0)))
            assert entry.areas is not None
            entry.areas.append(annotation.get("area", width * height))
        return list(found.values())


class VOCDetectionDataModule(DetectionDataModule):
    """Pascal VOC's boxes, 20 classes, by torchvision's data set.

    Objects marked as difficult are ignored, as crowds are. The validation images are the test
    images here too.

    Args:
        root: folder that holds `VOCdevkit/VOC<year>`.
        year: "2007" or "2012".
        download: fetch it where it is missing.
        **settings: see DetectionDataModule and ImageDataModule.

    Raises:
        FileNotFoundError: when a data set is opened and folders or images are missing.
        ValueError: when it is opened and an object is of an unknown class.
    """

    num_classes = 20

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
        self.class_names = [
            *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair"),
            *("cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant"),
            *("sheep", "sofa", "train", "tvmonitor"),
        ]

    def prepare_data(self) -> None:
        """Fetch the archive, where asked to."""
        if self.download and not (self.root / "VOCdevkit" / f"VOC{self.year}").is_dir():
            VOCDetection(self.root, self.year, download=True)

    def entries(self, split: str) -> list[Annotated]:
        """Of the split's list in `ImageSets/Main`."""
        try:
            data = VOCDetection(self.root, self.year, "train" if split == "train" else "val")
        except (RuntimeError, OSError) as error:
            raise FileNotFoundError(
                f"{self.root} has no Pascal VOC {self.year}: expected VOCdevkit/VOC{self.year} "
                f"with ImageSets/Main in it, or set download=true ({error})"
            ) from error
        pairs = zip(data.images, data.annotations, strict=True)
        return [self._entry(Path(image), Path(file)) for image, file in pairs]

    def _entry(self, image: Path, file: Path) -> Annotated:
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing: restore it, or take {image.stem} out")
        try:
            root = ElementTree.parse(file).getroot()
        except ElementTree.ParseError as error:
            raise ValueError(f"{file} is no XML ({error}): restore it") from error
        assert self.class_names is not None
        entry = Annotated(image, [], [], [])
        for found in root.iter("object"):
            name = found.findtext("name", "")
            if name not in self.class_names:
                raise ValueError(f"{file} has an object of the unknown class {name!r}")
            box = found.find("bndbox")
            sides = [box.findtext(side) if box is not None else None for side in _SIDES]
            if None in sides:
                raise ValueError(f"{file} has a {name} without a box of {', '.join(_SIDES)}")
            x1, y1, x2, y2 = (float(str(side)) for side in sides)
            entry.boxes.append([x1 - 1, y1 - 1, x2, y2])  # pixels count from 1 there
            entry.labels.append(self.class_names.index(name))
            entry.crowd.append(found.findtext("difficult", "0") == "1")
        return entry


_SIDES = ("xmin", "ymin", "xmax", "ymax")


class YoloDataModule(DetectionDataModule):
    """YOLO-format folders: a text file an image, with a line `class x y width height` a box.

    Centre and size are parts of the image's. An image without a text file has no boxes.

    Args:
        root: folder that holds `images/SPLIT/NAME.jpg` and `labels/SPLIT/NAME.txt`.
        class_names: the classes in the order of their numbers.
        train: folder of the training images in both.
        val: folder of the validation images in both.
        test: folder of the test images in both; by default the validation images.
        **settings: see DetectionDataModule and ImageDataModule.

    Raises:
        FileNotFoundError: when a data set is opened and a folder is missing, or a text file has no
            image.
        ValueError: when it is opened and a line is broken; names file and line.
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

    def entries(self, split: str) -> list[Annotated]:
        """Of all images of the split's folder, in order."""
        folder = self.root / "images" / self.splits[split]
        labels = self.root / "labels" / self.splits[split]
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{folder} is missing: expected images/{self.splits[split]}/NAME.jpg and "
                f"labels/{self.splits[split]}/NAME.txt in {self.root}"
            )
        images = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMG_EXTENSIONS)
        files = [labels / path.relative_to(folder).with_suffix(".txt") for path in images]
        lone = {str(path) for path in labels.rglob("*.txt")} - {str(path) for path in files}
        if lone:
            raise FileNotFoundError(f"{few(lone)} have no image in {folder}: add or remove them")
        twice = {str(path) for path, count in Counter(files).items() if count > 1}
        if twice:
            raise ValueError(f"several images share {few(twice)}: rename them")
        return [self._entry(image, file) for image, file in zip(images, files, strict=True)]

    def _entry(self, image: Path, file: Path) -> Annotated:
        entry = Annotated(image, [], [], [])
        lines = file.read_text().splitlines() if file.is_file() else []
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
            entry.boxes.append([x - width / 2, y - height / 2, x + width / 2, y + height / 2])
            entry.labels.append(label)
            entry.crowd.append(False)
        return entry


def _read_json(path: Path, needed: Sequence[str]) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: expected COCO's annotations there")
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}): restore it") from error
    if not isinstance(content, dict) or any(key not in content for key in needed):
        raise ValueError(f"{path} is not of COCO's form: expected {', '.join(needed)} in it")
    return content
