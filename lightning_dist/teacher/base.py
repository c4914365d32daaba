"""TeacherBase: the interface between the callback and every kind of teacher."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_dist.files.card import Card
from lightning_dist.taps import Entry

# A tap is the path of a part of the teacher, and the entry of its output.
Tap = tuple[str, Entry | None]
# Inputs are a dict from the paths of the student's parts to those of the teacher's parts that get
# the same inputs; or a function of the batch that returns the teacher's inputs.
Inputs = Mapping[str, str] | Callable[[Any], Any]


class TeacherBase(ABC):
    """The interface of a teacher for :class:`lightning_dist.DistillationCallback`.

    ``fit`` attaches the teacher, collects its outputs in every training step, and detaches it. A
    teacher refuses a module, data or terms that it does not support in :meth:`attach`, before
    training starts.

    Attributes:
        network: the trained network, which is frozen. The paths in distillation terms are paths of
            its sub-modules.
        class_map: for each class of the student, the index of the network's class; ``None`` if the
            classes are the same.
    """

    network: nn.Module
    class_map: list[int] | None = None
    card: Card | None = None  # It is the card of the network, if it has one.

    def class_map_of(self, part: str) -> list[int] | None:
        """Return the ``class_map`` that applies to a part of the network, or ``None``.

        Args:
            part: the dotted path of the part; ``""`` is the network.
        """
        return self.class_map

    def to_student_classes(self, logits: Tensor, part: str = "") -> Tensor:
        """Return the logits of the student's classes, selected from the network's by ``class_map``.

        Args:
            logits: logits of the network's classes.
            part: the dotted path of the part that returned them; ``""`` is the network.
        """
        return logits

    @abstractmethod
    def attach(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        taps: Sequence[Tap],
        inputs: Inputs,
    ) -> None:
        """Prepare for training: freeze the network and make it ready on the Trainer's device.

        Args:
            trainer: the Trainer, before it has made its data loaders.
            pl_module: the module that is trained.
            taps: for each term, the path of the teacher's part and the entry of its output.
            inputs: a dict from paths in the student to paths in the teacher, or a function of the
                batch, as in :class:`lightning_dist.DistillationCallback`.

        Raises:
            MisconfigurationException: if the teacher does not support this module, data or terms.
        """

    @abstractmethod
    def answers(
        self, student: nn.Module, batch: Any, parts: Sequence[str], inputs: Inputs
    ) -> AbstractContextManager[dict[str, list[Any]]]:
        """Collect the outputs of the teacher's parts while the student runs.

        Calls of the student without a gradient, as under ``torch.no_grad()``, are ignored.

        Args:
            student: the student, which is called within the context.
            batch: the training batch.
            parts: the paths of the teacher's parts; ``""`` is the teacher itself.
            inputs: the dict or function that :meth:`attach` gets.

        Returns:
            A context manager that returns a dict from paths to lists. When the context ends, each
            list contains the outputs of that part in the order of its calls.
        """

    def adapt(self, data: Card | None) -> None:
        """Convert the images and classes of some data to those that the teacher's card names.

        Conversions that the user has given, such as a class map, are not replaced. The callback
        calls this before :meth:`attach`.

        Args:
            data: the card of the data module, or ``None`` if it has none.

        Raises:
            ValueError: if the data has classes that the teacher does not have.
        """
        return None

    def describe(self) -> str:
        """Return one line with the name of the network and a description of its inputs."""
        return type(self.network).__name__

    @abstractmethod
    def detach(self) -> None:
        """Undo :meth:`attach`, and free the memory of the device."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a line that names the teacher and changes with its weights."""

    @abstractmethod
    def as_network(self) -> nn.Module:
        """Return the teacher as an ordinary network, for evaluation and export."""

    def with_network(self, network: nn.Module, inputs: Any | None = None) -> "TeacherBase":
        """Return a teacher with the same settings and another network.

        Args:
            network: the network of the new teacher.
            inputs: the :class:`lightning_dist.teacher.InputBridge` of the new teacher; by default
                the one of this teacher.

        Raises:
            MisconfigurationException: if this kind of teacher does not support another network.
        """
        raise MisconfigurationException(
            f"{self} knows whole images only, and detection calls parts of the teacher with what "
            "the student computes within: give the teacher itself (distill.cache=off)"
        )
