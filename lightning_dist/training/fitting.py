"""Functions that check, at the start of ``fit``, whether module, teacher and terms fit together."""

from collections.abc import Mapping

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_dist.taps import check_part, find_submodule
from lightning_dist.teacher.base import Inputs
from lightning_dist.terms import Term
from lightning_dist.training.averaging import earlier_averaging


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
    _warn_of_compiled_taps(student, terms)


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


def _warn_of_compiled_taps(student: nn.Module, terms: Mapping[str, Term]) -> None:
    compiled = any(
        hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in student.modules()
    )
    inner = [name for name, term in terms.items() if term.student]
    if compiled and inner:
        rank_zero_warn(
            f"term {inner[0]!r} compares a part within the student, which is compiled: to record "
            "the part, torch compiles the student again in each step, and after some steps runs it "
            "uncompiled. Compare the student's own output (student=''), or leave out torch.compile"
        )
