"""The card of a checkpoint: read it, choose the weights that it names, and convert other data."""

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import rich
import rich.markup
from lightning.pytorch import Callback, LightningModule, Trainer
from omegaconf import OmegaConf
from torch import nn

from lightning_dist.checks import check_flag
from lightning_dist.cli.errors import UserError
from lightning_dist.cli.run.saved_config import build_data
from lightning_dist.files.card import Card
from lightning_dist.files.card_files import card_in
from lightning_dist.files.text import printable
from lightning_dist.module import DistillModule
from lightning_dist.tasks.detection import DetectionModule
from lightning_dist.teacher import Teacher
from lightning_dist.teacher.matching import class_map_between
from lightning_dist.training.cards import card_of_data, differences, refuse_other_number

log = logging.getLogger(__name__)


def card_of_checkpoint(checkpoint: Mapping[str, Any], config: Mapping[str, Any], path: str) -> Card:
    """Return the card of a checkpoint, or what its config says if it has no card.

    Args:
        checkpoint: the checkpoint.
        config: its config, as :func:`lightning_dist.cli.run.saved_config.read_saved` returns it.
        path: its path, for messages.

    Raises:
        UserError: if the card is damaged.
    """
    try:
        card = card_in(checkpoint, path)
        if card is not None:
            return card
        data = build_data(config, OmegaConf.create(), path, trust=False)
        facts = data.image_facts() if hasattr(data, "image_facts") else {}
        names = config.get("class_names")
        facts |= {"class_names": names, "averaged": False, "origin": "run", "source": path}
        facts |= {"num_classes": config["module"].get("num_classes")}
        card = Card.from_plain(facts, path)
    except ValueError as error:
        raise UserError(str(error)) from error
    log.warning(
        "%s has no card, because an earlier version wrote it. Assumed from its config: %s",
        path,
        card.describe(),
    )
    return card


def use_weights(module: DistillModule, card: Card, ema: bool | None, path: str) -> Card:
    """Give the student of a module its averaged or its own weights, and print the choice.

    Args:
        module: the module with the weights of a checkpoint; its student is replaced.
        card: the card of the checkpoint.
        ema: use the averaged weights (true) or the student's own (false); ``None``: those that the
            card names.
        path: the path of the checkpoint, for messages.

    Returns:
        The card of the chosen weights.

    Raises:
        UserError: if ``ema`` is true and the checkpoint has no averaged weights.
        ValueError: if ``ema`` is neither true, false nor ``None``.
    """
    if ema is not None:
        check_flag("ema", ema)
    average = module.student_ema
    if ema and average is None:
        raise UserError(
            f"{path} holds no averaged weights: train with callbacks=[default,ema], or leave out "
            "ema=true"
        )
    averaged = average is not None and bool(card.averaged if ema is None else ema)
    if average is not None:
        metric = rich.markup.escape(printable(str(card.metric), 200))
        why = "ema" if ema is not None else f"monitor={metric}"
        rich.print(f"[bold]weights[/bold] {'averaged' if averaged else 'not averaged'} ({why})")
    if averaged and average is not None:
        module.student = average.module
    return card.of_weights(averaged)


class MatchData(Callback):
    """Convert the images and classes of the data of a test to those of the card, or refuse them.

    The size of the images is not converted, because a user may want to test another size.

    Args:
        card: the card of the student.
    """

    def __init__(self, card: Card) -> None:
        self.card = dataclasses.replace(card, crop_mode=None)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Wrap the student and its average; the data module has been set up before.

        Raises:
            UserError: if the data has other classes.
        """
        data = card_of_data(trainer)
        if data is not None and isinstance(pl_module, DistillModule):
            self.convert(pl_module, data)

    def convert(self, module: DistillModule, data: Card) -> None:
        """Convert all networks that a module evaluates, and log what differs.

        Args:
            module: the module.
            data: the card of the data.

        Raises:
            UserError: if the data has other classes.
        """
        before = module.student
        if isinstance(module, DetectionModule):
            self._relabel(module, data)
        else:
            module.convert_evaluated(lambda network: self.matched(network, data))
        if module.student is not before:
            log.warning(
                "the network was trained with %s: the data is converted",
                "; ".join(differences(self.card, data)),
            )

    def matched(self, network: nn.Module, data: Card) -> nn.Module:
        """Return the network, with conversions where the data differs from the card.

        Args:
            network: the network.
            data: the card of the data.

        Raises:
            UserError: if the data has other classes.
        """
        teacher = Teacher(network, card=self.card)
        try:
            teacher.adapt(data)
        except ValueError as error:
            raise UserError(str(error)) from error
        advice = "test it on data with all its classes, in any order"
        refuse_other_number(self.card.num_classes, data.num_classes, "the network", advice)
        return teacher.as_network()

    def _relabel(self, module: DetectionModule, data: Card) -> None:
        """Change the labels of the detectors, if the data has the classes in another order."""
        try:
            class_map = class_map_between(self.card, data)
        except ValueError as error:
            raise UserError(str(error)) from error
        if class_map is not None:
            module.convert_evaluated(lambda network: module.relabel(network, class_map))
