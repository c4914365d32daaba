"""Measure the time and the accuracy of runs with a teacher cache: ``python -m benchmarks.sweep``.

First it times a student's step in Lightning in three cases: alone, with the teacher's outputs from
a filled cache, and with the teacher itself. All use the same images from memory, cropped and
flipped. Each round runs a few steps of the first two cases, and the first rounds also run the third
case. The first steps of each case are not timed. A ratio is the median over the rounds, with
quartiles to estimate the noise.

Then it trains ``experiment=digits`` with shifted images and five seeds, and compares the accuracy
with eight cached views to the accuracy with a new augmentation each epoch. Finally, it measures how
much the loss changes if the teacher's outputs are stored as float16.
"""

import functools
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from itertools import pairwise
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from rich.table import Table
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import bar, peer, ratios, show
from benchmarks.step import SGD, Clock, spread
from lightning_dist import CachedTeacher, DISTLoss, Teacher
from lightning_dist.data.base import ImageDataModule
from lightning_dist.data.digits import DigitsDataModule
from lightning_dist.data.tensor_images import TensorImages
from lightning_dist.models.cifar import resnet8, wrn_40_2
from lightning_dist.models.small import SmallCNN
from lightning_dist.tasks.classification import ClassificationModule

SECONDS, LEAST_ROUNDS, TEACHER_ROUNDS, STEPS, WARM_UP = 120.0, 8, 3, 8, 2
CLASSES, BATCH = 100, 128
ALONE, WARM, LIVE = "student alone", "warm cache", "teacher itself"
LIMIT, LEAST_FLOPS = 1.08, 20
DIGITS = "lightning-dist train -m experiment=digits data.augment=true"
SWEEP = f"{DIGITS} distill.cache=off,auto seed=0,1,2,3,4"


class Noise(ImageDataModule):
    """A data module of random images with CIFAR's size, cropped and flipped."""

    mean, std = (0.5,) * 3, (0.25,) * 3
    location = "noise"

    def train_dataset(self) -> TensorImages:
        """Return one epoch of random images and labels."""
        generator = torch.Generator().manual_seed(0)
        count = BATCH * STEPS
        images = torch.randint(256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
        labels = torch.randint(CLASSES, (count,), generator=generator)
        return TensorImages(images, labels, mean=self.mean, std=self.std, padding=4, flip=True)

    def val_dataset(self) -> TensorImages:
        """Return the training set, because the benchmark validates nothing."""
        return self.train_dataset()


class Steps:
    """A contestant that trains a student in Lightning, with a new Trainer for each call."""

    def __init__(self, teacher: Teacher | None) -> None:
        optimizer = functools.partial(torch.optim.SGD, **SGD)
        student = resnet8(num_classes=CLASSES)
        self.module = ClassificationModule(
            student, teacher, num_classes=CLASSES, optimizer=optimizer
        )
        self.data = Noise(global_batch_size=BATCH)

    def seconds(self) -> float:
        """Train a few steps, and return the median seconds per step."""
        clock = Clock()
        trainer = Trainer(
            accelerator="cpu",
            max_epochs=1,
            limit_val_batches=0,
            callbacks=[clock],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(self.module, datamodule=self.data)
        return statistics.median(b - a for a, b in pairwise(clock.starts[WARM_UP:]))


def flops(network: nn.Module) -> int:
    """Return the FLOPs of the forward of a network on one image (3, 32, 32)."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.eval()(torch.zeros(1, 3, 32, 32))
    return counter.get_total_flops()


def measure(folder: str) -> dict[str, list[float]]:
    """Return a dict from contestants to the seconds per step, one value per round.

    Args:
        folder: the folder of the cache.
    """
    teacher = Teacher(wrn_40_2(num_classes=CLASSES))
    contestants = {ALONE: None, WARM: CachedTeacher(teacher, folder), LIVE: teacher}
    runs = {name: Steps(teacher) for name, teacher in contestants.items()}
    runs[WARM].seconds()  # This run fills the cache.
    times: dict[str, list[float]] = {name: [] for name in runs}
    end = time.perf_counter() + SECONDS
    names = [ALONE, WARM]
    while len(times[ALONE]) < LEAST_ROUNDS or time.perf_counter() < end:
        names.reverse()
        live = [LIVE] if len(times[LIVE]) < TEACHER_ROUNDS else []
        for name in [*names, *live]:
            times[name].append(runs[name].seconds())
    return times


def accuracies(folder: str) -> dict[str, list[float]]:
    """Run the sweep in a folder, and return a dict from distill.cache to the test accuracies."""
    options = ["trainer=cpu", "test_teacher=false", "print_config=false", "callbacks.progress=null"]
    words = [*SWEEP.split()[1:], *options, "hydra.sweep.dir=runs"]
    command = [sys.executable, "-m", "lightning_dist", *words]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    found: dict[str, list[float]] = {}
    for job in sorted(Path(folder, "runs").glob("*/result.json"), key=lambda p: int(p.parent.name)):
        result = json.loads(job.read_text())
        (cache,) = (o.partition("=")[2] for o in result["overrides"] if "distill.cache=" in o)
        found.setdefault(cache, []).append(result["metrics"]["test/accuracy"])
    return found


def rounding() -> float:
    """Return the largest relative change of the DIST loss by float16, over one epoch of digits."""
    teacher = Teacher(
        SmallCNN([32, 64, 128]), "pkg://lightning_dist/assets/digits_teacher.safetensors"
    )
    student, loss = SmallCNN([4, 8]).eval(), DISTLoss()
    changes = []
    for images, _ in DigitsDataModule(augment=True).train_dataloader():
        with torch.no_grad():
            logits, teacher_logits = student(images), teacher(images)
            exact = loss(logits, teacher_logits)
            rounded = loss(logits, teacher_logits.half().float())
        changes.append(abs(rounded / exact - 1).item())
    return max(changes)


def main() -> None:
    """Run all measurements and print the tables."""
    # At a lower level, each fit logs its devices.
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    stats = peer("scipy.stats")
    torch.manual_seed(0)
    larger = flops(wrn_40_2(num_classes=CLASSES)) / flops(resnet8(num_classes=CLASSES))
    with tempfile.TemporaryDirectory() as folder:
        times = measure(folder)
        table = Table(title=f"One step: WRN-40-2 teaches ResNet-8, batch {BATCH}, 32 x 32, float32")
        for title in ("contestant", "ms", "ratio to the student alone"):
            table.add_column(title, justify="left" if title == "contestant" else "right")
        for name, values in times.items():
            common = {key: column[: len(values)] for key, column in times.items()}
            over = spread(ratios(common, name, ALONE)) if name != ALONE else ""
            table.add_row(name, f"{1000 * statistics.median(values):.1f}", over)
        warm = statistics.median(ratios(times, WARM, ALONE))
        show(
            table,
            f"{len(times[ALONE])} rounds, {torch.get_num_threads()} threads, "
            f"torch {torch.__version__}",
            "the teacher's FLOPs divided by the student's: "
            + bar(larger, f">= {LEAST_FLOPS}", larger >= LEAST_FLOPS),
            f"warm cache divided by the student alone: {bar(warm, f'<= {LIMIT}', warm <= LIMIT)}",
        )
        found = accuracies(folder)
    table = Table(title=SWEEP)
    table.add_column("distill.cache")
    table.add_column("test/accuracy (mean ± std)", justify="right")
    for cache, values in found.items():
        mean_std = f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}"
        table.add_row("auto, 8 views" if cache == "auto" else cache, mean_std)
    p = stats.ttest_rel(found["auto"], found["off"], alternative="less").pvalue
    show(
        table,
        "one-sided t-test, paired by seed, that the cache lowers the accuracy: p = "
        + bar(p, ">= 0.05", p >= 0.05),
        f"largest relative change of a batch's DIST loss by float16: {rounding():.1e}",
    )


if __name__ == "__main__":
    main()
