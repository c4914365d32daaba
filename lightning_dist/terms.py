"""Terms of the distillation loss: two parts to compare, a loss and a weight each; and their sum."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_dist.checks import check_number
from lightning_dist.losses import DISTLoss
from lightning_dist.taps import logits_of

Weight = float | Callable[[Trainer], float]
Nonfinite = Literal["raise", "skip"]


class WeightSchedule:
    """A loss weight that moves linearly between points and stays at the last one.

    Args:
        points: weight at an epoch or step, from 0 on: ``{0: 0.0, 5: 2.0}`` warms up over five
            epochs; ``{0: 2.0, 80: 2.0, 100: 0.0}`` fades out in the last twenty of a hundred.
        unit: ``"epoch"`` (changes at each epoch's start) or ``"step"`` (optimizer steps).

    Raises:
        ValueError: if there is no point, or one lies before 0, or ``unit`` is another word.

    Example:
        >>> WeightSchedule({0: 0.0, 10: 2.0}).at(5)
        1.0
    """

    def __init__(
        self, points: Mapping[int, float], unit: Literal["epoch", "step"] = "epoch"
    ) -> None:
        if not points or min(points) < 0:
            raise ValueError(f"points is {dict(points)}: give at least one point, none before 0")
        if unit not in ("epoch", "step"):
            raise ValueError(f"unit is {unit!r}: use 'epoch' or 'step'")
        self.points = sorted((int(when), float(weight)) for when, weight in points.items())
        self.unit = unit

    def at(self, when: float) -> float:
        """Return the weight at an epoch or step."""
        earlier = [point for point in self.points if point[0] <= when]
        later = [point for point in self.points if point[0] > when]
        if not earlier or not later:
            return (earlier[-1] if earlier else later[0])[1]
        (start, first), (end, last) = earlier[-1], later[0]
        return first + (last - first) * (when - start) / (end - start)

    def __call__(self, trainer: Trainer) -> float:
        """Return the weight of this epoch or step of the Trainer."""
        return self.at(trainer.current_epoch if self.unit == "epoch" else trainer.global_step)

    def __repr__(self) -> str:
        return f"WeightSchedule({dict(self.points)}, unit={self.unit!r})"


@dataclass
class Term:
    """One distillation loss between a part of the student and a part of the teacher.

    A part that is called several times in one call of its network (a head shared by the levels of a
    pyramid) gives as many pairs, whose losses are summed. Calls of the student without a gradient,
    as under ``torch.no_grad()``, do not count.

    Args:
        loss: takes the student's and the teacher's output, returns a scalar. If it is a module with
            parameters (a projection), they train along and stay out of the student's state_dict.
        weight: factor in the total loss, or a function of the Trainer such as
            :class:`WeightSchedule`.
        student: dotted path inside the student; ``""`` is the student's own output.
        teacher: dotted path inside the teacher; ``""`` is the teacher's own output.
        output: entry to take from an output that is not a tensor: a key, an attribute or an index.
            By default ``logits`` or ``out`` where there is one, or the first item of a tuple or
            list, see :func:`lightning_dist.taps.logits_of`.
    """

    loss: nn.Module | Callable[[Tensor, Tensor], Tensor]
    weight: Weight = 1.0
    student: str = ""
    teacher: str = ""
    output: str | int | None = None

    def check(self, name: str) -> None:
        """Refuse a loss or a weight of the wrong kind.

        Args:
            name: of the term, for the message.

        Raises:
            TypeError: if the loss is not a function.
            ValueError: if the weight is not a finite number.
        """
        if not callable(self.loss) or isinstance(self.loss, type):
            raise TypeError(f"the loss of term {name!r} is {self.loss!r}: give a function")
        if not callable(self.weight):
            check_number(f"the weight of term {name!r}", self.weight)

    def parameters(self) -> list[nn.Parameter]:
        """Return the loss's own parameters."""
        return list(self.loss.parameters()) if isinstance(self.loss, nn.Module) else []

    def current_weight(self, trainer: Trainer) -> float:
        """Return the weight in this step.

        Raises:
            ValueError: if a function returned something else than a number.
        """
        weight = self.weight(trainer) if callable(self.weight) else self.weight
        if not isinstance(weight, (Real, Tensor)):
            raise ValueError(
                f"the weight gave {weight!r} at step {trainer.global_step}: a function of the "
                "Trainer must return a number"
            )
        return weight

    def value(self, student: list[Any], teacher: list[Any], trainer: Trainer) -> Tensor:
        """Return the loss, a tensor of shape (), summed over the calls of the parts.

        Args:
            student: the output of each call of the student's part.
            teacher: the output of each call of the teacher's part.
            trainer: the Trainer, at this batch.

        Raises:
            ValueError: if the outputs do not pair, or the loss is not defined for them.
        """
        if len(student) != len(teacher):
            raise ValueError(
                f"the student's part was called {len(student)} times and the teacher's "
                f"{self.teacher!r} {len(teacher)} times: choose parts that correspond"
            )
        pairs = [
            (logits_of(of_student, self.output), logits_of(of_teacher, self.output))
            for of_student, of_teacher in zip(student, teacher, strict=True)
        ]
        # A call under no_grad, such as one that makes pseudo-labels, has nothing to train.
        pairs = [pair for pair in pairs if pair[0].requires_grad]
        if not pairs:
            raise ValueError(
                "no call of the student's part has a gradient, so the term would teach nothing: "
                "call it outside of torch.no_grad(), with use_reentrant=False where it is "
                "checkpointed, and with parameters that require a gradient"
            )
        self._refuse_single_rows([logits for logits, _ in pairs], trainer)
        values = [self.loss(*pair) for pair in pairs]
        for value in values:
            if not isinstance(value, Tensor) or value.dim():
                got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"the loss returns {got}: it must return a tensor of shape ()")
        return torch.stack(values).sum()

    def zero(self, like: Any) -> Tensor:
        """Return a 0 that keeps the loss's own parameters in the graph, where DDP needs them."""
        zero = torch.zeros((), device=logits_of(like, self.output).device)
        return torch.stack([zero, *(0 * p.sum() for p in self.parameters())]).sum()

    def is_finite(self, outputs: list[Any]) -> bool:
        """Return whether the tensors that the term compares are finite in some outputs."""
        return all(bool(logits_of(x, self.output).isfinite().all()) for x in outputs)

    def _refuse_single_rows(self, logits: list[Tensor], trainer: Trainer) -> None:
        """Refuse a run of one-sample batches; the last batch of an epoch may have one sample."""
        loss = getattr(self.loss, "_orig_mod", self.loss)  # of a compiled one
        if not isinstance(loss, DISTLoss) or not loss.gamma:
            return
        if loss.sync and trainer.world_size > 1:
            return
        if trainer.fit_loop.total_batch_idx or trainer.is_last_batch:
            return
        if all(x.dim() > 1 and x.numel() == x.shape[1] for x in logits):
            raise ValueError(
                "the batch has one sample, which no intra-class relation can be of: use larger "
                "batches, sync=True over several processes, or gamma=0"
            )


@dataclass
class TermsSum:
    """The terms of one step.

    Attributes:
        total: the weighted sum, a tensor of shape ().
        values: each term without its weight, by name.
        skipped: how many terms were left out because they were not finite.
    """

    total: Tensor
    values: dict[str, Tensor]
    skipped: int


def sum_terms(
    terms: Mapping[str, Term],
    student: Mapping[str, list[Any]],
    teacher: Mapping[str, list[Any]],
    trainer: Trainer,
    *,
    place: str,
    nonfinite: Nonfinite,
) -> TermsSum:
    """Compute every term from the recorded outputs, and their weighted sum.

    Args:
        terms: by name, at least one.
        student: outputs of each part of the student, by its path, in the order of the calls.
        teacher: the same of the teacher.
        trainer: the Trainer, at this batch.
        place: dotted path of the student in its module, for messages.
        nonfinite: what to do where a term is NaN or infinite: ``"raise"`` or ``"skip"``.

    Raises:
        MisconfigurationException: if outputs do not pair, or a loss is not defined for them; the
            message names the term.
        FloatingPointError: if a term is not finite and ``nonfinite`` is ``"raise"``.
    """
    values, products, skipped = {}, [], 0
    for name, term in terms.items():
        of_student, of_teacher = student[term.student], teacher[term.teacher]
        part = f"{place}.{term.student}".strip(".") or "the module itself"
        if not of_student:
            raise MisconfigurationException(
                f"term {name!r}: {part!r} was not called in training_step, so there is nothing to "
                "distil: set student to the sub-module that training_step calls"
            )
        try:
            value = term.value(of_student, of_teacher, trainer)
            product = term.current_weight(trainer) * value
        except ValueError as error:
            against = f"the teacher's {term.teacher!r}" if term.teacher else "the teacher"
            raise MisconfigurationException(
                f"term {name!r} of {part!r} and {against}: {error}"
            ) from error
        if not product.isfinite():
            if nonfinite == "raise":
                raise _nonfinite_error(name, term, of_student, of_teacher, trainer)
            skipped += 1
            product = value = term.zero(of_student[0])
        values[name] = value
        products.append(product)
    return TermsSum(sum(products[1:], start=products[0]), values, skipped)


class TermParameters(nn.ModuleDict):
    """The losses with parameters: seen by optimizers and DDP, absent from the state_dict.

    Args:
        losses: the losses, by the names of their terms.
    """

    name = "_distillation"

    def __init__(self, losses: Mapping[str, nn.Module]) -> None:
        super().__init__(losses)
        self.register_load_state_dict_post_hook(_forget_missing_keys)

    @classmethod
    def join(cls, terms: Mapping[str, Term], pl_module: LightningModule) -> bool:
        """Register the terms' parameters on a module; return whether there are any."""
        losses = {name: x.loss for name, x in terms.items() if isinstance(x.loss, nn.Module)}
        parts = cls({name: loss for name, loss in losses.items() if terms[name].parameters()})
        if len(parts):
            pl_module.add_module(cls.name, parts)
        return bool(len(parts))

    @classmethod
    def leave(cls, pl_module: LightningModule) -> None:
        """Take the terms' parameters from a module, if it has any."""
        pl_module._modules.pop(cls.name, None)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return kwargs.get("destination", {})


def refuse_untrained(terms: Mapping[str, Term], optimizers: Iterable[Optimizer]) -> None:
    """Refuse terms with parameters that no optimizer holds.

    Args:
        terms: by name.
        optimizers: all of the Trainer's.

    Raises:
        MisconfigurationException: naming the term.
    """
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    trained = {id(parameter) for group in groups for parameter in group["params"]}
    for name, term in terms.items():
        if any(p.requires_grad and id(p) not in trained for p in term.parameters()):
            raise MisconfigurationException(
                f"the loss of term {name!r} has parameters that no optimizer holds: build the "
                "optimizer from self.parameters() in configure_optimizers"
            )


def _forget_missing_keys(module: nn.Module, incompatible: Any) -> None:
    keys = incompatible.missing_keys
    keys[:] = [key for key in keys if f"{TermParameters.name}." not in key]


def _nonfinite_error(
    name: str, term: Term, student: list[Any], teacher: list[Any], trainer: Trainer
) -> FloatingPointError:
    sides = {"student": student, "teacher": teacher}
    wrong = [f"the {side}'s output" for side in sides if not term.is_finite(sides[side])]
    return FloatingPointError(
        f"the distillation loss of term {name!r} is not finite at step {trainer.global_step} "
        f"(epoch {trainer.current_epoch}): NaN or infinity is in "
        f"{' and '.join(wrong) or 'neither output, so the loss or its weight makes it'}. Lower "
        "the learning rate or the weight, give the teacher a wider dtype, or leave such steps "
        "out with nonfinite='skip'"
    )
