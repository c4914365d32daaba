"""Functions that find and read image files and class folders, with errors that name the file."""

import functools
import itertools
import logging
import os
import stat
import struct
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image
from torch import Tensor
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from lightning_dist.data.packed import LabelledPaths
from lightning_dist.files.text import printable

log = logging.getLogger(__name__)

# A small image can have thousands of broken tags, with a warning for each.
warnings.filterwarnings("ignore", module=r"PIL\.TiffImagePlugin")

Transform = Callable[[Image.Image], Tensor]

SUFFIXES = (*IMG_EXTENSIONS, ".jfif", ".jpe")
UNREADABLE = (  # what Pillow raises for files that it cannot read
    *(OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError),
    *(ArithmeticError, AttributeError, LookupError, MemoryError, TypeError),
)
# Pillow recognises a file by its contents, and hands a PostScript file, whatever its name, to the
# program Ghostscript.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
# Images of formats that this package does not read.
_FOREIGN = {
    *(".arw", ".avif", ".cr2", ".dng", ".gif", ".heic", ".heif", ".jp2", ".jxl", ".nef", ".npy"),
    *(".svg", ".tga"),
}
# Folders that an archive program, a file system or a disk station adds.
_CLUTTER = {"__MACOSX", "@eaDir", "lost+found"}
_MOST_VISITS = 32  # The most paths to one folder through different links.
_MOST_LEVELS = 100  # The most levels of folders inside a folder.
# The marker of a scan in a JPEG file, of which a progressive one has about ten.
_SCAN, _MOST_SCANS, _MOST_OF_SCANS = b"\xff\xda", 200, 64 * 2**20
_ORIENTATION = 0x0112  # the EXIF tag with the direction in which the camera was held

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def open_image_folder(
    path: Path, transform: Transform, class_names: list[str], expected_by: Path
) -> ImageFolder:
    """Create a data set from a folder with a subfolder per class, and check the class names.

    Args:
        path: the folder that contains the class folders.
        transform: a function that converts a PIL image to a tensor (C, H, W).
        class_names: the names of the class folders; other names are refused.
        expected_by: the file or folder that lists these names, for the error message.

    Returns:
        A data set of (image, label). The labels number the class names in sorted order.

    Raises:
        FileNotFoundError: if the folder is missing, or if the folder of a class has no image.
        ValueError: if the names of the class folders are not `class_names`.
    """
    found = class_folders(path)
    if found != sorted(class_names):
        raise ValueError(
            f"{path} and {expected_by} differ in their classes: "
            f"missing from {path.name}: {abbreviate(set(class_names) - set(found))}; "
            f"only there: {abbreviate(set(found) - set(class_names))}"
        )
    return ClassFolders(path, transform)


class ClassFolders(ImageFolder):
    """torchvision's ImageFolder, but with the folders and files that `find_images` finds.

    Args:
        root: the folder that contains the class folders.
        transform: a function that converts a PIL image to a tensor (C, H, W).

    Attributes:
        samples: the path and the label of each image.
        paths: the paths.
        targets: the labels, int64 (N,).
    """

    def __init__(self, root: Path, transform: Transform) -> None:
        super().__init__(root, transform, loader=load_image)
        self.paths, self.targets = self.samples.paths, self.samples.labels

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        """Return the names of the class folders, and a dict from names to labels."""
        names = class_folders(Path(directory))
        return names, {name: label for label, name in enumerate(names)}

    @staticmethod
    def make_dataset(
        directory: str | Path, class_to_idx: dict[str, int], *_: Any, **__: Any
    ) -> LabelledPaths:
        """Return the path and the label of each image.

        Raises:
            FileNotFoundError: if the folder of a class has no image.
        """
        root = Path(directory)
        found: dict[str, list[str]] = {name: [] for name in class_to_idx}
        beside = set()
        for path in find_images(root):
            name = path.relative_to(root).parts[0]
            if name in found:
                found[name].append(str(path))
            else:
                beside.add(str(path))
        if beside:
            warn_once(f"images in no class folder are left out: {abbreviate(beside)}")
        if empty := {name for name, paths in found.items() if not paths}:
            raise FileNotFoundError(
                f"{root}: found no image for the classes {abbreviate(empty)}: "
                f"add images ({', '.join(SUFFIXES)}), or remove the folders"
            )
        labels = (class_to_idx[name] for name, paths in found.items() for _ in paths)
        return LabelledPaths(itertools.chain.from_iterable(found.values()), labels)


def class_folders(path: Path) -> list[str]:
    """Return the names of the class folders in `path`, sorted, without hidden folders.

    Raises:
        FileNotFoundError: if `path` is missing or contains no folder.
    """
    names = sorted(
        entry.name
        for entry in (os.scandir(path) if path.is_dir() else [])
        if entry.is_dir() and not _is_clutter(entry.name)
    )
    if not names:
        raise FileNotFoundError(
            f"{path} {'holds no class folder' if path.is_dir() else 'is missing'}: expected a "
            f"folder of images for each class, {path / 'CLASS' / 'FILE'}"
        )
    return names


def find_images(folder: Path) -> list[Path]:
    """Return the sorted paths of the image files in a folder, at any depth.

    Linked folders are followed. Files and folders whose names begin with a dot, folders such as
    `__MACOSX`, and images of a format that cannot be read are left out, and a warning lists them.

    Args:
        folder: the folder; if it is missing, the list is empty.
    """
    files = find_files(folder)
    if foreign := {str(path) for path in files if path.suffix.lower() in _FOREIGN}:
        warn_once(
            f"images of a format that is not read are left out: {abbreviate(foreign)}: convert "
            f"them to one of {', '.join(SUFFIXES)}"
        )
    return [path for path in files if path.suffix.lower() in SUFFIXES]


def find_files(folder: Path) -> list[Path]:
    """Return the sorted paths of all files in a folder, at any depth; see `find_images`."""
    left_out: set[str] = set()
    files = sorted(_walk(folder, left_out))
    if left_out:
        warn_once(f"files and folders in {folder} that are left out: {abbreviate(left_out)}")
    return files


def _walk(folder: Path, left_out: set[str]) -> Iterator[Path]:
    # For each folder: the real paths of it and of those above it.
    above: dict[str, set[str]] = {}
    start = {str(path) for path in Path(os.path.realpath(folder)).parents}
    visits: Counter[str] = Counter()
    for top, folders, files in os.walk(folder, followlinks=True):
        if top.count(os.sep) - str(folder).count(os.sep) > _MOST_LEVELS:
            left_out.add(f"{top} (more than {_MOST_LEVELS} levels deep)")
            folders.clear()
            continue
        place, parents = os.path.realpath(top), above.get(os.path.dirname(top), start)
        visits[place] += 1
        # Folders with links to each other have one path for each order of these folders.
        if place in parents or visits[place] > _MOST_VISITS:
            left_out.add(f"{top} (a link back to {place})")
            folders.clear()
            continue
        above[top] = parents | {place}
        left_out |= {str(Path(top, name)) for name in (*folders, *files) if _is_clutter(name)}
        folders[:] = sorted(name for name in folders if not _is_clutter(name))
        yield from (Path(top, name) for name in files if not _is_clutter(name))


def _is_clutter(name: str) -> bool:
    return name.startswith(".") or name in _CLUTTER


def load_image(path: str) -> Image.Image:
    """Read an image file as RGB, turned upright; see `to_rgb`.

    Raises:
        OSError: if the file is missing, is no regular file or cannot be decoded; the message names
            the file.
        ValueError: if its pixels have no known range; the message names the file.
    """
    return to_rgb(open_image(Path(path)), path)


def open_image(path: Path, kind: str = "an image") -> Image.Image:
    """Open an image file and decode its pixels; see `decode_image`.

    Args:
        path: the file.
        kind: what the file should be, for the error message.

    Raises:
        OSError: if the file is missing or cannot be decoded; the message names the file.
    """
    try:
        _refuse_special_file(path)
        # Pillow 13 maps an uncompressed TIFF into memory when it gets a path, and then exchanges
        # the width and the height if EXIF turns the image.
        with path.open("rb") as file:
            return decode_image(file)
    except UNREADABLE as error:
        raise OSError(f"{path} cannot be read as {kind} ({error}): restore the file") from error


def decode_image(file: BinaryIO) -> Image.Image:
    """Decode an image in one of the :data:`FORMATS`.

    Args:
        file: the open file.

    Raises:
        Exception: one of :data:`UNREADABLE`, if it cannot be decoded.
    """
    image = Image.open(file, formats=FORMATS)
    most = Image.MAX_IMAGE_PIXELS
    if most is not None and image.width * image.height > most:  # Pillow refuses from twice as many
        raise ValueError(f"it has {image.width} x {image.height} pixels, more than {most}")
    if image.format in ("JPEG", "MPO"):
        _refuse_many_scans(file)
    image.load()
    return image


def _refuse_many_scans(file: BinaryIO) -> None:
    """Raise an error for a JPEG file that takes minutes, because each of its scans has all pixels.

    Raises:
        ValueError: if the file has much more scans than a progressive JPEG.
    """
    place = file.tell()
    file.seek(0)
    if file.read(_MOST_OF_SCANS).count(_SCAN) > _MOST_SCANS:
        raise ValueError(f"it has more than {_MOST_SCANS} scans")
    file.seek(place)


def _refuse_special_file(path: Path) -> None:
    """Raise an OSError if the file is a pipe or a device, whose contents may never end."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError("it is no regular file")


def to_rgb(image: Image.Image, name: str = "an image") -> Image.Image:
    """Convert an image of any mode to RGB, turned upright as its EXIF orientation says.

    Grey values of 16 bits, 0 to 65535, are scaled to 0..255, where Pillow would clip them.

    Args:
        image: the image.
        name: the name of the image, for the error message.

    Raises:
        ValueError: if its pixels are floating-point or 32-bit numbers, whose range is unknown.
    """
    sixteen_bits = image.mode.startswith("I;16") or (
        # Pillow before version 11 gives a 16-bit PNG this mode.
        image.mode == "I" and image.format in ("PNG", "PPM")
    )
    image = upright(image)
    if sixteen_bits:
        grey = np.asarray(image).astype(np.uint32)
        grey += 128
        grey //= 257
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        kind = "32-bit" if image.mode == "I" else "floating-point"
        raise ValueError(
            f"{name} has {kind} pixels, whose range is unknown: save it with 8 or 16 bits"
        )
    return image.convert("RGB")


def image_size(path: Path) -> tuple[int, int]:
    """Return the width and height of an image file, upright, without decoding its pixels.

    Raises:
        OSError: if the file cannot be read; the message names the file.
    """
    try:
        _refuse_special_file(path)
        with Image.open(path, formats=FORMATS) as file:
            width, height = file.size
            # Pillow turns a TIFF itself, and has already exchanged the sides of its size.
            turned = _orientation(file) >= 5 and file.format != "TIFF"
            return (height, width) if turned else (width, height)
    except UNREADABLE as error:
        raise OSError(f"{path} cannot be read as an image ({error}): restore the file") from error


def upright(image: Image.Image) -> Image.Image:
    """Return an image turned as its EXIF orientation says; unreadable EXIF data are ignored.

    Pillow's exif_transpose writes the EXIF data again, which fails for damaged ones.
    """
    turn = _TURNS.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 for upright; from 5 on, width and height are exchanged."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except (SyntaxError, ValueError, KeyError, TypeError, struct.error):
        return 1
    return value if value in range(2, 9) else 1


def abbreviate(names: set[str]) -> str:
    """Format the first five names of a set and the number of the others, for error messages."""
    first = ", ".join(printable(name, 200) for name in sorted(names)[:5]) or "none"
    return first + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def pick_evenly(count: int, most: int) -> list[int]:
    """Return at most `most` of the indices 0 to `count` - 1, evenly spaced.

    Example:
        >>> pick_evenly(10, most=4)
        [0, 2, 5, 7]
    """
    return [index * count // min(count, most) for index in range(min(count, most))]


@functools.cache
def warn_once(message: str) -> None:
    """Log a warning, unless this process has logged the same warning before."""
    log.warning("%s", printable(message))
