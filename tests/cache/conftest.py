"""Fixtures for the tests of the teacher cache."""

import pytest
import torch

from caching import digits
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
