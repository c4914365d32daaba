"""A small module without distillation, its data and its teacher, and a plain training loop."""

import lightning as L
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_dist.functional import dist_loss

BATCH = 8


class Projection(nn.Module):
    """A loss of features with a trainable projection, as FeatureMimic."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.project = nn.Linear(features, features)

    def forward(self, student, teacher):
        return F.mse_loss(self.project(student), teacher)


class Plain(L.LightningModule):
    """A module as users write it, with no code for distillation."""

    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__()
        self.net = net or nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 4))
        self.losses: list[float] = []

    def training_step(self, batch, batch_idx):
        inputs, target = batch
        return F.cross_entropy(self.net(inputs), target)

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.training_step(batch, batch_idx))

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item() if outputs else None)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def data(batches: int = 4) -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(batches * BATCH, 6, generator=generator)
    target = torch.randint(0, 4, (len(inputs),), generator=generator)
    return DataLoader(TensorDataset(inputs, target), batch_size=BATCH)


def teacher_net() -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(6, 12), nn.Dropout(0.5), nn.BatchNorm1d(12), nn.Linear(12, 4))


def fitted(trainer, module=Plain, loader=None) -> Plain:
    torch.manual_seed(3)
    module = module() if isinstance(module, type) else module
    trainer.fit(module, loader or data())
    return module


def plain_loop(teacher, steps: int = 4, weight: float = 2.0, task_weight: float = 1.0, loss=None):
    """Train in the same way without Lightning; return the network and the losses to expect."""
    torch.manual_seed(3)
    net = Plain().net
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for inputs, target in [*data()][:steps]:
        with torch.no_grad():
            expected = teacher.eval()(inputs)
        logits = net(inputs)
        total = task_weight * F.cross_entropy(logits, target)
        total = total + weight * (loss or dist_loss)(logits, expected)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        losses.append(total.item())
    return net, losses


def assert_same_weights(left: nn.Module, right: nn.Module) -> None:
    for a, b in zip(left.state_dict().values(), right.state_dict().values(), strict=True):
        assert torch.equal(a, b)
