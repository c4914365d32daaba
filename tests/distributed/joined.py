"""A script that trains on two loaders, which the data module of docs/few_labels.md joins.

Each rank saves the samples that it has seen, and the weights at the end.
"""

import re
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from lightning_dist import DistillationCallback

PAGE = (Path(__file__).parents[2] / "docs" / "few_labels.md").read_text()
LABELED, UNLABELED = 12, 24


def joined_data() -> type:
    """Return the class of the page."""
    codes = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
    names: dict = {}
    exec(next(code for code in codes if "JoinedData" in code), names)
    return names["JoinedData"]


class Module(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Linear(6, 4)
        self.seen: list = []

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.seen.append((x[:, 0].int().tolist(), y.tolist()))
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def loader(count: int, first: int) -> DataLoader:
    """Return a loader of samples whose first number is the number of the sample."""
    x = torch.randn(count, 6, generator=torch.Generator().manual_seed(count))
    x[:, 0] = torch.arange(first, first + count)
    samples = [(row, int(row[0]) % 4) for row in x]
    return DataLoader(samples, batch_size=3, shuffle=True)


def main(out: str, devices: int = 2) -> None:
    torch.manual_seed(5)
    module, teacher = Module(), nn.Linear(6, 4)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=devices,
        max_epochs=1,
        callbacks=[DistillationCallback(teacher)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = joined_data()(loader(LABELED, 0), loader(UNLABELED, 100))
    trainer.fit(module, datamodule=data)
    Path(out).mkdir(exist_ok=True)
    found = {"seen": module.seen, "weights": dict(module.net.state_dict())}
    torch.save(found, Path(out) / f"{trainer.global_rank}.pt")
