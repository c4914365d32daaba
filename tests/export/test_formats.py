"""Tests that exported files contain the card, and give the student's outputs by themselves."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import timm
import timm.data
import torch
from lightning.pytorch import Trainer
from PIL import Image, UnidentifiedImageError
from torch import nn
from torch.utils.data import DataLoader
from torchvision.models.detection import RetinaNet

from disk import almost_full_disk
from lightning_dist import DistillModule
from lightning_dist.cli.run.saved_config import CONFIG_KEY
from lightning_dist.export import FORMATS, export_student
from lightning_dist.export.graphs import METADATA
from lightning_dist.files.card import Card
from lightning_dist.files.weights import load_weights, read_checkpoint
from lightning_dist.models.cifar import resnet8
from lightning_dist.models.detection import small_faster_rcnn, small_retinanet
from lightning_dist.models.segmentation import deeplabv3
from lightning_dist.models.small import SmallCNN, SmallUNet

QUICK = [
    "trainer=cpu",
    "trainer.max_epochs=1",
    "trainer.limit_train_batches=2",
    "print_config=false",
    "callbacks.progress=null",
    "distill=none",
    "test_teacher=false",
    "hydra.run.dir=run",
]
SCENES = ["data.train_size=4", "data.val_size=2", "data.test_size=2"]
CKPT = "ckpt=run/checkpoints/last.ckpt"
FACTS = {"mean": [0.5], "std": [0.25], "class_names": ["a", "b"]}


def trained(network: nn.Module) -> nn.Module:
    """Set the batch norms' statistics, so that eval and training mode give different outputs."""
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.uniform_(-0.5, 0.5)
                module.running_var.uniform_(0.5, 2)
    return network


def open_onnx(path: Path):
    """Return a function from images to a list of outputs, and the file's metadata."""
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (inputs,) = session.get_inputs()
    facts = session.get_modelmeta().custom_metadata_map

    def run(images):
        return [torch.from_numpy(x) for x in session.run(None, {inputs.name: images.numpy()})]

    return run, {name: json.loads(value) for name, value in facts.items()}


def open_pt2(path: Path):
    extra = {METADATA: ""}
    module = torch.export.load(path, extra_files=extra).module()
    return lambda images: [module(images)], json.loads(extra[METADATA])


OPEN = {"onnx": open_onnx, "torch_export": open_pt2}


class TwoHeads(nn.Module):
    """A network with the outputs of torchvision's segmentation networks."""

    def __init__(self) -> None:
        super().__init__()
        self.main, self.aux = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)

    def forward(self, images):
        return {"aux": self.aux(images), "out": self.main(images)}


NETWORKS = {
    "small": (lambda: SmallCNN([4, 8]), (1, 8, 8)),
    "of timm": (lambda: timm.create_model("test_resnet", num_classes=5), (3, 64, 64)),
    "of the CIFAR zoo": (lambda: resnet8(num_classes=7), (3, 32, 32)),
    "of segmentation": (lambda: SmallUNet([4, 8], num_classes=3), (3, 18, 22)),
    "with an auxiliary head": (TwoHeads, (3, 12, 12)),
    "DeepLabV3": (lambda: deeplabv3("test_resnet", 3, 8), (3, 64, 64)),
}
# onnxruntime 1.24 and older compute other outputs for a dilated network, so the export is refused.
CASES = [(f, n) for f in OPEN for n in NETWORKS if (f, n) != ("onnx", "DeepLabV3")]


@pytest.mark.parametrize(("format", "name"), CASES)
def test_a_graph_gives_the_students_logits_at_any_batch_size(name, format, tmp_path):
    make, size = NETWORKS[name]
    student = trained(make()).train()
    facts = {"input_size": size, **FACTS}
    path = export_student(student, tmp_path / FORMATS[format], format, **facts)
    run, metadata = OPEN[format](path)
    assert student.training, "the student stays as it is"
    student.eval()
    for batch in (1, 2, 5):
        images = torch.randn(batch, *size)
        (found,) = run(images)
        expected = student(images)
        expected = expected["out"] if isinstance(expected, dict) else expected
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert metadata == {**FACTS, "input_size": list(size), "dynamic_size": False}


@pytest.mark.parametrize("format", OPEN)
def test_height_and_width_are_free_where_asked_for(format, tmp_path):
    student = trained(SmallUNet([4, 8], num_classes=3))
    path = tmp_path / FORMATS[format]
    export_student(student, path, format, input_size=(3, 32, 32), dynamic_size=True)
    run, metadata = OPEN[format](path)
    assert metadata["dynamic_size"]
    images = torch.randn(3, 3, 50, 38)
    torch.testing.assert_close(run(images)[0], student.eval()(images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "build", "offset"),
    [
        ("retinanet", lambda: small_retinanet([32, 64, 96], 64, 10, 48), 0),
        ("fasterrcnn", lambda: small_faster_rcnn([32, 64, 96], 64, 128, 10, 48), 1),
    ],
    ids=["one stage", "two stages"],
)
def test_a_trained_detector_in_onnx_finds_the_same_boxes(kind, build, offset, tmp_path):
    student = build()
    load_weights(student, f"pkg://lightning_dist/assets/scenes_{kind}_teacher.safetensors")
    path = export_student(student, tmp_path / "student.onnx", "onnx", input_size=(3, 48, 48))
    run, _ = open_onnx(path)
    student.eval()
    for size in ((48, 48), (70, 56)):
        image = torch.rand(3, *size)
        boxes, labels, scores = run(image)
        (expected,) = student([image])
        assert len(boxes) > 5
        assert torch.equal(labels, expected["labels"] - offset)
        torch.testing.assert_close(boxes, expected["boxes"], atol=1e-2, rtol=0)
        torch.testing.assert_close(scores, expected["scores"], atol=1e-5, rtol=1e-5)


def test_timm_reads_its_folder(tmp_path):
    student = trained(timm.create_model("test_resnet", num_classes=2, in_chans=1, drop_rate=0.2))
    path = export_student(
        student,
        tmp_path / "mine",
        "timm",
        input_size=(1, 64, 64),
        architecture={"_target_": "timm.create_model", "model_name": "test_resnet", "in_chans": 1},
        extra={"crop_pct": 0.9, "interpolation": "bilinear"},
        **FACTS,
    )
    again = timm.create_model(f"local-dir:{path}", pretrained=True).eval()
    images = torch.randn(3, 1, 64, 64)
    torch.testing.assert_close(again(images), student.eval()(images))
    data = timm.data.resolve_model_data_config(again)
    assert tuple(data["input_size"]) == (1, 64, 64)  # timm 1.0.22 reads a list here.
    assert (list(data["mean"]), list(data["std"])) == ([0.5], [0.25])
    assert (data["crop_pct"], data["interpolation"]) == (0.9, "bilinear")
    assert list(again.pretrained_cfg["label_names"]) == ["a", "b"]
    assert again.num_classes == 2


class Counting(RetinaNet):
    """A detector that shifts its boxes by the number of its calls, which no trace records."""

    calls = 0

    def postprocess_detections(self, *args):
        self.calls += 1
        found = super().postprocess_detections(*args)
        return [each | {"boxes": each["boxes"] + self.calls} for each in found]


def test_boxes_are_compared_also_of_a_detector_that_finds_none_in_noise(tmp_path):
    student = small_retinanet([8, 16, 24], 16, 3, 48)
    (found,) = student.eval()([torch.rand(3, 48, 48)])
    assert not len(found["boxes"])
    export_student(student, tmp_path / "student.onnx", "onnx")
    run, _ = open_onnx(tmp_path / "student.onnx")
    assert not len(run(torch.rand(3, 48, 48))[0])
    student.__class__ = Counting
    with pytest.raises(
        ValueError, match="the file gives other outputs than the student for images of shape"
    ):
        export_student(student, tmp_path / "student.onnx", "onnx")


def test_a_compiled_student_is_exported_as_itself_for_all_to_read(tmp_path):
    student = torch.compile(SmallCNN([4]))
    path = export_student(student, tmp_path / "student.safetensors", input_size=(1, 8, 8))
    assert safetensors.torch.load_file(path).keys() == SmallCNN([4]).state_dict().keys()
    (tmp_path / "other").touch()
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.parametrize("channels_last", [False, True])
def test_safetensors_hold_the_weights_and_the_facts(channels_last, tmp_path):
    student = SmallCNN([4, 8])
    if channels_last:
        student.to(memory_format=torch.channels_last)
    architecture = {"_target_": "lightning_dist.models.small.SmallCNN", "channels": [4, 8]}
    path = tmp_path / "new folder" / "student.safetensors"
    export_student(student, path, input_size=(1, 8, 8), architecture=architecture, **FACTS)
    weights = safetensors.torch.load_file(path)
    assert weights.keys() == student.state_dict().keys()
    assert all(torch.equal(x, weights[name]) for name, x in student.state_dict().items())
    with safetensors.safe_open(path, "pt") as file:
        facts = {name: json.loads(value) for name, value in file.metadata().items()}
    assert facts == {**FACTS, "input_size": [1, 8, 8], "architecture": architecture}


def test_the_student_of_a_module_is_exported_from_python(tmp_path):
    module = DistillModule(
        nn.Sequential(nn.Flatten(), nn.Linear(12, 4)), nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
    )
    batches = DataLoader([(torch.randn(3, 2, 2), 1)] * 4, batch_size=2)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(max_epochs=1, accelerator="cpu", enable_checkpointing=False, **quiet)
    trainer.fit(module, batches)
    path = export_student(module.student, tmp_path / "a.pt2", "torch_export", input_size=(3, 2, 2))
    images = torch.randn(7, 3, 2, 2)
    torch.testing.assert_close(open_pt2(path)[0](images)[0], module.student(images))


class Moody(nn.Module):
    """A network whose output differs in each call, which no exporter can record."""

    calls = 0

    def forward(self, images):
        Moody.calls += 1
        return images.flatten(1) + Moody.calls


class Stiff(nn.Module):
    """A network that takes exactly two images."""

    def forward(self, images):
        return images.reshape(2, -1)[:, :4]


class Scores(nn.Module):
    """A network with an output in which `taps.logits_of` finds no logits."""

    def forward(self, images):
        return {"scores": images.flatten(1)}


class Pair(nn.Module):
    """A network that returns logits and features."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 2)

    def forward(self, images):
        return self.head(images.flatten(1)), images


def test_a_graph_of_a_network_with_several_outputs_returns_its_logits(tmp_path):
    network, images = Pair().eval(), torch.randn(5, 1, 8, 8)
    path = export_student(network, tmp_path / "x.pt2", "torch_export", input_size=(1, 8, 8))
    found = torch.export.load(path).module()(images)
    torch.testing.assert_close(found, network(images)[0])


def diverged(network: SmallCNN) -> SmallCNN:
    network.head.weight.data[0, 0] = float("nan")
    return network


RETINANET = ([8, 16, 24], 16, 3)
REFUSED = {
    "an unknown format": (
        lambda: nn.Flatten(),
        {"format": "tflite"},
        "there is no format 'tflite': use safetensors, timm, torch_export or onnx",
    ),
    "no network of timm": (
        lambda: SmallCNN([4, 8]),
        {"format": "timm"},
        "format=timm holds networks of timm, and the student is a SmallCNN of "
        "lightning_dist.models.small: use safetensors, torch_export or onnx",
    ),
    "a detector for timm": (
        lambda: small_retinanet(*RETINANET),
        {"format": "timm"},
        "the student is a RetinaNet .*: use safetensors or onnx",
    ),
    "a detector for torch.export": (
        lambda: small_retinanet(*RETINANET),
        {"format": "torch_export"},
        "cannot hold a detector, whose number of boxes depends on the image: use safetensors or",
    ),
    "no size": (
        lambda: SmallCNN([4, 8]),
        {"format": "torch_export", "input_size": None},
        "the size of its images is unknown: set input_size",
    ),
    "half a size": (
        lambda: SmallCNN([4, 8]),
        {"format": "torch_export", "input_size": (8, 8)},
        r"input_size is \[8, 8\]: give the channels, height and width",
    ),
    "images that the student does not take": (
        lambda: SmallCNN([4, 8]),
        {"format": "torch_export", "input_size": (3, 8, 8)},
        "does not run on images of 3 x 8 x 8 .*: set input_size",
    ),
    "weights of a run that diverged": (
        lambda: diverged(SmallCNN([4, 8])),
        {"format": "safetensors"},
        "'head.weight' is not finite: its training diverged",
    ),
    "a mean of other channels": (
        lambda: SmallCNN([4, 8]),
        {"format": "torch_export", "mean": [0.1, 0.2]},
        "mean has 2 entries, but input_size has 1 channels: give one entry for each channel",
    ),
    "an output without logits": (
        Scores,
        {"format": "onnx"},
        "the student returns a dict in which no logits are found .*: use safetensors",
    ),
    "other outputs": (
        Moody,
        {"format": "torch_export"},
        r"cannot hold this student \(the file gives other outputs .*\): use safetensors",
    ),
    "one batch size": (
        Stiff,
        {"format": "torch_export"},
        "format=torch_export cannot hold this student .*: use safetensors",
    ),
    "a size that is not free": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 2)),
        {"format": "onnx", "dynamic_size": True},
        "format=onnx cannot hold this student .*: leave out dynamic_size",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_format_cannot_hold_is_refused_and_nothing_is_written(case, tmp_path):
    make, options, message = REFUSED[case]
    options = {"input_size": (1, 8, 8), **options}
    with pytest.raises(ValueError, match=message) as caught:
        export_student(make(), tmp_path / "student", **options)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_refusal_leaves_the_file_of_before(tmp_path):
    path = tmp_path / "student.pt2"
    path.write_text("of before")
    with pytest.raises(ValueError, match="gives other outputs"):
        export_student(Moody(), path, "torch_export", input_size=(1, 8, 8))
    assert [file.read_text() for file in tmp_path.iterdir()] == ["of before"]


@pytest.mark.parametrize("format", ["safetensors", "timm", "torch_export", "onnx"])
def test_a_full_disk_is_named_and_leaves_nothing(format, tmp_path):
    student = timm.create_model("resnet10t", num_classes=4) if format == "timm" else resnet8(4)
    path = tmp_path / "student"
    with almost_full_disk(4_000), pytest.raises(OSError, match="student cannot be written"):
        export_student(student.eval(), path, format, input_size=[3, 32, 32])
    assert not list(tmp_path.iterdir())


def test_an_export_removes_what_a_killed_one_left_and_no_more(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for process in (dead.pid, os.getpid()):
        (tmp_path / f".export-{process}-abc").mkdir()
    export_student(resnet8(4), tmp_path / "student.safetensors", "safetensors")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"student.safetensors", f".export-{os.getpid()}-abc"}


def test_a_missing_package_is_named_with_the_extra_that_brings_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r"onnxruntime.*pip install 'lightning-dist\[onnx\]'"):
        export_student(SmallCNN([4]), tmp_path / "x.onnx", "onnx", input_size=(1, 8, 8))
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"file/x\.safetensors cannot be written"):
        export_student(SmallCNN([4]), tmp_path / "file" / "x.safetensors")


READER = """
import sys
sys.modules["lightning_dist"] = None  # importing it would fail
import numpy, onnxruntime, timm, torch
images = torch.load("images.pt")
network = timm.create_model("local-dir:student_timm", pretrained=True).eval()
session = onnxruntime.InferenceSession("student.onnx")
torch.save(
    {
        "torch_export": torch.export.load("student.pt2").module()(images),
        "onnx": torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0]),
        "timm": network(images).detach(),
    },
    "logits.pt",
)
"""


@pytest.mark.slow
def test_the_files_are_read_without_this_package(tmp_path):
    student = trained(timm.create_model("test_resnet", num_classes=4)).eval()
    images = torch.randn(5, 3, 32, 32)
    for format in ("torch_export", "onnx", "timm"):
        export_student(student, tmp_path / FORMATS[format], format, input_size=(3, 32, 32))
    torch.save(images, tmp_path / "images.pt")
    subprocess.run([sys.executable, "-c", READER], cwd=tmp_path, check=True)
    for found in torch.load(tmp_path / "logits.pt").values():
        torch.testing.assert_close(found, student(images), atol=1e-5, rtol=1e-5)


def test_the_command_writes_a_folder_of_timm(command, tmp_path):
    command(
        *("train", "experiment=digits", *QUICK),
        *("student=timm", "student.model_name=test_resnet", "+student.in_chans=1"),
    )
    command("export", CKPT, "format=timm")
    network = timm.create_model(f"local-dir:{tmp_path / 'student_timm'}", pretrained=True)
    saved = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(x, saved[f"student.{n}"]) for n, x in network.state_dict().items())
    assert network.pretrained_cfg["label_names"] == [str(digit) for digit in range(10)]
    assert tuple(network.pretrained_cfg["input_size"]) == (1, 8, 8)


def test_the_command_tells_of_the_checkpoints_data(command, tmp_path):
    command(
        "train", "experiment=digits", *QUICK, "callbacks=[default,ema]", "callbacks.ema.decay=0.5"
    )
    command("export", CKPT, "format=torch_export", "ema=true", "file=average.pt2")
    run, facts = open_pt2(tmp_path / "average.pt2")
    assert facts["class_names"] == [str(digit) for digit in range(10)]
    assert (facts["mean"], facts["std"]) == ([0.3054], [0.3761])
    assert (facts["input_size"], facts["channels"]) == ([1, 8, 8], "gray")
    assert facts["architecture"]["_target_"] == "lightning_dist.models.small.SmallCNN"
    checkpoint = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert facts["architecture"] == checkpoint[CONFIG_KEY]["module"]["student"]
    average = SmallCNN([4, 8]).eval()
    prefix = "student_ema.module."
    state = checkpoint["state_dict"].items()
    average.load_state_dict(
        {name.removeprefix(prefix): x for name, x in state if name.startswith(prefix)}
    )
    images = torch.randn(4, 1, 8, 8)
    torch.testing.assert_close(run(images)[0], average(images), atol=1e-5, rtol=1e-5)


def test_the_command_tells_how_masks_are_made(command, tmp_path):
    command("train", "experiment=scenes/segmentation", *QUICK, *SCENES)
    command("export", CKPT, "format=torch_export", "input_size=[32,64]")
    run, facts = open_pt2(tmp_path / "student.pt2")
    assert (facts["input_size"], facts["align_corners"]) == ([3, 32, 64], True)
    assert facts["class_names"][:2] == ["background", "0"]
    assert run(torch.randn(1, 3, 32, 64))[0].shape == (1, 11, 16, 32)


def test_the_command_exports_a_detector(command, refused, tmp_path):
    command("train", "experiment=scenes/detection_fasterrcnn_teacher", *QUICK, *SCENES)
    # In a detector that has hardly been trained, rounding decides which boxes are found.
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    trained = read_checkpoint("pkg://lightning_dist/assets/scenes_fasterrcnn_teacher.safetensors")
    checkpoint["state_dict"] |= {f"student.{name}": value for name, value in trained.items()}
    torch.save(checkpoint, path)
    command("export", CKPT, "format=onnx")
    run, facts = open_onnx(tmp_path / "student.onnx")
    assert facts["class_names"] == [str(digit) for digit in range(10)]
    assert (facts["mean"], facts["std"], facts["label_offset"]) == ([0.0] * 3, [1.0] * 3, 0)
    assert len(run(torch.rand(3, 64, 48))) == 3
    assert "use safetensors or onnx" in refused("export", CKPT, "format=torch_export")
    assert "use safetensors, timm, torch_export or onnx" in refused("export", CKPT, "format=tf")
    assert "give height and width" in refused("export", CKPT, "format=onnx", "input_size=48")


def test_the_script_of_an_export_shows_names_and_opens_images_safely(tmp_path, capsys, monkeypatch):
    """A class may have any name, and Pillow would hand a PostScript file to Ghostscript."""
    card = Card(class_names=("a\x1b[2J", "b\x1b[2J"), num_classes=2)
    student = trained(timm.create_model("test_resnet", num_classes=2))
    folder = export_student(student, tmp_path / "out", "timm", card=card)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EOF\n")
    monkeypatch.setattr(sys, "argv", ["predict.py", f"{tmp_path}/a.png", f"{tmp_path}/b.png"])
    with pytest.raises(UnidentifiedImageError):
        runpy.run_path(str(folder / "predict.py"), run_name="__main__")
    assert re.fullmatch(r".*/a\.png,[ab]\?\[2J,0\.\d{4}\n", capsys.readouterr().out)
