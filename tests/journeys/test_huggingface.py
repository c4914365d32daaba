"""Journeys of a Hugging Face data set, with a student of torchvision."""

import pytest
import torch
import torchvision
from safetensors.torch import load_file

from journeys import IMAGES, PIXELS, QUIET, assert_predicted, metrics, read_predictions
from lightning_dist.data.huggingface import HuggingFaceDataModule
from lightning_dist.files.card_files import read_card
from lightning_dist.teacher.loading import load_teacher

HUGGING_FACE = [
    *("data=huggingface", "data.path=pets", "data.num_workers=0", "data.global_batch_size=6"),
    *("num_classes=3", "student=cifar/resnet8", "trainer.max_epochs=2"),
    "student._target_=torchvision.models.shufflenet_v2_x0_5",
    *("teacher=timm", "teacher.source=test_resnet", "test_teacher=true"),
    *("teacher.weights=teacher/checkpoints/last.ckpt", "distill=kd", "optimizer.lr=0.1"),
    *(f"data.{name}={value}" for name, value in IMAGES.items()),
    *QUIET,
]
OTHER_ORDER = ["elk", "dog", "cat"]


@pytest.fixture
def pets(run, tmp_path, monkeypatch):
    """Write the folder's files as a Hugging Face data set, with its classes in another order."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets", reason="needs lightning-dist[datasets]")
    label = datasets.ClassLabel(names=OTHER_ORDER)
    features = datasets.Features({"image": datasets.Image(), "label": label})
    splits = {}
    for split, folder in (("train", "train"), ("validation", "val")):
        files = sorted((tmp_path / "images" / folder).rglob("*.png"))
        rows = {"image": list(map(str, files)), "label": [file.parent.name for file in files]}
        splits[split] = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "pets")
    return run


def test_a_torchvision_student_of_a_hugging_face_set(pets, own, tmp_path, capsys):
    """The teacher was trained on a folder, in which the classes have another order."""
    pets("train", *HUGGING_FACE, "hydra.run.dir=run")
    found = metrics(tmp_path / "run")
    assert found["teacher/loss"] == pytest.approx(own["test/ema_loss"], rel=5e-3)
    capsys.readouterr()
    ckpt = "ckpt=run/checkpoints/last.ckpt"
    pets("eval", ckpt, "+data.path=pets", "trainer=cpu")
    printed = capsys.readouterr().out
    assert all(str(found[name]) in printed for name in found if name.startswith("test/"))
    pets("predict", ckpt, "images=images/val", "out=labels", "trainer=cpu")
    pets("export", ckpt, "file=student.safetensors")
    student = torchvision.models.shufflenet_v2_x0_5(num_classes=3).eval()
    student.load_state_dict(load_file(tmp_path / "student.safetensors"))
    data = HuggingFaceDataModule(path=str(tmp_path / "pets"), **IMAGES)
    images = torch.stack([image for image, _ in data.val_dataset()])
    with torch.no_grad():
        assert_predicted(read_predictions(tmp_path / "labels"), student(images), OTHER_ORDER)
    for file in ("run/checkpoints/last.ckpt", "labels", "student.safetensors"):
        assert list(read_card(tmp_path / file).class_names) == OTHER_ORDER
    # The images that torchvision names for this network have 224 pixels.
    name = "torchvision/shufflenet_v2_x0_5"
    checkpoint = tmp_path / "run/checkpoints/last.ckpt"
    teacher = load_teacher(name, weights=checkpoint, num_classes=3)
    others = HuggingFaceDataModule(path=str(tmp_path / "pets"), **IMAGES, **PIXELS)
    teacher.adapt(others.card())
    with torch.no_grad():
        found = teacher(torch.stack([image for image, _ in others.val_dataset()]))
        torch.testing.assert_close(found, student(images), rtol=1e-4, atol=1e-4)
