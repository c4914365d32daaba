"""Reading image files and folders of classes; errors name what is wrong in them."""

from collections.abc import Callable
from pathlib import Path

from PIL import Image
from torch import Tensor
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import default_loader, find_classes

Transform = Callable[[Image.Image], Tensor]


def open_folder(
    path: Path, transform: Transform, class_names: list[str], expected_by: Path
) -> ImageFolder:
    """The images of one folder for each class, whose classes must be the named ones.

    Args:
        path: folder of the class folders.
        transform: makes the tensor of an image.
        class_names: the classes that must be there.
        expected_by: the file or folder that names them, for the error message.

    Raises:
        FileNotFoundError: if the folder is missing, or holds no image of some class.
        ValueError: if the classes are others.
    """
    found = class_folders(path)
    if found != sorted(class_names):
        raise ValueError(
            f"{path} and {expected_by} differ in their classes: "
            f"missing from {path.name}: {few(set(class_names) - set(found))}; "
            f"only there: {few(set(found) - set(class_names))}"
        )
    try:
        return ImageFolder(path, transform, loader=load_image)
    except FileNotFoundError as error:  # a class without images; it names no path
        raise FileNotFoundError(f"{path}: {error}") from error


def class_folders(path: Path) -> list[str]:
    """Names of the class folders of `path`, in order."""
    try:
        return find_classes(path)[0]
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{path} {'holds no class folder' if path.is_dir() else 'is missing'}: expected a "
            f"folder of images for each class, {path / 'CLASS' / 'FILE'}"
        ) from error


def load_image(path: str) -> Image.Image:
    """Read an image file as RGB; an OSError names the file."""
    try:
        return default_loader(path)
    except (OSError, SyntaxError) as error:  # PIL's for a broken PNG is a SyntaxError
        raise OSError(f"{path} cannot be read as an image ({error}): restore the file") from error


def few(names: set[str]) -> str:
    """The first names of a set, and how many more there are."""
    shown = ", ".join(sorted(names)[:5]) or "none"
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")
