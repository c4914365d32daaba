"""Fixtures for the tests of the teacher cache."""

from types import SimpleNamespace

import pytest
import torch

from caching import SAMPLES, TRAINED, digits
from counted import CountedCNN
from lightning_dist import CachedTeacher, Teacher
from lightning_dist.models.small import SmallCNN
from lightning_dist.tasks.classification import ClassificationModule


@pytest.fixture
def train(make_trainer):
    """Return a function that trains a module, by default a student and a teacher on digits."""

    def run(teacher, data=None, module=None, epochs=3, **kwargs):
        if module is None:
            torch.manual_seed(0)
            module = ClassificationModule(SmallCNN([4, 8]), teacher, num_classes=10)
        trainer = make_trainer(max_epochs=epochs, limit_val_batches=0, **kwargs)
        trainer.fit(module, datamodule=data or digits())
        return module

    return run


@pytest.fixture
def counted(tmp_path, monkeypatch):
    """Return two functions: one creates a teacher that counts, one returns its batch sizes."""
    monkeypatch.setenv("COUNTED", str(tmp_path / "counted.txt"))

    def batches() -> list[int]:
        path = tmp_path / "counted.txt"
        sizes = [int(line) for line in path.read_text().split()] if path.exists() else []
        return [size for size in sizes if size != SAMPLES]

    def new() -> CachedTeacher:
        network = Teacher(CountedCNN([32, 64, 128]), TRAINED)
        return CachedTeacher(network, tmp_path / "cache", views=2)

    return SimpleNamespace(teacher=new, batches=batches)
