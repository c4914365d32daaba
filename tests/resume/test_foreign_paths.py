"""Tests that a run that continues from a checkpoint touches no file that the checkpoint names."""

import os
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from hostile import contacts, watched
from lightning_dist.cli.run.callbacks import SaveConfig
from lightning_dist.resume import ExactResume


class Improves(L.LightningModule):
    """A module whose score is better in each epoch, so that each checkpoint replaces the last."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).sum()

    def on_train_epoch_end(self):
        self.log("score", float(self.current_epoch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def train(make_trainer, tmp_path):
    """Return a function that trains to an epoch, and keeps the best checkpoint and the last one."""

    def run(
        epochs: int, ckpt_path: str | None = None, guard: Callback | None = None
    ) -> ModelCheckpoint:
        saver = ModelCheckpoint(
            *(tmp_path / "run" / "checkpoints", "{epoch}"),
            monitor="score",
            mode="max",
            save_top_k=1,
            save_last=True,
        )
        trainer = make_trainer(
            max_epochs=epochs, callbacks=[saver, guard or ExactResume()], enable_checkpointing=True
        )
        data = DataLoader(torch.randn(4, 2), batch_size=2)
        trainer.fit(Improves(), data, ckpt_path=ckpt_path, weights_only=True)
        return saver

    return run


def change(path: Path, **entries: object) -> None:
    """Change the state of ModelCheckpoint in a checkpoint."""
    checkpoint = torch.load(path, weights_only=True)
    (state,) = [x for key, x in checkpoint["callbacks"].items() if "ModelCheckpoint" in key]
    state.update(entries)
    torch.save(checkpoint, path)


VICTIMS = {
    "a file": "{victim}",
    "a folder": "{folder}",
    "an address of a file": "local://{victim}",
    "another address of a file": "file://{victim}",
    "through the folder": "{checkpoints}/../../victims/victim.txt",
    "through a folder of the folder": "{checkpoints}/x/../../../victims/victim.txt",
    "through a link": "{checkpoints}/link/victim.txt",
    "an address": "http://127.0.0.1:9/x.ckpt",
    "an address within an address": "simplecache::http://127.0.0.1:9/x.ckpt",
    "bytes": b"victims/victim.txt",
    "the folder of the checkpoints": "{checkpoints}/x/..",
    "a name that no file has": "a\0b",
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", VICTIMS)
def test_no_file_outside_of_the_run_is_deleted(train, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    folder, checkpoints = tmp_path / "victims", tmp_path / "run" / "checkpoints"
    folder.mkdir()
    victim = folder / "victim.txt"
    victim.write_text("precious")
    train(1)
    (checkpoints / "x").mkdir()
    (checkpoints / "link").symlink_to(folder)
    path = VICTIMS[name]
    if isinstance(path, str):
        path = path.format(victim=victim, folder=folder, checkpoints=checkpoints)
    score = torch.tensor(0.0)
    change(
        checkpoints / "last.ckpt",
        best_model_path=path,
        kth_best_model_path=path,
        best_k_models={path: score},
        last_model_path=path,
    )
    with watched() as record:
        saver = train(3, str(checkpoints / "last.ckpt"))
    assert victim.read_text() == "precious"
    assert not contacts(record)
    assert os.listdir(checkpoints / "x") == []
    assert saver.best_model_path == str(checkpoints / "epoch=2.ckpt")


def test_the_best_checkpoint_of_the_run_itself_is_replaced(train, tmp_path):
    checkpoints = tmp_path / "run" / "checkpoints"
    train(1)
    assert (checkpoints / "epoch=0.ckpt").exists()
    saver = train(3, str(checkpoints / "last.ckpt"))
    assert saver.best_model_path == str(checkpoints / "epoch=2.ckpt")
    assert sorted(os.listdir(checkpoints)) == ["epoch=2.ckpt", "last.ckpt"]


@pytest.mark.filterwarnings("ignore")
def test_the_command_forgets_paths_also_without_exact_resume(train, tmp_path):
    train(1)
    victim = tmp_path / "victim.txt"
    victim.write_text("precious")
    path = f"local://{victim}"
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    change(last, kth_best_model_path=path, best_k_models={path: torch.tensor(0.0)})
    train(2, str(last), SaveConfig({}))
    assert victim.exists()


def test_what_is_forgotten_is_told(train, tmp_path):
    train(1)
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    change(path, best_model_path="/etc/\x1b[2Jpasswd")
    with pytest.warns(UserWarning, match=r"ModelCheckpoint.*/etc/\\x1b\[2Jpasswd"):
        train(2, str(path))
