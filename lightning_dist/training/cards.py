"""Functions that make the card of a run, and compare its classes with those of the data."""

import dataclasses
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_dist.files.card import CARD_KEY, Card
from lightning_dist.files.card_files import card_in
from lightning_dist.files.text import printable
from lightning_dist.teacher import TeacherBase


def card_of_data(trainer: Trainer) -> Card | None:
    """Return the card of the Trainer's data module, or ``None`` if it has no card.

    Args:
        trainer: a Trainer that has set up its data module.
    """
    data: Any = getattr(trainer, "datamodule", None)
    return data.card() if hasattr(data, "card") else None


def card_of_run(
    trainer: Trainer,
    task: str | None,
    num_classes: int | None,
    teacher: TeacherBase | None = None,
) -> Card:
    """Return the card of the student that a Trainer trains.

    Args:
        trainer: the Trainer.
        task: the task, as in :class:`lightning_dist.files.card.Card`.
        num_classes: the number of the student's classes, if the data module does not name them.
        teacher: the teacher. If the data module does not name the classes, they are the teacher's.
    """
    data: Any = getattr(trainer, "datamodule", None)
    names = getattr(data, "class_names", None)
    card = card_of_data(trainer) or Card(
        class_names=None if names is None else tuple(map(str, names))
    )
    own = None if teacher is None or teacher.class_map is not None else teacher.card
    if card.class_names is None and own is not None and len(own.class_names or ()) == num_classes:
        card = dataclasses.replace(card, class_names=own.class_names)
    saver: Any = trainer.checkpoint_callback
    metric = getattr(saver, "monitor", None)
    value = trainer.callback_metrics.get(metric) if metric else None
    folder = Path(getattr(saver, "dirpath", None) or trainer.default_root_dir)
    folder = folder.parent if folder.name == "checkpoints" else folder
    return dataclasses.replace(
        card,
        num_classes=num_classes if card.num_classes is None else card.num_classes,
        task=task,
        averaged=is_of_average(metric),
        precision=str(trainer.precision),
        metric=metric,
        value=None if value is None else float(value),
        origin="run",
        source=_short_path(folder),
    )


def save_card(
    trainer: Trainer,
    task: str | None,
    num_classes: int | None,
    teacher: TeacherBase | None,
    checkpoint: dict[str, Any],
) -> None:
    """Put the card of the student into a checkpoint; the arguments are those of `card_of_run`."""
    checkpoint[CARD_KEY] = card_of_run(trainer, task, num_classes, teacher).to_plain()


def is_of_average(metric: str | None) -> bool:
    """Return whether a metric is one of the averaged weights, such as ``val/ema_accuracy``."""
    return metric is not None and metric.rpartition("/")[2].startswith("ema_")


def refuse_other_classes(network: Card | None, data: Card | None, place: str) -> None:
    """Refuse data with other classes than a network.

    Args:
        network: the card of the network.
        data: the card of the data.
        place: what the network is, for the message.

    Raises:
        MisconfigurationException: if the names or numbers of the classes differ.
    """
    if network is None or data is None:
        return
    ours, own = network.class_names, data.class_names
    if ours is not None and own is not None and ours != own:
        raise MisconfigurationException(
            f"{place} has the classes {', '.join(ours[:20])} and the data has "
            f"{', '.join(own[:20])}: use the data that it was trained on, with its classes in the "
            "same order"
        )
    refuse_other_number(network.num_classes, data.num_classes, place)


def differences(network: Card | None, data: Card | None) -> list[str]:
    """Return a line for each fact in which the images or classes of data differ from a card.

    The size of images is not compared, nor are classes if their numbers differ.

    Args:
        network: the card of a network, or ``None`` if it has none.
        data: the card of the data, or ``None`` if it has none.
    """
    found = []
    for name in ("mean", "std", "channels", "class_names"):
        own, other = getattr(network, name, None), getattr(data, name, None)
        if own is None or other is None or own == other:
            continue
        if name != "class_names" or len(own) == len(other):
            found.append(f"{name} {_shown(own)}, and the data has {_shown(other)}")
    return found


def _shown(fact: Any) -> str:
    values = [fact] if isinstance(fact, str) else list(fact)
    return printable(", ".join(map(str, values[:8])) + ", ..." * (len(values) > 8), 200)


def refuse_checkpoint_of_other_classes(checkpoint: dict[str, Any], trainer: Trainer) -> None:
    """Refuse to continue a run with other classes, and warn of other images.

    Args:
        checkpoint: the checkpoint.
        trainer: the Trainer that continues.

    Raises:
        MisconfigurationException: if the names or numbers of the classes differ.
    """
    place = "the checkpoint"
    card, data = card_in(checkpoint, place), card_of_data(trainer)
    refuse_other_classes(card, data, place)
    for line in differences(card, data):
        rank_zero_warn(f"the run has trained with {line}: it continues with other images")


def refuse_other_number(
    network: int | None, data: int | None, place: str, advice: str | None = None
) -> None:
    """Refuse data with another number of classes than a network.

    Args:
        network: the number of classes of the network, or ``None`` if it is unknown.
        data: the number of classes of the data, or ``None`` if it is unknown.
        place: what the network is, for the message.
        advice: what to do, for the message; by default to set ``num_classes``.

    Raises:
        MisconfigurationException: if both numbers are known and differ.
    """
    if network is None or data is None or network == data:
        return
    raise MisconfigurationException(
        f"{place} has num_classes={network} and the data has {data} classes: "
        f"{advice or f'set num_classes={data}'}"
    )


def _short_path(folder: Path) -> str:
    """Return the path below the current folder, or the name of a folder elsewhere."""
    try:
        return str(folder.resolve().relative_to(Path.cwd()))
    except ValueError:
        return folder.name
