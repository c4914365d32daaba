"""Terms of the distillation loss; each has two parts to compare, a loss and a weight."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_dist.losses import DISTLoss
from lightning_dist.taps import Entry, logits_of

Weight = float | Callable[[Trainer], float]
Nonfinite = Literal["raise", "skip"]


def needs_target(loss: Any) -> bool:
    """Return whether a loss takes the labels of the batch as ``target``."""
    return getattr(getattr(loss, "_orig_mod", loss), "needs_target", False) is True


def default_loss() -> DISTLoss:
    """Return the loss of logits if no other is given: DIST, whose activation a task may choose."""
    return DISTLoss(activation=None)


@dataclass
class Term:
    """One distillation loss between a part of the student and a part of the teacher.

    A part can be called several times in one call of its network, such as a head that the levels of
    a pyramid share. Then the calls of the two parts form pairs, and the losses of all pairs are
    summed. Calls of the student without a gradient, as under ``torch.no_grad()``, are ignored.

    Args:
        loss: a function that takes the student's and the teacher's output and returns a scalar. If
            it is a module with parameters (a projection), they are trained with the student but
            are not in the student's state_dict.
        weight: the factor in the total loss, a number or a function of the Trainer such as
            :class:`lightning_dist.WeightSchedule`.
        student: the dotted path of the part inside the student: of a sub-module, or of a method of
            one, such as ``"encoder.embed"``; ``""`` is the whole student.
        teacher: the dotted path of the part inside the teacher; ``""`` is the whole teacher.
        output: the entry to take from an output that is not a tensor: a key, an attribute or an
            index, or a dotted path of them such as ``"aux.0"``. Or a function that takes the output
            of either part and returns a tensor, for networks whose output in training mode has
            another structure than in eval mode. By default ``logits`` or ``out`` if the output has
            one, or the first item of a tuple or list, see :func:`lightning_dist.taps.logits_of`.
        classes: ``True`` if the outputs are class scores, so that the teacher's ``class_map``
            applies to the teacher's part, or ``False`` if they are not. By default the attribute
            ``compares_classes`` of the loss: ``True`` for the losses of logits in
            :mod:`lightning_dist.losses`, ``False`` for those of features. Any other loss needs this
            option if it compares a part of a teacher with a ``class_map``.
        rows: how the rows (samples) of the student's part belong to those of the teacher's, if it
            has k times as many: ``"tiled"`` if the whole batch is repeated (1, 2, 3, 1, 2, 3), as
            from an ensemble of students, and ``"interleaved"`` if each sample is repeated (1, 1, 2,
            2, 3, 3), as from repeated augmentation. With either value, a teacher that is called
            once is also compared with several calls of the student, as of crops of several sizes.
        from_batch: a function of the training batch and of the tensor that the term takes from the
            student. It returns a dict of further arguments of the loss: ``mask`` for the entries
            that DISTLoss and KDLoss leave out (ignored pixels, padded tokens, absent objects), and
            ``target`` for a loss that needs labels, such as DKDLoss. It is called once for each
            call of the part.

    Example:
        >>> from lightning_dist import KDLoss
        >>> def tokens(batch: dict[str, Tensor], logits: Tensor) -> dict[str, Tensor]:
        ...     return {"mask": batch["attention_mask"].bool()}
        >>> term = Term(KDLoss(class_dim=-1), from_batch=tokens)
    """

    loss: nn.Module | Callable[..., Tensor]
    weight: Weight = 1.0
    student: str = ""
    teacher: str = ""
    output: Entry | None = None
    classes: bool | None = None
    rows: Literal["same", "tiled", "interleaved"] = "same"
    from_batch: Callable[[Any, Tensor], Mapping[str, Any]] | None = None

    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the loss, or an empty list if it has none."""
        return list(self.loss.parameters()) if isinstance(self.loss, nn.Module) else []

    def current_weight(self, trainer: Trainer) -> float:
        """Return the weight in this step.

        Raises:
            ValueError: if the weight is a function that does not return a number.
        """
        weight = self.weight(trainer) if callable(self.weight) else self.weight
        if not isinstance(weight, (Real, Tensor)):
            raise ValueError(
                f"the weight gave {weight!r} at step {trainer.global_step}: a function of the "
                "Trainer must return a number"
            )
        return weight

    def compares_classes(self) -> bool | None:
        """Return whether the teacher's ``class_map`` applies to its part; ``None`` if unknown."""
        loss = getattr(self.loss, "_orig_mod", self.loss)  # unwrap a compiled loss
        of_loss = getattr(loss, "compares_classes", None)
        if self.classes is None and isinstance(of_loss, bool):
            return of_loss
        return self.classes

    def _takes_the_mapped_logits(self) -> bool:
        """Return whether the teacher has already applied its class map to the term's tensor."""
        return not self.teacher and self.output in (None, "logits", "out", 0, "0")

    def value(
        self,
        student: list[Any],
        teacher: list[Any],
        trainer: Trainer,
        to_student_classes: Callable[[Tensor, str], Tensor] = lambda logits, part: logits,
        batch: Any = None,
    ) -> Tensor | None:
        """Return the loss, a tensor of shape (), summed over the calls of the parts.

        Args:
            student: the output of each call of the student's part.
            teacher: the output of each call of the teacher's part.
            trainer: the Trainer.
            to_student_classes: a function that maps the teacher's classes to the student's. It is
                applied only to a sub-module of the teacher, whose path is its second argument,
                because the output of the whole teacher is mapped already.
            batch: the training batch, for ``from_batch``.

        Returns:
            The loss, or ``None`` if no output of the student has a gradient.

        Raises:
            ValueError: if the outputs cannot be paired, or the loss is not defined for them.
        """
        pairs = self._pairs(student, teacher)
        if not pairs:
            return None
        if self.compares_classes() and not self._takes_the_mapped_logits():
            pairs = [(x, to_student_classes(y, self.teacher)) for x, y in pairs]
        # A teacher under inference_mode returns inference tensors, but autograd cannot save them.
        pairs = [(x, y.clone() if y.is_inference() else y) for x, y in pairs]
        pairs = [(x, self._with_rows(y, len(x))) if x.dim() else (x, y) for x, y in pairs]
        self._check_logits([logits for logits, _ in pairs], trainer)
        values = [self.loss(*pair, **self._further_arguments(batch, pair[0])) for pair in pairs]
        for value in values:
            if not isinstance(value, Tensor) or value.dim():
                got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"the loss returns {got}: it must return a tensor of shape ()")
        return torch.stack(values).sum()

    def _pairs(self, student: list[Any], teacher: list[Any]) -> list[tuple[Tensor, Tensor]]:
        """Return the two tensors of each pair of calls in which the student has a gradient."""
        if self.rows != "same" and len(teacher) == 1:
            teacher = teacher * len(student)
        if len(student) != len(teacher):
            raise ValueError(
                f"the student's part was called {len(student)} times and the teacher's "
                f"{self.teacher!r} {len(teacher)} times: choose parts that correspond"
            )
        pairs = []
        for of_student, of_teacher in zip(student, teacher, strict=True):
            x = self._taken(of_student, "the student's output in training_step")
            pairs.append((x, self._taken(of_teacher, "the teacher's output in eval mode")))
        return [(x, y) for x, y in pairs if x.requires_grad]

    def _taken(self, output: Any, whose: str) -> Tensor:
        try:
            return logits_of(output, self.output)
        except ValueError as error:
            raise ValueError(f"{whose}: {error}") from error

    def _with_rows(self, teacher: Tensor, count: int) -> Tensor:
        """Return the teacher's part with as many rows as the student's."""
        if not teacher.dim() or len(teacher) == count:
            return teacher
        times, rest = divmod(count, max(len(teacher), 1))
        if self.rows == "same" or rest:
            if self.compares_classes() is not True:
                return teacher  # The loss may accept different numbers of rows.
            raise ValueError(
                f"the student has {count} rows and the teacher {len(teacher)}: if each row of the "
                "teacher belongs to several of the student, set the term's rows to 'tiled' or "
                "'interleaved'"
            )
        if self.rows == "interleaved":
            return teacher.repeat_interleave(times, 0)
        return teacher.repeat(times, *[1] * (teacher.dim() - 1))

    def zero(self, outputs: list[Any], parameters: Iterable[nn.Parameter]) -> Tensor:
        """Return a 0 that keeps the student and the loss's own parameters in the graph.

        DDP waits for the gradient of every parameter: a rank that skips the term must therefore
        give a gradient of 0. A gradient of 0 would become NaN on its way through an output that is
        not finite, so such an output is left out, and the student's parameters take its place.

        Args:
            outputs: the outputs of the student's part.
            parameters: the parameters of the student; not used where all outputs are finite.
        """
        logits = [logits_of(x, self.output) for x in outputs]
        logits = [x for x in logits if x.requires_grad]
        kept = [x for x in logits if x.isfinite().all()]
        if len(kept) < len(logits):
            kept += [p for p in parameters if p.requires_grad]
        own = self.parameters()
        known = [logits_of(outputs[0], self.output)] if outputs else own
        device = known[0].device if known else None
        parts = [0 * x.float().sum() for x in (*kept, *own)]
        return torch.stack([torch.zeros((), device=device), *parts]).sum()

    def is_finite(self, outputs: list[Any]) -> bool:
        """Return whether the tensors that the term takes from some outputs are all finite."""
        return all(bool(logits_of(x, self.output).isfinite().all()) for x in outputs)

    def _further_arguments(self, batch: Any, logits: Tensor) -> Mapping[str, Any]:
        """Return the arguments of the loss that come from the batch."""
        if self.from_batch is None:
            return {}
        found = self.from_batch(batch, logits)
        if not isinstance(found, Mapping):
            raise ValueError(
                f"from_batch returns {type(found).__name__}: it must return a dict from the names "
                "of the loss's arguments to their values"
            )
        return found

    def _check_logits(self, logits: list[Tensor], trainer: Trainer) -> None:
        """Let the loss check the first batch, if it has a method for that."""
        loss = getattr(self.loss, "_orig_mod", self.loss)  # unwrap a compiled loss
        check = getattr(loss, "check_first_batch", None)
        if check is None or trainer.fit_loop.total_batch_idx:
            return
        warning = check(logits, processes=trainer.world_size, is_last=trainer.is_last_batch)
        if warning:
            rank_zero_warn(warning)


def refuse_unmapped(
    terms: Mapping[str, Term], class_map_of: Callable[[str], Sequence[int] | None]
) -> None:
    """Refuse a term if it is unknown whether the teacher's class map applies to it.

    Args:
        terms: a dict from names to terms.
        class_map_of: a function from a part of the teacher to its class map, or to ``None``.

    Raises:
        MisconfigurationException: if a term on a part of a teacher with a class map must set
            ``classes``; the message names the term.
    """
    for name, term in terms.items():
        has_map = class_map_of(term.teacher) is not None
        if has_map and callable(term.output) and term.classes is None:
            raise MisconfigurationException(
                f"the teacher has a class_map, and the output of term {name!r} is a function: set "
                "the term's classes=True to map the classes of what it returns, or classes=False "
                "if it returns the teacher's logits, which are mapped already, or no classes"
            )
        mapped = term._takes_the_mapped_logits()
        known = mapped or term.compares_classes() is not None
        if not known and has_map:
            raise MisconfigurationException(
                f"the teacher has a class_map, and term {name!r} compares its part "
                f"{term.teacher!r}, whose outputs may be class scores or features: set the term's "
                "classes=True to map the classes, or classes=False"
            )
