"""Tests that a data folder from elsewhere writes nothing, and that reading it ends."""

import json
import os
import subprocess
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from hostile import contacts, watched
from lightning_dist.data.detection import VOCDetectionDataModule, YoloDataModule
from lightning_dist.data.huggingface import HuggingFaceDataModule
from lightning_dist.data.image_files import find_images, warn_once
from lightning_dist.data.segmentation import CityscapesDataModule, VOC2012DataModule
from lightning_dist.data.tiny_imagenet import TinyImageNetDataModule
from lightning_dist.files.text import read_bounded


def test_archives_of_cityscapes_are_not_unpacked(tmp_path: Path):
    """torchvision would unpack the archives, and write through a link to a folder elsewhere."""
    (tmp_path / "victim").mkdir()
    root = tmp_path / "root"
    root.mkdir()
    (root / "leftImg8bit").symlink_to(tmp_path / "victim")
    for name in ("leftImg8bit_trainvaltest.zip", "gtFine_trainvaltest.zip"):
        with zipfile.ZipFile(root / name, "w") as archive:
            archive.writestr("leftImg8bit/.profile", "evil")
    with pytest.raises(FileNotFoundError, match="has no Cityscapes"):
        CityscapesDataModule(root=root).val_dataset()
    assert not list((tmp_path / "victim").iterdir())


def test_folders_with_links_to_each_other_are_read_in_bounded_time(tmp_path: Path):
    """There are 7 * 6 * ... = 13,699 paths through these 7 folders, and a billion through 12."""
    for i in range(7):
        (tmp_path / f"d{i}").mkdir()
        Image.new("L", (1, 1)).save(tmp_path / f"d{i}" / "a.png")
        for j in range(7):
            (tmp_path / f"d{i}" / f"to{j}").symlink_to(tmp_path / f"d{j}")
    assert 7 <= len(find_images(tmp_path)) <= 7 * 32


def test_a_link_to_a_folder_above_is_not_followed(tmp_path: Path):
    (tmp_path / "images").mkdir()
    Image.new("L", (1, 1)).save(tmp_path / "images" / "a.png")
    Image.new("L", (1, 1)).save(tmp_path / "outside.png")
    (tmp_path / "images" / "all").symlink_to(tmp_path)
    assert [path.name for path in find_images(tmp_path / "images")] == ["a.png"]


@pytest.mark.parametrize("kind", ["a pipe", "a device", "a sparse file"])
@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("val/val_annotations.txt", TinyImageNetDataModule),
        ("VOCdevkit/VOC2012/ImageSets/Main/val.txt", VOCDetectionDataModule),
        ("VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt", VOC2012DataModule),
        ("labels/val/a.txt", lambda root: YoloDataModule(root=root, class_names=["a"])),
    ],
    ids=["tiny", "voc", "voc masks", "yolo"],
)
def test_a_list_that_never_ends_is_not_read(tmp_path: Path, name, make, kind):
    (tmp_path / "images" / "val").mkdir(parents=True)
    Image.new("L", (8, 8)).save(tmp_path / "images" / "val" / "a.png")
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a device":
        path.symlink_to("/dev/zero")
    else:
        path.touch()
        os.truncate(path, 2**40)
    with pytest.raises((OSError, ValueError), match=r"no regular file|more than \d+ bytes"):
        make(root=tmp_path).val_dataset()


def test_only_a_regular_file_of_limited_size_is_read(tmp_path: Path):
    (tmp_path / "a").write_bytes(b"12345")
    assert read_bounded(tmp_path / "a", 5) == b"12345"
    with pytest.raises(ValueError, match="more than 4 bytes"):
        read_bounded(tmp_path / "a", 4)
    with pytest.raises(OSError, match="no regular file"):
        read_bounded("/dev/zero")


def test_a_warning_has_no_control_characters(caplog: pytest.LogCaptureFixture):
    warn_once("a\x1b[2J.png has boxes without area")
    assert "\x1b" not in caplog.text
    assert r"a\x1b[2J.png" in caplog.text


def description(path: str) -> str:
    files = "".join(f"  - split: {x}\n    path: '{path}'\n" for x in ("train", "validation"))
    return f"---\nconfigs:\n- config_name: default\n  data_files:\n{files}---\n"


def doubled_aliases() -> str:
    lines = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40)]
    return "---\n" + "\n".join([*lines, "configs: *a39"]) + "\n---\n"


@pytest.mark.parametrize("name", ["README.md", ".huggingface.yaml"])
@pytest.mark.parametrize(
    "text",
    [
        description("http://127.0.0.1:9/x.csv"),
        description("zip://x.csv::http://127.0.0.1:9/a.zip"),
        description("hf://datasets/a/b/x.csv"),
        description("/etc/x.csv"),
        description("../x.csv"),
        "\ufeff" + description("../x.csv"),
        doubled_aliases(),
    ],
    ids=["address", "archive", "hub", "absolute", "above", "after a mark", "aliases"],
)
def test_the_description_of_a_data_set_names_nothing_elsewhere(tmp_path: Path, name, text):
    pytest.importorskip("datasets")
    (tmp_path / name).write_text(text if name == "README.md" else text.replace("---\n", ""))
    (tmp_path / "train.csv").write_text("image,label\n")
    data = HuggingFaceDataModule(path=str(tmp_path), image_size=8)
    with watched() as record, pytest.raises(ValueError, match=f"{name} (lists|contains YAML)"):
        data.val_dataset()
    assert not contacts(record)


@pytest.mark.parametrize("text", ["[", "[]", '{"splits": 3}'])
def test_a_damaged_data_set_is_refused_by_name(tmp_path: Path, text):
    pytest.importorskip("datasets")
    (tmp_path / "dataset_dict.json").write_text(text)
    with pytest.raises(
        ValueError, match=rf"{tmp_path}.* (cannot be read as a data set|is no JSON)"
    ):
        HuggingFaceDataModule(path=str(tmp_path), image_size=8).val_dataset()


def test_folders_that_are_nested_without_end_are_left_out(tmp_path: Path, caplog):
    """Finding the real path of each folder takes a time that grows with the cube of the depth."""
    Image.new("L", (1, 1)).save(tmp_path / "a.png")
    at = os.open(tmp_path, os.O_RDONLY)
    for _ in range(1500):
        os.mkdir("d", dir_fd=at)
        inner = os.open("d", os.O_RDONLY, dir_fd=at)
        os.close(at)
        at = inner
    os.close(at)
    try:
        assert [path.name for path in find_images(tmp_path)] == ["a.png"]
        assert "more than 100 levels deep" in caplog.text
    finally:
        subprocess.run(["rm", "-rf", tmp_path / "d"], check=True)  # rmtree of shutil would fail


@pytest.mark.parametrize("text", ["x:\n" + 60_000 * "- [a]\n", "x: " + 200_000 * "["])
def test_a_description_of_a_data_set_that_takes_minutes_is_refused(tmp_path: Path, text):
    pytest.importorskip("datasets")
    (tmp_path / "README.md").write_text(f"---\n{text}\n---\n")
    with pytest.raises(ValueError, match=r"README\.md (has more than|is no YAML)"):
        HuggingFaceDataModule(path=str(tmp_path), image_size=8).val_dataset()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dataset_dict.json", {"splits": ["../secret"]}),
        ("train/state.json", {"_data_files": [{"filename": "/secret.arrow"}]}),
    ],
)
def test_a_saved_data_set_names_nothing_elsewhere(tmp_path: Path, name, value):
    pytest.importorskip("datasets")
    (tmp_path / "train").mkdir()
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train"]}')
    (tmp_path / name).write_text(json.dumps(value))
    with pytest.raises(ValueError, match=f"{name} lists .*secret.*, which is not in the folder"):
        HuggingFaceDataModule(path=str(tmp_path), image_size=8).val_dataset()


def test_a_folder_with_the_name_of_a_reader_of_datasets_is_the_folder(tmp_path: Path, monkeypatch):
    """By this name `datasets` reads the working folder, and the reader "pandas" unpickles files."""
    pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    (tmp_path / "json").mkdir()
    for folder, image in ((tmp_path, "outside"), (tmp_path / "json", "inside")):
        (folder / "train.json").write_text(json.dumps([{"image": image, "label": 0}]))
    rows = HuggingFaceDataModule(path="json", val_split="train", image_size=8).val_dataset().rows
    assert rows["image"][:] == ["inside"]
    with pytest.raises(ValueError, match="there is no folder pandas"):
        HuggingFaceDataModule(path="pandas", image_size=8).val_dataset()


def test_text_in_the_column_of_images_is_refused_by_row(tmp_path: Path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    (tmp_path / "train.json").write_text(json.dumps([{"image": "a", "label": 0}]))
    data = HuggingFaceDataModule(path=str(tmp_path), val_split="train", image_size=8)
    with pytest.raises(OSError, match=r"row 0 of .* cannot be read as an image: it is a str"):
        data.val_dataset()[0]
