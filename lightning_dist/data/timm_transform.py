"""What data sets with timm's augmentation and normalisation share."""

from typing import Any

from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from torch import Tensor

from lightning_dist.data.base import ImageDataModule
from lightning_dist.data.image_files import Transform


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
