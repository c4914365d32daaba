"""Rows of ``benchmarks.scale``: opening data sets, and what a worker process copies of them."""

import json
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from benchmarks.growth import Cost, Row, forked
from lightning_dist.data.detection import CocoDataModule, YoloDataModule
from lightning_dist.data.image_folder import ImageFolderDataModule
from lightning_dist.data.packed import LabelledPaths
from lightning_dist.data.segmentation import MaskFolderDataModule

BOXES_PER_IMAGE = 7.27  # in COCO's train2017: 860,001 boxes in 118,287 images


def opened(open_it: Callable[[], Any]) -> Cost:
    """Return the CPU seconds of opening a data set, and the bytes of what it keeps, pickled."""
    start = time.process_time()
    data = open_it()
    seconds = time.process_time() - start
    return Cost(seconds, len(pickle.dumps(getattr(data, "entries", data))))


def touch(path: Path, text: str = "") -> None:
    """Write a file, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def folders(count: int, root: Path) -> Cost:
    """Open a folder with 100 class folders."""
    for index in range(count):
        touch(root / "train" / f"class{index % 100:03d}" / f"{index:08d}.jpg")
    return opened(lambda: _plain(ImageFolderDataModule(root=root).train_dataset()))


def masks(count: int, root: Path) -> Cost:
    """Open images and masks."""
    for index in range(count):
        touch(root / "images" / "training" / f"{index:08d}.jpg")
        touch(root / "annotations" / "training" / f"{index:08d}.png")
    data = MaskFolderDataModule(root=root, num_classes=2)
    return opened(lambda: _plain(data.train_dataset()))


def yolo(count: int, root: Path) -> Cost:
    """Open images with text files of seven boxes."""
    for index in range(count):
        touch(root / "images" / "train" / f"{index:08d}.jpg")
        touch(root / "labels" / "train" / f"{index:08d}.txt", 7 * "1 0.5 0.5 0.25 0.25\n")
    return opened(YoloDataModule(root=root, class_names=["a", "b"]).train_dataset)


def coco(boxes: int, root: Path) -> Cost:
    """Open a file like COCO's, with polygons; the largest is of train2017's size."""
    images = round(boxes / BOXES_PER_IMAGE)
    numbers = np.random.default_rng(0).uniform(1, 300, (boxes, 4)).round(2).tolist()
    polygons = [json.dumps([[0.25 + x for x in range(length)]]) for length in range(20, 90)]
    (root / "annotations").mkdir()
    with (root / "annotations" / "instances_train2017.json").open("w") as file:
        file.write('{"categories": [{"id": 1, "name": "a"}], "images": [')
        url = "http://images.cocodataset.org/train2017"
        for index in range(images):
            name = f"{index:012d}.jpg"
            image = {"id": index, "file_name": name, "width": 640, "height": 480}
            file.write((", " if index else "") + json.dumps(image | {"coco_url": f"{url}/{name}"}))
        file.write('], "annotations": [')
        for index, bbox in enumerate(numbers):
            box = {"id": index, "image_id": index % images, "bbox": bbox, "category_id": 1}
            text = json.dumps(box | {"iscrowd": 0, "area": 99.5})
            polygon = polygons[index % len(polygons)]
            file.write(("," if index else "") + f'{text[:-1]}, "segmentation": {polygon}}}')
        file.write("]}")
    return opened(lambda: CocoDataModule(root=root, num_classes=1).entries("train"))


def worker(count: int, root: Path) -> Cost:
    """Read all paths and labels of a folder in a forked process."""
    samples = LabelledPaths((f"{root}/{index:012d}.jpg" for index in range(count)), range(count))

    def read_all() -> None:
        for index in range(count):
            samples[index]

    return forked(read_all, "Private_Dirty")


def _plain(dataset: Dataset) -> dict[str, Any]:
    """Return what a data set keeps, without its transform."""
    return {name: x for name, x in vars(dataset).items() if "transform" not in name}


ROWS = [
    Row("open a class folder", "images", (2_000, 20_000), folders, "kept"),
    Row("open COCO's file", "boxes", (86_000, 860_000), coco, "kept"),
    Row("open YOLO's files", "images", (500, 5_000), yolo, "kept"),
    Row("open masks", "images", (1_000, 10_000), masks, "kept"),
    Row("read in a worker", "images", (100_000, 1_000_000), worker, "private"),
]
