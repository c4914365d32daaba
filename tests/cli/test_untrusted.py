"""Tests that a checkpoint's config can load, read and contact nothing without ``trust=true``."""

import csv
import importlib
import inspect
import json
import os
import pickle
import typing
from pathlib import Path

import pytest
import torch
import torchvision
from lightning.pytorch import LightningDataModule
from PIL import Image

import lightning_dist.data
from hostile import Runs, contacts, hostile_config, saved, touched, watched
from lightning_dist.cli.errors import UserError
from lightning_dist.cli.predict import ClassWriter
from lightning_dist.cli.run.allowlist import FOLDERS, ONLY_TRAINING, without_downloads
from lightning_dist.cli.run.saved_config import CONFIG_KEY, build_module, read_saved
from lightning_dist.files.card import CARD_KEY, Card
from lightning_dist.files.text import printable
from lightning_dist.files.weights import read_checkpoint
from lightning_dist.models.small import SmallCNN

CPU = "trainer=cpu"
NAMED_BY = {
    "timm.create_model": "model_name",
    "lightning_dist.models.detection.TimmPyramid": "name",
    "lightning_dist.models.segmentation.deeplabv3": "backbone",
    "lightning_dist.models.segmentation.pspnet": "backbone",
}
SOURCES = ("local-dir:w", " local-dir:w", "local\t-dir:w", "local-\ndir:w", "\x1fLOCAL-dir:w")


def rebuilt(contents: dict, folder: Path) -> str:
    """Return the error of a checkpoint that is read and rebuilt as ``export`` does."""
    torch.save(contents, folder / "x.ckpt")
    try:
        build_module(*read_saved("x.ckpt", trust=False), "x.ckpt", trust=False)
    except UserError as error:
        return str(error)
    pytest.fail("the checkpoint is not refused")


@pytest.fixture(autouse=True)
def _in_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """Write a folder of timm's whose weights are a pickle that runs code."""
    folder = tmp_path / "w"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architecture": "resnet18"}))
    (folder / "pytorch_model.bin").write_bytes(saved({"a": Runs()}))
    return folder


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("target", NAMED_BY)
def test_no_name_makes_timm_load_a_folder(tmp_path, model_folder, target, source):
    student = {"_target_": target, NAMED_BY[target]: source, "pretrained": True}
    contents = hostile_config(**student)
    if target != "timm.create_model":
        del contents[CONFIG_KEY]["module"]["student"]["model_name"]
    with watched() as record:
        line = rebuilt(contents, tmp_path)
    assert "x.ckpt would load" in line
    assert not touched(record, model_folder)
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize(
    "student",
    [
        {"_target_": "lightning_dist.models.detection.TimmPyramid", "_args_": ["local-dir:w"]},
        {"_target_": "lightning_dist.models.segmentation.pspnet", "_partial_": True},
        {"model_name": {"_target_": "timm.create_model", "model_name": "resnet18"}},
        {"model_name": "resnet18:local-dir:w"},
        {"model_name": "no_such_network"},
    ],
    ids=["by position", "later", "another call", "after a name", "unknown"],
)
def test_only_a_network_of_timm_is_a_name(tmp_path, student):
    line = rebuilt(hostile_config(**student), tmp_path)
    assert "x.ckpt would" in line
    assert "trust=true" in line


LATER = {
    "timm's network": {"_target_": "timm.models.resnet18"},
    "timm by name": {"_target_": "timm.create_model", "model_name": "resnet18"},
    "a pyramid": {"_target_": "lightning_dist.models.detection.TimmPyramid", "name": "resnet18"},
    "torchvision's network": {"_target_": "torchvision.models.resnet18", "weights": "DEFAULT"},
    "torchvision by name": {
        "_target_": "torchvision.models.get_model",
        "name": "resnet18",
        "weights": "DEFAULT",
    },
}


@pytest.mark.parametrize("name", LATER)
@pytest.mark.parametrize("place", ["a layer", "a metric"])
def test_no_network_is_prepared_for_a_later_call(tmp_path, monkeypatch, place, name):
    """A layer would call a prepared function of timm with a number of channels as `pretrained`.

    A metric would call a prepared function during the test.
    """
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    later = LATER[name] | {"_partial_": True}
    contents = hostile_config()
    if place == "a layer":
        student = {"_target_": "torchvision.models.resnet18", "norm_layer": later}
        contents[CONFIG_KEY]["module"]["student"] = student
    else:
        metric = {"_target_": "torchmetrics.aggregation.MeanMetric"}
        metric["distributed_available_fn"] = later
        contents[CONFIG_KEY]["module"]["metrics"] = {"mean": metric}
    with watched() as record:
        line = rebuilt(contents, tmp_path)
    assert f"x.ckpt would run {LATER[name]['_target_']!r} later" in line
    assert not contacts(record)


def test_an_attribute_that_fails_ends_in_one_line(tmp_path):
    contents = hostile_config()
    contents[CONFIG_KEY]["module"]["student"] = {"_target_": "torch.classes.no_such.thing"}
    assert "x.ckpt names 'torch.classes.no_such.thing'" in rebuilt(contents, tmp_path)


def test_a_file_in_a_package_is_found_without_importing_it(tmp_path, monkeypatch):
    package = tmp_path / "imported"
    (package / "inner").mkdir(parents=True)
    code = "import pathlib; pathlib.Path('trace').mkdir()"
    for folder in (package, package / "inner"):
        (folder / "__init__.py").write_text(code)
    torch.save({"a": torch.ones(1)}, package / "inner" / "w.pth")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert read_checkpoint("pkg://imported.inner/w.pth").keys() == {"a"}
    assert read_checkpoint("pkg://imported/inner/w.pth").keys() == {"a"}
    for missing in ("pkg://imported/none.pth", "pkg://no_such_package/w.pth", "pkg:///w", "pkg://"):
        with pytest.raises(FileNotFoundError):
            read_checkpoint(missing)
    assert not (tmp_path / "trace").exists()


def test_no_file_of_weights_comes_from_a_config(tmp_path, monkeypatch):
    package = tmp_path / "imported_too"
    package.mkdir()
    (package / "__init__.py").write_text("import pathlib; pathlib.Path('trace').mkdir()")
    monkeypatch.syspath_prepend(tmp_path)
    for file in ("pkg://imported_too/w.pth", str(package / "w.pth")):
        student = {"backbone": "resnet18", "backbone_weights": file}
        student["_target_"] = "lightning_dist.models.segmentation.pspnet"
        contents = hostile_config(**student)
        del contents[CONFIG_KEY]["module"]["student"]["model_name"]
        with watched() as record:
            line = rebuilt(contents, tmp_path)
        assert "do not fit together" in line, "built, but with other weights"
        assert not touched(record, package)
        assert not (tmp_path / "trace").exists()


NETWORKS = {
    "timm": {"pretrained": True},
    "torchvision": {"_target_": "torchvision.models.resnet18", "weights": "DEFAULT"},
    "torchvision by name": {
        "_target_": "torchvision.models.get_model",
        "name": "resnet18",
        "weights": "IMAGENET1K_V1",
    },
    "torchvision's old name": {"_target_": "torchvision.models.resnet18", "pretrained": True},
    "the default of a detector's backbone": {
        "_target_": "torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn"
    },
    "a detector": {
        "_target_": "torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn",
        "weights": "DEFAULT",
    },
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_built_without_a_download(tmp_path, monkeypatch, name):
    """A file in torch's folder of downloads is not read either, because it may be from anybody."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    downloads = tmp_path / "torch" / "hub" / "checkpoints"
    downloads.mkdir(parents=True)
    for file in ("resnet18-f37072fd.pth", "mobilenet_v3_large-8738ca79.pth"):
        (downloads / file).write_bytes(saved({"a": Runs()}))
    contents = hostile_config(**NETWORKS[name])
    if name != "timm":
        del contents[CONFIG_KEY]["module"]["student"]["model_name"]
    with watched() as record:
        line = rebuilt(contents, tmp_path)
    assert "do not fit together" in line
    assert not contacts(record)
    assert not touched(record, downloads)
    assert not (tmp_path / "trace").exists()


def test_a_detector_has_the_layers_that_it_was_trained_with(monkeypatch):
    """torchvision freezes the batch norms of a detector that starts from pretrained weights."""
    name = "torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn"
    student = {"_target_": name, "weights_backbone": "IMAGENET1K_V1", "num_classes": 3}
    module = {"_target_": "lightning_dist.tasks.detection.DetectionModule", "student": student}
    norm = torchvision.ops.FrozenBatchNorm2d
    built = []
    monkeypatch.setattr(
        "lightning_dist.tasks.detection.DetectionModule.load_state_dict",
        lambda self, state: built.append(self),
    )
    build_module({"state_dict": {}}, {"module": module}, "x.ckpt", trust=False)
    assert any(isinstance(part, norm) for part in built[0].student.modules())


def test_torchvisions_downloads_of_a_student_are_read_as_weights(refused, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    downloads = tmp_path / "torch" / "hub" / "checkpoints"
    downloads.mkdir(parents=True)
    (downloads / "resnet18-f37072fd.pth").write_bytes(saved({"a": Runs()}))
    student = "{_target_: torchvision.models.resnet18, weights: DEFAULT}"
    line = refused(
        *("train", "experiment=digits", "distill=none", CPU, "print_config=false"),
        *("~student", f"+student={student}", "hydra.run.dir=run"),
    )
    assert "Weights only load failed" in line
    assert not (tmp_path / "trace").exists()


def folder_checkpoint(path: Path, /, **data: object) -> None:
    """Write the checkpoint of a student that classifies images; by default its data is a folder."""
    target = "lightning_dist.data.image_folder.ImageFolderDataModule"
    contents = hostile_config(data if "_target_" in data else {"_target_": target} | data)
    network = SmallCNN([4], num_classes=2, in_channels=3)
    student = {"_target_": "lightning_dist.models.small.SmallCNN"}
    student |= {"channels": [4], "num_classes": 2, "in_channels": 3}
    contents[CONFIG_KEY]["module"] = {
        "_target_": "lightning_dist.tasks.classification.ClassificationModule",
        "student": student,
        "num_classes": 2,
    }
    contents["state_dict"] = {f"student.{k}": v for k, v in network.state_dict().items()}
    torch.save(contents, path)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for name in ("dark", "light"):
        folder = tmp_path / "images" / "val" / name
        folder.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(folder / "0.png")
        (tmp_path / "images" / "train" / name).mkdir(parents=True)
    return tmp_path / "images"


def test_eval_reads_only_the_folder_that_the_command_names(refused, command, tmp_path, images):
    folder_checkpoint(tmp_path / "x.ckpt", root=str(images))
    with watched() as record:
        line = refused("eval", "ckpt=x.ckpt", CPU)
    assert "x.ckpt names the folder" in line
    assert "+data.root=" in line
    assert not touched(record, images)
    small = ("+data.image_size=8", CPU)
    command("eval", "ckpt=x.ckpt", f"+data.root={images}", *small)
    command("eval", "ckpt=x.ckpt", "trust=true", *small)


def test_eval_reads_no_default_folder_of_a_data_module(refused, tmp_path, images):
    images.rename(tmp_path / "imagenet")
    (tmp_path / "data").mkdir()
    (tmp_path / "imagenet").rename(tmp_path / "data" / "imagenet")
    folder_checkpoint(tmp_path / "x.ckpt", image_size=8)
    with watched() as record:
        line = refused("eval", "ckpt=x.ckpt", CPU)
    assert "root='data/imagenet'" in line
    assert not touched(record, "data/imagenet")


def test_a_function_of_the_networks_that_builds_none_is_refused(tmp_path):
    """Renaming with a pattern from the file could take forever."""
    rename = {"_target_": "lightning_dist.models.renaming.rename_entries", "network": "x"}
    contents = hostile_config()
    contents[CONFIG_KEY]["module"]["student"] = rename | {"names": ["a"], "table": [["a", "b"]]}
    assert "x.ckpt would run 'lightning_dist.models.renaming" in rebuilt(contents, tmp_path)


@pytest.mark.parametrize("verb", ["predict", "export"])
def test_a_verb_that_needs_no_data_reads_no_folder(command, tmp_path, images, verb):
    secret = tmp_path / "secret"
    secret.mkdir()
    folder_checkpoint(tmp_path / "x.ckpt", root=str(secret))
    options = ("images=images/val", CPU) if verb == "predict" else ("file=x.safetensors",)
    with watched() as record:
        command(verb, "ckpt=x.ckpt", *options)
    assert not touched(record, secret)
    assert not contacts(record)


def test_formulas_of_names_are_text_in_the_predictions(command, tmp_path, images):
    folder_checkpoint(tmp_path / "x.ckpt", root="x")
    contents = torch.load(tmp_path / "x.ckpt", weights_only=True)
    contents[CONFIG_KEY]["class_names"] = ["=A1"]  # and one name is missing
    torch.save(contents, tmp_path / "x.ckpt")
    (images / "=cmd.png").write_bytes((images / "val" / "dark" / "0.png").read_bytes())
    command("predict", "ckpt=x.ckpt", f"images={images}", CPU)
    with open(tmp_path / "predictions" / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["image"] == "'=cmd.png"
    assert {row["class"] for row in rows} <= {"'=A1", "1"}


@pytest.mark.parametrize("value", ["../../etc", "/etc", "a/../../b", "\\\\host\\share", "C:\\x"])
def test_the_parts_of_a_data_folder_are_inside_it(tmp_path, value):
    folder_checkpoint(tmp_path / "x.ckpt", root="x", val_dir=value)
    with pytest.raises(UserError, match=r"x\.ckpt would read val_dir="):
        read_saved("x.ckpt", trust=False)


def test_a_download_is_not_taken_from_a_config(refused, tmp_path):
    data = {"_target_": "lightning_dist.data.cifar.CIFAR10DataModule", "download": True}
    folder_checkpoint(tmp_path / "x.ckpt", **data, root=str(tmp_path / "elsewhere"))
    with watched() as record:
        refused("eval", "ckpt=x.ckpt", CPU)
        refused("eval", "ckpt=x.ckpt", CPU, f"+data.root={tmp_path / 'elsewhere'}")
    assert not contacts(record)
    assert not (tmp_path / "elsewhere").exists()


def test_a_data_set_of_a_hub_is_not_taken_from_a_config(refused, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    target = "lightning_dist.data.huggingface.HuggingFaceDataModule"
    folder_checkpoint(tmp_path / "x.ckpt", _target_=target, path="a/b")
    with watched() as record:
        line = refused("eval", "ckpt=x.ckpt", CPU)
    assert "path='a/b'" in line
    assert not contacts(record)


def test_every_folder_of_a_data_module_is_known():
    """A new data module may call its folder by another name.

    Then it would read any folder that a checkpoint names.
    """
    modules = [
        found
        for file in Path(lightning_dist.data.__file__).parent.glob("*.py")
        for found in vars(__import__(f"lightning_dist.data.{file.stem}", fromlist=["x"])).values()
        if isinstance(found, type) and issubclass(found, LightningDataModule)
    ]
    assert len(modules) > 10
    for module in modules:
        hints = typing.get_type_hints(module.__init__)
        paths = {name for name, hint in hints.items() if Path in (hint, *typing.get_args(hint))}
        assert paths <= {*FOLDERS, *ONLY_TRAINING}
        for name in inspect.signature(module.__init__).parameters:
            assert not name.startswith("url")


def test_an_import_that_fails_is_not_told_as_code_to_trust(tmp_path, monkeypatch):
    real = importlib.import_module

    def no_memory(name, *args):
        if name == "lightning_dist.models.mmdet":
            raise MemoryError
        return real(name, *args)

    student = {"_target_": "lightning_dist.models.mmdet.retinanet"}
    monkeypatch.delattr(lightning_dist.models, "mmdet", raising=False)
    monkeypatch.setattr(importlib, "import_module", no_memory)
    line = rebuilt(hostile_config(**student), tmp_path)
    assert "MemoryError" in line
    assert "trust" not in line


def test_control_characters_of_a_config_are_refused(refused, tmp_path):
    contents = hostile_config()
    metric = {"_target_": "torchmetrics.classification.MulticlassAccuracy", "num_classes": 10}
    contents[CONFIG_KEY]["module"]["metrics"] = {"acc\x1b[2J\x1b]0;owned\x07": metric}
    torch.save(contents, tmp_path / "x.ckpt")
    line = refused("eval", "ckpt=x.ckpt", CPU)
    assert "control characters" in line
    assert "\x1b" not in line


@pytest.mark.parametrize("metric", ["a\x1b]0;owned\x07", "[/bold]", "[link=http://x]"])
def test_the_metric_of_a_card_is_printed_as_text(command, tmp_path, capsys, metric):
    folder_checkpoint(tmp_path / "x.ckpt", root="x")
    contents = torch.load(tmp_path / "x.ckpt", weights_only=True)
    state = contents["state_dict"]
    average = {k.replace("student.", "student_ema.module."): v for k, v in state.items()}
    state |= average | {"student_ema.n_averaged": torch.tensor(1)}
    contents[CARD_KEY] = {"num_classes": 2, "metric": metric}
    torch.save(contents, tmp_path / "x.ckpt")
    command("export", "ckpt=x.ckpt", "file=x.safetensors")
    assert f"monitor={printable(metric)}" in capsys.readouterr().out


def test_a_checkpoint_of_train_is_instantiated_as_it_was_saved():
    """The removal of downloads changes nothing else in a config."""
    config = {"a": [1, (2, {"download": True, "b": "x"})], "_target_": "timm.create_model"}
    assert without_downloads(config) == {
        "a": [1, [2, {"download": False, "b": "x"}]],
        "_target_": "timm.create_model",
    }


def test_a_prediction_is_written_to_no_file_elsewhere(command, refused, tmp_path, images):
    folder_checkpoint(tmp_path / "x.ckpt", root="x")
    (tmp_path / "mine").write_text("mine")
    out = tmp_path / "predictions"
    out.mkdir()
    (out / "predictions.csv").symlink_to(tmp_path / "mine")
    os.link(tmp_path / "mine", out / "card.json")
    command("predict", "ckpt=x.ckpt", f"images={images}", CPU)
    assert (tmp_path / "mine").read_text() == "mine"
    assert "image,class" in (out / "predictions.csv").read_text()


def test_a_picture_is_written_through_no_link_out_of_the_folder(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "victim").mkdir()
    (tmp_path / "out" / "sub").symlink_to(tmp_path / "victim")
    writer = ClassWriter(["sub/deep/a"], tmp_path / "out", Card(), None)
    with pytest.raises(UserError, match="is a link out of"):
        writer.png(0)
    assert not list((tmp_path / "victim").iterdir())


def test_a_folder_of_unlabelled_images_is_not_taken_from_a_config(tmp_path):
    folder_checkpoint(tmp_path / "x.ckpt", root="x", unlabeled=["/etc"], unlabeled_share=0.5)
    _, config = read_saved("x.ckpt", trust=False)
    assert config["data"]["unlabeled"] is None
    assert config["data"]["unlabeled_share"] is None


def test_markup_in_the_name_of_a_metric_is_refused(tmp_path):
    """rich would parse it where Lightning prints the table of a test."""
    metric = {"_target_": "torchmetrics.classification.MulticlassAccuracy", "num_classes": 10}
    contents = hostile_config()
    contents[CONFIG_KEY]["module"]["metrics"] = {"acc[/bold]": metric}
    assert "x.ckpt contains markup in 'acc[/bold]'" in rebuilt(contents, tmp_path)


@pytest.mark.parametrize("option", ["--experimental-rerun", "--experimental-re"])
@pytest.mark.parametrize("verb", ["train", "eval", "predict", "export"])
def test_a_pickled_config_of_hydra_is_refused(refused, tmp_path, verb, option):
    (tmp_path / "config.pickle").write_bytes(pickle.dumps(Runs()))
    assert "would unpickle config.pickle" in refused(verb, option, "config.pickle")
    assert not (tmp_path / "trace").exists()
