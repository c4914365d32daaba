"""`TimmTransformDataModule`, a base class that transforms images by timm's `create_transform`."""

from typing import Any

from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from torch import Tensor

from lightning_dist.checks import UNLABELED
from lightning_dist.data.base import ImageDataModule
from lightning_dist.data.image_files import Transform, to_rgb
from lightning_dist.data.unlabeled import WithTarget


class TimmTransformDataModule(ImageDataModule):
    """A base class for images that timm transforms; the defaults are ImageNet's baseline recipe.

    Training uses a random resized crop and a random flip. Evaluation resizes the shorter side to
    `image_size / crop_pct` pixels and crops the centre. The LightningModule applies Mixup and
    CutMix, because they mix the images of a batch.

    Args:
        image_size: the height and width of the crops in pixels.
        crop_pct: the fraction of the resized image's shorter side that the centre crop keeps.
        interpolation: the kind of resizing: "bilinear", "bicubic" or "random". If it is "random",
            evaluation uses "bilinear".
        auto_augment: timm's string for RandAugment or a similar policy, such as
            "rand-m9-mstd0.5".
        re_prob: the probability of random erasing.
        re_mode: the pixels that fill an erased area: "pixel" (noise), "rand" (one colour) or
            "const" (the mean).
        color_jitter: the strength of colour jitter; timm ignores it if `auto_augment` is set.
        mean: one value per channel, for pixels scaled to 0..1.
        std: one value per channel, for pixels scaled to 0..1.
        **settings: the arguments of ImageDataModule.
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
        """Return the training transform of a PIL image to a normalised tensor (3, H, W)."""
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

    def unlabeled_transform(self) -> WithTarget:
        """Return the function that makes a training sample of an image without a label."""
        return WithTarget(self.train_transform(), UNLABELED)

    def image_facts(self) -> dict[str, Any]:
        """Return the fields of a Card that describe the images of the evaluation transform."""
        return super().image_facts() | {
            "crop_mode": "center",
            "crop_pct": self.crop_pct,
            "interpolation": self._eval_interpolation,
        }

    def prepare(self, image: Image.Image) -> Tensor:
        """Convert an image of any size as the evaluation loaders do, to a tensor (3, H, W)."""
        return self.eval_transform()(to_rgb(image))

    def eval_transform(self) -> Transform:
        """Return the evaluation transform of a PIL image to a normalised tensor (3, H, W)."""
        return create_transform(
            self.image_size,
            interpolation=self._eval_interpolation,
            crop_pct=self.crop_pct,
            mean=self.mean,
            std=self.std,
        )

    @property
    def _eval_interpolation(self) -> str:
        # timm accepts "random" only for the training transform.
        return "bilinear" if self.interpolation == "random" else self.interpolation
