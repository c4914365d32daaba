"""Tests of the lines at the start of distillation: what the teacher gets, and how good it is."""

import logging
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_dist import DistillationCallback
from lightning_dist.files.card import Card
from lightning_dist.tasks.classification import ClassificationModule
from lightning_dist.teacher import Teacher
from lightning_dist.training import introduction


class Sorted(TensorDataset):
    """Samples sorted by class, as those of a folder: the first quarter is class 0."""

    def __init__(self, count=400):
        labels = torch.arange(4).repeat_interleave(count // 4)
        super().__init__(nn.functional.one_hot(labels, 4).float(), labels)
        self.read = []

    def __getitem__(self, index):
        self.read.append(index)
        # Draw a number, as a data set with augmentation does.
        torch.rand(1), np.random.rand(), random.random()
        return super().__getitem__(index)


class KnowsClasses(nn.Module):
    """A teacher that predicts only the given classes correctly."""

    def __init__(self, *known: int) -> None:
        super().__init__()
        mask = torch.tensor([float(c in known) for c in range(4)])
        self.scale = nn.Parameter(mask, requires_grad=False)

    def forward(self, x):
        return x * self.scale


def fit(make_trainer, teacher, data=None, **options):
    module = ClassificationModule(nn.Linear(4, 4), teacher, num_classes=4, **options)
    data = data or Sorted()
    trainer = make_trainer(limit_train_batches=1, limit_val_batches=1, num_sanity_val_steps=0)
    trainer.fit(module, DataLoader(Sorted(), 10), DataLoader(data, 10))
    return module


CARD = Card(task="classification", metric="val/ema_accuracy", value=0.9, origin="run", source="r/1")


def test_the_measurement_covers_every_class_of_a_sorted_set(make_trainer, caplog):
    caplog.set_level(logging.INFO)
    fit(make_trainer, Teacher(KnowsClasses(0, 1, 3), card=CARD))
    # The third quarter is wrong: for equal zeros, the predicted class is 0.
    line = "teacher on 256 validation samples: val/accuracy 0.75; in its own run 0.9"
    assert line in caplog.text


def test_a_teacher_far_below_its_own_run_is_warned_of(make_trainer):
    with pytest.warns(UserWarning, match="val/accuracy 0.25; in its own run 0.9"):
        fit(make_trainer, Teacher(KnowsClasses(0), card=CARD))


def test_the_measurement_moves_no_generator_and_no_weight(make_trainer):
    students = []
    for measure in (True, False):
        torch.manual_seed(0), np.random.seed(0), random.seed(0)
        module = fit(make_trainer, KnowsClasses(0, 1, 2, 3), measure_teacher=measure)
        states = torch.rand(1).item(), np.random.rand(), random.random()
        students.append((module.student.weight.tolist(), states))
    assert students[0] == students[1]


class Stream(IterableDataset):
    def __iter__(self):
        return iter([(torch.zeros(4), torch.tensor(0))] * 20)


def test_data_without_an_order_is_not_measured(make_trainer, caplog):
    caplog.set_level(logging.INFO)
    fit(make_trainer, KnowsClasses(0), Stream())
    assert "not measured (no validation data, or data without an order)" in caplog.text


def test_the_measurement_ends_after_its_time(make_trainer, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(introduction, "SECONDS", 0.0)
    fit(make_trainer, KnowsClasses(0, 1, 2, 3))
    assert "teacher on 10 validation samples" in caplog.text


@pytest.mark.parametrize("student_mean", [None, (0.5,)])
def test_the_callback_says_what_the_teacher_is_given_to_any_module(
    make_trainer, caplog, student_mean
):
    """Without a data module, the images' normalisation is unknown, unless the user gives it."""
    from lightning.pytorch.demos.boring_classes import BoringModel

    caplog.set_level(logging.INFO)
    card = Card(num_classes=2, mean=(0.5,), std=(0.1,), averaged=False)
    teacher = Teacher(nn.Linear(32, 2), card=card)
    if student_mean is not None:
        teacher.adapt(Card(mean=student_mean, std=(0.1,)))
    callback = DistillationCallback(teacher, student="layer")
    make_trainer(callbacks=[callback], limit_train_batches=1, limit_val_batches=0).fit(
        BoringModel()
    )
    line = "teacher Linear, 2 classes, mean 0.5, std 0.1, weights that are not averaged"
    unknown = "; the data has no card, so it gets the student's images as they are"
    assert line in caplog.text
    assert (unknown in caplog.text) is (student_mean is None)
