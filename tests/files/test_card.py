"""Tests of the card of a network: every kind of file keeps it, and a damaged card is refused."""

import json
import os
import shutil
import zipfile

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from torch import nn

from lightning_dist import StudentEMA
from lightning_dist.data.digits import DigitsDataModule
from lightning_dist.export import export_student
from lightning_dist.files.card import CARD_KEY, Card, card_of_timm, card_of_torchvision
from lightning_dist.files.card_files import load_with_card, read_card, write_card
from lightning_dist.models.small import SmallCNN
from lightning_dist.tasks.classification import ClassificationModule

CARD = Card(
    **{"task": "classification", "size": (8, 8), "crop_mode": "squash", "crop_pct": 1.0},
    **{"interpolation": "bilinear", "mean": (0.3,), "std": (0.4,), "channels": "gray"},
    **{"num_classes": 3, "class_names": ("a", "b", "ç\x1b[1m"), "averaged": True},
    **{"metric": "val/accuracy", "value": 0.75, "origin": "run", "source": "runs/7"},
)


@pytest.mark.parametrize(
    ("format", "name"),
    [
        ("safetensors", "s.safetensors"),
        ("torch_export", "s.pt2"),
        pytest.param("onnx", "s.onnx", marks=pytest.mark.slow),
    ],
)
def test_every_exported_file_has_the_card(tmp_path, format, name):
    student = SmallCNN([4], num_classes=3)
    path = export_student(student, tmp_path / name, format, card=CARD)
    assert read_card(path) == CARD


def test_an_exported_timm_folder_has_the_card_and_its_preprocessing(tmp_path):
    student = timm.create_model("test_resnet", num_classes=3, in_chans=1)
    export_student(
        student, tmp_path / "x", "timm", card=CARD, architecture={"model_name": "", "in_chans": 1}
    )
    assert read_card(tmp_path / "x") == CARD
    network = timm.create_model(f"local-dir:{tmp_path / 'x'}", pretrained=True)
    data = timm.data.resolve_model_data_config(network)
    assert (data["crop_mode"], data["crop_pct"], *data["mean"]) == ("squash", 1.0, 0.3)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Return a checkpoint of Python's Trainer with an average of the weights."""
    import lightning as L
    from lightning.pytorch.callbacks import ModelCheckpoint

    folder = tmp_path_factory.mktemp("run")
    saver = ModelCheckpoint(
        folder, monitor="val/ema_accuracy", filename="best", save_weights_only=True
    )
    trainer = L.Trainer(
        **{"max_epochs": 1, "limit_train_batches": 2, "accelerator": "cpu", "logger": False},
        **{"enable_progress_bar": False, "enable_model_summary": False},
        callbacks=[StudentEMA(decay=0.5), saver],
        default_root_dir=folder,
    )
    data = DigitsDataModule(mean=(0.2,), std=(0.5,))
    trainer.fit(ClassificationModule(SmallCNN([4]), num_classes=10), data)
    return folder / "best.ckpt"


def test_a_checkpoint_from_python_has_a_card(checkpoint):
    card = read_card(checkpoint)
    assert (card.task, card.mean, card.std, card.size) == ("classification", (0.2,), (0.5,), (8, 8))
    assert card.class_names == tuple("0123456789")
    assert (card.metric, card.averaged) == ("val/ema_accuracy", True)
    assert 0 <= card.value <= 1


@pytest.mark.parametrize(("ema", "prefix"), [(None, "student_ema.module."), (False, "student.")])
def test_the_weights_that_the_card_names_are_loaded_unless_ema_says_otherwise(
    checkpoint, ema, prefix
):
    network = SmallCNN([4])
    card = load_with_card(network, checkpoint, ema)
    assert card.averaged is (ema is None)
    saved = torch.load(checkpoint, weights_only=True)["state_dict"]
    for name, value in network.state_dict().items():
        assert torch.equal(value, saved[prefix + name])


def test_averaged_weights_that_a_file_lacks_are_refused(tmp_path):
    network = nn.Linear(2, 2)
    torch.save(network.state_dict(), tmp_path / "plain.pth")
    with pytest.raises(ValueError, match=r"plain\.pth has no averaged weights"):
        load_with_card(network, tmp_path / "plain.pth", ema=True)
    header = {CARD_KEY: json.dumps({"averaged": True})}
    safetensors.torch.save_file(network.state_dict(), tmp_path / "x.safetensors", header)
    with pytest.raises(ValueError, match="has averaged weights only: leave out ema=false"):
        load_with_card(network, tmp_path / "x.safetensors", ema=False)


def test_cards_of_the_libraries_have_the_same_form():
    network = timm.create_model("vit_tiny_patch16_224", num_classes=5)
    card = card_of_timm(timm.data.resolve_model_data_config(network), "vit", 5)
    assert (card.size, card.mean, card.crop_pct) == ((224, 224), (0.5,) * 3, 0.9)
    weights = torchvision.models.ResNet50_Weights.IMAGENET1K_V2
    names = weights.meta["categories"]
    card = card_of_torchvision(weights.transforms(), "resnet50", names)
    assert (card.size, card.crop_mode, card.num_classes) == ((224, 224), "center", 1000)
    assert card.crop_pct == pytest.approx(224 / 232)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("size", [8]), ("size", [8, -1]), ("mean", "0.5"), ("std", [0.0]), ("channels", "cmyk")),
        *(("class_names", [1, 2]), ("averaged", 1), ("num_classes", 1e9), ("mean", [float("nan")])),
        *(("mean", [10**400]), ("crop_pct", 10**400), ("value", -(10**400))),
    ],
)
def test_a_damaged_card_is_refused_by_name(tmp_path, field, value):
    facts = {"mean": [0.5], "std": [0.5]} | {field: value}
    (tmp_path / "card.json").write_text(json.dumps({CARD_KEY: facts}))
    with pytest.raises(ValueError, match=rf"card\.json is damaged: {field} of its card"):
        read_card(tmp_path / "card.json")


@pytest.mark.parametrize("name", ["deep.json", "deep.safetensors", "x.onnx", "x.pt2"])
def test_a_damaged_file_is_refused_by_name(tmp_path, name):
    """The readers of the formats raise errors of other classes, which have to be converted."""
    deep = 100_000 * "["
    path = tmp_path / name
    if path.suffix == ".onnx":
        path.write_bytes(50 * b"\xff")
    elif path.suffix == ".pt2":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x/extra/metadata.json", "{}")
        contents = bytearray(path.read_bytes())
        # The number of a compression method that does not exist.
        contents[contents.index(b"PK\x01\x02") + 10] = 77
        path.write_bytes(contents)
    elif path.suffix == ".safetensors":
        safetensors.torch.save_file({"a": torch.zeros(1)}, path, metadata={CARD_KEY: deep})
    else:
        path.write_text(deep)
    with pytest.raises(ValueError, match=rf"{name} cannot be read"):
        read_card(path)


@pytest.mark.parametrize("name", ["x.json", "x.safetensors", "x.onnx"])
def test_a_card_of_many_megabytes_is_refused_by_name(tmp_path, name):
    """Read as Python lists, the card would take twenty times as much memory as the file."""
    path, long = tmp_path / name, json.dumps({"a": 3_000_000 * [[]]}, separators=(",", ":"))
    if path.suffix == ".safetensors":
        header = json.dumps({"__metadata__": {CARD_KEY: long}}).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header)
    elif path.suffix == ".onnx":
        onnx = pytest.importorskip("onnx")
        model = onnx.ModelProto(metadata_props=[{"key": CARD_KEY, "value": long}])
        path.write_bytes(model.SerializeToString())
    else:
        path.write_text(long)
    with pytest.raises(ValueError, match=rf"{name} cannot be read: .* bytes"):
        read_card(path)


def test_an_onnx_file_of_many_empty_messages_is_refused_at_once(tmp_path):
    """onnx makes an object of 100 bytes from each 2 bytes."""
    (tmp_path / "x.onnx").write_bytes(200_000 * b"\x42\0")
    with pytest.raises(ValueError, match=r"x\.onnx cannot be read: it has more than"):
        read_card(tmp_path / "x.onnx")


def test_a_pipe_is_no_card(tmp_path):
    os.mkfifo(tmp_path / "card.json")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_card(tmp_path / "card.json")


def test_the_command_prints_a_card_on_plain_lines(command, refused, tmp_path, capsys):
    write_card(CARD, tmp_path / "card.json")
    command("card", "card.json")
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["mean"] == "[0.3]"
    assert lines["class_names"] == '["a", "b", "\\u00e7\\u001b[1m"]'
    torch.save({"weight": torch.zeros(1)}, tmp_path / "plain.pth")
    assert "plain.pth has no card" in refused("card", "plain.pth")
    assert "there is no file gone.ckpt" in refused("card", "gone.ckpt")


def test_an_old_checkpoint_says_what_is_assumed(golden, command, tmp_path, capsys):
    shutil.copy(golden / "run_of_4a06b76.ckpt", tmp_path / "old.ckpt")
    command("export", "ckpt=old.ckpt", "file=student.safetensors")
    printed = capsys.readouterr().out
    assert "old.ckpt has no card" in printed
    assert "weights that are not averaged" in printed
    assert read_card(tmp_path / "student.safetensors").averaged is False


def test_the_card_of_the_other_weights_has_not_the_metric_of_these():
    card = Card(averaged=True, metric="val/ema_loss", value=0.7, num_classes=2)
    assert card.of_weights(True) == card
    assert card.of_weights(False) == Card(averaged=False, num_classes=2)
