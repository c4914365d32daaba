"""`SegmentationDataModule`, the base class that reads, checks and augments images and masks."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tvf

from lightning_dist.data.base import IGNORED, ImageDataModule
from lightning_dist.data.image_files import (
    abbreviate,
    load_image,
    open_image,
    pick_evenly,
    upright,
    warn_once,
)
from lightning_dist.data.packed import PackedPaths
from lightning_dist.files.card import Card

MASKS_TO_CHECK = 100  # At most this number of masks of a split is read before training starts.
MOSTLY = 0.95  # A warning is logged for a split with at least this fraction of ignored pixels.


class Pair(NamedTuple):
    """The paths of an image and of its mask."""

    image: Path
    mask: Path


class MaskedImages(Dataset):
    """A data set that reads images and masks, and applies one transform to both.

    Args:
        pairs: the paths of the images and masks. A mask is an image file with one channel or a
            palette, and its pixels are ids from 0 to 255.
        class_ids: the mask id of each class, in the order of the classes.
        ignored_ids: the mask ids of the pixels to ignore, which get the label 255.
        transform: a function that takes an image (3, H, W) and a mask (H, W), both uint8
            tv_tensors, and returns both transformed.

    Raises:
        FileNotFoundError: if files are missing; the message counts all of them.
        ValueError: when a sample is read, if the image and the mask differ in size, or if the mask
            contains an id that is neither in `class_ids` nor in `ignored_ids`.
        OSError: when a sample is read, if a file cannot be decoded.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        class_ids: Sequence[int],
        ignored_ids: Sequence[int],
        transform: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    ) -> None:
        missing = {str(path) for pair in pairs for path in pair if not path.is_file()}
        if missing:
            raise FileNotFoundError(
                f"{len(missing)} of {2 * len(pairs)} images and masks are missing: "
                f"{abbreviate(missing)}: restore them, or remove their counterparts"
            )
        self.paths = PackedPaths(pair.image for pair in pairs)
        self.masks = PackedPaths(pair.mask for pair in pairs)
        self.known = np.zeros(256, dtype=bool)
        self.known[[*class_ids, *ignored_ids]] = True
        self.class_of = np.full(256, IGNORED, dtype=np.uint8)
        self.class_of[list(class_ids)] = np.arange(len(class_ids))
        self.transform = transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        pair = Pair(Path(self.paths[index]), Path(self.masks[index]))
        image = load_image(str(pair.image))
        mask = torch.from_numpy(self.class_of[self.ids(pair.mask)])
        if mask.shape != (image.height, image.width):
            raise ValueError(
                f"{pair.image} has {image.height} x {image.width} pixels and {pair.mask} "
                f"{' x '.join(map(str, mask.shape))}: they must be of one size, after an image is "
                "turned upright by its EXIF orientation"
            )
        return self.transform(tv_tensors.Image(tvf.pil_to_tensor(image)), tv_tensors.Mask(mask))

    def ids(self, path: Path) -> np.ndarray:
        """Return the ids of a mask file, uint8 (H, W).

        Raises:
            ValueError: if the file is no mask, or has an unknown id; the message names the file.
            OSError: if the file cannot be decoded.
        """
        file = open_image(path, "a mask")
        ids = np.array(upright(file))
        if file.mode == "1":  # one bit per pixel, which NumPy reads as bool
            ids = ids.astype(np.uint8)
        if file.format in ("JPEG", "MPO"):
            raise ValueError(f"{path} is a JPEG, which changes the ids of a mask: save it as PNG")
        if ids.ndim != 2 or ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() > 255:
            raise ValueError(
                f"{path} is no mask of ids from 0 to 255 in one channel: it has {ids.dtype} ids "
                f"of shape {' x '.join(map(str, ids.shape))}"
            )
        unknown = {str(i) for i in np.unique(ids) if not self.known[i]}
        if unknown:
            raise ValueError(
                f"{path} has the ids {abbreviate(unknown)}, which are neither ids of a class "
                "nor ignored: correct the mask, or the class_ids and ignored_ids of the data set"
            )
        return ids.astype(np.uint8)

    def count_ids(self, indices: Iterable[int]) -> np.ndarray:
        """Return the number of pixels of each id, int64 (256,), in the masks of some samples."""
        counts = np.zeros(256, dtype=np.int64)
        for index in indices:
            counts += np.bincount(self.ids(Path(self.masks[index])).ravel(), minlength=256)
        return counts


class IgnoredMask:
    """A function that gives an image a mask that is ignored everywhere, and transforms both.

    Args:
        transform: the transform of an image and its mask; see `MaskedImages`.
    """

    def __init__(self, transform: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
        self.transform = transform

    def __call__(self, image: Image.Image) -> tuple[Tensor, Tensor]:
        mask = torch.full((image.height, image.width), IGNORED, dtype=torch.uint8)
        return self.transform(tv_tensors.Image(tvf.pil_to_tensor(image)), tv_tensors.Mask(mask))


class RandomScale:
    """A transform that resizes an image and its mask by a random factor from a list.

    Args:
        factors: the possible factors, which are equally likely.
    """

    def __init__(self, factors: Sequence[float]) -> None:
        self.factors = list(factors)

    def __call__(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        factor = self.factors[int(torch.randint(len(self.factors), ()))]
        size = [max(round(side * factor), 1) for side in image.shape[-2:]]
        # torchvision resizes a tv_tensors.Mask by the nearest pixel, so its ids are not averaged.
        return tvf.resize(image, size), tvf.resize(mask, size)


class SegmentationDataModule(ImageDataModule):
    """A base class for image files with masks: random scale, crop and flip in training.

    Evaluation uses whole images. A subclass defines `pairs`. By default, the mask ids 0 to
    `num_classes` - 1 are the classes and 255 is ignored; a subclass with other mask ids defines
    `class_ids` and `ignored_ids` too.

    Args:
        crop_size: the height and width of the training crops in pixels. Smaller images are padded
            with the mean colour, and their masks with ignored pixels. None trains on whole images.
        scales: the factors for the random resizing before the crop; with None, training images are
            not resized.
        flip: the probability of mirroring a training image horizontally with its mask.
        eval_size: the height and width in pixels to which evaluation resizes images and masks. With
            None they are not resized, and images of different sizes need `eval_batch_size=1`.
        bgr: use the channel order blue, green, red; `mean` and `std` must have this order too.
        mean: one value per channel, for pixels scaled to 0..1. If published values are for pixels
            in 0..255, divide them by 255.
        std: one value per channel, for pixels scaled to 0..1. A network that expects pixels in
            0..255 needs 1 / 255.
        **settings: the arguments of ImageDataModule.
    """

    def __init__(
        self,
        *,
        crop_size: tuple[int, int] | None = (512, 512),
        scales: Sequence[float] | None = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0),
        flip: float = 0.5,
        eval_size: tuple[int, int] | None = None,
        bgr: bool = False,
        mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        std: Sequence[float] = IMAGENET_DEFAULT_STD,
        eval_batch_size: int | None = 1,
        **settings: Any,
    ) -> None:
        super().__init__(mean=mean, std=std, eval_batch_size=eval_batch_size, **settings)
        self.crop_size = None if crop_size is None else tuple(crop_size)
        self.scales = scales
        self.flip = flip
        self.eval_size = None if eval_size is None else list(eval_size)
        self.bgr = bgr

    def pairs(self, split: str) -> list[Pair]:
        """Return the files of a split: "train", "val" or "test"."""
        raise NotImplementedError

    @property
    def class_ids(self) -> Sequence[int]:
        """The mask id of each class, in the order of the classes."""
        return range(self.num_classes)

    @property
    def ignored_ids(self) -> Sequence[int]:
        """The mask ids of the pixels to ignore."""
        return (IGNORED,)

    def train_transform(self) -> v2.Compose:
        """Return the training transform, which scales, crops and mirrors an image and its mask."""
        steps: list[Any] = []
        if self.scales is not None:
            steps.append(RandomScale(self.scales))
        if self.crop_size is not None:
            # The crop runs before the normalisation, which converts the mean colour to 0.
            colour = [round(255 * m) for m in (self.mean[::-1] if self.bgr else self.mean)]
            fill = {tv_tensors.Image: colour, tv_tensors.Mask: IGNORED}
            steps.append(v2.RandomCrop(self.crop_size, pad_if_needed=True, fill=fill))
        return v2.Compose([*steps, v2.RandomHorizontalFlip(self.flip), self._to_tensors])

    def unlabeled_transform(self) -> "IgnoredMask":
        """Return the function that makes a training sample of an image without a mask."""
        return IgnoredMask(self.train_transform())

    def eval_transform(self) -> v2.Compose:
        """Return the evaluation transform, which resizes an image and its mask to `eval_size`."""
        steps = [] if self.eval_size is None else [v2.Resize(self.eval_size)]
        return v2.Compose([*steps, self._to_tensors])

    def card(self) -> Card:
        """Return the card of these data, with the mask ids of the classes."""
        return dataclasses.replace(super().card(), mask_ids=tuple(self.class_ids))

    def image_facts(self) -> dict[str, Any]:
        """Return the fields of a Card that describe the images in evaluation."""
        facts = super().image_facts() | {"channels": "bgr" if self.bgr else "rgb"}
        if self.eval_size is None:
            return facts
        how = {"crop_mode": "squash", "crop_pct": 1.0, "interpolation": "bilinear"}
        return facts | {"size": tuple(self.eval_size), **how}

    def prepare(self, image: Image.Image) -> Tensor:
        """Convert an image as the evaluation loaders do, to a normalised tensor (3, H, W)."""
        pixels = tvf.pil_to_tensor(image.convert("RGB"))
        if self.eval_size is not None:
            pixels = tvf.resize(pixels, self.eval_size)
        return self._normalise(pixels)

    def to_pixels(self, images: Tensor) -> Tensor:
        """Undo the normalisation of a batch (N, 3, H, W), and return its RGB pixels in 0..255."""
        pixels = super().to_pixels(images)
        return pixels.flip(1) if self.bgr else pixels

    def train_dataset(self) -> MaskedImages:
        """Return the training images and masks with augmentation."""
        return self._masked_images("train", self.train_transform())

    def val_dataset(self) -> MaskedImages:
        """Return the validation images and masks."""
        return self._masked_images("val", self.eval_transform())

    def test_dataset(self) -> MaskedImages:
        """Return the test images and masks."""
        return self._masked_images("test", self.eval_transform())

    def check_dataset(self, split: str, dataset: Dataset) -> None:
        """Refuse masks that teach nothing, and warn of classes that do not occur.

        It reads at most `MASKS_TO_CHECK` masks, evenly spaced, and more only while all pixels are
        of one class.

        Raises:
            ValueError: if the pixels that are not ignored are of less than two classes in training,
                or of no class in another split; the message lists the ids found.
        """
        if not isinstance(dataset, MaskedImages):
            return super().check_dataset(split, dataset)
        some = pick_evenly(len(dataset), MASKS_TO_CHECK)
        counts = dataset.count_ids(some)
        least = min(2, self.num_classes) if split == "train" else 1
        if self._occurring(counts) < least and len(some) < len(dataset):
            counts, some = dataset.count_ids(range(len(dataset))), list(range(len(dataset)))
        of = f"{len(some)} of {len(dataset)} " if len(some) < len(dataset) else ""
        where = f"the {of}{split} masks of {self.location}"
        found = ", ".join(map(str, counts.nonzero()[0]))
        meaning = (
            f"they contain the ids {found}; the classes have the ids {_as_ranges(self.class_ids)}, "
            f"and {_as_ranges(self.ignored_ids)} are ignored"
        )
        if self._occurring(counts) < least:
            raise ValueError(
                f"{where} have pixels of {'one class' if least == 2 else 'no class'} only: "
                f"{meaning}. Set reduce_zero_label and num_classes, or class_ids, such as [0, 255]"
            )
        missing = {str(i) for i in self.class_ids if not counts[i]}
        # Rare classes may be missing from the masks that were read. Only many missing classes are a
        # sign of wrong ids.
        if split == "train" and missing and (not of or 3 * len(missing) > self.num_classes):
            warn_once(f"{where} have no pixel of the ids {abbreviate(missing)}: {meaning}")
        ignored = 1 - counts[list(self.class_ids)].sum() / counts.sum()
        if ignored > MOSTLY:
            warn_once(f"{where} have {ignored:.1%} of ignored pixels: {meaning}")

    def _occurring(self, counts: np.ndarray) -> int:
        """Return the number of classes that occur, given the number of pixels of each id."""
        return int((counts[list(self.class_ids)] > 0).sum())

    def _masked_images(self, split: str, transform: v2.Compose) -> MaskedImages:
        return MaskedImages(self.pairs(split), self.class_ids, self.ignored_ids, transform)

    def _to_tensors(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return self._normalise(image.as_subclass(Tensor)), mask.as_subclass(Tensor).long()

    def _normalise(self, pixels: Tensor) -> Tensor:
        return super()._normalise(pixels.flip(0) if self.bgr else pixels)


def _as_ranges(ids: Sequence[int]) -> str:
    """Format ids with ranges, for messages.

    Example:
        >>> _as_ranges([0, 1, 2, 255])
        '0 to 2, 255'
    """
    parts: list[list[int]] = []
    for number in sorted(ids):
        if parts and parts[-1][-1] == number - 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ", ".join(" to ".join(map(str, part)) for part in parts) or "none"
