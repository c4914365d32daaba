"""A script that trains under a strategy and saves the losses and weights of each rank.

Each rank gets some rows of each of five batches; a single process gets all rows.
"""

import copy
import functools
import os
import warnings
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, Dataset

from lightning_dist import DistillationCallback, DistillModule, DISTLoss, StudentEMA
from lightning_dist.tasks.classification import ClassificationModule


class Batches(Dataset):
    """A data set of whole batches, whose rows are divided among the ranks."""

    def __init__(self, trainer_rank: int, world: int, uneven: bool, unlabeled: bool) -> None:
        generator = torch.Generator().manual_seed(1)
        self.inputs = torch.randn(5, 16, 6, generator=generator).double()
        self.targets = torch.randint(0, 4, (5, 16), generator=generator)
        # In the five batches, the two ranks have 0 and 8, 5 and 3, 8 and 6, 1 and 0, 0 and 0
        # labels.
        if unlabeled:
            self.targets[0, :8] = self.targets[1, 5:13] = self.targets[2, 14:] = -100
            self.targets[3, 1:] = self.targets[4] = -100
        self.rank, self.world, self.uneven = trainer_rank, world, uneven

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index):
        cut = 11 if self.uneven and index == 4 else 8
        rows = slice(0, 16)
        if self.world == 2:
            rows = slice(0, cut) if self.rank == 0 else slice(cut, 16)
        return self.inputs[index, rows], self.targets[index, rows]


def new_student() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 4)).double()


class Recorded(L.LightningModule):
    """A module that loads its own data and stores the distillation loss of each step."""

    uneven = unlabeled = False
    distill = ()  # With spawned processes, this stays empty in the main process.

    def train_dataloader(self):
        self.distill = []
        ranks = (self.trainer.global_rank, self.trainer.world_size)
        data = Batches(*ranks, self.uneven, self.unlabeled)
        return DataLoader(data, batch_size=None)

    def on_train_batch_end(self, *args):
        super().on_train_batch_end(*args)
        self.distill.append(self.trainer.callback_metrics["train/distill"].item())


class Averaged(Recorded, DistillModule):
    """A DistillModule that averages the student's weights."""


class Classifier(Recorded, ClassificationModule):
    """A ClassificationModule, some of whose samples have no label."""

    unlabeled = True


class Plain(Recorded):
    def __init__(self, uneven: bool) -> None:
        super().__init__()
        self.net = new_student()
        self.uneven = uneven

    def configure_model(self):
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            for layer in (self.net[0], self.net[2], self.net):
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        inputs, target = batch
        return F.cross_entropy(self.net(inputs), target)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def main(
    out: str,
    devices: int = 2,
    strategy: str = "auto",
    sync: bool = False,
    uneven: bool = False,
    ema: bool = False,
    unlabeled: bool = False,
) -> None:
    """Train, and save the results of this rank.

    Args:
        out: the folder for the files.
        devices: the number of processes.
        strategy: the strategy of the Trainer.
        sync: the option ``sync`` of the loss.
        uneven: give the ranks 11 and 5 rows of the last batch.
        ema: train a DistillModule with StudentEMA.
        unlabeled: train a ClassificationModule on batches that have unequal numbers of labels.
    """
    warnings.filterwarnings("error", message=".*unused parameters.*")
    torch.manual_seed(7)
    teacher = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Linear(12, 4)).double()
    # Each rank has another teacher, so that a broadcast of the teacher would be noticed.
    if not sync:
        teacher[0].bias.data += 0.01 * int(os.environ.get("LOCAL_RANK", 0))
    before = copy.deepcopy(teacher.state_dict())
    loss = DISTLoss(sync=sync)
    callback = DistillationCallback(
        teacher,
        loss=loss,
        # With uneven batches, the mean over the ranks is not the mean of the joined batch. So leave
        # out the task loss.
        task_weight=0.0 if uneven else 1.0,
    )
    fsdp2 = {"data_parallel_size": 2, "tensor_parallel_size": 1}
    trainer = L.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=ModelParallelStrategy(**fsdp2) if strategy == "fsdp2" else strategy,
        max_epochs=1,
        callbacks=[StudentEMA(0.5)] if ema else [] if unlabeled else [callback],
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Plain(uneven)
    if ema:
        module = Averaged(new_student(), teacher, distill_loss=loss)
    if unlabeled:
        optimizer = functools.partial(torch.optim.SGD, lr=0.1)
        module = Classifier(
            new_student(), teacher, num_classes=4, distill_loss=loss, optimizer=optimizer
        )
    trainer.fit(module)
    weights = {
        name: value.full_tensor() if hasattr(value, "full_tensor") else value
        for name, value in module.state_dict().items()
    }
    same = all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    saved = {"weights": weights, "distill": list(module.distill), "teacher_unchanged": same}
    Path(out).mkdir(exist_ok=True)
    torch.save(saved, Path(out) / f"rank{trainer.global_rank}.pt")
