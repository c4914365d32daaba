"""Tests of whole journeys: what a run learns about its network reaches every later command.

Settings differ from the defaults everywhere, and the compared numbers are losses or logits, which
change with the smallest difference in the images.
"""

import csv
import json
import logging
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from safetensors.torch import load_file
from torchvision.datasets import CIFAR10

from formats import write_cifar, write_yolo
from lightning_dist import cli
from lightning_dist.cli.run.checkpoint_card import MatchData
from lightning_dist.data.cifar import CIFAR10DataModule
from lightning_dist.data.digits import DigitsDataModule
from lightning_dist.data.huggingface import HuggingFaceDataModule
from lightning_dist.data.image_folder import ImageFolderDataModule
from lightning_dist.data.segmentation import MaskFolderDataModule
from lightning_dist.files.card import Card, read_card
from lightning_dist.models.cifar import resnet8
from lightning_dist.models.detection import small_retinanet
from lightning_dist.models.segmentation import deeplabv3
from lightning_dist.models.small import SmallCNN, SmallUNet
from lightning_dist.module import DistillModule
from lightning_dist.resume import ExactResume
from lightning_dist.teacher.loading import load_teacher

QUIET = ["trainer=cpu", "print_config=false", "callbacks.progress=null", "logger=none"]
NAMES = ["cat", "dog", "elk"]
# Nothing here is a default: 48 pixels, a crop of 0.8, bicubic, own mean and std, averaged weights
# that are monitored, bfloat16 and channels_last.
IMAGES = {"image_size": 48, "crop_pct": 0.8, "interpolation": "bicubic"}
PIXELS = {"mean": [0.3, 0.4, 0.6], "std": [0.4, 0.2, 0.3]}
OWN = [
    *("data=image_folder", "data.root=images", "data.num_workers=0", "data.global_batch_size=6"),
    *("num_classes=3", "student=timm", "student.model_name=test_resnet"),
    *("trainer.max_epochs=2", "optimizer.lr=0.1", *QUIET),
    *(f"data.{name}={value}" for name, value in IMAGES.items()),
]
TEACHER = [
    *(*OWN, "distill=none", "callbacks=[default,ema]", "callbacks.ema.decay=0.9"),
    *("monitor=val/ema_loss", "monitor_mode=min"),
    *("trainer.precision=bf16-mixed", "module.channels_last=true"),
    *(f"data.{name}={value}".replace(" ", "") for name, value in PIXELS.items()),
]
LAST = "teacher/checkpoints/last.ckpt"
CKPT = f"ckpt={LAST}"


def write_images(root, names=NAMES, counts=(4, 2), turned=None) -> None:
    """Write oblong images of each class; ``turned`` stores them turned, with an EXIF mark."""
    rng = np.random.default_rng(0)
    for split, count in zip(("train", "val"), counts, strict=True):
        for label, name in enumerate(names):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 60, (50, 81, 3))
                pixels[:, 20 * label : 20 * label + 25, label] += 150
                image, exif = Image.fromarray(pixels.astype("uint8")), Image.Exif()
                if turned:
                    exif[0x0112] = 6  # "turn by 90 degrees clockwise to view"
                    image = image.transpose(Image.Transpose.ROTATE_90)
                image.save(folder / f"{i}.png", exif=exif)


def run_in(folder, monkeypatch, *arguments: str) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["lightning-dist", *arguments])
    cli.main()


@pytest.fixture(scope="module")
def journey(tmp_path_factory):
    """Train a teacher of a folder of images, and return the folder with both."""
    folder = tmp_path_factory.mktemp("journey")
    write_images(folder / "images")
    with pytest.MonkeyPatch.context() as monkeypatch:
        run_in(folder, monkeypatch, "train", *TEACHER, "hydra.run.dir=teacher")
    return folder


@pytest.fixture
def run(journey, tmp_path, monkeypatch):
    """Return a function that runs a command in a copy of the journey's folder."""
    shutil.copytree(journey, tmp_path, dirs_exist_ok=True)

    def run(*arguments: str) -> None:
        run_in(tmp_path, monkeypatch, *arguments)

    return run


@pytest.fixture
def own(journey):
    """Return the metrics of the teacher's own run."""
    return json.loads((journey / "teacher" / "result.json").read_text())["metrics"]


def metrics(folder) -> dict[str, float]:
    return json.loads((folder / "result.json").read_text())["metrics"]


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
    """Its student has other normalisation: the teacher gets its own, and its averaged weights."""
    teacher = ["teacher=timm", "teacher.source=test_resnet"]
    weights = "teacher.weights=teacher/checkpoints/last.ckpt"
    lightning = logging.getLogger("lightning.pytorch")  # Hydra removes the handlers of the root
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
    """The student's images have another size, and its classes another order."""
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
    """In bfloat16, as the run; eval's own default is float32."""
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
    """All use the averaged weights, which the run's monitor names."""
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


MASKS = [
    *("data=mask_folder", "data.root=masks", "num_classes=3", "data.num_workers=0"),
    *("module=segmentation", "distill=none"),
    *("data.crop_size=null", "data.scales=null", "data.eval_size=[24,40]"),
    "data.reduce_zero_label=true",
    *("data.global_batch_size=1", "data.bgr=true", "trainer.max_epochs=3", "optimizer.lr=0.5"),
    *QUIET,
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


def test_predicted_masks_are_those_of_the_test_with_the_ids_of_the_data(tmp_path, monkeypatch):
    """The network sees the size of the evaluation, and the pictures keep their size and ids."""
    write_masks(tmp_path / "masks")
    student = ["student=small_unet", "student.channels=[4,8]", "module.head=head"]
    run_in(tmp_path, monkeypatch, "train", *MASKS, *student, "hydra.run.dir=run")
    ckpt = "ckpt=run/checkpoints/last.ckpt"
    source = "images=masks/images/validation"
    run_in(tmp_path, monkeypatch, "predict", ckpt, source, "out=found", "trainer=cpu")
    checkpoint = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    student = SmallUNet([4, 8], num_classes=3).eval()
    state = {k.removeprefix("student."): v for k, v in checkpoint["state_dict"].items()}
    student.load_state_dict(state)
    data = MaskFolderDataModule(
        root=tmp_path / "masks", num_classes=3, reduce_zero_label=True, eval_size=(24, 40), bgr=True
    )
    for i, (image, _) in enumerate(data.test_dataset()):
        with torch.no_grad():
            logits = student(image[None])
        whole = torch.nn.functional.interpolate(
            logits, (24, 40), mode="bilinear", align_corners=True
        )
        whole = torch.nn.functional.interpolate(
            whole, (37, 61), mode="bilinear", align_corners=True
        )
        found = np.array(Image.open(tmp_path / f"found/{i}.png"))
        np.testing.assert_array_equal(found, whole[0].argmax(0) + 1)
    card = read_card(tmp_path / "found")
    assert (card.mask_ids, card.channels, card.size) == ((1, 2, 3), "bgr", (24, 40))


def read_predictions(folder) -> dict[str, tuple[str, float]]:
    """Return the class and the probability that ``predict`` wrote for each image."""
    with (folder / "predictions.csv").open() as file:
        return {r["image"]: (r["class"], float(r["probability"])) for r in csv.DictReader(file)}


def assert_predicted(predictions, logits, class_names) -> None:
    """Compare predictions, in the order of their images, with logits."""
    best = logits.softmax(1).max(1)
    assert [name for name, _ in predictions.values()] == [class_names[i] for i in best.indices]
    found = [probability for _, probability in predictions.values()]
    np.testing.assert_allclose(found, best.values, atol=2e-4)


def student_state(run) -> dict[str, torch.Tensor]:
    """Return the student's weights in the last checkpoint of a run."""
    state = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    return {k.removeprefix("student."): v for k, v in state.items() if k.startswith("student.")}


def assert_same(run, other) -> None:
    """Compare all metrics and the student's weights of two runs; they are the same to the bit."""
    assert metrics(run) == metrics(other)
    torch.testing.assert_close(student_state(run), student_state(other), rtol=0, atol=0)


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
SWEPT = ["distill=none,dist", "distill.weight=0,3"]  # jobs 0 to 3: none, none, dist and 0, dist


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
    """The files of all runs have the same name."""
    result = json.loads((cifar / "sweep/3/result.json").read_text())
    assert result["teacher"] == "cifar/resnet56 (run teacher)"


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
    """Its teacher has learned a folder's classes, whose order is another one."""
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
    name = "torchvision/shufflenet_v2_x0_5"  # whose own images have 224 pixels
    checkpoint = tmp_path / "run/checkpoints/last.ckpt"
    teacher = load_teacher(name, weights=checkpoint, num_classes=3)
    others = HuggingFaceDataModule(path=str(tmp_path / "pets"), **IMAGES, **PIXELS)
    teacher.adapt(others.card())
    with torch.no_grad():
        found = teacher(torch.stack([image for image, _ in others.val_dataset()]))
        torch.testing.assert_close(found, student(images), rtol=1e-4, atol=1e-4)


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
    """The members and the student have three normalisations."""
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


def test_a_run_goes_on_without_the_file_of_its_initial_weights(tmp_path, monkeypatch):
    """The checkpoint has the weights, for eval and export too."""
    write_masks(tmp_path / "masks")
    backbone = deeplabv3("test_resnet", num_classes=3).backbone
    torch.save(backbone.state_dict(), tmp_path / "backbone.pth")
    student = ["student=segmentation/deeplabv3_resnet18", "student.backbone=test_resnet"]
    student += ["student.backbone_weights=backbone.pth", "data.global_batch_size=2"]
    begin = ["train", *MASKS, *student, "hydra.run.dir=run"]
    run_in(tmp_path, monkeypatch, *begin, "trainer.max_epochs=1")
    (tmp_path / "backbone.pth").unlink()
    run_in(tmp_path, monkeypatch, *begin, "trainer.max_epochs=2", "ckpt_path=last")
    assert torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["epoch"] == 1
    ckpt = "ckpt=run/checkpoints/last.ckpt"
    run_in(tmp_path, monkeypatch, "eval", ckpt, "+data.root=masks", "trainer=cpu")
    run_in(tmp_path, monkeypatch, "export", ckpt)


RETINANET = {"channels": [8, 16, 24], "out_channels": 16, "image_size": 37}
YOLO = [
    *("module=detection", "data=yolo", "data.root=boxes", "data.class_names=[left,right]"),
    *("num_classes=2", "data.num_workers=0", "data.global_batch_size=8"),
    *("student=small_retinanet", "optimizer=adamw", "optimizer.lr=0.02", *QUIET),
    *(f"student.{name}={value}" for name, value in RETINANET.items()),
]
YOLO_TEACHER = [
    *(*YOLO, "distill=none", "callbacks=[default,ema]", "callbacks.ema.decay=0.5"),
    *("monitor=val/ema_map", "trainer.max_epochs=5", "trainer.check_val_every_n_epoch=5"),
]


def write_boxes(root, numbers) -> None:
    """Write images of 37 x 61 pixels; each has one bright box, in its left or its right half.

    ``numbers`` are the class numbers of a left and of a right box.
    """
    rng = np.random.default_rng(0)
    for split, count in (("train", 64), ("val", 4)):
        for i in range(count):
            pixels = rng.integers(0, 60, (37, 61, 3)).astype("uint8")
            left, top = 30 * (i % 2) + int(rng.integers(0, 8)), int(rng.integers(0, 16))
            pixels[top : top + 20, left : left + 20] += 180
            place = (left + 10) / 61, (top + 10) / 37, 20 / 61, 20 / 37
            text = " ".join(map(str, (numbers[i % 2], *place)))
            write_yolo(root, split, f"{i:02}", pixels, text)


@pytest.fixture(scope="module")
def boxes(tmp_path_factory):
    """Train a detector on files in YOLO's format, and return the folder with both."""
    folder = tmp_path_factory.mktemp("boxes")
    write_boxes(folder / "boxes", (0, 1))
    with pytest.MonkeyPatch.context() as patch:
        run_in(folder, patch, "train", *YOLO_TEACHER, "hydra.run.dir=teacher")
    return folder


def test_a_teacher_of_yolos_files_detects_in_its_place_as_in_its_run(boxes, monkeypatch):
    """Its student's data has the same images, and numbers its classes in another order."""
    write_boxes(boxes / "others", (1, 0))
    teacher = [f"teacher.network.{name}={x}" for name, x in RETINANET.items()]
    teacher += ["teacher=scenes_retinanet", f"teacher.weights={LAST}", "test_teacher=true"]
    data = ["data.root=others", "data.class_names=[right,left]", "trainer.max_epochs=1"]
    run_in(boxes, monkeypatch, "train", *YOLO, *teacher, *data, "hydra.run.dir=student")
    own, found = metrics(boxes / "teacher"), metrics(boxes / "student")
    assert own["test/ema_map"] > 0.02
    assert found["teacher/map"] == pytest.approx(own["test/ema_map"], rel=1e-3)
    assert found["teacher/map"] != pytest.approx(own["test/map"], rel=1e-2)


def test_eval_gives_the_test_of_a_detector(boxes, monkeypatch, capsys):
    run_in(boxes, monkeypatch, "eval", CKPT, "+data.root=boxes", "trainer=cpu")
    printed, own = capsys.readouterr().out, metrics(boxes / "teacher")
    assert all(str(own[name]) in printed for name in own if name.startswith("test/"))


def test_predicted_boxes_are_those_of_the_exported_weights_in_python(boxes, monkeypatch):
    files = "images=boxes/images/val"
    run_in(boxes, monkeypatch, "predict", CKPT, files, "out=found", "trainer=cpu")
    run_in(boxes, monkeypatch, "export", CKPT, "file=student.safetensors")
    network = small_retinanet(num_classes=2, **RETINANET).eval()
    network.load_state_dict(load_file(boxes / "student.safetensors"))
    predicted = json.loads((boxes / "found/predictions.json").read_text())
    for name in ("00", "01", "02", "03"):
        image = Image.open(boxes / f"boxes/images/val/{name}.png")
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


class OwnModule(DistillModule):
    """A module of a user's own: its step mirrors the images, and its loss is another one."""

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return torch.nn.functional.multi_margin_loss(self.student(images.flip(3)), labels)


def fit_own(folder, images, epochs=2, ckpt_path=None, teacher=None, pixels=PIXELS, **settings):
    """Train a module of the user's own on a folder of images; return the module and its test."""
    data = ImageFolderDataModule(
        root=images, global_batch_size=6, num_workers=0, **IMAGES, **pixels
    )
    torch.manual_seed(0)
    module = OwnModule(timm.create_model("test_resnet", num_classes=3), teacher, **settings)
    saver = ModelCheckpoint(folder / "checkpoints", filename="last", enable_version_counter=False)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        callbacks=[saver, ExactResume(seed=3)],
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True)
    return module, trainer.test(module, data, verbose=False)[0]


@pytest.fixture
def folder_teacher(journey):
    """Load the teacher that was trained on the folder."""
    return load_teacher("test_resnet", weights=journey / LAST, num_classes=3)


@pytest.fixture
def own_test(journey, folder_teacher, tmp_path):
    """Distil a module of the user's own to the folder "own", and return its test."""
    return fit_own(tmp_path / "own", journey / "images", teacher=folder_teacher)[1]


def test_a_module_of_the_users_own_goes_on_as_the_whole_run(
    own_test, journey, folder_teacher, tmp_path
):
    settings = {"images": journey / "images", "teacher": folder_teacher}
    fit_own(tmp_path / "begun", epochs=1, **settings)
    checkpoint = tmp_path / "begun/checkpoints/last.ckpt"
    _, test = fit_own(tmp_path / "begun", ckpt_path=checkpoint, **settings)
    whole, more = (student_state(tmp_path / name) for name in ("own", "begun"))
    torch.testing.assert_close(more, whole, rtol=0, atol=0)
    assert test == own_test


def test_weight_0_trains_a_module_of_the_users_own_as_without_a_teacher(
    own_test, journey, folder_teacher, tmp_path
):
    fit_own(tmp_path / "none", journey / "images")
    fit_own(tmp_path / "zero", journey / "images", teacher=folder_teacher, distill_weight=0.0)
    none, zero, full = (student_state(tmp_path / name) for name in ("none", "zero", "own"))
    torch.testing.assert_close(zero, none, rtol=0, atol=0)
    assert any(not torch.equal(full[name], none[name]) for name in none)


def test_a_module_of_the_users_own_teaches_the_next(own_test, journey, tmp_path):
    """Its checkpoint has the card; the next student has another normalisation."""
    checkpoint = tmp_path / "own/checkpoints/last.ckpt"
    card = read_card(checkpoint)
    assert (list(card.class_names), list(card.mean), card.size) == (NAMES, PIXELS["mean"], (48, 48))
    teacher = load_teacher("test_resnet", weights=checkpoint, num_classes=3)
    pixels = {"mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2)}
    module, _ = fit_own(tmp_path / "next", journey / "images", teacher=teacher, pixels=pixels)
    data = ImageFolderDataModule(root=journey / "images", **IMAGES, **pixels)
    images, labels = next(iter(data.test_dataloader()))
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(module.teacher_network()(images), labels)
    assert float(loss) == pytest.approx(own_test["test/loss"], rel=1e-4)
