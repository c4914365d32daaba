"""Time a whole distillation step: ``python -m benchmarks.step``.

A step consists of the forward of the student and the teacher, the cross-entropy, the distillation
loss, the backward and the optimizer step, for a small CNN on 128 colour images of 32 x 32 pixels
and 100 classes. It runs in

- DistillationCallback in Lightning's Trainer, including its logging;
- a plain PyTorch loop with the authors' formula of the loss;
- timm's LogitDistillationTask in a plain loop, with a KL divergence because timm has no DIST loss;
- torchdistill's training box with its DISTLoss;
- the two parts that every implementation needs: a supervised step of the same student in the same
  Trainer, and the teacher's forward without gradients. They are timed separately, and their times
  are added.

Each round runs a few steps of every contestant, and takes the median of all but the first steps. A
ratio is the median over the rounds, with quartiles to estimate the noise. "Ours" is the callback,
which counts as slower than another library if it was slower in at least three quarters of the
rounds.
"""

import logging
import statistics
import time
import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.common import bar, peer, plain_dist, ratios, show
from lightning_dist import DistillationCallback, DISTLoss
from lightning_dist.models.cifar import resnet8, resnet20

Batch = tuple[Tensor, Tensor]
# A contestant: a function that trains on batches and returns the start time of each batch.
Run = Callable[[list[Batch]], list[float]]

SECONDS, LEAST_ROUNDS, STEPS, WARM_UP = 150.0, 4, 6, 2
CLASSES, WEIGHT = 100, 2.0
SGD = {"lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4}
OURS, PLAIN = "DistillationCallback, DIST", "plain loop, authors' DIST"
TIMM, BOX = "timm LogitDistillationTask, KL", "torchdistill training box, DIST"
SUPERVISED, TEACHER = "supervised step in Lightning", "teacher's forward"
PARTS = "the two parts above"


class Classifier(LightningModule):
    """A LightningModule without distillation."""

    def __init__(self) -> None:
        super().__init__()
        self.net = resnet8(num_classes=CLASSES)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the cross-entropy of a batch."""
        images, target = batch
        return F.cross_entropy(self.net(images), target)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the same optimizer as all other contestants."""
        return sgd(self.net)


class Clock(Callback):
    """A callback that stores the start time of each training batch, in seconds."""

    def __init__(self) -> None:
        self.starts: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        """Store the current time."""
        self.starts.append(time.perf_counter())


def sgd(network: nn.Module) -> torch.optim.SGD:
    """Build the optimizer that all contestants use."""
    return torch.optim.SGD(network.parameters(), **SGD)


def lightning(*callbacks: Callback) -> Run:
    """Return a contestant that trains with ``fit``, and creates a new Trainer for each call."""
    module = Classifier()

    def run(batches: list[Batch]) -> list[float]:
        clock = Clock()
        trainer = Trainer(
            accelerator="cpu",
            max_epochs=1,
            callbacks=[clock, *callbacks],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, DataLoader(batches, batch_size=None))
        return clock.starts

    return run


def loop(step: Callable[[Tensor, Tensor], Any]) -> Run:
    """Return a contestant that calls a step for each batch in a plain loop."""

    def run(batches: list[Batch]) -> list[float]:
        starts = []
        for images, target in batches:
            starts.append(time.perf_counter())
            step(images, target)
        return starts

    return run


def plain_loop(teacher: nn.Module) -> Run:
    """Return a contestant in plain PyTorch, without a distillation library."""
    student = resnet8(num_classes=CLASSES)
    optimizer = sgd(student)

    def step(images: Tensor, target: Tensor) -> None:
        with torch.no_grad():
            teacher_logits = teacher(images)
        logits = student(images)
        loss = F.cross_entropy(logits, target) + WEIGHT * plain_dist(logits, teacher_logits)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return loop(step)


def timm_task(teacher: nn.Module) -> Run:
    """Return timm's task, with equal normalisations so that timm need not convert the images."""
    student = resnet8(num_classes=CLASSES)
    student.pretrained_cfg = teacher.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.25,) * 3}
    student.in_chans = 3
    task = peer("timm.task").LogitDistillationTask(
        student,
        teacher,
        criterion=nn.CrossEntropyLoss(),
        distill_loss_weight=WEIGHT,
        task_loss_weight=1.0,
        device=torch.device("cpu"),
        verbose=False,
    )
    task.train()
    optimizer = sgd(student)

    def step(images: Tensor, target: Tensor) -> None:
        loss = task(images, target)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return loop(step)


def training_box(teacher: nn.Module) -> Run:
    """Return torchdistill's training box, called as in torchdistill's example scripts."""
    distillation = peer("torchdistill.core.distillation")
    logging.getLogger("torchdistill").setLevel(logging.WARNING)
    tap = {"is_from_teacher": False, "module_path": ".", "io": "output"}
    taps = {f"{who}_module_path": "." for who in ("student", "teacher")}
    taps |= {f"{who}_module_io": "output" for who in ("student", "teacher")}
    terms = {
        "task": {
            "criterion": {"key": "CrossEntropyLoss", "kwargs": {}},
            "criterion_wrapper": {
                "key": "SimpleLossWrapper",
                "kwargs": {"input": tap, "target": {"uses_label": True}},
            },
            "weight": 1.0,
        },
        "dist": {"criterion": {"key": "DISTLoss", "kwargs": taps}, "weight": WEIGHT},
    }
    config = {
        "num_epochs": 1,
        "teacher": {"requires_grad": False, "forward_proc": "forward_batch_only"},
        "student": {"forward_proc": "forward_batch_only"},
        "optimizer": {"key": "SGD", "kwargs": dict(SGD)},
        "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": terms}},
    }
    box = distillation.get_distillation_box(
        teacher, resnet8(num_classes=CLASSES), {}, config, torch.device("cpu"), None, False, 1
    )
    box.pre_epoch_process(epoch=0)

    def step(images: Tensor, target: Tensor) -> None:
        box.pre_forward_process()
        loss = box.forward_process(images, target, None)
        box.post_forward_process(loss=loss)

    return loop(step)


def contestants() -> dict[str, Run]:
    """Return all contestants, each with a separate student; they share the frozen teacher."""
    teacher = resnet20(num_classes=CLASSES).eval().requires_grad_(False)
    callback = DistillationCallback(teacher, student="net", loss=DISTLoss(), weight=WEIGHT)
    return {
        OURS: lightning(callback),
        PLAIN: plain_loop(teacher),
        TIMM: timm_task(teacher),
        BOX: training_box(teacher),
        SUPERVISED: lightning(),
        TEACHER: loop(lambda images, _: torch.no_grad()(teacher)(images)),
    }


def measure(runs: dict[str, Run]) -> dict[str, list[float]]:
    """Return a dict from contestants to the seconds per step, one value per round."""
    batch = torch.randn(128, 3, 32, 32), torch.randint(CLASSES, (128,))
    times: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    end = time.perf_counter() + SECONDS
    while len(times[OURS]) < LEAST_ROUNDS or time.perf_counter() < end:
        names.append(names.pop(0))
        for name in names:
            starts = runs[name]([batch] * STEPS)[WARM_UP:]
            times[name].append(statistics.median(b - a for a, b in pairwise(starts)))
    return times


def spread(values: list[float]) -> str:
    """Format the median and the quartiles of some numbers."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def main() -> None:
    """Time all contestants and print the table."""
    # At a lower level, each fit logs its devices.
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    times = measure(contestants())
    times[PARTS] = [a + b for a, b in zip(times[SUPERVISED], times[TEACHER], strict=True)]
    table = Table(title="One step: ResNet-20 teaches ResNet-8, batch 128, 32 x 32, float32")
    table.add_column("contestant")
    for title in ("ms", "ours / contestant"):
        table.add_column(title, justify="right")
    over = {name: ratios(times, OURS, name) for name in (PLAIN, TIMM, BOX, PARTS)}
    for name, values in times.items():
        ratio = spread(over[name]) if name in over else ""
        table.add_row(name, f"{1000 * statistics.median(values):.1f}", ratio)
    parts = statistics.median(over[PARTS])
    fastest = max((over[name] for name in (PLAIN, TIMM, BOX)), key=statistics.median)
    slower = statistics.quantiles(fastest, n=4)[0] > 1
    show(
        table,
        f"{len(times[OURS])} rounds, {torch.get_num_threads()} threads, torch {torch.__version__}",
        f"ours divided by the parts: {bar(parts, '<= 1.05', parts <= 1.05)}",
        "ours divided by the fastest peer: "
        + bar(statistics.median(fastest), "lower quartile <= 1.0", not slower),
    )


if __name__ == "__main__":
    main()
