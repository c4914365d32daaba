"""Journeys of a student that learns from images without labels."""

import shutil

import pytest
import timm
import torch
from PIL import Image

from journeys import (
    IMAGES,
    NAMES,
    PIXELS,
    QUIET,
    metrics,
    read_predictions,
    run_in,
    write_images,
)
from lightning_dist.data.unlabeled_folder import UnlabeledFolderDataModule
from lightning_dist.files.card_files import read_card
from lightning_dist.files.weights import load_weights

RUN = [
    *("student=timm", "student.model_name=test_resnet", "optimizer.lr=0.05", *QUIET),
    *("data.num_workers=0", "data.global_batch_size=8", "trainer.max_epochs=2"),
    *(f"data.{name}={value}" for name, value in IMAGES.items()),
    *(f"data.{name}={value}".replace(" ", "") for name, value in PIXELS.items()),
]
UNLABELED = [
    *("data=unlabeled", "data.root=images/train", "data.val_fraction=0.5", *RUN),
    *("teacher=timm", "teacher.source=test_resnet", "teacher.weights=teacher"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Train a teacher, and distil it into a student without any label."""
    folder = tmp_path_factory.mktemp("unlabeled")
    write_images(folder / "images", counts=(8, 2))
    with pytest.MonkeyPatch.context() as patch:
        labeled = ["data=image_folder", "data.root=images", "num_classes=3", "distill=none", *RUN]
        run_in(folder, patch, "train", *labeled, "hydra.run.dir=teacher")
        run_in(folder, patch, "train", *UNLABELED, "hydra.run.dir=student")
    return folder


@pytest.fixture
def run(folder, monkeypatch):
    return lambda *arguments: run_in(folder, monkeypatch, *arguments)


@pytest.fixture
def refused(run, capsys):
    """Return a function that runs a command that is refused, and returns its error in one line."""

    def refused(*arguments: str) -> str:
        with pytest.raises(SystemExit):
            run(*arguments)
        return capsys.readouterr().err.splitlines()[-1]

    return refused


def network(file):
    network = timm.create_model("test_resnet", num_classes=3)
    load_weights(network, file)
    return network.eval()


def test_held_out_images_show_how_well_the_student_follows_its_teacher(folder):
    images = folder / "images" / "train"
    data = UnlabeledFolderDataModule(root=images, val_fraction=0.5, **IMAGES, **PIXELS)
    inputs, _ = next(iter(data.val_dataloader()))
    assert len(inputs) == 12
    with torch.no_grad():
        student = network(folder / "student/checkpoints/last.ckpt")(inputs).argmax(1)
        teacher = network(folder / "teacher/checkpoints/last.ckpt")(inputs).argmax(1)
    found = metrics(folder / "student")
    assert found["test/agreement"] == pytest.approx((student == teacher).float().mean().item())
    names = {"agreement", "inter_class_correlation", "intra_class_correlation"}
    assert found.keys() == {f"{split}/{name}" for split in ("val", "test") for name in names}


def test_the_student_has_the_classes_of_its_teacher(folder, run):
    card = read_card(folder / "student/checkpoints/best.ckpt")
    assert (card.num_classes, card.class_names) == (3, tuple(NAMES))
    assert card.metric == "val/agreement"
    checkpoint = f"ckpt={folder / 'student/checkpoints/best.ckpt'}"
    run("predict", checkpoint, "images=images/val", "out=predictions", "trainer=cpu")
    assert {name for name, _ in read_predictions(folder / "predictions").values()} <= {*NAMES}
    run("export", checkpoint, "file=student.safetensors")
    assert read_card(folder / "student.safetensors").class_names == tuple(NAMES)


def test_eval_needs_labelled_images(folder, run, refused, capsys):
    checkpoint = "ckpt=student/checkpoints/last.ckpt"
    given = [checkpoint, "+data.root=images/train", "trainer=cpu"]
    assert "+data.val_root=DIR" in refused("eval", *given)
    run("eval", *given, "+data.val_root=images/val")
    assert "test/accuracy" in capsys.readouterr().out


def test_labelled_validation_images_give_an_accuracy_of_the_classes_that_they_have(folder, run):
    """The teacher has three classes, and the folder has two of them in another position."""
    for name in NAMES[1:]:
        shutil.copytree(folder / "images/val" / name, folder / "some" / name)
    run("train", *UNLABELED, "data.val_root=some", "test_teacher=true", "hydra.run.dir=both")
    found = metrics(folder / "both")
    assert {"val/accuracy", "val/loss", "val/agreement"} <= found.keys()
    assert read_card(folder / "both/checkpoints/last.ckpt").class_names == tuple(NAMES[1:])
    correct = 0
    data = UnlabeledFolderDataModule(
        root=folder / "images/train", val_root=folder / "some", **IMAGES, **PIXELS
    )
    with torch.no_grad():
        for inputs, labels in data.val_dataloader():
            logits = network(folder / "teacher/checkpoints/last.ckpt")(inputs)[:, 1:]
            correct += int((logits.argmax(1) == labels).sum())
    assert found["teacher/accuracy"] == pytest.approx(correct / 4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["distill=none"], "only a teacher can teach"),
        (["distill=none", "num_classes=3"], "give a teacher"),
        ([], "only a teacher can teach"),
        (["teacher.weights=plain.pth"], "set num_classes"),
        (["data.val_root=other"], "was trained on the classes 'cat', 'dog', 'elk'"),
        (["~module.teacher_metrics", "monitor=val/accuracy"], "no teacher to compare"),
    ],
)
def test_a_run_that_has_nothing_to_learn_or_to_measure_is_refused(
    folder, refused, settings, message
):
    torch.save(timm.create_model("test_resnet", num_classes=3).state_dict(), folder / "plain.pth")
    for name in ("bird", "cat"):
        (folder / "other" / name).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40)).save(folder / "other" / name / "0.png")
    given = UNLABELED if settings else UNLABELED[:-3]  # without the teacher
    assert message in refused("train", *given, *settings, "hydra.run.dir=refused")
