"""Journeys of folders of masks, with two networks."""

import numpy as np
import pytest
import torch
from PIL import Image

from journeys import CKPT, LAST, QUIET, assert_same, metrics, run_in
from lightning_dist.data.segmentation import MaskFolderDataModule
from lightning_dist.files.card_files import read_card
from lightning_dist.models.segmentation import deeplabv3, pspnet
from lightning_dist.teacher.loading import load_teacher

MASKS = [
    *("data=mask_folder", "data.root=masks", "num_classes=3", "data.num_workers=0"),
    *("module=segmentation", "data.crop_size=null", "data.scales=null", "data.eval_size=[24,40]"),
    *("data.reduce_zero_label=true", "data.global_batch_size=2", "optimizer.lr=0.5", *QUIET),
]
TEACHER = [
    *(*MASKS, "distill=none", "data.bgr=true", "trainer.max_epochs=4"),
    *("student=segmentation/deeplabv3_resnet18", "student.backbone=test_resnet"),
    *("student.width=16", "callbacks=[default,ema]", "callbacks.ema.decay=0.5"),
    *("monitor=val/ema_loss", "monitor_mode=min"),
]
STUDENT = [
    *(*MASKS, "student=segmentation/pspnet_resnet18", "student.backbone=test_resnet"),
    *("student.width=16", "student.backbone_weights=backbone.pth", "trainer.max_epochs=2"),
    "optimizer.lr=0.1",
    *("trainer.precision=bf16-mixed", "data.mean=[0.2,0.3,0.4]", "data.std=[0.3,0.2,0.4]"),
    *("teacher=segmentation/deeplabv3_resnet101", "teacher.network.backbone=test_resnet"),
    *("teacher.network.width=16", f"teacher.weights={LAST}", "test_teacher=true"),
]


def write_masks(root) -> None:
    """Write images of 37 x 61 pixels in ADE20K's form: ids from 1 on, and 0 is ignored."""
    rng = np.random.default_rng(0)
    for split in ("training", "validation"):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        for i in range(2):
            mask = np.zeros((37, 61), dtype="uint8")
            for label in range(3):
                mask[2:, 20 * label : 20 * label + 19] = label + 1
            pixels = rng.integers(0, 40, (37, 61, 3)).astype("uint8")
            for label in range(3):
                pixels[mask == label + 1, label] += 200
            Image.fromarray(pixels).save(root / "images" / split / f"{i}.png")
            Image.fromarray(mask).save(root / "annotations" / split / f"{i}.png")


@pytest.fixture(scope="module")
def masks(tmp_path_factory):
    """Train a DeepLabV3 on BGR images, and distil it into a PSPNet on RGB images."""
    folder = tmp_path_factory.mktemp("masks")
    write_masks(folder / "masks")
    backbone = pspnet("test_resnet", num_classes=3).backbone
    torch.save(backbone.state_dict(), folder / "backbone.pth")
    with pytest.MonkeyPatch.context() as patch:
        run_in(folder, patch, "train", *TEACHER, "hydra.run.dir=teacher")
        run_in(folder, patch, "train", *STUDENT, "hydra.run.dir=student")
    return folder


def test_a_teacher_of_masks_does_in_its_place_what_it_did_in_its_run(masks):
    """The student's images have another order of channels, and its run has another precision."""
    own, found = metrics(masks / "teacher"), metrics(masks / "student")
    assert found["teacher/loss"] == pytest.approx(own["test/ema_loss"], rel=5e-3)
    assert found["teacher/loss"] != pytest.approx(own["test/loss"], rel=2e-2)
    card = read_card(masks / "student/checkpoints/last.ckpt")
    assert (card.precision, card.channels) == ("bf16-mixed", "rgb")


@pytest.mark.parametrize("run", ["teacher", "student"])
def test_eval_gives_the_test_of_a_segmentation_run(masks, monkeypatch, capsys, run):
    """The student's run is in bfloat16; the default of eval is float32."""
    ckpt = f"ckpt={run}/checkpoints/last.ckpt"
    run_in(masks, monkeypatch, "eval", ckpt, "+data.root=masks", "trainer=cpu")
    printed, own = capsys.readouterr().out, metrics(masks / run)
    assert all(str(own[name]) in printed for name in own if name.startswith("test/"))


def test_predicted_masks_are_those_of_the_test_with_the_ids_of_the_data(masks, monkeypatch):
    """The network gets images in the size of the evaluation.

    The masks have the size of the pictures, and the ids of the data set.
    """
    source = "images=masks/images/validation"
    run_in(masks, monkeypatch, "predict", CKPT, source, "out=found", "trainer=cpu")
    network = load_teacher(deeplabv3("test_resnet", num_classes=3, width=16), weights=masks / LAST)
    data = MaskFolderDataModule(
        root=masks / "masks", num_classes=3, reduce_zero_label=True, eval_size=(24, 40), bgr=True
    )
    for i, (image, _) in enumerate(data.test_dataset()):
        logits = network(image[None])["out"]
        for size in ((24, 40), (37, 61)):
            logits = torch.nn.functional.interpolate(
                logits, size, mode="bilinear", align_corners=True
            )
        found = np.array(Image.open(masks / f"found/{i}.png"))
        np.testing.assert_array_equal(found, logits[0].argmax(0) + 1)
    card = read_card(masks / "found")
    assert (card.mask_ids, card.channels, card.size) == ((1, 2, 3), "bgr", (24, 40))


def test_a_run_goes_on_without_the_file_of_its_initial_weights(masks, monkeypatch):
    """The checkpoint contains the weights; eval and export need no initial weights either."""
    begin = ["train", *STUDENT, "hydra.run.dir=continued"]
    run_in(masks, monkeypatch, *begin, "trainer.max_epochs=1")
    (masks / "backbone.pth").unlink()
    run_in(masks, monkeypatch, *begin, "ckpt_path=last")
    assert_same(masks / "continued", masks / "student")
    ckpt = "ckpt=continued/checkpoints/last.ckpt"
    run_in(masks, monkeypatch, "eval", ckpt, "+data.root=masks", "trainer=cpu")
    run_in(masks, monkeypatch, "export", ckpt)
