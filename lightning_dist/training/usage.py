"""TermsUsage: a record of the terms that were used, with a warning or an error for the others."""

from collections.abc import Callable, Iterable, Mapping

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_dist.training.manual import StepCalls
from lightning_dist.training.summing import TermsSum, is_zero


class TermsUsage:
    """A record of the terms that were used since ``fit`` started, and why others were not.

    A step may leave the student out, as in alternating training. So an unused term causes one
    warning, and an error only after an epoch if it has never been used.
    """

    def __init__(self) -> None:
        self._used: set[str] = set()
        self._reasons: dict[str, str] = {}
        self._warned: set[str] = set()
        self._settled: set[str] = set()  # the names of the terms that any process has used

    def note(self, found: TermsSum) -> None:
        """Record the terms of a step.

        Args:
            found: the sum of the terms.
        """
        for name in found.waiting:
            self._warn(
                f"{name} waits",
                f"term {name!r} waits: the part of the student that it compares is frozen. The "
                "term is used as soon as the part trains",
            )
        self._used.update(found.values, found.waiting)
        for name, reason in found.unused.items():
            self._note_unused(name, reason)

    def note_unjoined(
        self, calls: StepCalls, total: Callable[[], TermsSum], weights: Mapping[str, float]
    ) -> None:
        """Record the end of a step that optimizes manually and may not have used any term.

        Args:
            calls: the calls of this step.
            total: a function that sums and records the terms of the pending calls.
            weights: a dict from the names of the terms to their weights.
        """
        if calls.was_taken:
            return
        if not calls.pending():
            total()  # There is nothing to sum, but this records the reasons.
            return
        for name, weight in weights.items():
            if not is_zero(weight):
                self._note_unused(
                    name,
                    f"term {name!r}: the student was called, but the manual_backward that the term "
                    "joins did not follow in the step: call self.manual_backward(loss), not "
                    "loss.backward(), set backward to its number in the step, or add take_loss() "
                    "of the callback to a loss",
                )

    def refuse_unused(self, trainer: Trainer, names: Iterable[str]) -> None:
        """Refuse to continue after an epoch, if there is a term that no process has ever used.

        Args:
            trainer: the Trainer at the end of an epoch.
            names: the names of all terms, in the same order in all processes.

        Raises:
            MisconfigurationException: if there is such a term; the message contains the reason.
        """
        for name in names:
            if name in self._settled:
                continue
            if trainer.strategy.reduce_boolean_decision(name in self._used, all=False):
                self._settled.add(name)
            elif name in self._reasons:
                raise MisconfigurationException(
                    f"{self._reasons[name]}. No step of the epoch used the term"
                )

    def _note_unused(self, name: str, reason: str) -> None:
        self._reasons[name] = reason
        self._warn(
            f"{name} is unused",
            f"{reason}. The term is left out of this step. Training stops after the epoch if no "
            "step uses it",
        )

    def _warn(self, key: str, message: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            rank_zero_warn(message)
