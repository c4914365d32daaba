"""Tests that a resume within an epoch is exact, whatever else the run is set to do."""

import functools
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import timm.scheduler
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from interruption import Send
from lightning_dist import DistillModule, StudentEMA
from lightning_dist.data.base import ImageDataModule
from lightning_dist.data.tensor_images import TensorImages
from lightning_dist.resume import ExactResume, Interrupted, ResumableCSVLogger
from lightning_dist.training.optimization import warmup_multistep

BATCHES = 6  # The number of batches in an epoch.


class Images(ImageDataModule):
    """24 training images of noise, which are cropped at random, and 4 validation images."""

    num_classes, class_names = 4, None
    mean, std = (0.5,), (0.25,)
    image_size, in_channels, location = 6, 1, "noise"

    def __init__(self) -> None:
        super().__init__(global_batch_size=4)

    def noise(self, count: int, **options: Any) -> TensorImages:
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(256, (count, 1, 6, 6), generator=generator, dtype=torch.uint8)
        return TensorImages(images, torch.arange(count) % 4, mean=[0.5], std=[0.25], **options)

    def train_dataset(self) -> TensorImages:
        return self.noise(4 * BATCHES, padding=1, seed=self.seed)

    def val_dataset(self) -> TensorImages:
        return self.noise(4)


class OneCycle(DistillModule):
    """A module that counts the updates of the run as Lightning's documentation recommends."""

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)
        updates = self.trainer.estimated_stepping_batches
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=updates)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


def timm_schedule(**options: Any) -> Callable[..., Any]:
    settings = {"sched": "cosine", "num_epochs": 2, "warmup_epochs": 1}
    return functools.partial(timm.scheduler.create_scheduler_v2, **settings | options)


BY_UPDATE = {"scheduler": timm_schedule(step_on_epochs=False), "scheduler_interval": "step"}
WARMUP = {
    "scheduler": functools.partial(warmup_multistep, milestones=[1], warmup_updates=3),
    "scheduler_interval": "step",
}

# The settings of the module, those of the Trainer, and further callbacks.
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any], Callable[[], list[Callback]]]] = {
    "timm by epoch": ({"scheduler": timm_schedule()}, {}, list),
    "timm by update": (BY_UPDATE, {}, list),
    "warm-up": (WARMUP, {}, list),
    "one cycle": ({"kind": OneCycle}, {}, list),
    "average": (BY_UPDATE, {}, lambda: [StudentEMA(0.9)]),
    "accumulation": (WARMUP, {"accumulate_grad_batches": 2, "max_steps": 5}, list),
    "accumulation that changes": ({}, {}, lambda: [GradientAccumulationScheduler({0: 1, 1: 3})]),
    "validation within epochs": (WARMUP, {"val_check_interval": 0.34}, list),
    "validation by step": ({}, {"val_check_interval": 4, "check_val_every_n_epoch": None}, list),
    "overfitting": ({}, {"overfit_batches": 5}, list),
    "a part of the batches": (BY_UPDATE, {"limit_train_batches": 0.9}, list),
}


@pytest.fixture
def fit(make_trainer: Callable[..., L.Trainer], tmp_path: Path) -> Callable[..., L.Trainer]:
    """Return a function that trains for two epochs in a folder, and returns the trainer."""

    def run(
        name: str,
        module: dict[str, Any],
        trainer: dict[str, Any],
        callbacks: list[Callback],
        resume: bool = False,
    ) -> L.Trainer:
        torch.manual_seed(0)
        student = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(36, 4))
        kind = module.get("kind", DistillModule)
        options = {key: value for key, value in module.items() if key != "kind"}
        teacher = nn.Sequential(nn.Flatten(), nn.Linear(36, 4))
        saver = ModelCheckpoint(tmp_path / name, save_last=True, enable_version_counter=False)
        made = make_trainer(
            enable_checkpointing=True,
            log_every_n_steps=1,
            callbacks=[saver, ExactResume(seed=3), *callbacks],
            logger=ResumableCSVLogger(tmp_path, name, version=""),
            **{"max_epochs": 2} | trainer,
        )
        made.fit(
            kind(student, teacher, measure_teacher=False, **options),
            Images(),
            ckpt_path=tmp_path / name / "last.ckpt" if resume else None,
            weights_only=True,
        )
        return made

    return run


def state(trainer: L.Trainer) -> dict[str, Any]:
    """Return the weights and the states of optimizer and schedule, flat and by name."""
    parts = {
        "weights": trainer.lightning_module.state_dict(),
        "optimizer": trainer.optimizers[0].state_dict(),
        "schedules": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
    }
    leaves, _ = torch.utils._pytree.tree_flatten_with_path(parts)
    return {torch.utils._pytree.keystr(path): leaf for path, leaf in leaves}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_resume_within_an_epoch_is_exact_whatever_the_settings(fit, tmp_path, name):
    module, trainer, callbacks = SETTINGS[name]
    whole = fit("whole", module, trainer, callbacks())
    with pytest.raises(Interrupted):
        fit("stopped", module, trainer, [*callbacks(), Send(signal.SIGTERM, BATCHES + 2)])
    resumed = fit("stopped", module, trainer, callbacks(), resume=True)
    first, second = state(whole), state(resumed)
    assert first.keys() == second.keys()
    for key, value in first.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, second[key]), key
        else:
            assert value == second[key] or hasattr(value, "state_dict"), key
    curves = [(tmp_path / run / "metrics.csv").read_text() for run in ("whole", "stopped")]
    assert curves[0] == curves[1]


@pytest.mark.parametrize(
    "finder",
    [
        lambda: LearningRateFinder(num_training_steps=2, attr_name="lr"),
        lambda: BatchSizeFinder(steps_per_trial=1, max_trials=1),
    ],
    ids=["LearningRateFinder", "BatchSizeFinder"],
)
def test_a_resume_that_would_search_again_is_refused_and_a_new_run_is_not(fit, tmp_path, finder):
    class WithRate(DistillModule):
        lr = 0.01

    with pytest.raises(Interrupted):
        fit("run", {"kind": WithRate}, {}, [finder(), Send(signal.SIGTERM, BATCHES + 1)])
    rows = (tmp_path / "run" / "metrics.csv").read_text()
    with pytest.raises(
        MisconfigurationException, match=r"does not resume with \w+Finder, .*remove"
    ):
        fit("run", {"kind": WithRate}, {}, [finder()], resume=True)
    assert (tmp_path / "run" / "metrics.csv").read_text() == rows


def test_a_resume_within_an_epoch_warns_of_hooks_that_lightning_leaves_out(fit):
    class AtStart(Callback):
        def on_train_epoch_start(self, trainer, pl_module) -> None:
            pass

    class Both(DistillModule):
        def on_train_epoch_start(self) -> None:
            pass

    with pytest.raises(Interrupted):
        fit("run", {"kind": Both}, {}, [AtStart(), Send(signal.SIGTERM, 1)])
    with pytest.warns() as caught:
        fit("run", {"kind": Both}, {}, [AtStart()], resume=True)
    texts = " ".join(str(warning.message) for warning in caught)
    assert "does not call AtStart.on_train_epoch_start" in texts
    assert "does not call Both.on_train_epoch_start" in texts


def test_a_schedule_in_updates_refuses_an_accumulation_that_changes(fit):
    accumulation = GradientAccumulationScheduler({0: 1, 1: 3})
    with pytest.raises(MisconfigurationException, match="changes their number between epochs"):
        fit("run", WARMUP, {}, [accumulation])
