"""Rows of ``benchmarks.scale``: a training step against its terms and the teacher's modules."""

import statistics
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.growth import Cost, Row
from lightning_dist import DistillationCallback, Term

STEPS, WARM_UP = 200, 20


class Network(nn.Module):
    """A small network, with modules that its forward does not call."""

    def __init__(self, unused: int = 0) -> None:
        super().__init__()
        self.head = nn.Linear(16, 10)
        self.unused = nn.ModuleList(nn.Identity() for _ in range(unused))

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logits of a batch."""
        return self.head(inputs)


class Module(LightningModule):
    """A LightningModule with a small student."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Network()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Return a loss without labels."""
        return self.net(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return SGD."""
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Clock(Callback):
    """A callback that stores the CPU time at the start of each training batch, in seconds."""

    def __init__(self) -> None:
        self.starts: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        """Store the CPU time of this process."""
        self.starts.append(time.process_time())


def step_seconds(terms: int, unused: int = 0) -> float:
    """Return the median CPU seconds of a step with some terms.

    Args:
        terms: the number of terms, each a mean squared error of the logits.
        unused: the number of modules of the teacher that its forward does not call.
    """
    clock = Clock()
    named = {f"term{index}": Term(nn.MSELoss(), 1.0) for index in range(terms)}
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=[clock, DistillationCallback(Network(unused), terms=named)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(), DataLoader([torch.randn(8, 16)] * STEPS, batch_size=None))
    return statistics.median(b - a for a, b in pairwise(clock.starts[WARM_UP:]))


def against_terms(size: int, folder: Path) -> Cost:
    """Measure a step with `size` terms."""
    return Cost(step_seconds(terms=size))


def against_modules(size: int, folder: Path) -> Cost:
    """Measure a step with a teacher of `size` modules."""
    return Cost(step_seconds(terms=1, unused=size))


ROWS = [
    Row("step, terms", "terms", (2, 20), against_terms),
    Row("step, teacher's modules", "modules", (1_000, 10_000), against_modules),
]
