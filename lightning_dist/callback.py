"""DistillationCallback: a callback that adds distillation losses to a module's training step."""

import copy
import functools
import multiprocessing
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_dist.taps import Entry, find_submodule, recording
from lightning_dist.teacher import TeacherBase, as_teacher, is_other_teacher
from lightning_dist.teacher.base import Inputs
from lightning_dist.terms import Nonfinite, Term, Weight, refuse_unmapped
from lightning_dist.training.explaining import explain
from lightning_dist.training.fitting import (
    check_paths,
    introduce_teacher,
    refuse_earlier_averaging,
    refuse_pruned_terms,
    refuse_second_callback,
)
from lightning_dist.training.joining import Step, WrappedStep, add_to_loss, refuse_frozen_step
from lightning_dist.training.manual import StepCalls, check_backward, joined_backward
from lightning_dist.training.options import ONLY, check_options, terms_from
from lightning_dist.training.summing import TermsSum, current_weights, is_zero, log_sum, sum_terms
from lightning_dist.training.term_parameters import (
    TermParameters,
    load_states,
    refuse_untrained,
    states_of,
)
from lightning_dist.training.usage import TermsUsage


class DistillationCallback(Callback):
    """A callback that distils a teacher into a sub-module of a LightningModule.

    While ``fit`` runs, ``training_step`` is wrapped: the teacher is called with the inputs of each
    call of the student, and the returned loss becomes ``task_weight * loss + sum(weight * term)``.
    If the module optimizes manually, this happens to the losses that it gives to
    ``manual_backward``. Precision, accumulation, clipping and DDP therefore work as without
    distillation. When ``fit`` ends, normally or with an error, the wrapper is removed from the
    module. Validation and testing do not change.

    Each step has four stages: the student's outputs are recorded
    (:func:`lightning_dist.taps.recording`), the teacher's outputs are collected
    (:meth:`lightning_dist.teacher.TeacherBase.answers`), the terms are summed
    (:func:`lightning_dist.training.summing.sum_terms`), and the sum is added to the step's loss
    (:mod:`lightning_dist.training.joining`).

    It logs ``train/distill``, the weighted sum of the terms. Unless the only term is that of
    ``loss``, it also logs each term without its weight, as ``train/distill/NAME``.

    Args:
        teacher: the trained network, or a teacher of any kind, such as
            :class:`lightning_dist.Teacher` or :class:`lightning_dist.CachedTeacher`. It is frozen
            in place, moved to the student's device for ``fit``, and moved to the CPU afterwards.
        student: the dotted path of the student in the LightningModule; ``""`` is the module itself.
        loss: the loss of student and teacher logits, a :class:`lightning_dist.DISTLoss` by default.
        weight: the factor of ``loss``, a number or a function of the Trainer; 2 by default.
        task_weight: the factor of the loss that ``training_step`` returns.
        output: the entry to take from outputs that are not tensors, as in :class:`Term`.
        terms: a dict from names to terms, instead of ``loss``, ``weight`` and ``output``.
        nonfinite: the reaction to a term that is NaN or infinite: ``"raise"`` stops before the
            weights are updated; ``"skip"`` leaves the term out of that step and adds 1 to
            ``self.skipped``, which is logged as ``train/distill_skipped``.
        inputs: a dict from paths in the student to paths in the teacher. Each call of such a part
            of the student also calls the part of the teacher, with the same inputs. By default
            ``{"": ""}``: the teacher gets the student's inputs. Or a function of the training batch
            that returns the teacher's input, or a tuple of its inputs; it is called once a step.
        backward: only for manual optimization: the index, counted from 0, of the
            ``manual_backward`` in each step to whose loss the terms are added. By default, the
            terms of a call of the student are added to the loss of the next ``manual_backward``;
            with several optimizers, this default is refused.
            Instead of this option, the step can add :meth:`take_loss` to a loss.

    Raises:
        MisconfigurationException: at the start of ``fit``, if a part does not exist, the teacher
            shares tensors with the module, the Trainer has a second DistillationCallback, or
            ``backward`` is missing. In a training step, before the update, if the outputs of
            student and teacher cannot be paired, or an output was changed in place. After an epoch,
            if there is a term that no step has used so far, because its part was never called with
            a gradient; the first step that does not use it logs a warning.
        FloatingPointError: in a training step, if a term is not finite and ``nonfinite`` is
            ``"raise"``; the message names the term, the step and the side (student or teacher).

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> callback = DistillationCallback(nn.Linear(32, 2), student="layer", weight=2.0)
        >>> trainer = Trainer(callbacks=[callback], fast_dev_run=True, accelerator="cpu",
        ...     logger=False, enable_progress_bar=False, enable_model_summary=False)
        >>> trainer.fit(BoringModel())

    Reference:
        Huang et al., Knowledge Distillation from A Stronger Teacher, NeurIPS 2022.
    """

    def __init__(
        self,
        teacher: nn.Module | TeacherBase,
        student: str = "net",
        loss: nn.Module | Callable[[Tensor, Tensor], Tensor] | None = None,
        weight: Weight | None = None,
        *,
        task_weight: float = 1.0,
        output: Entry | None = None,
        terms: Mapping[str, Term] | None = None,
        inputs: Inputs | None = None,
        nonfinite: Nonfinite = "raise",
        backward: int | None = None,
    ) -> None:
        super().__init__()
        check_options(task_weight, nonfinite, student, backward)
        self.teacher = as_teacher(teacher)
        self.student = student
        self.task_weight = task_weight
        self.terms = terms_from(terms, loss, weight, output)
        self.inputs = inputs if callable(inputs) else dict(inputs or {"": ""})
        self.nonfinite = nonfinite
        self.backward = backward
        self.skipped = 0
        self.owner: LightningModule | None = None  # The module that created this callback, if any.
        self._fingerprint: str | None = None
        self._usage = TermsUsage()
        self._total: Callable[[], TermsSum] | None = None  # It is set within a training step.
        self._attached = False
        self._step: WrappedStep | None = None

    # Hooks, in the order in which Lightning calls them

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Attach the teacher, register the terms' parameters on the module, and wrap the step.

        All of this happens here and not when ``fit`` starts, because Lightning's tuners train
        before ``on_fit_start`` is called.
        """
        if stage != "fit" or self.owner not in (None, pl_module):
            return
        refuse_second_callback(trainer, DistillationCallback)
        introduce_teacher(self.teacher, trainer)
        refuse_unmapped(self.terms, self.teacher.class_map_of)
        taps = [(term.teacher, term.output) for term in self.terms.values()]
        self._attached, self._fingerprint, self._usage = True, None, TermsUsage()
        self.teacher.attach(trainer, pl_module, taps, self.inputs)
        if TermParameters.join(self.terms, pl_module):
            refuse_earlier_averaging(trainer, self)
        for term in self.terms.values():
            if isinstance(term.loss, nn.Module):
                term.loss.to(trainer.strategy.root_device)
        self._step = WrappedStep(
            trainer, pl_module, functools.partial(self._distill, trainer, pl_module)
        )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the paths and the terms, which needs the complete module and the optimizers."""
        if self.owner not in (None, pl_module):
            return
        check_backward(pl_module, trainer, self.backward)
        check_paths(pl_module, self.student, self.teacher.network, self.terms, self.inputs)
        refuse_untrained(self.terms, trainer.optimizers)
        refuse_pruned_terms(self.terms, trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse to continue if there is a term that no step has used so far."""
        if self._attached:
            self._usage.refuse_unused(trainer, self.terms)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Remove everything from the module when ``fit`` fails."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._detach(pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove everything from the module when ``fit`` ends."""
        if stage == "fit":  # Another Trainer may validate within fit: then keep everything.
            self._detach(pl_module)

    @property
    def state_key(self) -> str:
        return self._generate_state_key(student=self.student)

    def state_dict(self) -> dict[str, Any]:
        """Return the terms' parameters, the number of skipped terms and the teacher's fingerprint.

        The module's state_dict leaves these parameters out. If a run continues with a teacher of
        another fingerprint, a warning is logged.
        """
        terms = states_of(self.terms)
        if self._fingerprint is None:
            self._fingerprint = self.teacher.fingerprint()
        return {"terms": terms, "skipped": self.skipped, "teacher": self._fingerprint}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the terms' parameters; outside of ``fit``, those of another shape are left out.

        Raises:
            MisconfigurationException: in ``fit``, if a loss does not fit its checkpointed state.
        """
        self.skipped = state_dict.get("skipped", 0)
        saved = state_dict.get("teacher")
        if self._step is not None and saved is not None:  # Outside of fit, no teacher is used.
            own = self.state_dict()["teacher"]
            if is_other_teacher(saved, own):
                rank_zero_warn(f"this run was distilled from {saved} and goes on with {own}")
        load_states(self.terms, state_dict["terms"], strict=self._step is not None)

    def _distill(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        step: Step,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        student = find_submodule(pl_module, self.student, "the LightningModule", "student")
        weights = current_weights(self.terms, trainer)
        used = {
            term.teacher: None for name, term in self.terms.items() if not is_zero(weights[name])
        }
        asking: Any = nullcontext({})  # The teacher is not called if all weights are 0.
        if used:
            asking = self.teacher.answers(student, args[0], [*used], self.inputs)
        taps = {term.student: None for term in self.terms.values()}
        with asking as of_teacher, recording(student, [*taps]) as of_student:
            calls = StepCalls(of_student, of_teacher, args[0])
            total = functools.partial(self._sum, trainer, pl_module, weights, calls)
            add = functools.partial(self._add, pl_module, total)
            self._total = total
            with joined_backward(pl_module, calls, self.backward, add):
                result = step(*args, **kwargs)
            self._total = None
        if not pl_module.automatic_optimization:
            self._usage.note_unjoined(calls, total, weights)
            return result
        if result is None or calls.all_taken():  # The step skips this batch, or took the loss.
            return result
        return add(result)

    def take_loss(self) -> Tensor:
        """Return the distillation loss of the student's calls so far, within a ``training_step``.

        A step can add it to the loss of its choice. The callback does not add these calls again.

        Returns:
            The weighted sum of the terms, of shape ().

        Raises:
            RuntimeError: outside of a training step.
        """
        if self._total is None:
            raise RuntimeError(
                "call take_loss only in training_step, during a fit with this callback"
            )
        return self._total().total

    def _add(self, pl_module: LightningModule, total: Callable[[], TermsSum], result: Any) -> Any:
        """Return a loss, or a result of ``training_step``, with the distillation loss added."""
        found = total()
        added = add_to_loss(result, found.total, self.task_weight, pl_module)
        refuse_frozen_step(added, found.waiting, self.student)
        return added

    def _sum(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        weights: dict[str, float],
        calls: StepCalls,
    ) -> TermsSum:
        """Sum and log the terms of the calls that were not summed before."""
        found = sum_terms(
            self.terms,
            weights,
            *calls.take(),
            trainer,
            place=self.student,
            nonfinite=self.nonfinite,
            to_student_classes=self.teacher.to_student_classes,
            batch=calls.batch,
        )
        self._usage.note(found)
        self.skipped += found.skipped
        if not trainer.barebones:
            skipped = self.skipped if self.nonfinite == "skip" else None
            log_sum(found, pl_module, each=[*self.terms] != [ONLY], skipped=skipped)
        return found

    explain = explain  # callback.explain(module, batch) prints the calls of one training step

    def _detach(self, pl_module: LightningModule) -> None:
        if self._step is not None:
            self._step.remove()
        if self._attached:
            self.teacher.detach()
        self._step, self._attached, self._total = None, False, None
        TermParameters.leave(pl_module)

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes without networks, which no checkpoint may contain.

        Only a process that Lightning starts (``ddp_spawn``) gets the teacher too.
        """
        if multiprocessing.context.get_spawning_popen() is not None:
            return self.__dict__
        return self.__dict__ | self._idle() | {"teacher": None, "terms": {}, "inputs": {}}

    def __deepcopy__(self, memo: dict[int, Any]) -> "DistillationCallback":
        """Return a callback with the same teacher and copies of the terms."""
        copied = type(self).__new__(type(self))
        copied.__dict__ |= self.__dict__ | self._idle()
        copied.terms = copy.deepcopy(self.terms, memo)
        return copied

    def _idle(self) -> dict[str, Any]:
        """Return the attributes that only ``fit`` sets, with their values outside of it."""
        return {"owner": None, "_step": None, "_attached": False, "_total": None}
