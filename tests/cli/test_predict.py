"""Tests of predictions as files and pictures, from ``predict`` and from the loggers' callback."""

import csv
import json
import re
import time

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from PIL import Image

from lightning_dist.data.scenes import ScenesDataModule
from lightning_dist.files.weights import load_weights
from lightning_dist.models.detection import small_retinanet
from lightning_dist.models.small import SmallUNet
from lightning_dist.tasks.drawing import LogSegmentations, box_image, class_palette, mask_image
from lightning_dist.tasks.segmentation import SegmentationModule

QUICK = ["trainer=cpu", "trainer.max_epochs=1", "print_config=false", "callbacks.progress=null"]
SCENES = [
    *("experiment=scenes/segmentation", "distill=none", *QUICK),
    *("data.train_size=16", "data.val_size=4", "data.test_size=4", "hydra.run.dir=run"),
]
CKPT = "ckpt=run/checkpoints/last.ckpt"


@pytest.fixture
def images(tmp_path):
    """Write a folder of images of two sizes."""
    data = ScenesDataModule()
    for name, size in (("one", (48, 64)), ("deep/two", (40, 56))):
        path = tmp_path / "images" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = data.scene("test", 0).image[:, : size[0], : size[1]]
        Image.fromarray(pixels.movedim(0, 2).numpy()).save(path)
    return tmp_path / "images"


@pytest.mark.slow
def test_segmentation_writes_a_colour_png_of_classes_for_each_image(command, tmp_path, images):
    command("train", *SCENES)
    command("predict", CKPT, f"images={images}", "out=masks", "trainer=cpu")
    files = {str(path.relative_to(tmp_path / "masks")) for path in tmp_path.rglob("masks/**/*.png")}
    assert files == {"one.png", "deep/two.png"}
    saved = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    student = SmallUNet([8, 16, 24, 32], num_classes=11).eval()
    student.load_state_dict({k.removeprefix("student."): v for k, v in saved.items()})
    for name in files:
        pixels = torch.from_numpy(np.array(Image.open(images / name))).movedim(2, 0)
        with torch.no_grad():
            logits = student((pixels[None] / 255 - 0.5) / 0.25)
        logits = torch.nn.functional.interpolate(
            logits, pixels.shape[1:], mode="bilinear", align_corners=True
        )
        mask = Image.open(tmp_path / "masks" / name)
        assert mask.mode == "P"
        np.testing.assert_array_equal(np.array(mask), logits.argmax(1)[0])
        colours = np.array(mask.convert("RGB"))
        assert (colours[np.array(mask) == 0] == 0).all(), "the background is black"


@pytest.mark.slow
def test_classification_writes_a_table(command, tmp_path, images):
    command("train", "experiment=digits", *QUICK, "hydra.run.dir=run")
    command("predict", CKPT, f"images={images}", "trainer=cpu")
    with (tmp_path / "predictions" / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == ["deep/two.png", "one.png"]
    assert all(row["class"] in map(str, range(10)) for row in rows)
    assert all(0.1 <= float(row["probability"]) <= 1 for row in rows)


@pytest.mark.slow
def test_detection_draws_boxes_and_lists_them(command, tmp_path, images):
    sizes = ["data.train_size=16", "data.val_size=4", "data.test_size=4", "hydra.run.dir=run"]
    command("train", "experiment=scenes/detection_retinanet_teacher", *QUICK, *sizes)
    student = small_retinanet([32, 64, 96], 64, num_classes=10, image_size=48).eval()
    load_weights(student, "pkg://lightning_dist/assets/scenes_retinanet_teacher.safetensors")
    checkpoint = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    checkpoint["state_dict"] = {f"student.{k}": v for k, v in student.state_dict().items()}
    torch.save(checkpoint, tmp_path / "run/checkpoints/last.ckpt")
    command("predict", CKPT, f"images={images}", "out=boxes", "trainer=cpu")
    found = json.loads((tmp_path / "boxes" / "predictions.json").read_text())
    for name in ("one", "deep/two"):
        pixels = torch.from_numpy(np.array(Image.open(images / f"{name}.png"))).movedim(2, 0)
        with torch.no_grad():
            (expected,) = student([pixels / 255])
        assert len(expected["boxes"]) > 0
        own = [one for one in found if one["image"] == name]
        np.testing.assert_allclose([one["box"] for one in own], expected["boxes"], rtol=1e-4)
        assert [int(one["class"]) for one in own] == expected["labels"].tolist()
        assert Image.open(tmp_path / "boxes" / f"{name}.png").size == pixels.shape[:0:-1]


def test_boxes_are_drawn_where_the_score_is_high():
    image = torch.zeros(3, 40, 100, dtype=torch.uint8)
    boxes = torch.tensor([[5.0, 15.0, 25.0, 30.0], [70.0, 15.0, 90.0, 30.0]])
    found = {"boxes": boxes, "labels": torch.tensor([1, 2]), "scores": torch.tensor([0.9, 0.2])}
    drawn = np.array(box_image(image, found, ["cat", "dog"]))
    assert drawn[15:31, 5].any(axis=1).all()
    assert not drawn[:, 70:].any()


def test_a_long_name_of_a_class_is_cut_in_a_picture():
    """Drawing 900,000 characters takes minutes."""
    found = {"boxes": torch.tensor([[1.0, 1, 9, 9]]), "labels": torch.tensor([0])}
    found["scores"] = torch.ones(1)
    image = torch.zeros(3, 16, 16, dtype=torch.uint8)
    begin = time.process_time()
    assert box_image(image, found, ["x" * 900_000 + "\x1b[2J"]).size == (16, 16)
    assert time.process_time() - begin < 5


@pytest.mark.slow
def test_predict_refuses_what_it_cannot_read(command, refused, tmp_path, images):
    command("train", *SCENES)
    assert "images=nowhere does not exist" in refused("predict", CKPT, "images=nowhere")
    (tmp_path / "empty").mkdir()
    assert "images=empty holds no images" in refused("predict", CKPT, "images=empty")
    (images / "one.jpg").write_bytes((images / "one.png").read_bytes())
    message = refused("predict", CKPT, f"images={images}")
    assert re.search(r"one\.jpg and .*one\.png would have one prediction", message)
    (images / "one.png").unlink()
    (images / "one.jpg").write_bytes(b"no image")
    message = refused("predict", CKPT, f"images={images}", "trainer=cpu")
    assert re.search(r"1 of 2 images cannot be read and have no prediction: .*one\.jpg", message)
    files = [path.name for path in (tmp_path / "predictions").rglob("*.png")]
    assert files == ["two.png"], "the other image is predicted all the same"


def test_a_mask_keeps_its_labels_and_has_the_colours_of_the_classes():
    labels = torch.tensor([[0, 1], [2, 255]])
    image = mask_image(labels, class_palette(3, [(1, 2, 3), (4, 5, 6), (7, 8, 9)]))
    np.testing.assert_array_equal(np.array(image), labels)
    expected = [[(1, 2, 3), (4, 5, 6)], [(7, 8, 9), (255, 255, 255)]]
    np.testing.assert_array_equal(np.array(image.convert("RGB")), expected)


def test_chosen_colours_all_differ():
    assert len(set(class_palette(150))) == 151


class Pictures(Logger):
    """A logger that stores the images that it gets."""

    name = version = "pictures"

    def __init__(self) -> None:
        self.given = []

    def log_image(self, key, images, step):
        self.given.append((key, images, step))

    def log_metrics(self, metrics, step):
        pass

    def log_hyperparams(self, params):
        pass


def test_samples_go_to_the_logger_or_a_file_every_so_many_epochs(make_trainer, tmp_path):
    data = ScenesDataModule(
        train_size=4, val_size=4, global_batch_size=2, eval_batch_size=3, scene_size=32
    )
    pictures, table = Pictures(), CSVLogger(tmp_path)
    module = SegmentationModule(SmallUNet([4, 8], num_classes=11), num_classes=11)
    callback = LogSegmentations(every_n_epochs=2, count=2)
    trainer = make_trainer(max_epochs=5, logger=[pictures, table], callbacks=[callback])
    trainer.fit(module, data)
    assert [(key, step) for key, _, step in pictures.given] == [
        ("val/samples", 4),
        ("val/samples", 8),
    ]
    ((_, (picture,), _), _) = pictures.given
    assert picture.shape == (64, 96, 3)
    scene = data.scene("val", 1)
    np.testing.assert_array_equal(picture[32:, :32], scene.image.movedim(0, 2))
    colours = np.array(class_palette(11))[scene.mask]
    np.testing.assert_array_equal(picture[32:, 32:64], colours)
    files = sorted(path.name for path in tmp_path.rglob("samples/*.png"))
    assert files == ["epoch-1.png", "epoch-3.png"]


def test_tensorboard_gets_samples(make_trainer, tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    data = ScenesDataModule(train_size=2, val_size=2, global_batch_size=2, scene_size=32)
    module = SegmentationModule(SmallUNet([4, 8], num_classes=11), num_classes=11)
    logger = TensorBoardLogger(tmp_path)
    trainer = make_trainer(logger=logger, callbacks=[LogSegmentations(every_n_epochs=1, count=1)])
    trainer.fit(module, data)
    logger.finalize("success")
    found = events.EventAccumulator(logger.log_dir, {"images": 0}).Reload()
    (image,) = found.Images("val/samples")
    assert (image.width, image.height) == (96, 32)


def test_samples_of_no_images_are_refused():
    with pytest.raises(ValueError, match="at least 1"):
        LogSegmentations(every_n_epochs=0)
