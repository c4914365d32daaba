"""Functions that read image files and class folders, with errors that name the file or folder."""

from collections.abc import Callable
from pathlib import Path

from PIL import Image
from torch import Tensor
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import default_loader, find_classes

Transform = Callable[[Image.Image], Tensor]


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
    try:
        return ImageFolder(path, transform, loader=load_image)
    except FileNotFoundError as error:  # torchvision's message names the empty classes, but no path
        raise FileNotFoundError(f"{path}: {error}") from error


def class_folders(path: Path) -> list[str]:
    """Return the names of the class folders in `path`, sorted.

    Raises:
        FileNotFoundError: if `path` is missing or contains no folder.
    """
    try:
        return find_classes(path)[0]
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{path} {'holds no class folder' if path.is_dir() else 'is missing'}: expected a "
            f"folder of images for each class, {path / 'CLASS' / 'FILE'}"
        ) from error


def load_image(path: str) -> Image.Image:
    """Read an image file as RGB.

    Raises:
        OSError: if the file is missing or cannot be decoded; the message names the file.
    """
    try:
        return default_loader(path)
    except (OSError, SyntaxError) as error:  # Pillow raises SyntaxError for a broken PNG
        raise OSError(f"{path} cannot be read as an image ({error}): restore the file") from error


def abbreviate(names: set[str]) -> str:
    """Format the first five names of a set and the number of the others, for error messages."""
    first = ", ".join(sorted(names)[:5]) or "none"
    return first + (f" and {len(names) - 5} more" if len(names) > 5 else "")
