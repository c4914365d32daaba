"""`Pixels`, the part of a data module that converts images to normalised tensors."""

from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from lightning_dist.data.image_files import to_rgb
from lightning_dist.data.tensor_images import per_channel
from lightning_dist.files.card import Card


class Pixels:
    """A base class that converts images to tensors and back, and describes them by a Card.

    Attributes:
        mean: one value per channel, for pixels scaled to 0..1; the loaders subtract it.
        std: one value per channel, for pixels scaled to 0..1; the loaders then divide by it.
        image_size: the height and width in pixels, if all images are squares of one size.
        in_channels: the number of channels of an image.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int
    in_channels: int = 3

    def prepare(self, image: Image.Image) -> Tensor:
        """Convert an image of any size as the evaluation loaders do, to a tensor (C, H, W)."""
        return self._normalise(self._to_square(image))

    def _to_square(self, image: Image.Image) -> Tensor:
        """Convert an image of any size to uint8 pixels (C, H, W) of `image_size`."""
        size = (self.image_size, self.image_size)
        return self._to_pixels(to_rgb(image).resize(size, Image.Resampling.BILINEAR))

    def card(self) -> Card:
        """Return the card of these data: their images and classes.

        The names of the classes can come from files: call this after `setup`.
        """
        names = getattr(self, "class_names", None)
        return Card(
            **self.image_facts(),
            num_classes=getattr(self, "num_classes", None),
            class_names=None if names is None else tuple(names),
        )

    def image_facts(self) -> dict[str, Any]:
        """Return the fields of a Card that describe what `prepare` returns, without any file."""
        size = getattr(self, "image_size", None)
        facts: dict[str, Any] = {"size": None if size is None else (size, size)}
        if size is not None:
            facts |= {"crop_mode": "squash", "crop_pct": 1.0, "interpolation": "bilinear"}
        # The subclass may be a user's, with other inputs than images, such as tokens.
        if not hasattr(self, "mean"):
            return facts
        channels = self.in_channels
        mean, std = (
            tuple(float(x) for x in (values if len(values) == channels else values * channels))
            for values in (self.mean, self.std)
        )
        return facts | {"mean": mean, "std": std, "channels": "gray" if channels == 1 else "rgb"}

    def _to_tensor(self, image: Image.Image) -> Tensor:
        """Convert an image to a normalised tensor (C, H, W) without resizing it."""
        return self._normalise(self._to_pixels(to_rgb(image)))

    def _to_pixels(self, image: Image.Image) -> Tensor:
        """Convert an RGB image to uint8 pixels (C, H, W)."""
        return pil_to_tensor(image.convert("L") if self.in_channels == 1 else image)

    def _normalise(self, pixels: Tensor) -> Tensor:
        """Normalise a uint8 image (C, H, W) by `mean` and `std`."""
        pixels = pixels.float().div_(255)
        return pixels.sub_(per_channel(self.mean)).div_(per_channel(self.std))

    def to_pixels(self, images: Tensor) -> Tensor:
        """Undo the normalisation of a batch (N, C, H, W), and return uint8 pixels in 0..255."""
        mean, std = (per_channel(x).to(images) for x in (self.mean, self.std))
        return (255 * (images * std + mean)).round().clamp(0, 255).to(torch.uint8)
