"""Functions that write small data sets in the formats of the real ones."""

import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100

FINE_LABELS = [f"class {label}" for label in range(100)]
COARSE_LABELS = [f"kind {label}" for label in range(20)]


def write_cifar(root: Path, source: type[CIFAR10], patch: pytest.MonkeyPatch) -> None:
    """Write files with two random images of each class, and have torchvision accept their md5."""
    folder, rng = root / source.base_folder, np.random.default_rng(0)
    folder.mkdir(parents=True)
    many, key = (100, "fine_labels") if source is CIFAR100 else (10, "labels")

    def write(name: str, content: dict[str, object]) -> str:
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    for files in ("train_list", "test_list"):
        sums = []
        for name, _ in getattr(source, files):
            pixels = rng.integers(0, 256, (2 * many, 3072), dtype=np.uint8)
            labels = [index % many for index in range(2 * many)]
            sums.append([name, write(name, {"data": pixels, key: labels})])
        patch.setattr(source, files, sums)
    names = (
        {"fine_label_names": FINE_LABELS, "coarse_label_names": COARSE_LABELS}
        if source is CIFAR100
        else {"label_names": FINE_LABELS[:10]}
    )
    meta = source.meta | {"md5": write(source.meta["filename"], names)}
    patch.setattr(source, "meta", meta)


def write_yolo(root: Path, split: str, name: str, pixels: np.ndarray, text: str) -> None:
    """Write an image of a data set in YOLO's format.

    Args:
        root: the folder of the data set.
        split: the name of the split.
        name: the name of the image, without a suffix.
        pixels: the image, with shape (height, width, 3) and type uint8.
        text: the content of its text file, or an empty string for an image without a file.
    """
    image = root / "images" / split / f"{name}.png"
    label = root / "labels" / split / f"{name}.txt"
    for path in (image, label):
        path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(image)
    if text:
        label.write_text(text)
