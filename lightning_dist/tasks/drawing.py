"""Pictures of predictions: coloured masks and boxes, and the callback ``LogSegmentations``."""

import colorsys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from PIL import Image
from torch import Tensor
from torchvision.utils import draw_bounding_boxes

from lightning_dist.files.text import printable
from lightning_dist.training.batches import split_batch

Color = tuple[int, int, int]

_GOLDEN_RATIO = 0.618034
_MOST_DRAWN = 60  # characters of a class's name


def class_palette(num_classes: int, colors: Sequence[Color] | None = None) -> list[Color]:
    """Return a colour (red, green, blue), each 0..255, for each of the labels 0..255.

    Args:
        num_classes: the number of classes. Labels from this number on, such as those of ignored
            pixels, are white.
        colors: the colours of the classes; by default class 0 is black and the other classes differ
            in hue.

    Returns:
        256 colours.

    Example:
        >>> class_palette(2)[0], class_palette(2)[255]
        ((0, 0, 0), (255, 255, 255))
    """
    if colors is None:
        hues = [colorsys.hsv_to_rgb(i * _GOLDEN_RATIO % 1, 0.8, 1.0) for i in range(1, num_classes)]
        colors = [
            (0, 0, 0),
            *((round(255 * r), round(255 * g), round(255 * b)) for r, g, b in hues),
        ]
    chosen = [(int(r), int(g), int(b)) for r, g, b in list(colors)[:num_classes]]
    return chosen + [(255, 255, 255)] * (256 - len(chosen))


def mask_image(mask: Tensor, palette: Sequence[Color]) -> Image.Image:
    """Return a palette image of a mask; the values of its pixels are the labels.

    Args:
        mask: a mask of labels (H, W) in 0..255.
        palette: 256 colours, see :func:`class_palette`.

    Returns:
        An image in PIL's mode ``P``.
    """
    image = Image.fromarray(mask.cpu().numpy().astype(np.uint8))
    image.putpalette(np.array(palette, dtype=np.uint8).tobytes())
    return image


def box_image(
    image: Tensor, found: Mapping[str, Tensor], names: Sequence[str], least_score: float = 0.5
) -> Image.Image:
    """Return an image with the boxes that a detector found in it.

    Args:
        image: an image, uint8 (3, H, W).
        found: a mapping with ``boxes`` (K, 4) as x1, y1, x2, y2 in pixels, ``labels`` (K,) and
            ``scores`` (K,).
        names: the name of the class of each of the K boxes.
        least_score: the lowest score of a box that is drawn.

    Returns:
        An RGB image of the same size.
    """
    drawn = (found["scores"] >= least_score).nonzero().flatten().tolist()
    palette = class_palette(256)
    if drawn:
        image = draw_bounding_boxes(
            image.cpu(),
            found["boxes"][drawn].cpu(),
            [f"{printable(names[i], _MOST_DRAWN)} {found['scores'][i]:.2f}" for i in drawn],
            [palette[int(found["labels"][i]) + 1] for i in drawn],
        )
    return Image.fromarray(image.cpu().movedim(0, 2).numpy())


class LogSegmentations(Callback):
    """A callback that logs the first validation images next to their masks and predictions.

    TensorBoard and loggers with a method ``log_image`` (such as W&B's) get the picture. For any
    other logger, or without one, it is a PNG file in ``samples/`` under the logger's folder.

    Args:
        every_n_epochs: the number of epochs from one picture to the next.
        count: the number of images; at most the images of one validation batch are drawn.

    Raises:
        ValueError: if a number is below 1.
    """

    def __init__(self, every_n_epochs: int = 5, count: int = 4) -> None:
        if every_n_epochs < 1 or count < 1:
            raise ValueError(
                f"every_n_epochs is {every_n_epochs} and count is {count}: both must be at least 1"
            )
        self.every_n_epochs = every_n_epochs
        self.count = count

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Log the picture, at the first batch of every ``every_n_epochs``-th epoch."""
        due = (trainer.current_epoch + 1) % self.every_n_epochs == 0
        if not due or trainer.sanity_checking or batch_idx or not trainer.is_global_zero:
            return
        split = getattr(pl_module, "split_batch", split_batch)
        images, masks = (part[: self.count] for part in split(batch))
        logits = pl_module.predict_step(images, batch_idx)
        data: Any = getattr(trainer, "datamodule", None)
        palette = class_palette(logits.shape[1], getattr(data, "class_colors", None))
        pixels = data.to_pixels(images) if hasattr(data, "to_pixels") else _stretched(images)
        rows = [
            _beside(pixel, *(_in_colour(labels, palette) for labels in (mask, prediction)))
            for pixel, mask, prediction in zip(
                pixels.cpu(), masks.cpu(), logits.argmax(1).cpu(), strict=True
            )
        ]
        self._log(trainer, torch.cat(rows, dim=1))

    def _log(self, trainer: Trainer, picture: Tensor) -> None:
        """Log a picture, uint8 (3, H, W), with every logger."""
        name, step = "val/samples", trainer.global_step
        loggers: list[Logger | None] = [*trainer.loggers] or [None]
        array = picture.movedim(0, 2).numpy()
        for logger in loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image(name, picture, step)
            elif logger is not None and hasattr(logger, "log_image"):
                logger.log_image(name, [array], step=step)
            else:
                folder = _folder(trainer, logger) / "samples"
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(folder / f"epoch-{trainer.current_epoch}.png")


def _folder(trainer: Trainer, logger: Logger | None) -> Path:
    own = getattr(logger, "log_dir", None) or getattr(logger, "save_dir", None)
    return Path(own or trainer.default_root_dir)


def _in_colour(labels: Tensor, palette: Sequence[Color]) -> Tensor:
    """Return the coloured picture, uint8 (3, H, W), of labels (H, W)."""
    return torch.tensor(palette, dtype=torch.uint8)[labels].movedim(2, 0)


def _beside(*pictures: Tensor) -> Tensor:
    """Return pictures (1 or 3, H, W) side by side, as one picture."""
    return torch.cat([p.expand(3, -1, -1) for p in pictures], dim=2)


def _stretched(images: Tensor) -> Tensor:
    """Return uint8 pixels for images (N, C, H, W) of unknown normalisation.

    The lowest value of each image becomes 0 and the highest becomes 255.
    """
    low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
    return (255 * (images - low) / (high - low).clamp(min=1e-8)).to(torch.uint8)
