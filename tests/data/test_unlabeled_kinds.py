"""Tests of images without labels beside the training set of every kind of data module."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from lightning_dist.data.base import ImageDataModule
from lightning_dist.data.cifar import CIFAR10DataModule
from lightning_dist.data.detection import CocoDataModule, YoloDataModule
from lightning_dist.data.digits import DigitsDataModule
from lightning_dist.data.scenes import SceneDetectionDataModule, ScenesDataModule
from lightning_dist.data.segmentation import CityscapesDataModule, MaskFolderDataModule
from lightning_dist.data.tiny_imagenet import TinyImageNetDataModule

COLOUR = (100, 50, 200)
SPLITS = ("train", "val")


def save(path: Path, colour: tuple[int, ...] | int = 0, size: tuple[int, int] = (12, 10)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    mode = "L" if isinstance(colour, int) else "RGB"
    Image.new(mode, size, colour).save(path)
    return path


def masks(root: Path, image: str, mask: str) -> None:
    """Save two images and masks of two classes for each split; the names have a split, a number."""
    for split in SPLITS:
        for number in range(2):
            save(root / image.format(split, number), (0, 0, number))
            pixels = np.full((10, 12), 7, dtype=np.uint8)
            pixels[:5] = 8
            path = root / mask.format(split, number)
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)


def mask_folder(root: Path, **settings) -> MaskFolderDataModule:
    masks(root, "images/{0}/{1}.png", "masks/{0}/{1}.png")
    whole = {"crop_size": None, "scales": None, "class_ids": [7, 8], "num_classes": 2}
    names = {"masks": "masks", "train": "train", "val": "val"}
    return MaskFolderDataModule(root=root, **whole, **names, **settings)


def cityscapes(root: Path, **settings) -> CityscapesDataModule:
    masks(
        root,
        "leftImg8bit/{0}/bonn/bonn_{1}_leftImg8bit.png",
        "gtFine/{0}/bonn/bonn_{1}_gtFine_labelIds.png",
    )
    for split in SPLITS:
        for number in range(2):
            for kind in ("color.png", "instanceIds.png", "polygons.json"):
                path = root / f"gtFine/{split}/bonn/bonn_{number}_gtFine_{kind}"
                path.write_text("{}")
    return CityscapesDataModule(root=root, crop_size=None, scales=None, **settings)


def coco(root: Path, **settings) -> CocoDataModule:
    for split in SPLITS:
        for number in range(2):
            save(root / f"{split}2017" / f"{number}.png", (0, 0, 0))
        content = {
            "images": [
                {"id": i, "file_name": f"{i}.png", "width": 12, "height": 10} for i in (0, 1)
            ],
            "annotations": [{"id": 1, "image_id": 0, "category_id": 1, "bbox": [1, 1, 5, 5]}],
            "categories": [{"id": 1, "name": "cat"}],
        }
        path = root / "annotations" / f"instances_{split}2017.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
    return CocoDataModule(root=root, num_classes=1, **settings)


def yolo(root: Path, **settings) -> YoloDataModule:
    for split in SPLITS:
        for number in range(2):
            save(root / "images" / split / f"{number}.png", (0, 0, 0))
            text = root / "labels" / split / f"{number}.txt"
            text.parent.mkdir(parents=True, exist_ok=True)
            text.write_text("0 0.5 0.5 0.2 0.2\n")
    return YoloDataModule(root=root, class_names=["cat"], **settings)


def tiny_imagenet(root: Path, **settings) -> TinyImageNetDataModule:
    for number in range(2):
        save(root / "train" / "n01" / "images" / f"{number}.JPEG", (0, 0, 0), (64, 64))
    save(root / "val" / "images" / "0.JPEG", (0, 0, 0), (64, 64))
    (root / "val" / "val_annotations.txt").write_text("0.JPEG\tn01\t0\t0\t62\t62\n")
    (root / "wnids.txt").write_text("n01\n")
    (root / "words.txt").write_text("n01\tcat\n")
    return TinyImageNetDataModule(root=root, padding=0, **settings)


def cifar(root: Path, **settings) -> CIFAR10DataModule:
    class Small(CIFAR10DataModule):
        def _torchvision_dataset(self, train):
            return SimpleNamespace(data=np.zeros((2, 32, 32, 3), np.uint8), targets=[0, 1])

    return Small(root=root, **settings)


def scenes(kind: type) -> Callable[..., ImageDataModule]:
    sizes = {"train_size": 2, "val_size": 1, "test_size": 1, "scene_size": 16}
    return lambda root, **settings: kind(**sizes, **settings)


KINDS: dict[str, Callable[..., ImageDataModule]] = {
    "digits": lambda root, **settings: DigitsDataModule(train_size=10, **settings),
    "cifar": cifar,
    "tiny_imagenet": tiny_imagenet,
    "scenes": scenes(ScenesDataModule),
    "scenes_detection": scenes(SceneDetectionDataModule),
    "mask_folder": mask_folder,
    "cityscapes": cityscapes,
    "coco": coco,
    "yolo": yolo,
}


def is_unlabeled(target) -> bool:
    """Return whether a target is None, a mask that is ignored everywhere, or -100."""
    if target is None or isinstance(target, dict):
        return target is None
    return bool((target == (255 if target.dim() else -100)).all())


def samples_of(data: ImageDataModule, epoch: int = 0) -> list[tuple[Tensor, object]]:
    data.setup("fit")
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return [sample for batch in loader for sample in zip(*batch, strict=True)]


@pytest.fixture
def more(tmp_path: Path) -> Path:
    for number in range(3):
        save(tmp_path / "more" / f"part{number % 2}" / "deep" / f"{number}.png", COLOUR)
    return tmp_path / "more"


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_data_takes_images_without_labels(kind, tmp_path, more):
    data = KINDS[kind](tmp_path / "data", unlabeled=more, global_batch_size=2, seed=3)
    samples = samples_of(data)
    without = [image for image, target in samples if is_unlabeled(target)]
    assert len(without) == 3
    assert len(samples) == 3 + len(data.train_dataset())
    expected = torch.tensor(COLOUR).view(3, 1, 1)
    if data.in_channels == 1:
        expected = torch.tensor([round(0.299 * 100 + 0.587 * 50 + 0.114 * 200)]).view(1, 1, 1)
    for image in without:
        # CIFAR's random crop adds black pixels.
        pixels = data.to_pixels(image[None])[0].int().amax((1, 2), keepdim=True)
        assert ((pixels - expected).abs() <= 1).all()
    again = samples_of(KINDS[kind](tmp_path / "data", unlabeled=more, global_batch_size=2, seed=3))
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(samples, again, strict=True))
    other = {"unlabeled_share": 0.5, "global_batch_size": 2, "labels": 1, "num_workers": 0}
    shared = samples_of(KINDS[kind](tmp_path / "data", unlabeled=[more], **other))
    assert sorted(is_unlabeled(target) for _, target in shared) == [False, True]


@pytest.mark.parametrize("kind", ["tiny_imagenet", "mask_folder", "cityscapes", "coco", "yolo"])
def test_images_for_evaluation_are_named_and_training_images_are_used_once(
    kind, tmp_path, more, caplog
):
    root = tmp_path / "data"
    KINDS[kind](root)
    folders = {"cityscapes": "leftImg8bit", "mask_folder": "images", "yolo": "images"}
    images = root / folders.get(kind, "")
    if kind == "cityscapes":  # the folder of the 20,000 further images
        shutil.copytree(more, root / "leftImg8bit" / "train_extra")
    (tmp_path / "link").symlink_to(images)
    data = KINDS[kind](root, unlabeled=tmp_path / "link")
    samples = samples_of(data)
    evaluated = sorted(str(path) for path in data._dataset("val").paths)
    assert "the student then trains on what it is evaluated on" in caplog.text
    assert evaluated[0] in caplog.text
    extra = 3 if kind == "cityscapes" else 0
    assert len(samples) == len(data.train_dataset()) + len(evaluated) + extra
    trained = KINDS[kind](root, unlabeled=Path(data.train_dataset().paths[0]).parent)
    with pytest.raises(ValueError, match="are also training images"):
        trained.setup("fit")
