"""Tests of the data module in docs/few_labels.md, which joins two loaders for the callback."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_dist import DistillationCallback
from lightning_dist.data.digits import DigitsDataModule
from lightning_dist.functional import dist_loss
from lightning_dist.resume import ExactResume

PAGE = (Path(__file__).parents[1] / "docs" / "few_labels.md").read_text()
LABELED, UNLABELED = 40, 64  # With batches of 8, an epoch has 8 batches, and 5 have the labels.


@pytest.fixture
def joined_data():
    """Return the class of the page."""
    code = next(x for x in re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S) if "Joined" in x)
    names = {}
    exec(compile(code, "example", "exec"), names)
    return names["JoinedData"]


class Module(LightningModule):
    """A module that knows nothing of images without labels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).double()
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch)
        return F.cross_entropy(self.net(batch[0].double()), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), lr=0.1, momentum=0.9)


def new_teacher() -> nn.Module:
    torch.manual_seed(4)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).double()


def loader(size: int):
    return DigitsDataModule(train_size=size, global_batch_size=8).train_dataloader()


def fit(module, data, folder, ckpt_path=None, **options) -> None:
    saver = ModelCheckpoint(folder, "{step}", every_n_train_steps=6, save_top_k=-1)
    Trainer(
        accelerator="cpu",
        callbacks=[DistillationCallback(new_teacher()), ExactResume(), saver],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    ).fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)


def test_a_step_learns_the_labels_of_one_loader_and_the_relations_of_both(joined_data, tmp_path):
    module, start = Module(), Module()
    fit(module, joined_data(loader(LABELED), loader(UNLABELED)), tmp_path, max_steps=1)
    x, y = module.seen[0]
    assert (len(x), (y[8:] == -100).all(), (y[:8] >= 0).all()) == (16, True, True)
    logits, x = start.net(x.double()), x.double()
    loss = F.cross_entropy(logits[:8], y[:8])
    (loss + 2 * dist_loss(logits, new_teacher()(x))).backward()
    for before, after in zip(start.net.parameters(), module.net.parameters(), strict=True):
        torch.testing.assert_close(after, before - 0.1 * before.grad, rtol=0, atol=1e-12)


def test_a_run_goes_on_at_the_right_batch_of_both_loaders(joined_data, tmp_path):
    """The run stops when the loader of the labels has begun its second pass of the epoch."""
    whole, resumed = Module(), Module()
    fit(whole, joined_data(loader(LABELED), loader(UNLABELED)), tmp_path / "a", max_epochs=2)
    assert len(whole.seen) == 16
    data = joined_data(loader(LABELED), loader(UNLABELED))
    fit(resumed, data, tmp_path / "b", tmp_path / "a" / "step=6.ckpt", max_epochs=2)
    assert len(resumed.seen) == 10
    for again, once in zip(resumed.seen, whole.seen[6:], strict=True):
        assert torch.equal(again[0], once[0])
        assert torch.equal(again[1], once[1])
    for again, once in zip(resumed.net.parameters(), whole.net.parameters(), strict=True):
        assert torch.equal(again, once)
