"""A script that optimizes manually with two optimizers, and saves the weights of each rank.

A critic and the student are trained in turn. The distillation loss is added to the student's loss,
not to the critic's. It contains a projection that the student's optimizer trains. Each rank gets
half of the rows of each batch; a single process gets all rows.
"""

import copy
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_dist import DistillationCallback, Term

STEPS = 4


class Projected(nn.Module):
    """The squared error of a trained projection of the student's features."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Linear(12, 5).double()

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return F.mse_loss(self.projection(student), teacher)


class Adversarial(L.LightningModule):
    """A student and a critic of its logits, each with its own optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 4)).double()
        self.critic = nn.Linear(4, 1).double()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        of_critic, of_net = self.optimizers()
        logits = self.net(batch[0])
        of_critic.zero_grad()
        self.manual_backward(self.critic(logits.detach()).square().mean())
        of_critic.step()
        of_net.zero_grad()
        self.manual_backward(F.cross_entropy(logits, batch[1]) - self.critic(logits).mean())
        of_net.step()

    def configure_optimizers(self):
        rest = [p for name, p in self.named_parameters() if not name.startswith("critic.")]
        return [torch.optim.SGD(p, lr=0.1) for p in (self.critic.parameters(), rest)]

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(1)
        rank, world = self.trainer.global_rank, self.trainer.world_size
        batches = [
            (
                torch.randn(8, 6, generator=generator).double()[rank::world],
                torch.randint(0, 4, (8,), generator=generator)[rank::world],
            )
            for _ in range(STEPS)
        ]
        return DataLoader(batches, batch_size=None)


def main(out: str, devices: int = 2, strategy: str = "auto") -> None:
    """Train, and save the results of this rank.

    Args:
        out: the folder for the files.
        devices: the number of processes.
        strategy: the strategy of the Trainer.
    """
    torch.manual_seed(3)
    teacher = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)).double()
    before = copy.deepcopy(teacher.state_dict())
    loss = Projected()
    terms = {
        "logits": Term(F.mse_loss, 2.0),
        "features": Term(loss, 0.5, student="0", teacher="0"),
    }
    trainer = L.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        max_epochs=1,
        callbacks=[DistillationCallback(teacher, terms=terms, backward=1)],
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Adversarial()
    trainer.fit(module)
    same = all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    weights = {"net": module.state_dict(), "projection": loss.state_dict()}
    Path(out).mkdir(exist_ok=True)
    saved = {**weights, "teacher_unchanged": same}
    torch.save(saved, Path(out) / f"rank{trainer.global_rank}.pt")
