"""Functions that check, at the start of ``fit``, whether module, teacher and terms fit together."""

from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_dist.taps import check_part, find_submodule
from lightning_dist.teacher.base import Inputs, TeacherBase
from lightning_dist.terms import Term
from lightning_dist.training.averaging import earlier_averaging
from lightning_dist.training.cards import card_of_data


def check_paths(
    pl_module: LightningModule,
    path: str,
    network: nn.Module,
    terms: Mapping[str, Term],
    inputs: Inputs,
) -> None:
    """Refuse paths at which student or teacher have no part.

    Args:
        pl_module: the module that is trained.
        path: the path of the student in the module.
        network: the teacher's network.
        terms: a dict from names to terms.
        inputs: the callback's option of this name.

    Raises:
        MisconfigurationException: if a part does not exist; the message lists similar paths.
    """
    student = find_submodule(pl_module, path, "the LightningModule", "student")
    if isinstance(inputs, Mapping):
        for of_student, of_teacher in inputs.items():
            check_part(student, of_student, "the student", "inputs")
            check_part(network, of_teacher, "the teacher", "inputs")
    for name, term in terms.items():
        of = f"path of term {name!r}"
        check_part(student, term.student, "the student", f"the student {of}")
        check_part(network, term.teacher, "the teacher", f"the teacher {of}")


def refuse_earlier_averaging(trainer: Trainer, callback: Callback) -> None:
    """Refuse a callback that has copied the module before the terms' parameters joined it.

    Args:
        trainer: the Trainer.
        callback: the DistillationCallback, whose terms have parameters.

    Raises:
        MisconfigurationException: if there is such a callback.
    """
    averaging = earlier_averaging(trainer, callback)
    if averaging is not None:
        raise MisconfigurationException(
            f"{type(averaging).__name__} comes before a DistillationCallback whose terms "
            "have parameters, and would not average them: list DistillationCallback first"
        )


def attached_callbacks(trainer: Trainer) -> list[Callback]:
    """Return the Trainer's callbacks, an attribute that Lightning does not declare."""
    return trainer.callbacks  # type: ignore[attr-defined]


def put_first(
    trainer: Trainer,
    owner: LightningModule,
    kind: type[Any],
    make: Callable[[], Any | None],
) -> None:
    """Put a module's own callback before those of the Trainer, unless they include one.

    A callback that another module created for the same Trainer is replaced.

    Args:
        trainer: the Trainer.
        owner: the module.
        kind: the class, DistillationCallback.
        make: a function that returns the module's own callback, or ``None`` if it needs none.
    """
    attached = attached_callbacks(trainer)
    present = [callback for callback in attached if isinstance(callback, kind)]
    if any(callback.owner in (None, owner) for callback in present):
        return
    own = make()
    if own is None:
        return
    own.owner = owner
    # Lightning would append the callback, but it must be first: WeightAveraging must find the
    # parameters of the callback's terms when it copies the module.
    others = [callback for callback in attached if callback not in present]
    trainer.callbacks = [own, *others]  # type: ignore[attr-defined]


def refuse_second_callback(trainer: Trainer, kind: type) -> None:
    """Refuse a Trainer with several callbacks of one class.

    Args:
        trainer: the Trainer.
        kind: the class, DistillationCallback.

    Raises:
        MisconfigurationException: if the Trainer has several of them.
    """
    if sum(isinstance(callback, kind) for callback in attached_callbacks(trainer)) > 1:
        raise MisconfigurationException(
            f"the Trainer has several {kind.__name__}s: give one of them several terms"
        )


def refuse_pruned_terms(terms: Mapping[str, Term], trainer: Trainer) -> None:
    """Refuse a ModelPruning that would prune the parameters of a term.

    Args:
        terms: a dict from names to terms.
        trainer: the Trainer, after the ``setup`` of all callbacks.

    Raises:
        MisconfigurationException: if there is such a callback; the message names the term.
    """
    for callback in attached_callbacks(trainer):
        pruned = {
            id(module) for module, *_ in getattr(callback, "_parameters_to_prune", None) or ()
        }
        for name, term in terms.items():
            parts = term.loss.modules() if isinstance(term.loss, nn.Module) else ()
            if any(id(part) in pruned for part in parts):
                raise MisconfigurationException(
                    f"{type(callback).__name__} would prune the parameters of term {name!r}, which "
                    "are not a part of the student: list it before DistillationCallback, or give "
                    "it parameters_to_prune"
                )


def introduce_teacher(teacher: TeacherBase | None, trainer: Trainer) -> None:
    """Convert the data's images and classes to those of a teacher, and log its inputs.

    Args:
        teacher: the callback's teacher, which pickles and checkpoints do not contain.
        trainer: a Trainer that has set up its data module.

    Raises:
        MisconfigurationException: if there is no teacher.
        ValueError: if the data has classes that the teacher does not have.
    """
    if teacher is None:
        raise MisconfigurationException(
            "this DistillationCallback comes from a pickle or a checkpoint, which does not contain "
            "its teacher: create a new one with the teacher"
        )
    teacher.adapt(card_of_data(trainer))
    rank_zero_info(f"teacher {teacher.describe()}")
