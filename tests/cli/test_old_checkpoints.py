"""Tests that the commands can read a checkpoint that the code of an earlier commit wrote."""

import csv
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

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
