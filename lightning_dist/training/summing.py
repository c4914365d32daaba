"""The sum of the distillation terms of one step, computed from the recorded outputs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_dist.taps import Recording
from lightning_dist.teacher.isolation import own_inputs
from lightning_dist.terms import Nonfinite, Term


@dataclass
class TermsSum:
    """The values of the terms in one step, and their weighted sum.

    Attributes:
        total: the weighted sum, a tensor of shape ().
        values: a dict from names to the values of the terms, before the weights.
        skipped: the number of terms that were left out because they were not finite.
        waiting: the names of the terms whose part of the student is frozen in this step.
        unused: a dict from the name of each unused term to the reason: no call of its part of the
            student had a gradient.
    """

    total: Tensor
    values: dict[str, Tensor]
    skipped: int
    waiting: list[str]
    unused: dict[str, str]


def current_weights(terms: Mapping[str, Term], trainer: Trainer) -> dict[str, float]:
    """Return a dict from the names of the terms to their weights in this step.

    Raises:
        MisconfigurationException: if a weight is not a number; the message names the term.
    """
    weights = {}
    for name, term in terms.items():
        try:
            weights[name] = term.current_weight(trainer)
        # Lightning would end the epoch at a StopIteration.
        except (ValueError, StopIteration) as error:
            raise MisconfigurationException(
                f"term {name!r}: {str(error) or repr(error)}"
            ) from error
    return weights


def is_zero(weight: Any) -> bool:
    """Return whether a weight is the number 0; reading a tensor would wait for the GPU."""
    return isinstance(weight, Real) and weight == 0


def sum_terms(
    terms: Mapping[str, Term],
    weights: Mapping[str, float],
    student: Recording,
    teacher: Mapping[str, list[Any]],
    trainer: Trainer,
    *,
    place: str,
    nonfinite: Nonfinite,
    to_student_classes: Callable[[Tensor, str], Tensor],
    batch: Any = None,
) -> TermsSum:
    """Compute all terms from the recorded outputs, and their weighted sum.

    A term adds 0 and is not computed if its weight is 0, or if its part of the student is frozen or
    was not called.

    Args:
        terms: a dict from names to terms, with at least one term.
        weights: a dict from names to the weights in this step.
        student: the recorded outputs of the student's parts.
        teacher: a dict from the paths of the teacher's parts to their outputs, in the order of the
            calls.
        trainer: the Trainer.
        place: the dotted path of the student in its module, for messages.
        nonfinite: the reaction to a term that is NaN or infinite, ``"raise"`` or ``"skip"``.
        to_student_classes: the teacher's method of that name.
        batch: the training batch, in which a term that is not finite may have its cause.

    Raises:
        MisconfigurationException: if outputs cannot be paired, or a loss is not defined for them;
            the message names the term.
        FloatingPointError: if a term is not finite and ``nonfinite`` is ``"raise"``.
    """
    total = TermsSum(torch.zeros(()), {}, 0, [], {})
    products: dict[str, Tensor] = {}
    for name, term in terms.items():
        of_student = student.outputs[term.student]
        if is_zero(weights[name]):
            products[name] = _zero(term, student)
            continue
        part = f"{place}.{term.student}".strip(".") or "the module itself"
        of_teacher, value = teacher[term.teacher], None
        if of_student:
            try:
                value = term.value(of_student, of_teacher, trainer, to_student_classes, batch)
            except (ValueError, StopIteration) as error:
                against = f"the teacher's {term.teacher!r}" if term.teacher else "the teacher"
                raise MisconfigurationException(
                    f"term {name!r} of {part!r} and {against}: {str(error) or repr(error)}"
                ) from error
        if value is None:
            if of_student and student.is_frozen(term.student):
                total.waiting.append(name)
            else:
                total.unused[name] = _not_called(name, term, part, student)
            products[name] = _zero(term, student)
            continue
        total.values[name] = value
        products[name] = weights[name] * value
    total.total = _added(products)
    # One number is read from the device, and not one for each term.
    if not total.total.isfinite():
        for name in [name for name in total.values if not products[name].isfinite()]:
            term = terms[name]
            if nonfinite == "raise":
                sides = student.outputs[term.student], teacher[term.teacher]
                raise _nonfinite_error(name, term, *sides, trainer, batch)
            total.skipped += 1
            total.values[name] = products[name] = _zero(term, student)
        total.total = _added(products)
    return total


def _zero(term: Term, student: Recording) -> Tensor:
    """Return what a term that is left out adds to the sum."""
    return term.zero(student.outputs[term.student], student.root.parameters())


def _added(products: Mapping[str, Tensor]) -> Tensor:
    first, *rest = products.values()
    return sum(rest, start=first)


def log_sum(
    found: TermsSum, pl_module: LightningModule, *, each: bool, skipped: int | None
) -> None:
    """Log ``train/distill`` and, for each term, ``train/distill/NAME`` without its weight.

    Args:
        found: the sum of the terms of a step.
        pl_module: the module that logs.
        each: log each term too.
        skipped: the number of terms that were left out so far, to log as
            ``train/distill_skipped``; ``None`` logs no number.
    """
    _log(pl_module, "train/distill", found.total.detach())
    for name, value in found.values.items() if each else ():
        _log(pl_module, f"train/distill/{name}", value.detach())
    if skipped is not None:
        _log(pl_module, "train/distill_skipped", torch.tensor(float(skipped)))


def _log(pl_module: LightningModule, name: str, value: Tensor) -> None:
    """Log a value, as ``pl_module.log`` does.

    Nine tenths of the time of ``log`` in Lightning 2.6.6 are the preparation of an entry, which it
    repeats for an entry that exists. With many terms, that takes longer than the step. So the
    second half of ``log`` is called alone if the entry exists and has a value of this epoch.
    """
    results: Any = pl_module.trainer._results
    key = f"{pl_module._current_fx_name}.{name}"
    entry = results.get(key) if type(pl_module).log is LightningModule.log else None
    # The values are logged per step, so the batch size never weighs a mean. Without batch_size,
    # Lightning would infer the size, which fails if training_step takes a dataloader_iter.
    if entry is None or entry.has_reset:
        pl_module.log(name, value, batch_size=1)
    else:
        results.update_metrics(key, value, 1)


def _not_called(name: str, term: Term, part: str, student: Recording) -> str:
    """Return a message with the reason why a term has nothing to distil, and with advice."""
    if not student.outputs[term.student] and term.student not in student.without_grad:
        return (
            f"term {name!r}: {part!r} was not called in training_step, so there is nothing to "
            "distil: set student to the sub-module or method that training_step calls, which "
            "DistillationCallback.explain(module, batch) lists"
        )
    return (
        f"term {name!r}: no call of {part!r} has a gradient, so the term cannot train it: call it "
        "outside of torch.no_grad(), do not detach its outputs, and give torch.utils.checkpoint "
        "use_reentrant=False"
    )


def _nonfinite_error(
    name: str,
    term: Term,
    student: list[Any],
    teacher: list[Any],
    trainer: Trainer,
    batch: Any,
) -> FloatingPointError:
    place = (
        f"the distillation loss of term {name!r} is not finite at step {trainer.global_step} "
        f"(epoch {trainer.current_epoch}, batch {trainer.fit_loop.batch_idx})"
    )
    broken = _broken_samples(batch)
    if broken:
        shown = ", ".join(map(str, broken[:5])) + (" and more" if len(broken) > 5 else "")
        return FloatingPointError(
            f"{place}: NaN or infinity is in the batch itself, in the samples {shown} of "
            "it (counted from 0): look at these inputs and at what reads and normalises them"
        )
    sides = {"student": student, "teacher": teacher}
    wrong = [f"the {side}'s output" for side in sides if not term.is_finite(sides[side])]
    return FloatingPointError(
        f"{place}: NaN or infinity is in "
        f"{' and '.join(wrong) or 'neither output, so it comes from the loss or its weight'}. "
        "Lower the learning rate or the weight, give the teacher a wider dtype, or leave such "
        "steps out with nonfinite='skip'"
    )


def _broken_samples(batch: Any) -> list[int]:
    """Return the positions in the batch of the samples with a number that is not finite."""
    broken: set[int] = set()
    # This includes the tensors in the attributes of objects.
    _, tensors = own_inputs(batch, clone=False)
    for tensor in tensors:
        if tensor.is_floating_point() and tensor.dim():
            finite = tensor.isfinite().flatten(1).all(1) if tensor.dim() > 1 else tensor.isfinite()
            broken.update((~finite).nonzero().flatten().tolist())
    return sorted(broken)
