"""EnsembleTeacher: several teachers whose mean is distilled."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_dist.checks import class_axis
from lightning_dist.files.card import Card
from lightning_dist.taps import logits_of
from lightning_dist.teacher.base import Tap
from lightning_dist.teacher.teacher import Teacher, TeacherNetwork


class EnsembleTeacher(Teacher):
    """A teacher that is the mean of several teachers.

    For the mean of probabilities, the output is the logarithm of the mean, so that the softmax of
    the output is the mean. A loss with a temperature then softens the mean, not the output of each
    teacher. The mean of logits is a (normalised) geometric mean of probabilities, at any
    temperature.

    Each teacher has its own bridge, class map and dtype. A call returns the mean, ``(N, C)`` or
    ``(N, C, *spatial)``, in float32 or wider.

    In distillation terms, ``teacher="0"`` is the first network and ``"0.head"`` its part ``head``,
    and so on; the teacher's class map applies. If all terms name parts, no mean is computed, and
    the teachers can have different heads.

    Args:
        teachers: networks or Teachers, in a list or as a dict from names to them. For the mean, all
            must return logits of the same shape.
        mean: the kind of mean, ``"probabilities"`` or ``"logits"``.
        class_dim: the dimension of the classes in the logits; by default 1. Logits with three
            dimensions need it: ``1`` for ``(N, C, L)``, ``-1`` for ``(B, T, V)``.

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
        class_dim: int | None = None,
    ) -> None:
        members = list(teachers.values() if isinstance(teachers, Mapping) else teachers)
        if not members:
            raise ValueError("the ensemble has no teachers: give at least one")
        if mean not in ("probabilities", "logits"):
            raise ValueError(f"mean is {mean!r}: use 'probabilities' or 'logits'")
        self.teachers = [m if isinstance(m, Teacher) else Teacher(m) for m in members]
        self.mean = mean
        self._averages = True  # It is False in a run in which all terms name parts.
        networks = nn.ModuleList([teacher.network for teacher in self.teachers])
        super().__init__(networks, class_dim=class_dim)

    def adapt(self, data: Card | None) -> None:
        """Convert the images and classes of the data for each teacher."""
        for teacher in self.teachers:
            teacher.adapt(data)

    def describe(self) -> str:
        """Return the lines of all teachers in one line."""
        return "; ".join(teacher.describe() for teacher in self.teachers)

    def release(self) -> None:
        """Restore ``requires_grad`` and the training mode of every network as they were before."""
        for teacher in self.teachers:
            teacher.release()

    def expect(self, taps: Sequence[Tap]) -> None:
        """Compute no mean if all terms name parts; see :meth:`Teacher.expect`."""
        self._averages = not taps or any(not part for part, _ in taps)

    def class_map_of(self, part: str) -> list[int] | None:
        """Return the ``class_map`` of the teacher to which a part belongs."""
        member = self._member(part)
        return None if member is None else member.class_map

    def to_student_classes(self, logits: Tensor, part: str = "") -> Tensor:
        """Return the logits of the student's classes, as the teacher of the part maps them."""
        member = self._member(part)
        return logits if member is None else member.to_student_classes(logits)

    def _member(self, part: str) -> Teacher | None:
        """Return the teacher to which a part belongs, or None for the mean of all teachers."""
        index = part.partition(".")[0]
        known = index.isdigit() and int(index) < len(self.teachers)
        return self.teachers[int(index)] if known else None

    def _answer(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
        total: Tensor | None = None
        for index, teacher in enumerate(self.teachers):
            output = teacher._ask_protected("", args, dict(kwargs))
            if not self._averages:
                continue
            logits = logits_of(output)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            if self.mean == "probabilities":
                logits = logits.log_softmax(class_axis(logits.shape, self.class_dim))
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
        if total is None:
            return None
        n = len(self.teachers)
        return total - math.log(n) if self.mean == "probabilities" else total / n

    def as_network(self) -> nn.Module:
        """Return a module that calls all teachers and returns their mean."""
        return TeacherNetwork(self)

    def __repr__(self) -> str:
        return f"EnsembleTeacher({', '.join(map(repr, self.teachers))})"
