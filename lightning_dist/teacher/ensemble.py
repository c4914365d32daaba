"""EnsembleTeacher: several teachers whose mean is distilled."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_dist.taps import logits_of
from lightning_dist.teacher.base import Tap
from lightning_dist.teacher.teacher import Teacher, TeacherNetwork


class EnsembleTeacher(Teacher):
    """A teacher that is the mean of several teachers.

    The mean of probabilities is returned as its logarithm, so that the softmax of the output is the
    mean; a loss with a temperature then softens that mean, not each teacher. The mean of logits is
    a (normalised) geometric mean of probabilities, at any temperature.

    Each teacher has its own bridge, class map and dtype. In distillation terms, the paths of the
    first teacher's sub-modules start with ``"0."``, and so on. A call returns the mean, ``(N, C)``
    or ``(N, C, *spatial)``, in float32 or wider.

    Args:
        teachers: networks or Teachers, in a list or as a dict from names to them. All must return
            logits of the same shape.
        mean: the kind of mean, ``"probabilities"`` or ``"logits"``.

    Raises:
        ValueError: if there is no teacher, if ``mean`` is unknown, or, in a call, if the teachers'
            logits differ in shape.

    Example:
        >>> ensemble = EnsembleTeacher([nn.Linear(4, 3), nn.Linear(4, 3)])
        >>> torch.allclose(ensemble(torch.ones(2, 4)).exp().sum(1), torch.ones(2))
        True
    """

    def __init__(
        self,
        teachers: Sequence[nn.Module | Teacher] | Mapping[str, nn.Module | Teacher],
        mean: Literal["probabilities", "logits"] = "probabilities",
    ) -> None:
        members = list(teachers.values() if isinstance(teachers, Mapping) else teachers)
        if not members:
            raise ValueError("the ensemble has no teachers: give at least one")
        if mean not in ("probabilities", "logits"):
            raise ValueError(f"mean is {mean!r}: use 'probabilities' or 'logits'")
        self.teachers = [m if isinstance(m, Teacher) else Teacher(m) for m in members]
        self.mean = mean
        super().__init__(nn.ModuleList([teacher.network for teacher in self.teachers]))

    def release(self) -> None:
        """Restore ``requires_grad`` and the training mode of every network as they were before."""
        for teacher in self.teachers:
            teacher.release()

    def refuse_taps(self, taps: Sequence[Tap]) -> None:
        """Refuse a term that compares a part of a teacher with a ``class_map``.

        The map applies to the logits of the whole teacher only.

        Args:
            taps: as in :meth:`attach`.

        Raises:
            MisconfigurationException: if there is such a term.
        """
        for part, _ in taps:
            index = part.partition(".")[0]
            known = index.isdigit() and int(index) < len(self.teachers)
            if known and self.teachers[int(index)].class_map is not None:
                raise MisconfigurationException(
                    f"a term compares {part!r} of an ensemble, whose teacher {index} has a "
                    "class_map: let the term compare the ensemble's own output (teacher='')"
                )

    def _answer(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        total: Tensor | None = None
        for index, teacher in enumerate(self.teachers):
            logits = logits_of(teacher._ask_protected("", args, dict(kwargs)))
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            if self.mean == "probabilities":
                logits = logits.log_softmax(1)
            if total is None:
                total = logits
            elif total.shape != logits.shape:
                raise ValueError(
                    f"teacher {index} of the ensemble ({teacher}) has logits {tuple(logits.shape)} "
                    f"and teacher 0 {tuple(total.shape)}: give each a class_map to the student's "
                    "classes"
                )
            else:
                total = (
                    torch.logaddexp(total, logits)
                    if self.mean == "probabilities"
                    else total + logits
                )
        assert total is not None
        n = len(self.teachers)
        return total - math.log(n) if self.mean == "probabilities" else total / n

    def as_network(self) -> nn.Module:
        """Return a module that calls all teachers and returns their mean."""
        return TeacherNetwork(self)

    def __repr__(self) -> str:
        return f"EnsembleTeacher({', '.join(map(repr, self.teachers))})"
