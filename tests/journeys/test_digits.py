"""Journeys of an ensemble whose outputs are cached."""

import pytest
import torch

from journeys import LAST, QUIET, assert_same, metrics, run_in, student_state
from lightning_dist.data.digits import DigitsDataModule
from lightning_dist.models.small import SmallCNN
from lightning_dist.teacher.loading import load_teacher

DIGITS = [
    *("data.train_size=256", "data.global_batch_size=64", "data.augment=true", "optimizer.lr=0.3"),
    *("trainer.max_epochs=3", *QUIET),
]
DIGITS_TEACHER = [
    *(*DIGITS, "distill=none", "student.channels=[8,16]", "data.mean=[0.1]", "data.std=[0.6]"),
    *("callbacks=[default,ema]", "callbacks.ema.decay=0.9", "monitor=val/ema_accuracy"),
]
ENSEMBLE = """
_target_: lightning_dist.teacher.EnsembleTeacher
teachers:
  - _target_: lightning_dist.teacher.Teacher
    weights: pkg://lightning_dist/assets/digits_teacher.safetensors
    network: {_target_: lightning_dist.models.small.SmallCNN, channels: [32, 64, 128]}
  - _target_: lightning_dist.teacher.Teacher
    weights: teacher/checkpoints/last.ckpt
    network: {_target_: lightning_dist.models.small.SmallCNN, channels: [8, 16]}
"""
FROM_ENSEMBLE = [
    *(*DIGITS, "teacher=ensemble", "distill=kd", "test_teacher=true"),
    *("data.mean=[0.4]", "data.std=[0.2]", "distill.cache_dtype=float32", "--config-dir=conf"),
]
CACHED = ["distill.cache=cache", *FROM_ENSEMBLE]


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Train a teacher of digits, and a student of two teachers whose outputs are cached."""
    folder = tmp_path_factory.mktemp("digits")
    (folder / "conf/teacher").mkdir(parents=True)
    (folder / "conf/teacher/ensemble.yaml").write_text(ENSEMBLE)
    with pytest.MonkeyPatch.context() as patch:
        run_in(folder, patch, "train", *DIGITS_TEACHER, "hydra.run.dir=teacher")
        run_in(folder, patch, "train", "hydra.run.dir=whole", *CACHED)
    return folder


def test_each_member_of_an_ensemble_gets_the_images_of_its_own_run(digits):
    """The two members and the student all have different normalisations."""
    files = ("pkg://lightning_dist/assets/digits_teacher.safetensors", digits / LAST)
    networks = (SmallCNN([32, 64, 128]), SmallCNN([8, 16]))
    facts = ({}, {"mean": (0.1,), "std": (0.6,)})
    probabilities = []
    for file, network, own in zip(files, networks, facts, strict=True):
        images, labels = next(iter(DigitsDataModule(**own, eval_batch_size=512).test_dataloader()))
        probabilities.append(load_teacher(network, weights=file)(images).softmax(1))
    mean = sum(probabilities) / 2
    found = metrics(digits / "whole")
    expected = torch.nn.functional.nll_loss(mean.log(), labels)
    assert found["teacher/loss"] == pytest.approx(float(expected), rel=1e-4)
    alone = torch.nn.functional.nll_loss(probabilities[1].log(), labels)
    assert float(alone) == pytest.approx(metrics(digits / "teacher")["test/ema_loss"], rel=1e-4)


def test_a_cached_ensemble_teaches_as_the_ensemble_itself(digits, monkeypatch):
    run_in(digits, monkeypatch, "train", "hydra.run.dir=live", *FROM_ENSEMBLE)
    cached, live = (student_state(digits / name) for name in ("whole", "live"))
    torch.testing.assert_close(cached, live, rtol=1e-4, atol=1e-4)


def test_a_run_from_a_cached_ensemble_goes_on_as_the_whole_run(digits, monkeypatch):
    begin = ["hydra.run.dir=continued", *CACHED]
    run_in(digits, monkeypatch, "train", "trainer.max_steps=4", *begin)
    run_in(digits, monkeypatch, "train", "ckpt_path=last", *begin)
    assert_same(digits / "continued", digits / "whole")
