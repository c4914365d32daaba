"""What data sets of images with a mask each share: reading, augmenting, normalising."""

from collections.abc import Callable, Sequence
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

from lightning_dist.data.base import ImageDataModule
from lightning_dist.data.image_files import few, load_image

IGNORED = 255  # the label of pixels that count nowhere


class Pair(NamedTuple):
    """The files of an image and its mask."""

    image: Path
    mask: Path


class MaskedImages(Dataset):
    """Reads images and masks, maps the masks' ids to classes, and transforms both alike.

    Args:
        pairs: the files; masks are single-channel images, or palette ones, of ids 0 to 255.
        class_ids: the id of each class, in the order of the classes.
        ignored_ids: ids of pixels that count nowhere; they become 255.
        transform: takes image (3, H, W) and mask (H, W), uint8 tv_tensors, and returns both.

    Raises:
        FileNotFoundError: if a file is missing; all are looked for at once.
        ValueError: when a pair is read: a mask of another size than its image, or with other ids.
        OSError: when a pair is read and a file cannot be decoded.
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
                f"{len(missing)} of {2 * len(pairs)} images and masks are missing: {few(missing)}: "
                "restore them, or remove their counterparts"
            )
        self.pairs = list(pairs)
        self.known = np.zeros(256, dtype=bool)
        self.known[[*class_ids, *ignored_ids]] = True
        self.class_of = np.full(256, IGNORED, dtype=np.uint8)
        self.class_of[list(class_ids)] = np.arange(len(class_ids))
        self.transform = transform

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        pair = self.pairs[index]
        image = load_image(str(pair.image))
        mask = self._mask(pair.mask)
        if mask.shape != (image.height, image.width):
            raise ValueError(
                f"{pair.image} has {image.height} x {image.width} pixels and {pair.mask} "
                f"{' x '.join(map(str, mask.shape))}: they must be of one size"
            )
        return self.transform(tv_tensors.Image(tvf.pil_to_tensor(image)), tv_tensors.Mask(mask))

    def _mask(self, path: Path) -> Tensor:
        try:
            with Image.open(path) as file:
                ids = np.array(file)
        except (OSError, SyntaxError) as error:
            raise OSError(f"{path} cannot be read as a mask ({error}): restore the file") from error
        if ids.ndim != 2 or ids.min() < 0 or ids.max() > 255:
            raise ValueError(
                f"{path} is no mask of ids from 0 to 255 in one channel, but of {ids.dtype} "
                f"{' x '.join(map(str, ids.shape))}"
            )
        unknown = {str(i) for i in np.unique(ids) if not self.known[i]}
        if unknown:
            raise ValueError(
                f"{path} has the ids {few(unknown)}, which are neither a class's nor ignored: "
                "mend the mask, or the class_ids and ignored_ids of the data set"
            )
        return torch.from_numpy(self.class_of[ids])


class RandomScale:
    """Resize image and mask by a factor drawn from a list, every one alike.

    Args:
        factors: to draw from.
    """

    def __init__(self, factors: Sequence[float]) -> None:
        self.factors = list(factors)

    def __call__(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        factor = self.factors[int(torch.randint(len(self.factors), ()))]
        size = [max(round(side * factor), 1) for side in image.shape[-2:]]
        return tvf.resize(image, size), tvf.resize(mask, size)  # the mask to the nearest pixel


class SegmentationDataModule(ImageDataModule):
    """Image files with masks, augmented by random scale, crop and flip; evaluated whole.

    A subclass provides `pairs`, `class_ids` and `ignored_ids`.

    Args:
        crop_size: height and width of the training crops in pixels, padded where the image is
            smaller with the mean and ignored labels; None trains on whole images.
        scales: factors of the random resizing before the crop; None for none.
        flip: probability of mirroring.
        eval_size: height and width to which images and masks are resized in evaluation; None keeps
            theirs, and then images of several sizes need `eval_batch_size` 1.
        bgr: give the channels in the order blue, green, red; `mean` and `std` are in that order.
        mean: of each channel, for pixels scaled to 0..1: in a convention of 0..255, over 255.
        std: of each channel, likewise; 1 / 255 leaves pixels in 0..255.
        **settings: see ImageDataModule.
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
        """The files of "train", "val" or "test"."""
        raise NotImplementedError

    @property
    def class_ids(self) -> Sequence[int]:
        """The masks' id of each class."""
        return range(self.num_classes)

    @property
    def ignored_ids(self) -> Sequence[int]:
        """The masks' ids of pixels that count nowhere."""
        return (IGNORED,)

    def train_transform(self) -> v2.Compose:
        """Random scale, crop and flip, of an image and its mask."""
        steps: list[Any] = []
        if self.scales is not None:
            steps.append(RandomScale(self.scales))
        if self.crop_size is not None:
            # In front of the normalisation the mean is what becomes 0.
            colour = [round(255 * m) for m in (self.mean[::-1] if self.bgr else self.mean)]
            fill = {tv_tensors.Image: colour, tv_tensors.Mask: IGNORED}
            steps.append(v2.RandomCrop(self.crop_size, pad_if_needed=True, fill=fill))
        return v2.Compose([*steps, v2.RandomHorizontalFlip(self.flip), self._finish])

    def eval_transform(self) -> v2.Compose:
        """Resize where asked for, of an image and its mask."""
        steps = [] if self.eval_size is None else [v2.Resize(self.eval_size)]
        return v2.Compose([*steps, self._finish])

    def prepare(self, image: Image.Image) -> Tensor:
        """An image as in evaluation, at its own size."""
        return self._normalised(image)

    def to_pixels(self, images: Tensor) -> Tensor:
        """The uint8 images (N, 3, H, W), red first, that a batch of the loaders was made from."""
        pixels = super().to_pixels(images)
        return pixels.flip(1) if self.bgr else pixels

    def train_dataset(self) -> MaskedImages:
        """The training images and masks, augmented."""
        return self._open("train", self.train_transform())

    def val_dataset(self) -> MaskedImages:
        """The validation images and masks."""
        return self._open("val", self.eval_transform())

    def test_dataset(self) -> MaskedImages:
        """The test images and masks."""
        return self._open("test", self.eval_transform())

    def _open(self, split: str, transform: v2.Compose) -> MaskedImages:
        return MaskedImages(self.pairs(split), self.class_ids, self.ignored_ids, transform)

    def _finish(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return self._scaled(image.as_subclass(Tensor)), mask.as_subclass(Tensor).long()

    def _scaled(self, pixels: Tensor) -> Tensor:
        return super()._scaled(pixels.flip(0) if self.bgr else pixels)
