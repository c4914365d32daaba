"""``lightning-dist predict``: label the images of a folder with the student of a checkpoint."""

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import rich
import torch
from hydra.utils import instantiate
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_dist.cli.errors import UserError
from lightning_dist.cli.hydra_app import hydra_app
from lightning_dist.cli.run.channels import channel_errors
from lightning_dist.cli.run.checkpoint_card import MatchData, card_of_checkpoint, use_weights
from lightning_dist.cli.run.saved_config import build_data, build_module, read_saved
from lightning_dist.data.image_files import SUFFIXES, abbreviate, find_images, load_image
from lightning_dist.data.workers import start_worker
from lightning_dist.files.card import Card
from lightning_dist.files.card_files import write_card
from lightning_dist.files.text import csv_cell
from lightning_dist.files.writing import naming
from lightning_dist.tasks.classification import ClassificationModule
from lightning_dist.tasks.detection import DetectionModule
from lightning_dist.tasks.drawing import box_image, class_palette, mask_image
from lightning_dist.tasks.segmentation import SegmentationModule, resize


def main() -> None:
    """Run the Hydra app on ``sys.argv``."""
    hydra_app("predict", _job)


class Files(Dataset):
    """A data set that returns ``(tensor, index, (height, width))`` for each image file.

    The height and width are those of the file in pixels, before ``prepare`` may resize it.

    For a file that cannot be read it returns a black image and ``~index``, which is below 0, so
    that one file does not end the prediction of all others.

    Args:
        paths: the paths of the images.
        prepare: a function that converts an image to a tensor of shape (channels, height, width).
    """

    def __init__(self, paths: Sequence[Path], prepare: Callable[[Image.Image], Tensor]) -> None:
        self.paths = paths
        self.prepare = prepare

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int, tuple[int, int]]:
        try:
            image = load_image(str(self.paths[index]))
            return self.prepare(image), index, (image.height, image.width)
        except (OSError, ValueError):
            return self.prepare(Image.new("RGB", (256, 256))), ~index, (256, 256)


class Writer(BasePredictionWriter):
    """The base class of the writers, with the names of classes and the paths of pictures.

    Args:
        names: the name of the prediction for each image.
        out: the folder to write to.
        card: the card of the network, which is written to the folder too.
        colors: the colours of the classes, or None for default colours.
    """

    when: Literal["batch", "batch_and_epoch"] = "batch"

    def __init__(self, names: Sequence[str], out: Path, card: Card, colors: Any) -> None:
        super().__init__(self.when)
        self.names, self.out = names, out
        self.card, self.colors = card, colors
        self.unreadable: list[int] = []

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the card, which names the classes and their ids."""
        write_card(self.card, self.fresh("card.json"))

    def write_on_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, prediction: Any, *args: Any
    ) -> None:
        """Write the prediction of a batch of one image, unless its file could not be read."""
        _, (images, indices, (height, width)), *_ = args
        if int(indices[0]) < 0:
            self.unreadable.append(~int(indices[0]))
        else:
            with naming(self.out):
                self.write(prediction, images, indices, (int(height[0]), int(width[0])))

    def write(self, prediction: Any, images: Any, indices: Tensor, size: tuple[int, int]) -> None:
        """Write the prediction of a batch.

        Args:
            prediction: the output of the module's ``infer``.
            images: the images of the batch.
            indices: the indices of the images.
            size: the height and width of the image file.
        """
        raise NotImplementedError

    def class_names(self, labels: Tensor) -> list[str]:
        """Return the names of classes, or their numbers if they have no names.

        Args:
            labels: the class numbers, with shape (n,).
        """
        names = self.card.class_names or ()
        return [names[i] if i < len(names) else str(i) for i in labels.tolist()]

    def png(self, index: int) -> Path:
        """Return the path of the picture for an image, and create its folder.

        Args:
            index: the index of the image.
        """
        return self.fresh(f"{self.names[index]}.png")

    def fresh(self, name: str) -> Path:
        """Return the path of a new file, and create its folder; an existing file is removed.

        An existing file may be a link to a file elsewhere, which must not be written.

        Args:
            name: the name of the file in the folder.

        Raises:
            UserError: if a link inside the folder leads out of it.
        """
        path = self.out / name
        if not path.parent.resolve().is_relative_to(self.out.resolve()):
            raise UserError(f"{path.parent} is a link out of {self.out}: choose another out=")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        return path


class MaskWriter(Writer):
    """Write a palette PNG for each image, of its own size and drawn in class colours.

    The pixels are the ids that the masks of the data set have for the classes: with
    ``reduce_zero_label`` class 0 has id 1, and Cityscapes has its own ids.
    """

    def on_predict_start(self, trainer: Trainer, pl_module: Any) -> None:
        super().on_predict_start(trainer, pl_module)
        self.align_corners = pl_module.align_corners

    def write(self, prediction: Any, images: Any, indices: Tensor, size: tuple[int, int]) -> None:
        count = prediction.shape[1]
        known = self.card.mask_ids or ()
        ids = torch.tensor(known if len(known) == count else range(count))
        colors = class_palette(count, self.colors)
        palette = [colors[255]] * 256
        for label, id in enumerate(ids.tolist()):
            palette[id] = colors[label]
        logits = resize(prediction, size, self.align_corners)
        for labels, index in zip(logits.argmax(1).cpu(), indices.tolist(), strict=True):
            mask_image(ids[labels], palette).save(self.png(index))


class ClassWriter(Writer):
    """Write the class of each image and its probability to a line of ``predictions.csv``."""

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write a file with only the header, which replaces the file of an earlier command."""
        super().on_predict_start(trainer, pl_module)
        self.fresh("predictions.csv")
        self._write([("image", "class", "probability")])

    def write(self, prediction: Any, images: Any, indices: Tensor, size: tuple[int, int]) -> None:
        best = prediction.softmax(1).max(1)
        names = [self.names[i] for i in indices.tolist()]
        numbers = [f"{p:.4f}" for p in best.values.tolist()]
        self._write(zip(names, self.class_names(best.indices), numbers, strict=True))

    def _write(self, rows: Any) -> None:
        path = self.out / "predictions.csv"
        with naming(path), path.open("a", newline="") as file:
            csv.writer(file).writerows(map(csv_cell, row) for row in rows)


class BoxWriter(Writer):
    """Write a PNG with drawn boxes for each image, and write all boxes to ``predictions.json``."""

    when = "batch_and_epoch"

    def __init__(self, names: Sequence[str], out: Path, card: Card, colors: Any) -> None:
        super().__init__(names, out, card, colors)
        self.found: list[dict[str, Any]] = []

    def write(self, prediction: Any, images: Any, indices: Tensor, size: tuple[int, int]) -> None:
        for image, one, index in zip(images, prediction, indices.tolist(), strict=True):
            labels = self.class_names(one["labels"])
            box_image((255 * image).round().to(torch.uint8), one, labels).save(self.png(index))
            scored = zip(one["boxes"].tolist(), labels, one["scores"].tolist(), strict=True)
            self.found += [
                {"image": self.names[index], "box": box, "class": label, "score": round(score, 4)}
                for box, label, score in scored
            ]

    def write_on_epoch_end(self, trainer: Trainer, *args: Any) -> None:
        """Write all boxes, including those whose score is too low to be drawn."""
        path = self.fresh("predictions.json")
        with naming(path):
            path.write_text(json.dumps(self.found, indent=1) + "\n")


def _job(config: DictConfig) -> None:
    checkpoint, saved = read_saved(config.ckpt, config.trust)
    card = card_of_checkpoint(checkpoint, saved, config.ckpt)
    module = build_module(checkpoint, saved, config.ckpt, config.trust)
    writers: list[tuple[type, type[Writer]]] = [
        (SegmentationModule, MaskWriter),
        (ClassificationModule, ClassWriter),
        (DetectionModule, BoxWriter),
    ]
    writer = next((w for task, w in writers if isinstance(module, task)), None)
    if writer is None:
        raise UserError(
            f"{config.ckpt} contains a {type(module).__name__}, but predict writes only the "
            "predictions of modules from lightning_dist.tasks: call predict_step from Python"
        )
    card = use_weights(module, card, config.ema, config.ckpt)
    paths = image_files(Path(config.images))
    datamodule = build_data(saved, config.data, config.ckpt, config.trust)
    out = Path(config.out)
    names = _names(paths, Path(config.images), with_suffix=writer is ClassWriter)
    if hasattr(datamodule, "image_facts"):  # config.data may have changed the images
        seen = Card(**datamodule.image_facts())
        MatchData(card).convert(module, seen)
    written = writer(names, out, card, saved.get("class_colors"))
    trainer = instantiate(
        config.trainer,
        logger=False,
        callbacks=[written],
        precision=config.trainer.precision or card.precision,
    )
    loader = DataLoader(
        Files(paths, datamodule.prepare),
        num_workers=config.num_workers,
        worker_init_fn=start_worker,
    )
    with channel_errors(module, len(card.mean) if card.mean else None):
        trainer.predict(module, loader, return_predictions=False)
    rich.print(f"[bold]{len(paths) - len(written.unreadable)} predictions[/bold] {out}")
    if written.unreadable:
        files = {str(paths[index]) for index in written.unreadable}
        raise UserError(
            f"{len(files)} of {len(paths)} images cannot be read and have no prediction: "
            f"{abbreviate(files)}: restore or remove them"
        )


def image_files(source: Path) -> list[Path]:
    """Return the sorted paths of all images in a folder, at any depth, or the path of one file.

    Args:
        source: the folder or the file.

    Raises:
        UserError: if the folder contains no image, or does not exist.
    """
    if source.is_file():
        return [source]
    paths = find_images(source)
    if not paths:
        what = "holds no images" if source.is_dir() else "does not exist"
        raise UserError(f"images={source} {what}: give a file or a folder of {SUFFIXES}")
    return paths


def _names(paths: Sequence[Path], source: Path, with_suffix: bool) -> list[str]:
    """Return the name of each prediction, which is the path of its image inside the folder."""
    root = source.parent if source.is_file() else source
    named: dict[str, Path] = {}
    for path in paths:
        relative = path.relative_to(root)
        name = str(relative if with_suffix else relative.with_suffix(""))
        if name in named:
            raise UserError(f"{named[name]} and {path} would have one prediction: rename one")
        named[name] = path
    return list(named)
