"""`TensorImages`, a data set in memory that augments and normalises a whole batch at once."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from lightning_dist.checks import IGNORED, UNLABELED
from lightning_dist.data.seeding import Key, derive_seeds


class TensorImages(Dataset):
    """A data set in memory that is read by Key or by index, one sample or a whole batch at once.

    Args:
        images: the pixels, usually uint8, shape (N, C, H, W), where H equals W.
        labels: the int64 class indices, shape (N,), or masks, shape (N, H, W).
        mean: one value per channel, for pixels scaled to 0..1.
        std: one value per channel, for pixels scaled to 0..1.
        white: the pixel value that is scaled to 1.
        padding: the number of black pixels to add on each side before a random crop; 0 does not
            crop.
        flip: mirror each image with probability 0.5.
        seed: the seed of the run. The crop and the flip depend on it and on the epoch and the index
            in the Key.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        white: int = 255,
        padding: int = 0,
        flip: bool = False,
        seed: int = 0,
    ) -> None:
        self.images = images
        self.labels = labels
        self.mean = per_channel(mean)
        self.std = per_channel(std)
        self.white = white
        self.padding = padding
        self.flip = flip
        self.seed = seed
        self._draws: tuple[int, Tensor, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: Key | int) -> tuple[Tensor, Tensor]:
        images, labels = self.__getitems__([key])
        return images[0], labels[0]

    def __getitems__(self, keys: Sequence[Key | int]) -> tuple[Tensor, Tensor]:
        """Return a batch of normalised images (B, C, H, W) and their labels (B,).

        All Keys must have the same epoch.
        """
        pairs = [key if isinstance(key, tuple) else (key, 0) for key in keys]
        indices = torch.tensor([index for index, _ in pairs])
        images = self.images[indices]
        if self.random:
            images = self._augment(images, indices, epoch=pairs[0][1])
        pixels = images.float().div_(self.white).sub_(self.mean).div_(self.std)
        return pixels, self.labels[indices]

    @property
    def no_label(self) -> int:
        """The label of an image without a label, or of each pixel of its mask."""
        return UNLABELED if self.labels.dim() == 1 else IGNORED

    def with_unlabeled(self, images: Tensor) -> "TensorImages":
        """Return a copy with further images, which have no label.

        Args:
            images: uint8 pixels in 0..255, shape (M, C, H, W).
        """
        other = copy.copy(self)
        if self.white != 255:
            images = images * (self.white / 255)
        other.images = torch.cat([self.images, images])
        labels = self.labels.new_full((len(images), *self.labels.shape[1:]), self.no_label)
        other.labels, other._draws = torch.cat([self.labels, labels]), None
        return other

    @property
    def random(self) -> bool:
        """True if the images are augmented at random."""
        return bool(self.padding or self.flip)

    def with_seed(self, seed: int) -> "TensorImages":
        """Return a copy with the same images and another augmentation seed."""
        other = copy.copy(self)
        other.seed, other._draws = seed, None
        return other

    @staticmethod
    def collate(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the batch unchanged, because `__getitems__` has collated it."""
        return batch

    def _augment(self, images: Tensor, indices: Tensor, epoch: int) -> Tensor:
        """Crop and mirror a batch by one gather, several times faster than one image at a time."""
        offsets, flips = (draw[indices] for draw in self._draws_of(epoch))
        count, channels, size, _ = images.shape
        pixel = torch.arange(size)
        rows = offsets[:, :1] + pixel
        columns = offsets[:, 1:] + torch.where(flips[:, None], pixel.flip(0), pixel)
        source = rows[:, :, None] * (size + 2 * self.padding) + columns[:, None, :]
        source = source.view(count, 1, -1).expand(-1, channels, -1)
        padded = F.pad(images, (self.padding,) * 4).flatten(2)
        return padded.gather(2, source).view_as(images)

    def _draws_of(self, epoch: int) -> tuple[Tensor, Tensor]:
        """Return the crop offsets (N, 2) and flips (N,) of all images, drawn once per epoch."""
        if self._draws is None or self._draws[0] != epoch:
            seeds = derive_seeds(self.seed, epoch, count=2)
            crops, mirrors = (torch.Generator().manual_seed(seed) for seed in seeds)
            offsets = torch.randint(2 * self.padding + 1, (len(self), 2), generator=crops)
            flips = (torch.rand(len(self), generator=mirrors) < 0.5) & self.flip
            self._draws = (epoch, offsets, flips)
        return self._draws[1:]


def per_channel(values: Sequence[float]) -> Tensor:
    """Return a tensor (C, 1, 1) of one number per channel, which broadcasts over an image."""
    return torch.tensor(values).view(-1, 1, 1)
