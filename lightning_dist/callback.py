"""DistillationCallback: adds distillation losses to the training step of a LightningModule."""

import functools
import types
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_dist.cache import CachedTeacher
from lightning_dist.checks import check_number
from lightning_dist.data.views import KeyedBatch
from lightning_dist.losses import DISTLoss
from lightning_dist.taps import find, record, recorded, refuse_shared_tensors
from lightning_dist.teacher import Teacher
from lightning_dist.terms import Term, TermParameters, Weight

Nonfinite = Literal["raise", "skip"]


class DistillationCallback(Callback):
    """Distil a teacher into a sub-module of any LightningModule under automatic optimization.

    While ``fit`` runs, ``training_step`` is wrapped: each call of the student hands its inputs to
    the teacher too, and the returned loss becomes ``task_weight * loss + sum(weight * term)``.
    Precision, accumulation, clipping and DDP therefore work as ever. Nothing stays on the module
    when ``fit`` ends, normally or not. Validation and testing are untouched.

    Logs ``train/distill``, the weighted sum of the terms, and, where ``terms`` are given,
    ``train/distill/NAME``, each term without its weight.

    Args:
        teacher: the trained network, a :class:`lightning_dist.teacher.Teacher`, or a
            :class:`lightning_dist.CachedTeacher`. It is frozen in place, joins the student's device
            for ``fit``, and lies on the CPU afterwards.
        student: dotted path of the student in the LightningModule; ``""`` is the module itself.
        loss: the loss of student and teacher logits, a :class:`lightning_dist.DISTLoss` by default.
        weight: factor of ``loss``, a number or a function of the Trainer; 2 by default.
        task_weight: factor of the loss that ``training_step`` returns.
        output: entry of outputs that are not tensors, as in :class:`Term`.
        terms: several named losses instead of ``loss``, ``weight`` and ``output``.
        nonfinite: what happens where a term is NaN or infinite: ``"raise"`` stops before the
            weights are updated; ``"skip"`` leaves the term out of that step and counts it, in
            ``self.skipped`` and ``train/distill_skipped``.
        inputs: which sub-modules of the student hand what they are called with to which ones of the
            teacher, both as dotted paths. By default ``{"": ""}``: what the student is called with
            goes to the teacher.

    Raises:
        MisconfigurationException: at the start of ``fit``: manual optimization, an unknown
            sub-module, a teacher that shares tensors with the module, a second callback. In the
            first training step, before anything is updated: a student that is not called with a
            gradient, outputs that do not pair, or one that is changed in place.
        FloatingPointError: in a training step whose distillation loss is not finite, unless
            ``nonfinite`` is ``"skip"``; it names the term, the step and the side.

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
        teacher: nn.Module | Teacher,
        student: str = "net",
        loss: nn.Module | Callable[[Tensor, Tensor], Tensor] | None = None,
        weight: Weight | None = None,
        *,
        task_weight: float = 1.0,
        output: str | int | None = None,
        terms: Mapping[str, Term] | None = None,
        inputs: Mapping[str, str] | None = None,
        nonfinite: Nonfinite = "raise",
    ) -> None:
        super().__init__()
        check_number("task_weight", task_weight)
        if nonfinite not in ("raise", "skip"):
            raise ValueError(f"nonfinite is {nonfinite!r}: use 'raise' or 'skip'")
        if terms is not None and any(x is not None for x in (loss, weight, output)):
            raise ValueError("give either loss, weight and output, or terms")
        if terms is not None and not terms:
            raise ValueError("terms is empty: name at least one Term")
        if terms is not None and not isinstance(terms, Mapping):
            raise TypeError(f"terms is a {type(terms).__name__}: give a dict of names and Terms")
        if not isinstance(student, str):
            raise TypeError(f"student is a {type(student).__name__}: give its dotted path, a str")
        self.teacher = teacher if isinstance(teacher, Teacher) else Teacher(teacher)
        self.student = student
        self.task_weight = task_weight
        self._named = terms is not None
        if terms is None:
            # Not "loss or": a compiled module has no truth value.
            loss = DISTLoss() if loss is None else loss
            terms = {"distill": Term(loss, 2.0 if weight is None else weight, output=output)}
        self.terms = dict(terms)
        for name, term in self.terms.items():
            if not isinstance(term, Term):
                raise TypeError(f"term {name!r} is a {type(term).__name__}: give a Term")
            term.check(name)
        self.inputs = dict(inputs or {"": ""})
        self.nonfinite = nonfinite
        self.skipped = 0
        self.owner: LightningModule | None = None  # the module that brought it, if one did
        self._own_step: Callable[..., Any] | None = None
        self._wrapped = False

    # Hooks, in the order in which Lightning calls them

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let the terms' own parameters join the module, place the teacher, wrap the step."""
        if stage != "fit" or self.owner not in (None, pl_module):
            return
        _refuse_manual_optimization(pl_module)
        if sum(isinstance(c, DistillationCallback) for c in attached_callbacks(trainer)) > 1:
            raise MisconfigurationException(
                "the Trainer has several DistillationCallbacks: give one of them several terms"
            )
        try:
            refuse_shared_tensors(self.teacher.network, pl_module)
        except MisconfigurationException:
            self.teacher.release()  # what it shares is the student's, which would stay frozen
            raise
        if isinstance(self.teacher, CachedTeacher):
            taps = [(term.teacher, term.output) for term in self.terms.values()]
            self.teacher.attach(trainer, taps, self.inputs)
        parts = TermParameters(
            {
                name: term.loss
                for name, term in self.terms.items()
                if isinstance(term.loss, nn.Module) and term.parameters()
            }
        )
        if len(parts):
            callbacks = attached_callbacks(trainer)
            before = callbacks[: callbacks.index(self)]
            averaging = next((c for c in before if isinstance(c, WeightAveraging)), None)
            if averaging is not None:  # it has copied the module without them
                raise MisconfigurationException(
                    f"{type(averaging).__name__} comes before a DistillationCallback whose terms "
                    "have parameters, which it then cannot average: list DistillationCallback first"
                )
            pl_module.add_module(TermParameters.name, parts)
        # Here, and not when fit starts: Lightning's tuners train before that hook is called.
        device = trainer.strategy.root_device
        for term in self.terms.values():
            if isinstance(term.loss, nn.Module):
                term.loss.to(device)
        self.teacher.freeze()
        if isinstance(self.teacher, CachedTeacher):
            self.teacher.locate(trainer)
        self.teacher.to(device)
        self._wrap(trainer, pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check what needs the module's parts and the optimizers."""
        if self.owner not in (None, pl_module):
            return
        _refuse_manual_optimization(pl_module)  # its own setup may have changed it
        student = find(pl_module, self.student, "the LightningModule", "student")
        for path, part in self.inputs.items():
            find(student, path, "the student", "inputs")
            find(self.teacher.network, part, "the teacher", "inputs")
        for name, term in self.terms.items():
            find(student, term.student, "the student", f"the student path of term {name!r}")
            find(
                self.teacher.network,
                term.teacher,
                "the teacher",
                f"the teacher path of term {name!r}",
            )
        self._refuse_untrained_terms(trainer)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Have a cached teacher's answers at hand, outside of autocast and DDP's forward."""
        if self._wrapped and isinstance(self.teacher, CachedTeacher):
            self.teacher.provide(trainer, batch)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Leave no trace when ``fit`` fails."""
        self._detach(pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave no trace when ``fit`` ends."""
        self._detach(pl_module)

    @property
    def state_key(self) -> str:
        return self._generate_state_key(student=self.student)

    def state_dict(self) -> dict[str, Any]:
        """The terms' own parameters, which the module's state_dict leaves out, and the count."""
        states = {
            name: term.loss.state_dict()
            for name, term in self.terms.items()
            if isinstance(term.loss, nn.Module)
        }
        terms = {name: state for name, state in states.items() if state}
        return {"terms": terms, "skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the terms' parameters; outside of ``fit`` only those that fit, as none is used.

        Raises:
            MisconfigurationException: in ``fit``, if the checkpoint is of other terms.
        """
        self.skipped = state_dict.get("skipped", 0)
        saved, own = state_dict["terms"], self.state_dict()["terms"]
        for name in sorted({*saved, *own}):
            shapes = [
                {k: x.shape for k, x in terms.get(name, {}).items()} for terms in (saved, own)
            ]
            if shapes[0] == shapes[1]:
                loss = self.terms[name].loss
                assert isinstance(loss, nn.Module)
                loss.load_state_dict(saved[name])
            elif self._wrapped:
                raise MisconfigurationException(
                    f"the checkpoint does not fit the loss of term {name!r}: it has "
                    f"{sorted(shapes[0]) or 'no parameters'} and the loss "
                    f"{sorted(shapes[1]) or 'none'}, or of other shapes. Resume with the terms of "
                    "the run that wrote it"
                )

    # One training step

    def _distill(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        step: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        student = find(pl_module, self.student, "the LightningModule", "student")
        teacher_outputs: dict[str, list[Any]] = {t.teacher: [] for t in self.terms.values()}
        student_outputs: dict[str, list[Any]] = {t.student: [] for t in self.terms.values()}
        # Hooks live for the step only, so that a copy or a pickle of the module never holds one.
        with ExitStack() as hooks:
            if isinstance(self.teacher, CachedTeacher):
                # A tuner trains without the Trainer's callbacks, and so without their hooks.
                with torch.autocast(pl_module.device.type, enabled=False):
                    self.teacher.provide(trainer, args[0])
                teacher_outputs = self.teacher.recall(args[0])
                hooks.callback(_refuse_other_images(student, args[0]))
            else:
                self._ask(student, teacher_outputs, hooks)
            for path, outputs in student_outputs.items():
                hooks.callback(record(student.get_submodule(path), outputs))
            result = step(*args, **kwargs)
        if result is None:  # the module skips this batch
            return None

        values: dict[str, Tensor] = {}
        distill: Tensor | float = 0.0
        for name, term in self.terms.items():
            ours, theirs = student_outputs[term.student], teacher_outputs[term.teacher]
            place = f"{self.student}.{term.student}".strip(".") or "the module itself"
            if not ours:
                raise MisconfigurationException(
                    f"term {name!r}: {place!r} was not called in training_step, so there is "
                    "nothing to distil: set student to the sub-module that training_step calls"
                )
            try:
                values[name] = term.value(ours, theirs, trainer)
                weighted = term.current_weight(trainer) * values[name]
            except ValueError as error:
                raise MisconfigurationException(
                    f"term {name!r} of {place!r} and {self.teacher}: {error}"
                ) from error
            if not weighted.isfinite():
                if self.nonfinite == "raise":
                    raise _nonfinite_error(name, term, ours, theirs, trainer)
                self.skipped += 1
                weighted = values[name] = term.zero(ours[0])
            distill = distill + weighted
        assert isinstance(distill, Tensor)
        if not trainer.barebones:
            # Of a step: no mean is taken, and the batch may not be there to be measured.
            log = functools.partial(pl_module.log, batch_size=1)
            log("train/distill", distill.detach())
            if self._named:
                for name, value in values.items():
                    log(f"train/distill/{name}", value.detach())
            if self.nonfinite == "skip":
                log("train/distill_skipped", float(self.skipped))
        if isinstance(result, Tensor):
            return self.task_weight * result + distill
        if not isinstance(result, Mapping) or "loss" not in result:
            raise MisconfigurationException(
                f"training_step of {type(pl_module).__name__} returned {type(result).__name__} "
                "without a loss: return a tensor, a dict with 'loss', or None to skip the batch"
            )
        return {**result, "loss": self.task_weight * result["loss"] + distill}

    def _ask(self, student: nn.Module, outputs: dict[str, list[Any]], hooks: ExitStack) -> None:
        """Have the student's calls go to the teacher too, and record what its parts return."""

        def ask_teacher(
            part: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> None:
            # Before the student runs: it may change its inputs in place, and the teacher's
            # activations are gone before the student's are kept.
            output = self.teacher.ask(part, args, kwargs)
            if not part and "" in outputs:
                outputs[""].append(recorded(output))

        for path, part in self.inputs.items():
            ask = functools.partial(ask_teacher, part)
            asking = student.get_submodule(path)
            hooks.callback(asking.register_forward_pre_hook(ask, with_kwargs=True).remove)
        for path, found in outputs.items():
            if path:
                hooks.callback(record(self.teacher.network.get_submodule(path), found))

    # Helpers of the hooks

    def _wrap(self, trainer: Trainer, pl_module: LightningModule) -> None:
        step = pl_module.training_step
        self._own_step = pl_module.__dict__.get("training_step")  # torch.compile sets one
        self._wrapped = True

        @functools.wraps(getattr(step, "__func__", step))
        def training_step(module: LightningModule, *args: Any, **kwargs: Any) -> Any:
            if module is not pl_module:  # a copy made during fit
                return type(module).training_step(module, *args, **kwargs)
            if not trainer.training:  # a validation_step that calls it
                return step(*args, **kwargs)
            return self._distill(trainer, pl_module, step, args, kwargs)

        # A method, for a copy binds it to itself, and a pickle holds no more than its name.
        training_step.__name__ = "training_step"
        pl_module.__dict__["training_step"] = types.MethodType(training_step, pl_module)

    def _refuse_untrained_terms(self, trainer: Trainer) -> None:
        trained = {
            id(parameter)
            for optimizer in trainer.optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        for name, term in self.terms.items():
            if any(p.requires_grad and id(p) not in trained for p in term.parameters()):
                raise MisconfigurationException(
                    f"the loss of term {name!r} has parameters that no optimizer holds: build the "
                    "optimizer from self.parameters() in configure_optimizers"
                )

    def _detach(self, pl_module: LightningModule) -> None:
        if self._wrapped:
            del pl_module.__dict__["training_step"]
            if self._own_step is not None:
                pl_module.__dict__["training_step"] = self._own_step
            self.teacher.to("cpu")
        self._own_step, self._wrapped = None, False
        pl_module._modules.pop(TermParameters.name, None)
        if isinstance(self.teacher, CachedTeacher):
            self.teacher.detach()


def attached_callbacks(trainer: Trainer) -> list[Callback]:
    """The Trainer's callbacks, which Lightning sets without declaring them."""
    return trainer.callbacks  # type: ignore[attr-defined]


def _refuse_manual_optimization(pl_module: LightningModule) -> None:
    if not pl_module.automatic_optimization:
        raise MisconfigurationException(
            f"{type(pl_module).__name__} optimizes manually: DistillationCallback adds to the "
            "loss that training_step returns, which needs automatic_optimization=True"
        )


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


def _refuse_other_images(student: nn.Module, batch: KeyedBatch) -> Callable[[], None]:
    """Raise where the student is called with other than the batch's images; returns what ends it.

    A cached teacher saw those, so they must be the same tensor, which nothing has written to.
    """
    version = batch.inputs._version

    def check(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if len(tensors) != 1 or tensors[0] is not batch.inputs or tensors[0]._version != version:
            raise MisconfigurationException(
                f"the student, a {type(student).__name__}, is called with other than the batch's "
                "images, about which a CachedTeacher was asked: hand them over as they are, "
                "without Mixup, CutMix or normalisation in training_step, or give the teacher "
                "itself (distill.cache=off)"
            )

    return student.register_forward_pre_hook(check, with_kwargs=True).remove
