"""Tests that image files of every kind are found, and read upright with the right brightness."""

import logging
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lightning_dist.data.image_files import class_folders, find_images, load_image, warn_once
from lightning_dist.data.image_folder import ImageFolderDataModule

GREY = np.arange(0, 65536, 4096, dtype=np.uint16).reshape(4, 4)


@pytest.fixture(autouse=True)
def _fresh_warnings():
    warn_once.cache_clear()


def write(path: Path, size: tuple[int, int] = (4, 4)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "red").save(path, format="PNG")
    return path


def write_turned(path: Path, orientation: int) -> None:
    """Write a picture of 6 x 4 pixels, white at its top left, as a turned camera stores it."""
    pixels = np.zeros((4, 6), np.uint8)
    pixels[:2, :2] = 255
    stored = {1: pixels, 3: np.rot90(pixels, 2), 6: np.rot90(pixels, 1), 8: np.rot90(pixels, -1)}
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored[orientation]).save(path, exif=exif)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tiff"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_a_picture_is_turned_upright(tmp_path: Path, orientation: int, suffix: str):
    write_turned(tmp_path / f"x{suffix}", orientation)
    pixels = np.array(load_image(str(tmp_path / f"x{suffix}")))[..., 0]
    assert pixels.shape == (4, 6)
    assert pixels[:2, :2].min() > 200
    assert pixels[2:, 4:].max() < 60


def palette() -> Image.Image:
    image = Image.fromarray(np.array([[0, 1]], np.uint8), mode="L").convert("P")
    image.putpalette([10, 20, 30, 200, 210, 220])
    return image


READABLE: dict[str, tuple[Callable[[], Image.Image], str, list[int]]] = {
    # an image, the format of its file, and the red values of its pixels
    "16 bits": (lambda: Image.fromarray(GREY), "png", [round(4096 * i / 257) for i in range(16)]),
    "16 bits, TIFF": (
        lambda: Image.fromarray(GREY),
        "tiff",
        [round(4096 * i / 257) for i in range(16)],
    ),
    "16 bits, white": (lambda: Image.fromarray(np.full((1, 1), 65535, np.uint16)), "png", [255]),
    "1 bit": (lambda: Image.fromarray(np.array([[True, False]])), "png", [255, 0]),
    "8 bits": (lambda: Image.new("L", (1, 1), 77), "png", [77]),
    "grey with alpha": (lambda: Image.new("LA", (1, 1), (77, 9)), "png", [77]),
    "colour with alpha": (lambda: Image.new("RGBA", (1, 1), (77, 1, 2, 9)), "png", [77]),
    "palette": (palette, "png", [10, 200]),
}


@pytest.mark.parametrize("name", READABLE)
def test_an_image_of_any_mode_keeps_its_brightness(tmp_path: Path, name: str):
    make, suffix, red = READABLE[name]
    make().save(tmp_path / f"x.{suffix}")
    image = load_image(str(tmp_path / f"x.{suffix}"))
    assert image.mode == "RGB"
    assert np.array(image)[..., 0].ravel().tolist() == red


@pytest.mark.parametrize(
    ("dtype", "message"),
    [(np.float32, "floating-point pixels"), (np.int32, "32-bit pixels")],
)
def test_pixels_of_unknown_range_are_refused_with_the_file(tmp_path: Path, dtype, message):
    Image.fromarray(np.ones((2, 2), dtype)).save(tmp_path / "x.tiff")
    with pytest.raises(ValueError, match=rf"x\.tiff has {message}"):
        load_image(str(tmp_path / "x.tiff"))


def test_broken_exif_data_do_not_hide_an_image(tmp_path: Path):
    Image.new("RGB", (3, 2)).save(tmp_path / "x.jpg", exif=b"Exif\0\0nonsense")
    assert load_image(str(tmp_path / "x.jpg")).size == (3, 2)


def test_linked_folders_are_read_and_links_back_are_not_followed(tmp_path: Path):
    write(tmp_path / "elsewhere" / "b.png")
    write(tmp_path / "split" / "a.png")
    (tmp_path / "split" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "split" / "again").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "split" / "back").symlink_to(tmp_path / "split")
    (tmp_path / "elsewhere" / "to_split").symlink_to(tmp_path / "split")
    found = [str(path.relative_to(tmp_path / "split")) for path in find_images(tmp_path / "split")]
    assert found == ["a.png", "again/b.png", "linked/b.png"]


def test_what_is_left_out_is_listed_once(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    kept = ["a.png", "b.jfif", "c.JPG", "sub/d.webp"]
    left = [".hidden.png", "._a.png", ".ipynb_checkpoints/a.png", "__MACOSX/a.png"]
    for name in (*kept, *left, "e.heic", "notes.txt"):
        write(tmp_path / name)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert [str(p.relative_to(tmp_path)) for p in find_images(tmp_path)] == kept
    assert len(caplog.records) == 2
    for name in (".hidden.png", "._a.png", ".ipynb_checkpoints", "__MACOSX", "e.heic"):
        assert name in caplog.text
    assert "notes.txt" not in caplog.text


def test_hidden_folders_are_no_classes_and_their_files_no_images(tmp_path: Path):
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            write(tmp_path / split / name / "one.jfif")
            (tmp_path / split / name / "._one.jfif").write_bytes(b"resource fork")
        write(tmp_path / split / ".ipynb_checkpoints" / "one.png")
        write(tmp_path / split / "__MACOSX" / "one.png")
    (tmp_path / "more").mkdir()
    write(tmp_path / "more" / "two.png")
    os.symlink(tmp_path / "more", tmp_path / "train" / "dog" / "more")
    data = ImageFolderDataModule(root=tmp_path, image_size=4)
    assert class_folders(tmp_path / "train") == data.class_names == ["cat", "dog"]
    assert [label for _, label in data.train_dataset()] == [0, 1, 1]
