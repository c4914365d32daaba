"""Rows of ``benchmarks.scale``: filling a view of a teacher cache, and reading it from the disk."""

import os
import time
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from benchmarks.growth import Cost, Row
from lightning_dist import CachedTeacher
from lightning_dist.data.base import ImageDataModule
from lightning_dist.data.tensor_images import TensorImages
from lightning_dist.tasks.classification import ClassificationModule

CLASSES, BATCH, STEPS = 1000, 256, 20
IO = Path("/proc/self/io")


class Pixels(ImageDataModule):
    """A data module of many random images of 2 x 2 pixels, in memory."""

    mean, std = (0.5,), (0.25,)
    num_classes, in_channels, location = CLASSES, 1, "pixels"

    def __init__(self, count: int) -> None:
        super().__init__(global_batch_size=BATCH)
        self.count = count

    def train_dataset(self) -> TensorImages:
        """Return the images and labels."""
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(256, (self.count, 1, 2, 2), generator=generator, dtype=torch.uint8)
        labels = torch.randint(CLASSES, (self.count,), generator=generator)
        return TensorImages(images, labels, mean=self.mean, std=self.std)

    def val_dataset(self) -> TensorImages:
        """Return the training set, because the benchmark validates nothing."""
        return self.train_dataset()


class Linear(nn.Module):
    """A network that costs almost nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of a batch."""
        return self.head(images.flatten(1))


def train(count: int, folder: Path, steps: int) -> None:
    """Train a few steps with a cached teacher, which fills the first view if there is none."""
    torch.manual_seed(0)
    teacher = CachedTeacher(Linear(), folder, views=1)
    module = ClassificationModule(Linear(), teacher, num_classes=CLASSES)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=Pixels(count))


def fill(size: int, folder: Path) -> Cost:
    """Measure a run of one step that fills a view of `size` images."""
    start = time.process_time()
    train(size, folder, steps=1)
    seconds = time.process_time() - start
    return Cost(seconds, sum(path.stat().st_size for path in folder.glob("*/view-*.npy")))


def recall(size: int, folder: Path) -> Cost:
    """Measure a step that reads its rows of a view of `size` images, which is not in memory.

    The bytes are those that Linux reads from the disk for a step. A step needs 256 rows of 2,008
    bytes.
    """
    train(size, folder, steps=1)
    for path in folder.glob("*/view-*.npy"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    start, before = time.process_time(), read_from_disk()
    train(size, folder, steps=STEPS)
    seconds = (time.process_time() - start) / STEPS
    return Cost(seconds, None if before is None else (read_from_disk() - before) / STEPS)


def read_from_disk() -> int | None:
    """Return the bytes that this process has read from the disk, or None outside of Linux."""
    if not IO.exists():
        return None
    return int(IO.read_text().partition("\nread_bytes: ")[2].partition("\n")[0])


ROWS = [
    Row("cache, fill", "images", (20_000, 200_000), fill, "written"),
    Row("cache, cold recall", "images", (20_000, 200_000), recall, "read a step"),
]
