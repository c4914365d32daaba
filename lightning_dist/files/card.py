"""`Card`: the facts about a trained network that are stored with its weights."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_dist.files.text import printable

CARD_KEY = "lightning_dist_card"  # the name of the card in every kind of file
_TASKS = ("classification", "segmentation", "detection")


@dataclass(frozen=True)
class Card:
    """The images that a network expects, its classes, and which of its weights were tested.

    ``None`` means that a fact is unknown. All values are plain data.

    Args:
        task: ``"classification"``, ``"segmentation"`` or ``"detection"``.
        size: the height and width in pixels of the images that the network gets.
        crop_mode: ``"center"``: the shorter side of an image is resized to ``size / crop_pct``, and
            the centre is cropped. ``"squash"``: the whole image is resized to ``size``. ``None``:
            images keep their size, and ``size`` is only their usual size.
        crop_pct: the fraction of the resized shorter side that a centre crop keeps.
        interpolation: the method of resizing, such as ``"bilinear"``.
        mean: the mean of each channel, for pixels in ``value_range`` and in the order ``channels``.
        std: the standard deviation of each channel.
        channels: ``"rgb"``, ``"bgr"`` or ``"gray"``.
        value_range: the range to which pixels are scaled before ``mean`` is subtracted.
        num_classes: the number of classes.
        class_names: the names of the classes in the order of the network's outputs.
        mask_ids: the id of each class in the mask files of the data set; they start from 1 with
            ``reduce_zero_label``.
        averaged: whether the averaged weights (EMA) are meant, because ``monitor`` names a metric
            of them, or the student's own weights.
        precision: the precision of the Trainer, such as ``"bf16-mixed"``.
        metric: the monitored metric.
        value: its value in the last validation.
        origin: the kind of program that the weights are from: ``"run"`` (this package), ``"timm"``
            or ``"torchvision"``.
        source: the folder of the run, or the library's name of the weights.

    Example:
        >>> card = Card(size=(48, 48), mean=(0.5,), std=(0.25,), class_names=("cat", "dog"))
        >>> Card.from_plain(card.to_plain(), "here") == card
        True
    """

    task: str | None = None
    size: tuple[int, int] | None = None
    crop_mode: str | None = None
    crop_pct: float | None = None
    interpolation: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    channels: str | None = None
    value_range: tuple[float, float] = (0.0, 1.0)
    num_classes: int | None = None
    class_names: tuple[str, ...] | None = None
    mask_ids: tuple[int, ...] | None = None
    averaged: bool | None = None
    precision: str | None = None
    metric: str | None = None
    value: float | None = None
    origin: str | None = None
    source: str | None = None

    def to_plain(self) -> dict[str, Any]:
        """Return the known facts as a dict of plain data, for a checkpoint or JSON."""
        facts = dataclasses.asdict(self).items()
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in facts
            if value is not None
        }

    @classmethod
    def from_plain(cls, facts: Any, path: str | Path) -> "Card":
        """Return the card that :meth:`to_plain` converted; facts of later versions are left out.

        Args:
            facts: the dict.
            path: the file that it comes from, for the message.

        Raises:
            ValueError: if a fact is not what a card contains; the message names it.
        """
        if not isinstance(facts, Mapping):
            raise ValueError(f"{path} is damaged: its card is a {type(facts).__name__}")
        known: dict[str, Any] = {}
        for name, is_right in _CHECKS.items():
            value = facts.get(name)
            if value is None:
                continue
            if not is_right(value):
                raise ValueError(f"{path} is damaged: {name} of its card is {value!r:.100}")
            known[name] = tuple(value) if isinstance(value, (list, tuple)) else value
        card = cls(**known)
        if len(card.mean or ()) != len(card.std or ()):
            raise ValueError(f"{path} is damaged: its card has mean {card.mean}, std {card.std}")
        return card

    def of_weights(self, averaged: bool) -> "Card":
        """Return the card of the averaged weights or of the others.

        The monitored metric is left out if it is one of the other set of weights.

        Args:
            averaged: whether the averaged weights are meant.
        """
        if averaged == self.averaged:
            return self
        return dataclasses.replace(self, averaged=averaged, metric=None, value=None)

    def describe(self) -> str:
        """Return one line with the classes, the images and the weights."""
        facts = [
            self.num_classes and f"{self.num_classes} classes",
            self.size and self.crop_mode and f"{self.size[0]} x {self.size[1]} pixels",
            self.mean and f"mean {_short(self.mean)}",
            self.std and f"std {_short(self.std)}",
            self.channels,
            self.source and f"from {'run ' * (self.origin == 'run')}{self.source}",
        ]
        if self.averaged is not None:
            facts.append("averaged weights" if self.averaged else "weights that are not averaged")
        return printable(", ".join(fact for fact in facts if fact), 500)


def card_of_timm(config: Mapping[str, Any], name: str, num_classes: int) -> Card:
    """Return the card of a network of timm.

    Args:
        config: what ``timm.data.resolve_model_data_config`` returns for the network.
        name: timm's name of the network.
        num_classes: the number of the network's classes.
    """
    channels, height, width = config["input_size"]
    return Card(
        task="classification",
        size=(height, width),
        crop_mode=config["crop_mode"],
        crop_pct=config["crop_pct"],
        interpolation=config["interpolation"],
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        channels="gray" if channels == 1 else "rgb",
        num_classes=num_classes,
        origin="timm",
        source=f"timm's {name}",
    )


def card_of_torchvision(preset: Any, name: str, categories: Sequence[str] | None) -> Card:
    """Return the card of a network of torchvision.

    Args:
        preset: the transform that torchvision has for the weights.
        name: torchvision's name of the network.
        categories: the names of its classes; ``None`` if its head is not the library's.
    """
    facts: dict[str, Any] = {"origin": "torchvision", "source": f"torchvision's {name}"}
    if categories is not None:
        facts |= {"num_classes": len(categories), "class_names": tuple(categories)}
    if not hasattr(preset, "mean"):  # detectors normalise their images themselves
        return Card(**facts)
    crop, resized = getattr(preset, "crop_size", None), getattr(preset, "resize_size", None)
    if crop is not None:
        size = (crop[0], crop[-1])
        facts |= {"task": "classification", "size": size, "crop_mode": "center"}
        facts["crop_pct"] = min(1.0, size[0] / min(resized)) if resized else 1.0
    return Card(
        mean=tuple(preset.mean),
        std=tuple(preset.std),
        interpolation=preset.interpolation.value,
        channels="rgb",
        **facts,
    )


def _short(values: Sequence[float]) -> str:
    return " ".join(f"{value:.4g}" for value in values)


def _is_number(value: Any) -> bool:
    """Return whether a value is a number that float can hold; JSON has integers of any size."""
    return type(value) is float or (type(value) is int and abs(value) < 2**63)


def _one_of(*choices: str) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and value in choices


def _list_of(check: Callable[[Any], bool], *lengths: int) -> Callable[[Any], bool]:
    return lambda values: (
        isinstance(values, (list, tuple))
        and (not lengths or len(values) in lengths)
        and all(map(check, values))
    )


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**31


# For each field, a function that returns whether a value in a file is right.
_CHECKS: dict[str, Callable[[Any], bool]] = {
    "task": _one_of(*_TASKS),
    "size": _list_of(lambda x: _is_count(x) and x < 2**16, 2),
    "crop_mode": _one_of("center", "squash", "border"),
    "crop_pct": lambda x: _is_number(x) and 0 < x < math.inf,
    "interpolation": _is_text,
    "mean": _list_of(lambda x: _is_number(x) and math.isfinite(x)),
    "std": _list_of(lambda x: _is_number(x) and 0 < x < math.inf),
    "channels": _one_of("rgb", "bgr", "gray"),
    "value_range": _list_of(lambda x: _is_number(x) and math.isfinite(x), 2),
    "num_classes": _is_count,
    "class_names": _list_of(_is_text),
    "mask_ids": _list_of(lambda x: type(x) is int and 0 <= x < 256),
    "averaged": lambda x: type(x) is bool,
    "precision": _is_text,
    "metric": _is_text,
    "value": _is_number,
    "origin": _one_of("run", "timm", "torchvision"),
    "source": _is_text,
}
