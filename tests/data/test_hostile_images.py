"""Tests that only images of the usual formats are decoded, and only regular files are read."""

import os
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin

from hostile import contacts, watched
from lightning_dist.cli.errors import one_line_errors
from lightning_dist.data.huggingface import HuggingFaceDataModule, RowImages
from lightning_dist.data.image_files import FORMATS, image_size, load_image
from lightning_dist.data.image_folder import ImageFolderDataModule
from lightning_dist.data.segmentation_base import MaskedImages, Pair

POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.fixture
def ghostscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a program gs before all others, which creates a file when it is called."""
    from PIL import EpsImagePlugin

    program, trace = tmp_path / "bin" / "gs", tmp_path / "called"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {trace}\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # Pillow stores what it has found
    assert shutil.which("gs") == str(program)
    return trace


def test_postscript_by_another_name_is_not_run(tmp_path, ghostscript):
    path = tmp_path / "a.png"
    path.write_bytes(POSTSCRIPT)
    for read in (lambda: load_image(str(path)), lambda: image_size(path)):
        with pytest.raises(OSError, match=r"a\.png cannot be read as an image"):
            read()
    assert not ghostscript.exists()


def test_postscript_is_not_run_as_a_mask(tmp_path, ghostscript):
    image, mask = tmp_path / "a.png", tmp_path / "mask.png"
    Image.new("RGB", (8, 8)).save(image)
    mask.write_bytes(POSTSCRIPT)
    with pytest.raises(OSError, match=r"mask\.png cannot be read as a mask"):
        MaskedImages([Pair(image, mask)], [0], [255], lambda *parts: parts)[0]
    assert not ghostscript.exists()


def test_postscript_is_not_run_in_a_data_set(tmp_path, ghostscript):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = {"image": [{"bytes": POSTSCRIPT, "path": "a.png"}], "label": [0]}
    split = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"train": split, "validation": split}).save_to_disk(tmp_path / "rows")
    data = HuggingFaceDataModule(path=str(tmp_path / "rows"), image_size=8)
    with pytest.raises(OSError, match=r"row 0 of .* cannot be read as an image"):
        data.val_dataset()[0]
    assert not ghostscript.exists()


def test_the_address_of_an_image_in_a_data_set_is_not_contacted():
    rows = [{"image": {"bytes": None, "path": "http://127.0.0.1:9/a.png"}, "label": 0}]
    columns = {"image_column": "image", "label_column": "label"}
    images = RowImages(rows, lambda image: image, location="rows", split="train", **columns)
    with watched() as record, pytest.raises(OSError, match="row 0 of rows cannot be read"):
        images[0]
    assert not contacts(record)


@pytest.mark.parametrize("kind", FORMATS)
def test_the_usual_formats_are_read(tmp_path, kind):
    pixels = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
    options = {"lossless": True} if kind == "WEBP" else {}
    Image.fromarray(pixels).save(tmp_path / "a.png", kind, **options)
    found = load_image(str(tmp_path / "a.png"))
    assert (found.mode, found.size) == ("RGB", (8, 8))
    if kind not in ("GIF", "JPEG"):
        np.testing.assert_array_equal(np.asarray(found), pixels)


@pytest.mark.parametrize("kind", ["a pipe", "a device", "a folder", "nothing"])
def test_only_a_regular_file_is_read(tmp_path, kind):
    path = tmp_path / "a.png"
    if kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a device":
        path.symlink_to("/dev/zero")
    elif kind == "a folder":
        path.mkdir()
    with pytest.raises(OSError, match=r"a\.png cannot be read as an image"):
        load_image(str(path))


@pytest.mark.parametrize("kind", ["a pipe", "a damaged file"])
def test_a_bad_image_in_a_worker_is_one_line_with_its_name(tmp_path, capsys, kind):
    for name in ("a", "b"):
        (tmp_path / "train" / name).mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / "train" / name / "good.png")
    bad = tmp_path / "train" / "b" / "good.png"
    bad.unlink()
    os.mkfifo(bad) if kind == "a pipe" else bad.write_bytes(b"\x89PNG\r\n")
    data = ImageFolderDataModule(root=tmp_path, val_dir="train", image_size=8, num_workers=1)
    loader = data.val_dataloader()
    with pytest.raises(SystemExit), one_line_errors():
        list(loader)
    loader._iterator._shutdown_workers()  # The garbage collector would wait for the worker.
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{bad} cannot be read as an image" in line


def test_a_huge_image_is_an_error_that_names_the_file(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    Image.new("1", (64, 64)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(OSError, match=r"a\.png cannot be read as an image"):
        load_image(str(path))


def test_a_large_text_in_an_image_is_an_error_that_names_the_file(tmp_path):
    path, text = tmp_path / "a.png", PngImagePlugin.PngInfo()
    text.add_text("note", "x" * (PngImagePlugin.MAX_TEXT_CHUNK + 1), zip=True)
    Image.new("L", (2, 2)).save(path, pnginfo=text)
    with pytest.raises(OSError, match=r"a\.png cannot be read as an image"):
        load_image(str(path))


@pytest.mark.parametrize("kind", ["L", "I;16"])
def test_an_image_that_pillow_only_warns_of_is_refused(tmp_path, monkeypatch, kind):
    """Pillow decodes up to twice its limit, which takes gigabytes."""
    path = tmp_path / "a.png"
    Image.new(kind, (12, 10)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(OSError, match=r"a\.png cannot be read .*12 x 10 pixels, more than 100"):
        load_image(str(path))


def test_exif_data_that_cannot_be_written_do_not_hide_an_image(tmp_path, monkeypatch):
    """Pillow's exif_transpose raises struct.error for some, because it writes the data again."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (3, 2)).save(tmp_path / "a.jpg", exif=exif)

    def broken(self: Image.Exif, offset: int = 8) -> bytes:
        raise struct.error("required argument is not an integer")

    monkeypatch.setattr(Image.Exif, "tobytes", broken)
    assert load_image(str(tmp_path / "a.jpg")).size == (2, 3)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_pillow_turns_them(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.arange(18, dtype=np.uint8).reshape(2, 3, 3)
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    np.testing.assert_array_equal(np.asarray(load_image(str(tmp_path / "a.png"))), expected)


def many_scans(side: int, scans: int) -> bytes:
    """Return a progressive JPEG file; a scan with a few bytes decodes to all pixels."""

    def segment(marker: int, content: bytes) -> bytes:
        return bytes([255, marker]) + struct.pack(">H", len(content) + 2) + content

    blocks = (side // 8) ** 2
    start = segment(0xDB, b"\0" + 64 * b"\1")
    start += segment(0xC2, b"\x08" + struct.pack(">HH", side, side) + b"\1\1\x11\0")
    # Two codes of one bit: "no difference" for the mean of a block, "end" for up to 32767 blocks.
    start += segment(0xC4, b"\0\1" + 15 * b"\0" + b"\0") + segment(
        0xC4, b"\x10\1" + 15 * b"\0" + b"\xe0"
    )
    means = segment(0xDA, b"\1\1\0\0\0\0") + bytes(-(-blocks // 8))
    empty = segment(0xDA, b"\1\1\0\1\x3f\0") + (b"\x7f\xff\0" * -(-blocks // 32767))[:-1]
    return b"\xff\xd8" + start + means + scans * empty + b"\xff\xd9"


@pytest.mark.parametrize(("scans", "read"), [(20, True), (1000, False)])
def test_a_jpeg_with_thousands_of_scans_is_not_decoded(tmp_path, scans, read):
    """A scan of 12 bytes takes as long as decoding all pixels."""
    (tmp_path / "a.jpg").write_bytes(many_scans(64, scans))
    if read:
        assert load_image(str(tmp_path / "a.jpg")).size == (64, 64)
    else:
        with pytest.raises(OSError, match=r"a\.jpg cannot be read as an image .* than 200 scans"):
            load_image(str(tmp_path / "a.jpg"))
