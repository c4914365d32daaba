"""Tests of ``student.weights``: runs whose student starts from a file or from another run."""

import logging

import pytest
import timm
import torch
from PIL import Image
from torchvision.models import WeightsEnum, resnet18

from composition import composed
from lightning_dist.cli.run.saved_config import CONFIG_KEY
from lightning_dist.cli.train import _build_module

RUN = [
    *("train", "data=image_folder", "data.root=images", "data.image_size=32", "distill=none"),
    *("student=timm", "student.model_name=test_resnet", "optimizer.lr=0", "trainer.max_epochs=1"),
    *("data.num_workers=0", "data.global_batch_size=6", "trainer=cpu", "logger=none"),
    *("print_config=false", "callbacks.progress=null", "num_classes=3"),
]


@pytest.fixture
def images(tmp_path):
    for split in ("train", "val"):
        for label in range(3):
            folder = tmp_path / "images" / split / f"class{label}"
            folder.mkdir(parents=True)
            for index in range(2):
                Image.new("RGB", (40, 40), (80 * label, 0, 99 * index)).save(
                    folder / f"{index}.png"
                )
    return tmp_path / "images"


def weights_of(run):
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def test_a_student_starts_from_a_file_and_another_from_its_run(images, command, tmp_path, caplog):
    torch.manual_seed(7)
    pretrained = timm.create_model("test_resnet", num_classes=11)
    torch.save(pretrained.state_dict(), "pretrained.pth")
    with caplog.at_level(logging.INFO):
        command(*RUN, "student.weights=pretrained.pth", "hydra.run.dir=first")
    assert "starts from pretrained.pth, except the new layer fc" in caplog.text
    first = weights_of(tmp_path / "first")
    assert torch.equal(first["student.conv1.0.weight"], pretrained.conv1[0].weight)
    assert first["student.fc.weight"].shape[0] == 3
    caplog.clear()
    with caplog.at_level(logging.INFO):
        command(*RUN, "student.weights=first", "seed=5", "hydra.run.dir=second")
    assert "starts from first/checkpoints/last.ckpt" in caplog.text
    assert "except" not in caplog.text
    assert torch.equal(
        weights_of(tmp_path / "second")["student.fc.weight"], first["student.fc.weight"]
    )


def test_a_run_needs_its_first_weights_only_once(images, command, tmp_path, capsys):
    torch.save(timm.create_model("test_resnet", num_classes=3).state_dict(), "gone.pth")
    command(*RUN, "student.weights=gone.pth", "hydra.run.dir=run")
    (tmp_path / "gone.pth").unlink()
    more = ["trainer.max_epochs=2", "hydra.run.dir=run", "ckpt_path=last"]
    command(*RUN, "student.weights=gone.pth", *more)
    saved = torch.load("run/checkpoints/last.ckpt", weights_only=True)
    assert saved["epoch"] == 1
    assert "weights" not in saved[CONFIG_KEY]["module"]["student"]
    command("eval", "ckpt=run/checkpoints/last.ckpt", "+data.root=images", "trainer=cpu")


def test_weights_of_another_network_are_refused_by_their_names(images, refused):
    torch.save(resnet18(num_classes=3).state_dict(), "other.pth")
    assert "28 missing: conv1.0.weight" in refused(*RUN, "student.weights=other.pth")
    assert "there is no weight file none.pth" in refused(*RUN, "student.weights=none.pth")
    assert "there is no weight file images" in refused(*RUN, "student.weights=images")


def test_the_teacher_of_a_resumed_run_has_its_own_pretrained_weights(monkeypatch):
    torch.manual_seed(7)
    pretrained = resnet18(num_classes=1000).state_dict()
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda *_, **__: pretrained)
    config = composed(
        *("data=cifar10", "teacher=timm", "teacher.source=torchvision/resnet18"),
        *("teacher.num_classes=null", "teacher.class_map=[0,1,2,3,4,5,6,7,8,9]"),
    )
    teacher = _build_module(config, is_resumed=True).teacher.network
    assert torch.equal(teacher.state_dict()["conv1.weight"], pretrained["conv1.weight"])
