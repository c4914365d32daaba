"""Settings, data and functions of the tests of whole journeys, from training to prediction.

They test that the facts about a network reach every later command. The settings differ from the
defaults, and the compared numbers are losses or logits, because the smallest difference in the
images changes them.
"""

import csv
import json
import sys

import numpy as np
import torch
from PIL import Image

from lightning_dist import cli

QUIET = ["trainer=cpu", "print_config=false", "callbacks.progress=null", "logger=none"]
NAMES = ["cat", "dog", "elk"]
# No setting has its default value: 48 pixels, a crop of 0.8, bicubic, own mean and std, averaged
# weights that are monitored, bfloat16 and channels_last.
IMAGES = {"image_size": 48, "crop_pct": 0.8, "interpolation": "bicubic"}
PIXELS = {"mean": [0.3, 0.4, 0.6], "std": [0.4, 0.2, 0.3]}
OWN = [
    *("data=image_folder", "data.root=images", "data.num_workers=0", "data.global_batch_size=6"),
    *("num_classes=3", "student=timm", "student.model_name=test_resnet"),
    *("trainer.max_epochs=2", "optimizer.lr=0.1", *QUIET),
    *(f"data.{name}={value}" for name, value in IMAGES.items()),
]
TEACHER = [
    *(*OWN, "distill=none", "callbacks=[default,ema]", "callbacks.ema.decay=0.9"),
    *("monitor=val/ema_loss", "monitor_mode=min"),
    *("trainer.precision=bf16-mixed", "module.channels_last=true"),
    *(f"data.{name}={value}".replace(" ", "") for name, value in PIXELS.items()),
]
LAST = "teacher/checkpoints/last.ckpt"
CKPT = f"ckpt={LAST}"


def write_images(root, names=NAMES, counts=(4, 2), turned=None) -> None:
    """Write images that are not square; ``turned`` rotates them, and sets the EXIF orientation."""
    rng = np.random.default_rng(0)
    for split, count in zip(("train", "val"), counts, strict=True):
        for label, name in enumerate(names):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 60, (50, 81, 3))
                pixels[:, 20 * label : 20 * label + 25, label] += 150
                image, exif = Image.fromarray(pixels.astype("uint8")), Image.Exif()
                if turned:
                    exif[0x0112] = 6  # "turn by 90 degrees clockwise to view"
                    image = image.transpose(Image.Transpose.ROTATE_90)
                image.save(folder / f"{i}.png", exif=exif)


def run_in(folder, monkeypatch, *arguments: str) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["lightning-dist", *arguments])
    cli.main()


def metrics(folder) -> dict[str, float]:
    return json.loads((folder / "result.json").read_text())["metrics"]


def read_predictions(folder) -> dict[str, tuple[str, float]]:
    """Return the class and the probability that ``predict`` wrote for each image."""
    with (folder / "predictions.csv").open() as file:
        return {r["image"]: (r["class"], float(r["probability"])) for r in csv.DictReader(file)}


def assert_predicted(predictions, logits, class_names) -> None:
    """Compare predictions, in the order of their images, with logits."""
    best = logits.softmax(1).max(1)
    assert [name for name, _ in predictions.values()] == [class_names[i] for i in best.indices]
    found = [probability for _, probability in predictions.values()]
    np.testing.assert_allclose(found, best.values, atol=2e-4)


def student_state(run) -> dict[str, torch.Tensor]:
    """Return the student's weights in the last checkpoint of a run."""
    state = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    return {k.removeprefix("student."): v for k, v in state.items() if k.startswith("student.")}


def assert_same(run, other) -> None:
    """Check that all metrics and the student's weights of two runs are equal to the last bit."""
    assert metrics(run) == metrics(other)
    torch.testing.assert_close(student_state(run), student_state(other), rtol=0, atol=0)
