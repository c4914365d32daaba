"""ImageNet, and any other data set in a folder for each class, with timm's augmentation."""

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from torch import Tensor
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import default_loader, find_classes

from lightning_dist.data.base import ImageDataModule

Transform = Callable[[Image.Image], Tensor]


class TimmTransformDataModule(ImageDataModule):
    """Image files through timm's `create_transform`: by default ImageNet's baseline recipe.

    Training takes a random resized crop and a random flip; evaluation resizes the shorter side to
    image_size / crop_pct and takes the centre. Mixup and CutMix mix whole batches: the
    LightningModule applies them.

    Args:
        image_size: side of the crops in pixels.
        crop_pct: what the centre crop keeps of the resized image's shorter side.
        interpolation: "bilinear", "bicubic" or, for training, "random".
        auto_augment: timm's string for RandAugment and its like, such as "rand-m9-mstd0.5".
        re_prob: probability of random erasing.
        re_mode: what erasing fills in: "pixel" (noise), "rand" (one colour) or "const" (the mean).
        color_jitter: strength of colour jitter; timm leaves it out where there is `auto_augment`.
        mean: of each channel, for the normalisation.
        std: of each channel, likewise.
        **settings: see ImageDataModule.
    """

    def __init__(
        self,
        *,
        image_size: int = 224,
        crop_pct: float = 0.875,
        interpolation: str = "bilinear",
        auto_augment: str | None = None,
        re_prob: float = 0.0,
        re_mode: str = "pixel",
        color_jitter: float | None = None,
        mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN,
        std: tuple[float, ...] = IMAGENET_DEFAULT_STD,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self.image_size = image_size
        self.crop_pct = crop_pct
        self.interpolation = interpolation
        self.auto_augment = auto_augment
        self.re_prob = re_prob
        self.re_mode = re_mode
        self.color_jitter = color_jitter
        self.mean = tuple(mean)
        self.std = tuple(std)

    def train_transform(self) -> Transform:
        """Random crop, flip and what the arguments ask for, up to the normalised tensor."""
        return create_transform(
            self.image_size,
            is_training=True,
            interpolation=self.interpolation,
            auto_augment=self.auto_augment,
            re_prob=self.re_prob,
            re_mode=self.re_mode,
            color_jitter=self.color_jitter,  # type: ignore[arg-type]
            mean=self.mean,
            std=self.std,
        )

    def prepare(self, image: Image.Image) -> Tensor:
        """An image as in evaluation."""
        return self.eval_transform()(image.convert("RGB"))

    def eval_transform(self) -> Transform:
        """Resize and centre crop, up to the normalised tensor."""
        return create_transform(
            self.image_size,
            # "random" is of the training transform alone
            interpolation="bilinear" if self.interpolation == "random" else self.interpolation,
            crop_pct=self.crop_pct,
            mean=self.mean,
            std=self.std,
        )


class ImageFolderDataModule(TimmTransformDataModule):
    """Images as ROOT/train/CLASS/FILE and ROOT/val/CLASS/FILE: ImageNet, or any data set like it.

    The labels follow the class folders' names in order.

    Args:
        root: folder that holds the three below.
        train_dir: training images, a folder for each class.
        val_dir: validation images, likewise.
        test_dir: test images, likewise; by default the validation images, as ImageNet's published
            numbers are on them.
        **settings: see TimmTransformDataModule and ImageDataModule.

    Raises:
        FileNotFoundError: when a data set is opened and a folder, or a class's images, are missing.
        ValueError: when it is opened and its classes are not those of the training images.
        OSError: when an image cannot be decoded; names the file.
    """

    def __init__(
        self,
        *,
        root: str | Path = "data/imagenet",
        train_dir: str = "train",
        val_dir: str = "val",
        test_dir: str | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self.root = Path(root)
        self.train_dir = train_dir
        self.val_dir = val_dir
        self.test_dir = test_dir or val_dir
        self.location = str(self.root)

    @cached_property
    def class_names(self) -> list[str]:  # type: ignore[override]
        """Names of the training images' class folders, in order."""
        return class_folders(self.root / self.train_dir)

    @property
    def num_classes(self) -> int:  # type: ignore[override]
        """Number of class folders."""
        return len(self.class_names)

    def train_dataset(self) -> ImageFolder:
        """The training images, augmented."""
        return self._folder(self.train_dir, self.train_transform())

    def val_dataset(self) -> ImageFolder:
        """The validation images."""
        return self._folder(self.val_dir, self.eval_transform())

    def test_dataset(self) -> ImageFolder:
        """The test images, or the validation images where there are no others."""
        return self._folder(self.test_dir, self.eval_transform())

    def _folder(self, name: str, transform: Transform) -> ImageFolder:
        return open_folder(
            self.root / name, transform, self.class_names, expected_by=self.root / self.train_dir
        )


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
