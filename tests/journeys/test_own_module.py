"""Journeys of a module of the user's own, from Python."""

import pytest
import timm
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from journeys import IMAGES, LAST, NAMES, PIXELS, student_state
from lightning_dist.data.image_folder import ImageFolderDataModule
from lightning_dist.files.card_files import read_card
from lightning_dist.module import DistillModule
from lightning_dist.resume import ExactResume
from lightning_dist.teacher.loading import load_teacher


class OwnModule(DistillModule):
    """A module that a user has written: its step mirrors the images, and it has another loss."""

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return torch.nn.functional.multi_margin_loss(self.student(images.flip(3)), labels)


def fit_own(folder, images, epochs=2, ckpt_path=None, teacher=None, pixels=PIXELS, **settings):
    """Train a module of the user's own on a folder of images; return the module and its test."""
    data = ImageFolderDataModule(
        root=images, global_batch_size=6, num_workers=0, **IMAGES, **pixels
    )
    torch.manual_seed(0)
    module = OwnModule(timm.create_model("test_resnet", num_classes=3), teacher, **settings)
    saver = ModelCheckpoint(folder / "checkpoints", filename="last", enable_version_counter=False)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        callbacks=[saver, ExactResume(seed=3)],
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True)
    return module, trainer.test(module, data, verbose=False)[0]


@pytest.fixture
def folder_teacher(journey):
    """Load the teacher that was trained on the folder."""
    return load_teacher("test_resnet", weights=journey / LAST, num_classes=3)


@pytest.fixture
def own_test(journey, folder_teacher, tmp_path):
    """Distil a module of the user's own to the folder "own", and return its test."""
    return fit_own(tmp_path / "own", journey / "images", teacher=folder_teacher)[1]


def test_a_module_of_the_users_own_goes_on_as_the_whole_run(
    own_test, journey, folder_teacher, tmp_path
):
    settings = {"images": journey / "images", "teacher": folder_teacher}
    fit_own(tmp_path / "begun", epochs=1, **settings)
    checkpoint = tmp_path / "begun/checkpoints/last.ckpt"
    _, test = fit_own(tmp_path / "begun", ckpt_path=checkpoint, **settings)
    whole, more = (student_state(tmp_path / name) for name in ("own", "begun"))
    torch.testing.assert_close(more, whole, rtol=0, atol=0)
    assert test == own_test


def test_weight_0_trains_a_module_of_the_users_own_as_without_a_teacher(
    own_test, journey, folder_teacher, tmp_path
):
    fit_own(tmp_path / "none", journey / "images")
    fit_own(tmp_path / "zero", journey / "images", teacher=folder_teacher, distill_weight=0.0)
    none, zero, full = (student_state(tmp_path / name) for name in ("none", "zero", "own"))
    torch.testing.assert_close(zero, none, rtol=0, atol=0)
    assert any(not torch.equal(full[name], none[name]) for name in none)


def test_a_module_of_the_users_own_teaches_the_next(own_test, journey, tmp_path):
    """The checkpoint of the module has a card; the next student has another normalisation."""
    checkpoint = tmp_path / "own/checkpoints/last.ckpt"
    card = read_card(checkpoint)
    assert (list(card.class_names), list(card.mean), card.size) == (NAMES, PIXELS["mean"], (48, 48))
    teacher = load_teacher("test_resnet", weights=checkpoint, num_classes=3)
    pixels = {"mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2)}
    module, _ = fit_own(tmp_path / "next", journey / "images", teacher=teacher, pixels=pixels)
    data = ImageFolderDataModule(root=journey / "images", **IMAGES, **pixels)
    images, labels = next(iter(data.test_dataloader()))
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(module.teacher_network()(images), labels)
    assert float(loss) == pytest.approx(own_test["test/loss"], rel=1e-4)
