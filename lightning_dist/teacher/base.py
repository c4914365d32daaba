"""TeacherBase: what the callback asks of a teacher, whatever kind of teacher it is."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

Tap = tuple[str, str | int | None]  # a part of the teacher, and the entry of its output


class TeacherBase(ABC):
    """A teacher as :class:`lightning_dist.DistillationCallback` uses it.

    ``fit`` attaches it, asks for its answers in every training step, and detaches it. A teacher
    refuses what it cannot serve in :meth:`attach`, before training starts.

    Attributes:
        network: the trained network, frozen. The paths of the distillation terms are its
            sub-modules.
        class_map: the network's class for each of the student's, or ``None`` if they are the same.
    """

    network: nn.Module
    class_map: list[int] | None = None

    def to_student_classes(self, logits: Tensor) -> Tensor:
        """Return logits of the network's classes as logits of the student's, by ``class_map``.

        Args:
            logits: ``(N, C, ...)``, the classes in dimension 1.
        """
        return logits

    @abstractmethod
    def attach(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        taps: Sequence[Tap],
        inputs: Mapping[str, str],
    ) -> None:
        """Prepare for training: freeze the network and make it ready on the Trainer's device.

        Args:
            trainer: the Trainer, before it has made its data loaders.
            pl_module: the module that is trained.
            taps: the part of the teacher and the entry of its output that each term compares.
            inputs: which sub-modules of the student hand what they are called with to which ones of
                the teacher, as in :class:`lightning_dist.DistillationCallback`.

        Raises:
            MisconfigurationException: if the teacher cannot serve this module, data or terms.
        """

    @abstractmethod
    def answers(
        self, student: nn.Module, batch: Any, parts: Sequence[str], inputs: Mapping[str, str]
    ) -> AbstractContextManager[dict[str, list[Any]]]:
        """While the student runs, collect what the parts of the teacher return.

        Calls of the student without a gradient, as under ``torch.no_grad()``, do not count.

        Args:
            student: the student, which is called within the context.
            batch: the training batch.
            parts: dotted paths of the teacher's parts; ``""`` is the teacher itself.
            inputs: as in :meth:`attach`.

        Returns:
            A context manager. It gives a dict that holds, when the context ends, the outputs of
            each part in the order of its calls.
        """

    @abstractmethod
    def detach(self) -> None:
        """Leave the Trainer: undo what :meth:`attach` did, and free the device."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a line that names the teacher and differs where its weights differ."""

    @abstractmethod
    def as_network(self) -> nn.Module:
        """Return the teacher as an ordinary network, for evaluation and export."""

    def with_network(self, network: nn.Module, inputs: Any | None = None) -> "TeacherBase":
        """Return a teacher with the same settings and another network.

        Args:
            network: the network of the new teacher.
            inputs: the :class:`lightning_dist.teacher.InputBridge` of the new teacher; by default
                this teacher's own.

        Raises:
            MisconfigurationException: if this kind of teacher cannot take another network.
        """
        raise MisconfigurationException(
            f"{self} knows whole images only, and detection calls parts of the teacher with what "
            "the student computes within: give the teacher itself (distill.cache=off)"
        )
