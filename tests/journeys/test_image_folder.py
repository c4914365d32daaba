"""Journeys of a network for a folder of images: as a teacher, in `eval`, `predict` and exports."""

import csv
import logging
import runpy
import shutil
import sys

import numpy as np
import pytest
import torch

from journeys import CKPT, IMAGES, LAST, NAMES, OWN, PIXELS, TEACHER, metrics, write_images
from lightning_dist.cli.run.checkpoint_card import MatchData
from lightning_dist.data.image_folder import ImageFolderDataModule
from lightning_dist.files.card import Card
from lightning_dist.files.card_files import read_card
from lightning_dist.teacher.loading import load_teacher


def test_the_card_of_a_run_names_images_classes_and_weights(journey):
    card = read_card(journey / "teacher/checkpoints/last.ckpt")
    assert (card.task, card.size, card.crop_mode, card.crop_pct, card.interpolation) == (
        *("classification", (48, 48), "center", 0.8, "bicubic"),
    )
    assert (list(card.mean), list(card.std), card.channels) == (*PIXELS.values(), "rgb")
    assert (list(card.class_names), card.num_classes) == (NAMES, 3)
    assert (card.averaged, card.precision, card.metric) == (True, "bf16-mixed", "val/ema_loss")
    assert card.source == "teacher"


def test_an_own_teacher_does_in_its_place_what_it_did_in_its_run(run, own, tmp_path, caplog):
    """The student has another normalisation.

    The teacher gets images in its own normalisation, and uses its averaged weights.
    """
    teacher = ["teacher=timm", "teacher.source=test_resnet"]
    weights = "teacher.weights=teacher/checkpoints/last.ckpt"
    # Hydra removes the handlers of the root logger.
    lightning = logging.getLogger("lightning.pytorch")
    lightning.addHandler(caplog.handler)
    run("train", *OWN, *teacher, weights, "test_teacher=true", "hydra.run.dir=student")
    lightning.removeHandler(caplog.handler)
    found = metrics(tmp_path / "student")
    assert found["teacher/loss"] == pytest.approx(own["test/ema_loss"], rel=5e-3)
    assert found["teacher/loss"] != pytest.approx(own["test/loss"], rel=2e-2)
    said = "teacher test_resnet, 3 classes, 48 x 48 pixels, mean 0.3 0.4 0.6, std 0.4 0.2 0.3, rgb"
    assert f"{said}, from run teacher, averaged weights" in caplog.text
    assert f"val/loss {found['teacher/loss']:.4g}; in its own run" in caplog.text
    saved = torch.load(tmp_path / "student/checkpoints/last.ckpt", weights_only=True)
    assert not any("teacher" in name for name in saved["state_dict"])


@pytest.mark.parametrize("ema", [True, False])
def test_ema_chooses_the_weights_of_a_teacher(journey, ema):
    checkpoint = journey / "teacher/checkpoints/last.ckpt"
    teacher = load_teacher("test_resnet", weights=checkpoint, num_classes=3, ema=ema)
    saved = torch.load(checkpoint, weights_only=True)["state_dict"]
    prefix = "student_ema.module." if ema else "student."
    assert torch.equal(teacher.network.fc.bias, saved[f"{prefix}fc.bias"])


def test_a_teacher_gives_the_logits_of_its_run_for_the_students_images(journey):
    """The images of the student have another size, and its classes have another order."""
    data = ImageFolderDataModule(root=journey / "images", **IMAGES, mean=(0.5,) * 3, std=(0.2,) * 3)
    plain = ImageFolderDataModule(root=journey / "images", **IMAGES, **PIXELS)
    checkpoint = journey / "teacher/checkpoints/last.ckpt"
    teacher = load_teacher("test_resnet", weights=checkpoint, num_classes=3)
    (images, _), (own_images, _) = (next(iter(x.val_dataloader())) for x in (data, plain))
    own = teacher(own_images)
    data.class_names = ["elk", "cat", "dog"]
    teacher.adapt(data.card())
    assert teacher.class_map == [2, 0, 1]
    torch.testing.assert_close(teacher(images), own[:, [2, 0, 1]], rtol=1e-4, atol=1e-4)
    small = ImageFolderDataModule(root=journey / "images", image_size=24)
    teacher.adapt(small.card())
    assert teacher.inputs.size == (48, 48)


def test_a_teacher_of_other_classes_is_refused_with_both_sides(journey):
    checkpoint = journey / "teacher/checkpoints/last.ckpt"
    teacher = load_teacher("test_resnet", weights=checkpoint, num_classes=3)
    data = ImageFolderDataModule(root=journey / "images", **IMAGES)
    data.class_names = ["cat", "dog", "fox"]
    with pytest.raises(
        ValueError, match="'cat', 'dog', 'elk' and the data has 'cat', 'dog', 'fox'"
    ):
        teacher.adapt(data.card())


def test_eval_gives_the_test_of_the_run(run, own, capsys):
    """The test is in bfloat16, as in the run; the default of eval is float32."""
    run("eval", CKPT, "+data.root=images", "trainer=cpu")
    printed = capsys.readouterr().out
    assert all(str(own[name]) in printed for name in own if name.startswith("test/"))


@pytest.fixture
def renamed(run, tmp_path):
    """Rename a class, so that the order of all classes changes."""
    for split in ("train", "val"):
        (tmp_path / "images" / split / "cat").rename(tmp_path / "images" / split / "zebra")


def test_eval_refuses_a_renamed_class(renamed, run, capsys):
    with pytest.raises(SystemExit):
        run("eval", CKPT, "+data.root=images", "trainer=cpu")
    assert "'cat', 'dog', 'elk' and the data has 'dog', 'elk', 'zebra'" in capsys.readouterr().err


def test_a_run_that_goes_on_with_another_normalisation_is_warned_of(run):
    more = ["trainer.max_epochs=3", f"ckpt_path={LAST}", "data.mean=[0.3,0.4,0.5]"]
    with pytest.warns(UserWarning, match="with mean 0.3, 0.4, 0.6, and the data has 0.3, 0.4, 0.5"):
        run("train", *TEACHER, *more, "hydra.run.dir=again")


def test_eval_refuses_data_without_one_of_the_classes(run, tmp_path, capsys):
    for split in ("train", "val"):
        shutil.rmtree(tmp_path / "images" / split / "cat")
    with pytest.raises(SystemExit):
        run("eval", CKPT, "+data.root=images", "trainer=cpu")
    error = capsys.readouterr().err
    assert "num_classes=3 and the data has 2 classes: test it on data with all its" in error


def test_a_run_does_not_go_on_with_a_renamed_class(renamed, run, capsys):
    more = ["trainer.max_epochs=3", "ckpt_path=teacher/checkpoints/last.ckpt"]
    with pytest.raises(SystemExit):
        run("train", *TEACHER, *more, "hydra.run.dir=again")
    assert "has the classes cat, dog, elk and the data has dog, elk, zebra" in (
        capsys.readouterr().err
    )


def test_eval_follows_classes_of_another_order_and_another_normalisation():
    own = Card(class_names=("cat", "dog"), mean=(0.5,), std=(0.5,), channels="gray", origin="run")
    data = Card(class_names=("dog", "cat"), mean=(0.0,), std=(1.0,), channels="gray")
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 2))
    images = torch.rand(3, 1, 4, 4)
    with torch.no_grad():
        found = MatchData(own).matched(network, data)(images)
        torch.testing.assert_close(found, network((images - 0.5) / 0.5)[:, [1, 0]])


def test_predict_export_and_the_exported_script_agree(run, tmp_path, capsys, monkeypatch):
    """All three use the averaged weights, because the run monitors their metric."""
    run("predict", CKPT, "images=images/val", "out=labels", "trainer=cpu", "trainer.precision=32")
    assert "weights averaged (monitor=val/ema_loss)" in capsys.readouterr().out
    with (tmp_path / "labels/predictions.csv").open() as file:
        rows = {row["image"]: (row["class"], row["probability"]) for row in csv.DictReader(file)}
    run("export", CKPT, "format=timm", "file=exported")
    capsys.readouterr()
    files = [f"images/val/{name}" for name in rows]
    monkeypatch.setattr(sys, "argv", ["predict.py", *files])
    runpy.run_path(str(tmp_path / "exported/predict.py"), run_name="__main__")
    lines = [line.split(",") for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines] == files
    assert [line[1] for line in lines] == [name for name, _ in rows.values()]
    probabilities = [float(p) for _, p in rows.values()]
    np.testing.assert_allclose([float(line[2]) for line in lines], probabilities, atol=2e-4)
    for file in ("labels", "exported"):
        assert read_card(tmp_path / file) == read_card(tmp_path / LAST)


def test_a_student_that_starts_from_a_run_on_other_images_is_warned_of(renamed, run):
    """The data has another normalisation, and a class with another name."""
    with pytest.warns(UserWarning, match="the student starts from teacher") as warnings:
        run("train", *OWN, "distill=none", "student.weights=teacher", "trainer.max_epochs=1")
    found = [
        str(x.message) for x in warnings if "the student starts from teacher" in str(x.message)
    ]
    assert len(found) == 3
    assert "with mean 0.3, 0.4, 0.6, and the data has 0.485, 0.456, 0.406: unless" in found[0]
    assert "with class_names cat, dog, elk, and the data has dog, elk, zebra" in found[2]


def test_an_exported_folder_teaches_as_the_run(run, tmp_path):
    """timm builds the teacher from the exported folder, or only the weight file in it is loaded."""
    run("export", CKPT, "format=timm", "file=exported")
    data = ImageFolderDataModule(root=tmp_path / "images", image_size=24)
    images, _ = next(iter(data.val_dataloader()))
    file = {"weights": tmp_path / "exported/model.safetensors", "num_classes": 3}
    own = load_teacher("test_resnet", weights=tmp_path / LAST, num_classes=3)
    exported = [load_teacher("test_resnet", **file), load_teacher("local-dir:exported")]
    for teacher in (own, *exported):
        teacher.adapt(data.card())
        assert teacher.card == own.card
        torch.testing.assert_close(teacher(images), own(images), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="local-dir:exported have 3 classes and num_classes is 7"):
        load_teacher("local-dir:exported", num_classes=7)


def test_num_classes_unlike_the_datas_is_refused_before_training(run, capsys):
    with pytest.raises(SystemExit):
        run("train", *TEACHER, "num_classes=5", "hydra.run.dir=other")
    assert "num_classes=5 and the data has 3 classes" in capsys.readouterr().err


def test_files_that_a_camera_has_turned_are_upright_everywhere(tmp_path):
    write_images(tmp_path / "upright")
    write_images(tmp_path / "turned", turned=True)
    upright, turned = (
        ImageFolderDataModule(root=tmp_path / name, image_size=24) for name in ("upright", "turned")
    )
    for ours, others in zip(upright.val_dataset(), turned.val_dataset(), strict=True):
        assert torch.equal(ours[0], others[0])


def test_eval_and_predict_name_what_they_convert(run, own, capsys, caplog):
    """The loss is that of the run, whatever the normalisation of the data."""
    pixels = ["+data.mean=[0.5,0.5,0.5]", "+data.std=[0.2,0.2,0.2]"]
    line = "trained with mean 0.3, 0.4, 0.6, and the data has 0.5, 0.5, 0.5; std 0.4, 0.2, 0.3, and"
    with caplog.at_level("WARNING", logger="lightning_dist.cli.run.checkpoint_card"):
        logging.getLogger("lightning_dist").addHandler(caplog.handler)
        run("eval", CKPT, "+data.root=images", "trainer=cpu", *pixels)
        run("predict", CKPT, "images=images/val", "trainer=cpu", *pixels)
        logging.getLogger("lightning_dist").removeHandler(caplog.handler)
    assert sum(line in x.getMessage() for x in caplog.records) >= 2
    printed = capsys.readouterr().out
    (found,) = (x for x in printed.splitlines() if "test/ema_loss" in x)
    assert float(found.strip("│ ").split("│")[1]) == pytest.approx(own["test/ema_loss"], rel=5e-3)
