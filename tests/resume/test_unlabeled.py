"""Tests of an exact resume of runs with images without labels."""

import signal

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from torch import nn

from interruption import Send
from lightning_dist.data.digits import DigitsDataModule
from lightning_dist.data.scenes import ScenesDataModule
from lightning_dist.models.small import SmallCNN
from lightning_dist.resume import ExactResume, Interrupted
from lightning_dist.tasks.classification import ClassificationModule
from lightning_dist.tasks.segmentation import SegmentationModule

SCENES = {"train_size": 6, "val_size": 1, "test_size": 1, "scene_size": 16}


def new_run(task: str, **settings):
    """Return a module with a teacher, and its data."""
    torch.manual_seed(0)
    if task == "classification":
        networks = (SmallCNN([4, 8]) for _ in range(2))
        module = ClassificationModule(*networks, num_classes=10)
        return module, DigitsDataModule(train_size=12, augment=True, **settings)
    networks = (nn.Conv2d(3, 11, 3) for _ in range(2))
    module = SegmentationModule(*networks, num_classes=11, head="")
    return module, ScenesDataModule(**SCENES, **settings)


@pytest.mark.parametrize("task", ["classification", "segmentation"])
def test_a_run_that_is_stopped_within_an_epoch_ends_with_the_same_bits(
    make_trainer, tmp_path, task
):
    (tmp_path / "more").mkdir()
    for number in range(5):
        Image.new("RGB", (16, 16), (50 * number, 0, 99)).save(tmp_path / "more" / f"{number}.png")
    settings = {"unlabeled": tmp_path / "more", "unlabeled_share": 0.5, "global_batch_size": 2}

    def fit(name: str, *callbacks, **options):
        module, data = new_run(task, labels=4, **settings)
        saver = ModelCheckpoint(tmp_path / name, save_last=True, enable_version_counter=False)
        trainer = make_trainer(
            enable_checkpointing=True,
            max_epochs=2,
            limit_val_batches=0,
            callbacks=[saver, ExactResume(seed=3), *callbacks],
        )
        trainer.fit(module, data, weights_only=True, **options)
        assert trainer.global_step == 8
        return module.state_dict()

    whole = fit("whole")
    with pytest.raises(Interrupted):
        fit("stopped", Send(signal.SIGTERM, 5))
    saved = tmp_path / "stopped" / "last.ckpt"
    assert torch.load(saved, weights_only=True)["global_step"] == 6
    resumed = fit("stopped", ckpt_path=saved)
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
