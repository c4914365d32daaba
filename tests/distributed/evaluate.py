"""A script that validates and tests on sets that two processes cannot share evenly.

Rank 0 saves the logged metrics.
"""

import json
from pathlib import Path

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_dist.metrics import teacher_metrics
from lightning_dist.tasks.segmentation import SegmentationModule

CLASSES = 4


def samples(count: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(count)
    masks = torch.randint(0, CLASSES, (count, 8, 12), generator=generator)
    masks[:, 0] = 255
    return TensorDataset(torch.randn(count, 3, 8, 12, generator=generator), masks)


def new_student(seed: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, CLASSES, 1), nn.BatchNorm2d(CLASSES))


def main(out: str, count: int, batch: int) -> None:
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = SegmentationModule(
        new_student(),
        teacher=new_student(seed=4),
        teacher_metrics=teacher_metrics(CLASSES),
        num_classes=CLASSES,
        head="",
        optimizer=lambda student: torch.optim.SGD(student.parameters(), lr=0.0),
    )
    module.student.eval()  # The student does not change.
    module.student.train = lambda mode=True: module.student
    loader = DataLoader(samples(count), batch_size=batch)
    trainer.fit(module, DataLoader(samples(4), batch_size=2), loader)
    found = {name: float(value) for name, value in trainer.callback_metrics.items()}
    trainer.test(module, loader, verbose=False)
    found |= {name: float(value) for name, value in trainer.callback_metrics.items()}
    if trainer.is_global_zero:
        Path(out).write_text(json.dumps(found))
