"""Tests that the commands can read a checkpoint that the code of an earlier commit wrote."""

import csv
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch
from hydra.utils import instantiate
from PIL import Image

from lightning_dist.teacher.loading import load_teacher

CPU = "trainer=cpu"


@pytest.fixture
def old_run(golden, tmp_path):
    """Write the images on which the checkpoint was trained, and the checkpoint as ``old.ckpt``."""
    rng = np.random.default_rng(0)
    for split, images in (("train", 4), ("val", 2)):
        for label, name in enumerate(("dark", "light")):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(images):
                pixels = rng.integers(0, 80, (12, 12, 3)) + label * 150
                Image.fromarray(pixels.astype("uint8")).save(folder / f"{i}.png")
    shutil.copy(golden / "run_of_4a06b76.ckpt", tmp_path / "old.ckpt")


def test_an_old_checkpoint_is_tested_with_the_results_of_its_time(old_run, command, capsys):
    command("eval", "ckpt=old.ckpt", "+data.root=images", CPU)
    printed = capsys.readouterr().out
    rows = [line.strip("│ ").split("│") for line in printed.splitlines() if "test/" in line]
    metrics = {name.strip(): float(value) for name, value in rows}
    assert metrics == {
        "test/loss": pytest.approx(0.6046749949455261),
        "test/accuracy": 1.0,
        "test/ema_loss": pytest.approx(0.6506984233856201),
        "test/ema_accuracy": 1.0,
    }


def test_an_old_checkpoint_labels_images(old_run, command, tmp_path):
    command("predict", "ckpt=old.ckpt", "images=images/val", "out=labels", CPU)
    with open(tmp_path / "labels" / "predictions.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(row["image"], row["class"]) for row in rows] == [
        (f"{name}/{i}.png", name) for name in ("dark", "light") for i in (0, 1)
    ]


@pytest.mark.parametrize(
    ("options", "prefix"), [([], "student."), (["ema=true"], "student_ema.module.")]
)
def test_an_old_checkpoint_is_exported(old_run, command, tmp_path, options, prefix):
    command("export", "ckpt=old.ckpt", "file=student.safetensors", *options)
    exported = safetensors.torch.load_file(tmp_path / "student.safetensors")
    saved = torch.load(tmp_path / "old.ckpt", weights_only=True)["state_dict"]
    assert exported
    assert all(torch.equal(value, saved[prefix + name]) for name, value in exported.items())


@pytest.fixture
def of_digits(old_run, tmp_path):
    """Write a checkpoint whose config names other data than that of its training."""
    checkpoint = torch.load(tmp_path / "old.ckpt", weights_only=True)
    checkpoint["lightning_dist_config"] |= {
        "data": {"_target_": "lightning_dist.data.digits.DigitsDataModule"},
        "class_names": None,
    }
    torch.save(checkpoint, tmp_path / "digits.ckpt")


def test_a_network_of_other_channels_than_its_datas_is_refused_in_one_line(of_digits, refused):
    line = refused("predict", "ckpt=digits.ckpt", "images=images/val", CPU)
    assert "the images have 1 channels and the student, a " in line
    assert "takes 3: choose" in line


def test_an_old_network_of_fewer_classes_than_its_datas_is_refused(of_digits, refused):
    line = refused("eval", "ckpt=digits.ckpt", CPU)
    assert "the network has num_classes=2 and the data has 10 classes" in line


@pytest.mark.parametrize(("ema", "weights"), [(None, "averaged"), (False, "student's own")])
def test_a_teacher_from_an_old_checkpoint_says_what_is_assumed(
    old_run, tmp_path, caplog, ema, weights
):
    checkpoint = torch.load(tmp_path / "old.ckpt", weights_only=True)
    student = checkpoint["lightning_dist_config"]["module"]["student"]
    teacher = load_teacher(instantiate(student), weights=tmp_path / "old.ckpt", ema=ema)
    (line,) = [x.getMessage() for x in caplog.records if "has no card" in x.getMessage()]
    assert (
        f"old.ckpt has no card, because an earlier version wrote it. Assumed: the {weights}" in line
    )
    prefix = "student." if ema is False else "student_ema.module."
    for name, value in teacher.network.state_dict().items():
        assert torch.equal(value, checkpoint["state_dict"][prefix + name])
