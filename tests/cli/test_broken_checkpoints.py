"""Tests that a checkpoint of any broken form ends a resumed run with one line that names it."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import OmegaConf
from torch import nn
from torch.utils.data import DataLoader

from lightning_dist.cli.errors import UserError
from lightning_dist.cli.run.callbacks import VALIDATION_KEY, SaveConfig
from lightning_dist.cli.run.restoring import restoring_errors
from lightning_dist.cli.run.resuming import checkpoint_to_begin_with
from lightning_dist.data.digits import DigitsDataModule
from lightning_dist.resume import ExactResume


class Small(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).sum()

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 3])]


def train(folder: Path, epochs: int, path: str | None = None) -> None:
    """Train as the command does, from the check of the checkpoint to the end."""
    if path is not None:
        checkpoint_to_begin_with(
            OmegaConf.create({"resume": False, "ckpt_path": path, "trust": False}), folder
        )
    saver = ModelCheckpoint(folder, filename="last", enable_version_counter=False)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[saver, ExactResume(), SaveConfig({"seed": 0})],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    data = DataLoader(torch.randn(4, 2), batch_size=2)
    with restoring_errors(path):
        trainer.fit(Small(), data, ckpt_path=path, weights_only=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("run")
    train(folder, 1)
    return torch.load(folder / "last.ckpt", weights_only=True)


def state_of(checkpoint: dict, name: str) -> tuple[str, dict]:
    return next((k, v) for k, v in checkpoint["callbacks"].items() if name in k)


def counters(checkpoint: dict) -> dict:
    return checkpoint["loops"]["fit_loop"]["epoch_progress"]


ESCAPE = "\x1b[2J"
BROKEN: dict[str, Callable[[dict], object]] = {
    "version is a word": lambda c: c.update({"pytorch-lightning_version": "new"}),
    "version is empty": lambda c: c.update({"pytorch-lightning_version": ""}),
    "version is no version": lambda c: c.update({"pytorch-lightning_version": "2.6.6!!!"}),
    "version is very old": lambda c: c.update({"pytorch-lightning_version": "0.0.1"}),
    "callbacks are a list": lambda c: c.update(callbacks=[1]),
    "a callback is a number": lambda c: c["callbacks"].update({"ExactResume": 7}),
    "a callback is empty": lambda c: c["callbacks"].update({"ExactResume": {"x": 1}}),
    "a callback has words": lambda c: c["callbacks"].update({"ExactResume": {"batches": "x"}}),
    "a callback has a name of escapes": lambda c: c["callbacks"].update({ESCAPE: {}}),
    "a callback has a name of 2 MB": lambda c: c["callbacks"].update({"x" * 2**21: {}}),
    "a callback has a number for a name": lambda c: c["callbacks"].update({7: {}}),
    "ModelCheckpoint has a list": lambda c: state_of(c, "ModelCheckpoint")[1].update(
        best_k_models=[1]
    ),
    "ModelCheckpoint has words": lambda c: state_of(c, "ModelCheckpoint")[1].update(kth_value="x"),
    "loops are empty": lambda c: c["loops"].update(fit_loop={}),
    "loops are words": lambda c: c["loops"].update(fit_loop="x"),
    "a loop lacks its parts": lambda c: c["loops"].update(fit_loop={"epoch_progress": {}}),
    "a counter is a word": lambda c: counters(c)["current"].update(completed="x"),
    "a counter is negative": lambda c: counters(c)["current"].update(completed=-1),
    "a counter is a fraction": lambda c: counters(c)["total"].update(ready=0.5),
    "a counter has a method's name": lambda c: counters(c)["total"].update(reset=1),
    "a counter is a list": lambda c: counters(c).update(total=[1]),
    "an optimizer is a number": lambda c: c.update(optimizer_states=[1]),
    "an optimizer is empty": lambda c: c.update(optimizer_states=[{}]),
    "an optimizer has a word for a rate": lambda c: c["optimizer_states"][0]["param_groups"][
        0
    ].update(lr="x"),
    "an optimizer has a number for its groups": lambda c: c["optimizer_states"][0].update(
        param_groups=7
    ),
    "an optimizer has a word for its state": lambda c: c["optimizer_states"][0].update(state="x"),
    "an optimizer has a list for a state": lambda c: c["optimizer_states"][0]["state"].update(
        {0: [1]}
    ),
    "an optimizer has other shapes": lambda c: c["optimizer_states"][0]["state"][0].update(
        momentum_buffer=torch.ones(7)
    ),
    "an optimizer lacks a setting": lambda c: c["optimizer_states"][0]["param_groups"][0].pop(
        "dampening"
    ),
    "a path is a list": lambda c: state_of(c, "ModelCheckpoint")[1].update(best_model_path=[1]),
    "a number of steps is a list": lambda c: c["loops"]["fit_loop"]["epoch_loop.state_dict"].update(
        _batches_that_stepped=[1]
    ),
    "the loop is a tensor": lambda c: c["loops"].update(fit_loop=torch.ones(3)),
    "schedulers are words": lambda c: c.update(lr_schedulers=["x"]),
    "a scheduler has a word for its epoch": lambda c: c["lr_schedulers"][0].update(last_epoch="x"),
    "a scheduler has a number for a method": lambda c: c["lr_schedulers"][0].update(step=1),
    "a scheduler has words for milestones": lambda c: c["lr_schedulers"][0].update(
        milestones={"x": 1}
    ),
    "weights of other names": lambda c: c["state_dict"].update({ESCAPE: torch.ones(1)}),
    "weights of another shape": lambda c: c["state_dict"].update({"layer.weight": torch.ones(7)}),
    "weights are words": lambda c: c["state_dict"].update({"layer.weight": "x"}),
    "an epoch is a word": lambda c: c.update(epoch="x"),
    "a step is a list": lambda c: c.update(global_step=[1]),
    "a validation is a list": lambda c: c.update({VALIDATION_KEY: [1]}),
    "a validation has another metric": lambda c: c.update({VALIDATION_KEY: {"test/[/b]": 0.5}}),
    "a validation has a huge number": lambda c: c.update({VALIDATION_KEY: {"val/a": 10**400}}),
    "a version has an escape": lambda c: c.update({"pytorch-lightning_version": "2.9.9\x1b[2J"}),
    "callbacks are many": lambda c: c["callbacks"].update({str(i) * 200: {} for i in range(200)}),
    "a validation has words": lambda c: c.update({VALIDATION_KEY: {"val/loss": "x"}}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", BROKEN)
def test_a_resumed_run_ends_with_one_line(tmp_path, checkpoint, name):
    broken = copy.deepcopy(checkpoint)
    BROKEN[name](broken)
    path = tmp_path / "broken.ckpt"
    torch.save(broken, path)
    with pytest.raises(UserError) as caught:
        train(tmp_path, 4, str(path))
    line = str(caught.value)
    assert "checkpoint is damaged" in line or "broken.ckpt" in line
    assert len(line) < 5000
    assert ESCAPE not in line


def test_the_same_checkpoint_unbroken_is_resumed(tmp_path, checkpoint):
    torch.save(checkpoint, tmp_path / "whole.ckpt")
    train(tmp_path, 2, str(tmp_path / "whole.ckpt"))


def test_a_bug_outside_of_restoring_keeps_its_type(tmp_path, checkpoint, monkeypatch):
    torch.save(checkpoint, tmp_path / "whole.ckpt")
    monkeypatch.setattr(Small, "training_step", lambda self, *_: self.no_such_attribute)
    with pytest.raises(AttributeError, match="no_such_attribute"):
        train(tmp_path, 2, str(tmp_path / "whole.ckpt"))


@pytest.mark.parametrize("state", [{"epoch": 0, "batches": "x"}, {"epoch": 0}, {"batches": -1}])
def test_a_broken_state_of_a_loader_is_refused(state):
    loader = DigitsDataModule().train_dataloader()
    with pytest.raises(ValueError, match="in the state of the loader"):
        loader.load_state_dict(state)
