"""Functions for manual optimization: the terms are added to a loss of ``manual_backward``."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_dist.taps import Recording


class StepCalls:
    """The recorded calls of student and teacher in one step; each call is taken once.

    Args:
        student: the recorded outputs of the student's parts.
        teacher: a dict from the paths of the teacher's parts to their outputs.
        batch: the training batch.
    """

    def __init__(
        self, student: Recording, teacher: Mapping[str, list[Any]], batch: Any = None
    ) -> None:
        self.student, self.teacher, self.batch = student, teacher, batch
        # A teacher with a cache, or with a function of the batch as ``inputs``, is called before
        # the student.
        none = dict.fromkeys(student.outputs, 0), dict.fromkeys(teacher, 0)
        self._taken = self._last_backward = none
        self.was_taken = False

    def all_taken(self) -> bool:
        """Return whether all calls of the student have been taken by :meth:`take`."""
        return self.was_taken and not self.pending()

    def pending(self) -> bool:
        """Return whether there are calls of the student that were not taken."""
        return self._counts()[0] != self._taken[0]

    def mark_backward(self) -> None:
        """Record that a backward pass follows the calls so far."""
        self._last_backward = self._counts()

    def take(self) -> tuple[Recording, dict[str, list[Any]]]:
        """Return the calls since the last backward pass, or all calls not taken if there is none.

        Returns:
            The student's recording and the teacher's outputs, cut to these calls.
        """
        now = self._counts()
        start = self._last_backward if self._last_backward[0] != now[0] else self._taken
        self._taken, self.was_taken = now, True
        outputs = {path: found[start[0][path] :] for path, found in self.student.outputs.items()}
        student = Recording(self.student.root, outputs, self.student.without_grad)
        return student, {path: found[start[1][path] :] for path, found in self.teacher.items()}

    def _counts(self) -> tuple[dict[str, int], dict[str, int]]:
        student, teacher = self.student.outputs, self.teacher
        return {k: len(v) for k, v in student.items()}, {k: len(v) for k, v in teacher.items()}


@contextmanager
def joined_backward(
    pl_module: LightningModule,
    calls: StepCalls,
    chosen: int | None,
    add: Callable[[Tensor], Tensor],
) -> Iterator[None]:
    """Add the distillation loss to losses that a step gives to ``manual_backward`` in this context.

    With automatic optimization, nothing is changed.

    Args:
        pl_module: the module.
        calls: the calls of this step.
        chosen: the number of the backward pass in the step, from 0, that the loss joins; with
            ``None``, it joins each pass before which the student was called.
        add: a function that returns a loss with the distillation loss of the pending calls added.
    """
    if pl_module.automatic_optimization:
        yield
        return
    own, kept = pl_module.manual_backward, pl_module.__dict__.get("manual_backward")
    passes = 0

    def manual_backward(loss: Tensor, *args: Any, **kwargs: Any) -> None:
        nonlocal passes
        if passes == chosen or (chosen is None and calls.pending()):
            loss = add(loss)
        passes += 1
        calls.mark_backward()
        own(loss, *args, **kwargs)

    pl_module.__dict__["manual_backward"] = manual_backward
    try:
        yield
    finally:
        if kept is None:
            del pl_module.__dict__["manual_backward"]
        else:
            pl_module.__dict__["manual_backward"] = kept


def check_backward(pl_module: LightningModule, trainer: Trainer, chosen: int | None) -> None:
    """Refuse a manual step with several optimizers if it is unknown which backward pass to join.

    Args:
        pl_module: the module that is trained.
        trainer: the Trainer, with its optimizers.
        chosen: the callback's option ``backward``.

    Raises:
        MisconfigurationException: if the option is missing, or has no effect.
    """
    if pl_module.automatic_optimization:
        if chosen is not None:
            raise MisconfigurationException(
                f"backward is {chosen}, but {type(pl_module).__name__} optimizes automatically: "
                "leave out backward, which is for steps that call manual_backward"
            )
    elif chosen is None and len(trainer.optimizers) > 1:
        raise MisconfigurationException(
            f"{type(pl_module).__name__} optimizes manually with {len(trainer.optimizers)} "
            "optimizers: set backward to the number, counted from 0, of the manual_backward in "
            "training_step that trains the student"
        )
