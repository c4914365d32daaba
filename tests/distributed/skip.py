"""A script in which one of two ranks skips the distillation in one step.

A part of the student, `extra`, is trained only by the distillation. DDP waits for its gradient on
every rank, even on the rank that skips the step.
"""

import json
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_dist import DistillationCallback, Term

STEPS = 4


class Student(nn.Module):
    """A student with two heads; the task loss uses only one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.main, self.extra = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.extra(x)
        return self.main(x)


class NotANumberOnce(nn.Linear):
    """A teacher whose second output on the second rank is NaN."""

    def __init__(self) -> None:
        super().__init__(6, 4)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        wrong = self.calls == 2 and torch.distributed.get_rank() == 1
        return super().forward(x) * (float("nan") if wrong else 1.0)


class Module(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net = Student()

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def main(out: str) -> None:
    """Train, and save the weights and the number of skipped steps of each rank.

    Args:
        out: the folder for the files.
    """
    torch.manual_seed(7)
    inputs, labels = torch.randn(2 * STEPS * 8, 6), torch.randint(0, 4, (2 * STEPS * 8,))
    terms = {"extra": Term(F.mse_loss, 2.0, student="extra")}
    callback = DistillationCallback(NotANumberOnce(), terms=terms, nonfinite="skip")
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_epochs=1,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Module()
    trainer.fit(module, DataLoader(TensorDataset(inputs, labels), batch_size=8))
    folder = Path(out)
    folder.mkdir(exist_ok=True)
    weights = {name: value.tolist() for name, value in module.state_dict().items()}
    saved = {"weights": weights, "skipped": callback.skipped, "steps": trainer.global_step}
    (folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(saved))
