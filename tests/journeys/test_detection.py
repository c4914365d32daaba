"""Journeys of detectors, on files in YOLO's and COCO's format."""

import json

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file

from formats import write_yolo
from journeys import CKPT, LAST, QUIET, metrics, run_in
from lightning_dist.files.card_files import read_card
from lightning_dist.models.detection import small_retinanet

RETINANET = {"channels": [8, 16, 24], "out_channels": 16, "image_size": 37}
SETTINGS = [
    *("module=detection", "num_classes=2", "data.num_workers=0", "data.global_batch_size=8"),
    *("student=small_retinanet", "optimizer=adamw", "optimizer.lr=0.02", *QUIET),
    *(f"student.{name}={value}" for name, value in RETINANET.items()),
]
TEACHER = [
    *(
        *SETTINGS,
        "data=coco",
        "data.root=coco",
        "distill=none",
        "callbacks=[default,ema]",
        "callbacks.ema.decay=0.5",
    ),
    *("monitor=val/ema_map", "trainer.max_epochs=5", "trainer.check_val_every_n_epoch=5"),
]
STUDENT = [
    *(*SETTINGS, "data=yolo", "data.root=yolo", "data.class_names=[right,left]"),
    *("trainer.max_epochs=1", "test_teacher=true"),
    *("teacher=scenes_retinanet", f"teacher.weights={LAST}"),
    *(f"teacher.network.{name}={x}" for name, x in RETINANET.items()),
]


def boxes_of(split):
    """Yield (name, pixels, side, (x, y)): images of 37 x 61 pixels with one bright box of 20 x 20.

    Side 0 is the left half of the image, and side 1 the right one.
    """
    rng = np.random.default_rng(["train", "val"].index(split))
    for i in range({"train": 64, "val": 4}[split]):
        pixels = rng.integers(0, 60, (37, 61, 3)).astype("uint8")
        left, top = 30 * (i % 2) + int(rng.integers(0, 8)), int(rng.integers(0, 16))
        pixels[top : top + 20, left : left + 20] += 180
        yield f"{i:02}", pixels, i % 2, (left, top)


def write_in_yolos_format(root) -> None:
    """Write the images; a box on the right has class 0, and a box on the left has class 1."""
    for split in ("train", "val"):
        for name, pixels, side, (left, top) in boxes_of(split):
            place = (left + 10) / 61, (top + 10) / 37, 20 / 61, 20 / 37
            write_yolo(root, split, name, pixels, " ".join(map(str, (1 - side, *place))))


def write_in_cocos_format(root, ids) -> None:
    """Write the images; ``ids`` are the category ids of a box on the left and on the right."""
    for split in ("train", "val"):
        folder = root / f"{split}2017"
        folder.mkdir(parents=True)
        images, annotations = [], []
        for name, pixels, side, corner in boxes_of(split):
            Image.fromarray(pixels).save(folder / f"{name}.png")
            images.append({"id": 100 + int(name), "file_name": f"{name}.png"})
            box = {"image_id": 100 + int(name), "id": int(name), "iscrowd": 0, "area": 400.0}
            annotations.append({**box, "category_id": ids[side], "bbox": [*corner, 20, 20]})
        categories = [{"id": ids[1], "name": "right"}, {"id": ids[0], "name": "left"}]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / "annotations").mkdir(exist_ok=True)
        (root / f"annotations/instances_{split}2017.json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def boxes(tmp_path_factory):
    """Train a detector on files in COCO's format, and a student of it on files in YOLO's format."""
    folder = tmp_path_factory.mktemp("boxes")
    write_in_yolos_format(folder / "yolo")
    write_in_cocos_format(folder / "coco", (3, 7))
    with pytest.MonkeyPatch.context() as patch:
        run_in(folder, patch, "train", *TEACHER, "hydra.run.dir=teacher")
        run_in(folder, patch, "train", *STUDENT, "hydra.run.dir=student")
    return folder


def test_a_teacher_of_cocos_files_detects_in_its_place_as_in_its_run(boxes):
    """The student's data, in YOLO's format, has the same images but another order of classes."""
    own, found = metrics(boxes / "teacher"), metrics(boxes / "student")
    assert own["test/ema_map"] > 0.02
    assert found["teacher/map"] == pytest.approx(own["test/ema_map"], rel=1e-3)
    assert found["teacher/map"] != pytest.approx(own["test/map"], rel=1e-2)
    assert read_card(boxes / "student/checkpoints/last.ckpt").class_names == ("right", "left")


@pytest.mark.parametrize("data", ["its own", "of another order"])
def test_eval_gives_the_test_of_a_detector(boxes, monkeypatch, capsys, data):
    """If the data has the same classes in another order, eval converts the labels."""
    root = "coco"
    if data == "of another order":
        root = "others"
        write_in_cocos_format(boxes / root, (7, 3))
    run_in(boxes, monkeypatch, "eval", CKPT, f"+data.root={root}", "trainer=cpu")
    printed, own = capsys.readouterr().out, metrics(boxes / "teacher")
    assert all(str(own[name]) in printed for name in own if name.startswith("test/"))


def test_predicted_boxes_are_those_of_the_exported_weights_in_python(boxes, monkeypatch):
    files = "images=coco/val2017"
    run_in(boxes, monkeypatch, "predict", CKPT, files, "out=found", "trainer=cpu")
    run_in(boxes, monkeypatch, "export", CKPT, "file=student.safetensors")
    network = small_retinanet(num_classes=2, **RETINANET).eval()
    network.load_state_dict(load_file(boxes / "student.safetensors"))
    predicted = json.loads((boxes / "found/predictions.json").read_text())
    for name in ("00", "01", "02", "03"):
        image = Image.open(boxes / f"coco/val2017/{name}.png")
        with torch.no_grad():
            (expected,) = network([torchvision.transforms.functional.to_tensor(image)])
        found = [row for row in predicted if row["image"] == name]
        assert found
        assert [x["class"] for x in found] == [("left", "right")[i] for i in expected["labels"]]
        np.testing.assert_allclose([x["box"] for x in found], expected["boxes"], atol=1e-2)
        np.testing.assert_allclose([x["score"] for x in found], expected["scores"], atol=2e-4)
    card = read_card(boxes / LAST)
    assert card.class_names == ("left", "right")
    assert card == read_card(boxes / "found") == read_card(boxes / "student.safetensors")
