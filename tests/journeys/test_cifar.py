"""Journeys of CIFAR's files: a teacher, students in a sweep, and their report."""

import csv
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10

from formats import write_cifar
from journeys import (
    CKPT,
    LAST,
    QUIET,
    assert_predicted,
    assert_same,
    metrics,
    read_predictions,
    run_in,
    student_state,
)
from lightning_dist.data.cifar import CIFAR10DataModule
from lightning_dist.files.card_files import read_card
from lightning_dist.models.cifar import resnet8
from lightning_dist.teacher.loading import load_teacher

CIFAR = [
    *("data=cifar10", "data.root=data", "data.num_workers=0", "data.global_batch_size=32"),
    *("data.val_fraction=0.2", "student=cifar/resnet8", "trainer.max_epochs=2", *QUIET),
]
CIFAR_TEACHER = [
    *(*CIFAR, "distill=none", "callbacks=[default,ema]", "callbacks.ema.decay=0.8"),
    *("monitor=val/ema_accuracy", "data.mean=[0.1,0.2,0.3]", "data.std=[0.5,0.4,0.3]"),
    *("module.channels_last=true", "optimizer.lr=0.5"),
]


@pytest.fixture(scope="module")
def cifar(tmp_path_factory):
    """Train a teacher on CIFAR-10's files, then students in a sweep, and return the folder."""
    folder = tmp_path_factory.mktemp("cifar")
    with pytest.MonkeyPatch.context() as patch:
        write_cifar(folder / "data", CIFAR10, patch)
        run_in(folder, patch, "train", *CIFAR_TEACHER, "hydra.run.dir=teacher")
        run_in(folder, patch, "train", "-m", *FROM_CIFAR, *SWEPT, "hydra.sweep.dir=sweep")
        yield folder


FROM_CIFAR = [
    *(*CIFAR, "teacher=cifar/resnet56", "test_teacher=true"),
    "teacher.network._target_=lightning_dist.models.cifar.resnet8",
    "teacher.weights=teacher/checkpoints/last.ckpt",
]
# Jobs 0 and 1 have distill=none; jobs 2 and 3 have dist, with weight 0 and 3.
SWEPT = ["distill=none,dist", "distill.weight=0,3"]


def test_a_teacher_of_cifar_does_in_its_place_what_it_did_in_its_run(cifar):
    own, found = metrics(cifar / "teacher"), metrics(cifar / "sweep/3")
    for name in ("loss", "accuracy"):
        assert found[f"teacher/{name}"] == pytest.approx(own[f"test/ema_{name}"], rel=1e-5)
    assert found["teacher/loss"] != pytest.approx(own["test/loss"], rel=1e-2)


def test_weight_0_trains_as_without_distillation(cifar):
    for job in (1, 2):
        found = metrics(cifar / f"sweep/{job}")
        found = {k: v for k, v in found.items() if not k.startswith("teacher/")}
        assert found == metrics(cifar / "sweep/0")
    none, zero, full = (student_state(cifar / f"sweep/{job}") for job in (0, 2, 3))
    torch.testing.assert_close(zero, none, rtol=0, atol=0)
    assert any(not torch.equal(full[name], none[name]) for name in none)


def test_a_job_of_a_sweep_is_the_single_run(cifar, monkeypatch):
    single = ["distill=dist", "distill.weight=3", "hydra.run.dir=single"]
    run_in(cifar, monkeypatch, "train", *FROM_CIFAR, *single)
    assert_same(cifar / "single", cifar / "sweep/3")


def test_the_report_has_the_results_of_the_runs(cifar):
    with (cifar / "sweep/report.csv").open() as file:
        rows = {Path(row["folder"]).name: row for row in csv.DictReader(file)}
    for job in range(4):
        found = metrics(cifar / f"sweep/{job}")
        assert {name: float(rows[str(job)][name]) for name in found} == found


def test_the_result_names_the_run_of_the_teacher(cifar):
    """The result names the folder, because the checkpoints of all runs have the same file name."""
    result = json.loads((cifar / "sweep/3/result.json").read_text())
    assert result["teacher"] == "cifar/resnet56 (run teacher)"
    names = f"data {result['data']}; student resnet8; teacher {result['teacher']}."
    assert names in (cifar / "sweep/report.html").read_text()


def test_eval_gives_the_test_of_a_swept_run(cifar, monkeypatch, capsys):
    run_in(cifar, monkeypatch, "eval", "ckpt=sweep/3/checkpoints/last.ckpt", "+data.root=data")
    printed, own = capsys.readouterr().out, metrics(cifar / "sweep/3")
    assert all(str(own[name]) in printed for name in own if name.startswith("test/"))


def test_a_network_for_cifar_predicts_files_as_the_exported_and_as_python(cifar, monkeypatch):
    data = CIFAR10DataModule(root=cifar / "data", mean=(0.1, 0.2, 0.3), std=(0.5, 0.4, 0.3))
    (cifar / "files").mkdir()
    for i, pixels in enumerate(CIFAR10(cifar / "data", train=False).data):
        Image.fromarray(pixels).save(cifar / f"files/{i:02}.png")
    run_in(cifar, monkeypatch, "predict", CKPT, "images=files", "out=labels", "trainer=cpu")
    run_in(cifar, monkeypatch, "export", CKPT, "format=torch_export", "file=student.pt2")
    exported = torch.export.load(cifar / "student.pt2").module()
    network = load_teacher(resnet8, weights=cifar / LAST, num_classes=10)
    images, _ = next(iter(data.test_dataloader()))
    logits = network(images)
    torch.testing.assert_close(exported(images), logits, rtol=1e-4, atol=1e-4)
    assert_predicted(read_predictions(cifar / "labels"), logits, data.class_names)
    card = read_card(cifar / "teacher/checkpoints/last.ckpt")
    assert list(card.class_names) == data.class_names
    assert card == read_card(cifar / "labels") == read_card(cifar / "student.pt2")
