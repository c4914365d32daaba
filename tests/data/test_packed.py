"""Tests of the sequences that keep data sets small, and of what a data set keeps of an image."""

import gc
import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from torch.utils.data import Dataset

from lightning_dist.data.detection import CocoDataModule, YoloDataModule
from lightning_dist.data.image_folder import ImageFolderDataModule
from lightning_dist.data.packed import LabelledPaths, PackedPaths
from lightning_dist.data.segmentation import MaskFolderDataModule


def test_packed_paths_are_the_paths(tmp_path: Path):
    names = ["", "a.png", "ä/ 漢.png", os.fsdecode(b"not-\xff-utf8"), str(tmp_path / "b")]
    paths = PackedPaths(names)
    assert list(paths) == names
    assert paths[-1] == names[-1]
    assert list(PackedPaths([])) == []
    for index in (len(names), -len(names) - 1):
        with pytest.raises(IndexError):
            paths[index]
    labelled = LabelledPaths([tmp_path, "c"], [7, 300])
    assert list(labelled) == [(str(tmp_path), 7), ("c", 300)]
    assert labelled.labels.tolist() == [7, 300]


def touched(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def of_folders(root: Path, count: int) -> tuple[Callable[[], Dataset], int]:
    for index in range(count):
        touched(root / "train" / f"class{index % 7}" / f"{index:06d}.png")
    files = [str(path) for path in (root / "train").rglob("*.png")]
    return ImageFolderDataModule(root=root).train_dataset, sum(map(len, files))


def of_masks(root: Path, count: int) -> tuple[Callable[[], Dataset], int]:
    for index in range(count):
        touched(*(root / x / "training" / f"{index:06d}.png" for x in ("images", "annotations")))
    files = [str(path) for path in root.rglob("*.png")]
    return MaskFolderDataModule(root=root, num_classes=2).train_dataset, sum(map(len, files))


def of_yolo(root: Path, count: int) -> tuple[Callable[[], Dataset], int]:
    for index in range(count):
        name = f"{index:06d}"
        touched(root / "images" / "train" / f"{name}.png", root / "labels/train" / f"{name}.txt")
        (root / "labels/train" / f"{name}.txt").write_text("1 0.5 0.5 0.25 0.25\n")
    files = [str(path) for path in (root / "images").rglob("*.png")]
    return YoloDataModule(root=root, class_names=["a", "b"]).train_dataset, sum(map(len, files))


def of_coco(root: Path, count: int) -> tuple[Callable[[], Dataset], int]:
    files = [root / "train2017" / f"{index:06d}.jpg" for index in range(count)]
    touched(*files, root / "annotations" / "instances_train2017.json")
    images = [{"id": index, "file_name": path.name} for index, path in enumerate(files)]
    box = {"category_id": 3, "bbox": [1, 2, 3, 4], "iscrowd": 0, "area": 5}
    polygons = {"segmentation": [[float(number) for number in range(60)]]}
    annotations = [{"image_id": index, **box, **polygons} for index in range(count)]
    content = {"images": images, "annotations": annotations, "categories": [{"id": 3, "name": "a"}]}
    (root / "annotations" / "instances_train2017.json").write_text(json.dumps(content))
    return CocoDataModule(root=root, num_classes=1).train_dataset, sum(len(str(x)) for x in files)


KINDS = {
    # The bytes of the one box of an image: four sides, the class and the crowd flag, the area.
    "folders": (of_folders, 0),
    "masks": (of_masks, 0),
    "yolo": (of_yolo, 21),
    "coco": (of_coco, 25),
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_takes_at_most_forty_bytes_besides_its_characters(tmp_path: Path, kind: str):
    (generate, box), kept, characters = KINDS[kind], [], []
    for count in (50, 350):
        create, length = generate(tmp_path / str(count), count)
        tracemalloc.start()
        dataset = create()
        gc.collect()
        kept.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
        characters.append(length)
        assert len(dataset) == count
    assert kept[1] - kept[0] - (characters[1] - characters[0]) <= (40 + box) * 300
