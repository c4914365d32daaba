"""Tests of the sequences that keep data sets small, and of what a data set keeps of an image."""

import gc
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from torch.utils.data import Dataset

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


KINDS = {"folders": of_folders, "masks": of_masks}


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_takes_at_most_forty_bytes_besides_its_characters(tmp_path: Path, kind: str):
    kept, characters = [], []
    for count in (50, 350):
        create, length = KINDS[kind](tmp_path / str(count), count)
        tracemalloc.start()
        dataset = create()
        gc.collect()
        kept.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
        characters.append(length)
        assert len(dataset) == count
    assert kept[1] - kept[0] - (characters[1] - characters[0]) <= 40 * 300
