"""DistillModule: a LightningModule with a trainable student and a frozen teacher."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel
from torchmetrics import MetricCollection

from lightning_dist.callback import DistillationCallback
from lightning_dist.teacher import TeacherBase, as_teacher
from lightning_dist.teacher.sharding import shard_with_trainer
from lightning_dist.terms import Nonfinite, Term, Weight, default_loss, needs_target
from lightning_dist.training.averaging import make_room_for_average, refuse_stale_average
from lightning_dist.training.cards import (
    card_of_data,
    refuse_checkpoint_of_other_classes,
    refuse_other_number,
    save_card,
)
from lightning_dist.training.evaluation import Metrics, refuse_without_labels
from lightning_dist.training.evaluation_module import EvaluationModule
from lightning_dist.training.fitting import put_first
from lightning_dist.training.hyper_parameters import without_objects
from lightning_dist.training.introduction import log_measured_teacher
from lightning_dist.training.labels import ignores_unlabeled, mean_over_labels
from lightning_dist.training.optimization import build_optimizer, build_scheduler, step_scheduler
from lightning_dist.training.options import ONLY, check_options, check_weight, with_further_terms


class DistillModule(EvaluationModule):
    """A LightningModule that trains a student on ``(inputs, target)`` batches.

    If a teacher is given, the student is distilled from it. The teacher is stored in
    ``self.teacher`` but is not a part of the module: it is not in the module's parameters,
    state_dict or checkpoints. A :class:`lightning_dist.DistillationCallback` does the distillation;
    the module creates it, unless the Trainer has one. Subclasses can override all steps and
    ``configure_*`` methods.

    It logs ``train/loss`` (total), ``train/task``, ``train/distill``, ``val/loss``, ``val/METRIC``,
    ``test/loss`` and ``test/METRIC``. With :class:`lightning_dist.StudentEMA` it also logs
    ``val/ema_loss``, ``val/ema_METRIC``, ``test/ema_loss`` and ``test/ema_METRIC``.

    Args:
        student: the network to train.
        teacher: the network to distil from; ``None`` trains without distillation.
        task_loss: the loss of the student's output and the target, cross-entropy by default.
            Validation and test use ``self.eval_loss``, which is the same loss unless a subclass
            sets another. With torch's cross-entropy, a label of -100 marks a sample without a
            label.
        metrics: the metrics to update with the student's output and the target in validation and
            test.
        optimizer: an optimizer class (or a partial of one) or another function of the student's
            parameters, or a function of the student itself, as ``timm.optim.create_optimizer_v2``.
            AdamW by default.
        scheduler: a torch or timm scheduler class (or a partial of one), or timm's
            ``create_scheduler_v2``. It is called with the optimizer. If it takes
            ``updates_per_epoch``, it also gets the number of optimizer updates in an epoch of this
            Trainer.
        scheduler_interval: the interval at which the scheduler is stepped, ``"epoch"`` or
            ``"step"``.
        scheduler_monitor: the name of the metric for a scheduler that lowers the rate on a plateau;
            give the scheduler ``mode="max"`` if a larger value is better.
        distill_loss: the loss of student and teacher logits. The default is DIST, but no such loss
            if ``distill_terms`` is given.
        distill_terms: a dict from names to further terms, such as those of feature maps.
        distill_weight: the weight of ``distill_loss``, a number or a function of the Trainer.
        task_weight: the weight of the task loss during distillation.
        nonfinite: the callback's reaction to a distillation loss that is NaN or infinite,
            ``"raise"`` or ``"skip"``.
        batch_keys: the keys of the inputs and of the target, for batches that are mappings. By
            default the first of ``image``, ``images``, ``pixel_values`` and ``inputs``, and the
            first of ``label``, ``labels``, ``mask``, ``masks`` and ``target``, that is present.
        channels_last: keep the student's weights in channels-last memory format; the outputs of
            convolutions then have this format too.
        shard_teacher: under FSDP2, also shard the teacher, which is then whole only while it is
            called.
        measure_teacher: log at the start how good the teacher is on up to 256 validation samples,
            which takes up to 5 seconds.
        teacher_metrics: the metrics to update with the outputs of student and teacher in validation
            and test, such as :func:`lightning_dist.metrics.teacher_metrics`; they need no labels.

    Raises:
        TypeError: if ``student`` is not a module.
        ValueError: if an option is out of range, or needs a teacher and there is none.

    Example:
        >>> module = DistillModule(nn.Linear(4, 3), teacher=nn.Linear(4, 3))
        >>> sorted(module.state_dict())
        ['student.bias', 'student.weight']
    """

    distill_loss: Callable[[Tensor, Tensor], Tensor] | None
    distill_terms: dict[str, Term]
    task: str | None = None  # A subclass sets it to its task, which is written to the card.
    # A subclass sets it, so that it is compared with the number of classes of the data.
    num_classes: int | None = None

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | TeacherBase | None = None,
        *,
        task_loss: nn.Module | Callable[[Any, Any], Tensor] | None = None,
        metrics: Metrics = None,
        optimizer: Callable[..., Optimizer] | None = None,
        # LightningCLI reads from these types which classes it may build.
        scheduler: Callable[[Optimizer], LRScheduler] | Callable[..., Any] | None = None,
        scheduler_interval: str = "epoch",
        scheduler_monitor: str = "val/loss",
        distill_loss: nn.Module | Callable[[Tensor, Tensor], Tensor] | None = None,
        distill_terms: Mapping[str, Term] | None = None,
        distill_weight: Weight = 2.0,
        task_weight: float = 1.0,
        nonfinite: Nonfinite = "raise",
        batch_keys: tuple[str, str] | None = None,
        channels_last: bool = False,
        shard_teacher: bool = False,
        measure_teacher: bool = True,
        teacher_metrics: MetricCollection | None = None,
    ) -> None:
        task_loss = nn.CrossEntropyLoss() if task_loss is None else task_loss
        super().__init__(student, task_loss, metrics, batch_keys, teacher_metrics)
        if teacher_metrics is not None and teacher is None:
            raise ValueError(
                "teacher_metrics compares the student with a teacher, and there is none: give a "
                "teacher (on the command line teacher=... and another distill than none)"
            )
        if scheduler_interval not in ("epoch", "step"):
            raise ValueError(f"scheduler_interval is {scheduler_interval!r}: use 'epoch' or 'step'")
        check_options(task_weight, nonfinite)
        check_weight("distill_weight", distill_weight)
        if channels_last:
            student.to(memory_format=torch.channels_last)
        self.student_ema: AveragedModel | None = None  # StudentEMA or a checkpoint sets it.
        self.register_load_state_dict_pre_hook(make_room_for_average)
        self.teacher = None if teacher is None else as_teacher(teacher)
        self.teacher_inputs: Mapping[str, str] = {"": ""}  # the callback's option "inputs"
        self.shard_teacher = shard_teacher
        self.measure_teacher = measure_teacher
        self.task_loss = task_loss
        self.optimizer: Callable[..., Optimizer] = optimizer or torch.optim.AdamW
        self.scheduler = scheduler
        self.scheduler_interval = scheduler_interval
        self.scheduler_monitor = scheduler_monitor
        # Do not register a loss with parameters here: the callback registers it during fit.
        self.__dict__["distill_loss"] = distill_loss
        self.__dict__["distill_terms"] = dict(distill_terms or {})
        self.distill_weight = distill_weight
        self.task_weight = task_weight
        self.nonfinite = nonfinite

    def _set_hparams(self, hp: Any) -> None:
        """Save hyper-parameters as Lightning does, but no networks, losses and functions."""
        super()._set_hparams(without_objects(hp))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the task loss of a batch; the callback adds the distillation loss to it."""
        inputs, target = self.split_batch(batch)
        output = self.student(inputs)
        if ignores_unlabeled(self.task_loss, target):
            loss = mean_over_labels(self.task_loss, output, target)
        else:
            loss = self.task_loss(output, target)
        self.log("train/task", loss.detach())
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log ``train/loss``, the training loss including the distillation loss."""
        if outputs is not None:  # Lightning divides the loss by the number of accumulated batches
            loss = outputs["loss"] if isinstance(outputs, Mapping) else outputs
            self.log("train/loss", loss * self.trainer.accumulate_grad_batches, prog_bar=True)

    def teacher_network(self) -> nn.Module:
        """Return the teacher as a network with the same inputs and kind of output as the student.

        Raises:
            MisconfigurationException: if there is no teacher, or it has no such output.
        """
        return super().teacher_network() if self.teacher is None else self.teacher.as_network()

    def configure_terms(self) -> Mapping[str, Term]:
        """Return a dict from names to distillation terms; override it to distil other parts.

        ``distill_terms`` are added to them.
        """
        loss = self.logits_loss()
        if loss is None:
            return {}
        return {ONLY: Term(loss, self.distill_weight, from_batch=self.labels_for(loss))}

    def logits_loss(self) -> Callable[..., Tensor] | None:
        """Return the loss of the logits, or ``None`` if only ``distill_terms`` are compared."""
        if self.distill_loss is None and not self.distill_terms:
            return default_loss()
        return self.distill_loss

    def labels_for(self, loss: Any) -> Callable[[Any, Tensor], dict[str, Any]] | None:
        """Return the function that gives a term the labels, if its loss needs them.

        Args:
            loss: the loss of the term.
        """
        if not needs_target(loss):
            return None

        def labels(batch: Any, logits: Tensor) -> dict[str, Any]:
            target = self.split_batch(batch)[1]
            is_integer = isinstance(target, Tensor) and not target.is_floating_point()
            return {"target": target.long() if is_integer else target}

        return labels

    def configure_distillation(self) -> DistillationCallback | None:
        """Return the callback of this module, or ``None`` to train without distillation."""
        if self.teacher is None:
            return None
        return DistillationCallback(
            self.teacher,
            student="student",
            terms=with_further_terms(self.configure_terms(), self.distill_terms, self.labels_for),
            inputs=self.teacher_inputs,
            task_weight=self.task_weight,
            nonfinite=self.nonfinite,
        )

    def configure_callbacks(self) -> list[Callback]:
        """Put the distillation callback before the Trainer's callbacks, unless they include one."""
        put_first(self.trainer, self, DistillationCallback, self.configure_distillation)
        return []

    def on_fit_start(self) -> None:
        """Refuse averaged weights that no callback updates, and data that does not fit."""
        refuse_stale_average(self)
        refuse_without_labels(self.trainer, self.teacher is not None, self.compares_teacher)
        data = card_of_data(self.trainer)
        if data is not None:
            refuse_other_number(self.num_classes, data.num_classes, type(self).__name__)

    def on_test_start(self) -> None:
        """Refuse data without labels if there is no teacher to compare the student with."""
        refuse_without_labels(self.trainer, self.teacher is not None, self.compares_teacher)

    def on_train_start(self) -> None:
        """Log the teacher's metric on the validation set, and the one in its card."""
        if self.measure_teacher:
            log_measured_teacher(self.trainer, self)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the card of the student; a subclass that overrides this calls it too."""
        save_card(self.trainer, self.task, self.num_classes, self.teacher, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to go on with data whose classes differ from those in the checkpoint."""
        if self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING:
            refuse_checkpoint_of_other_classes(checkpoint, self.trainer)

    def configure_model(self) -> None:
        """Shard the student, and with ``shard_teacher`` also the teacher, if FSDP2 is used.

        Each network is sharded as one unit. Override this method to shard blocks separately.

        Raises:
            MisconfigurationException: if ``shard_teacher`` is set but the strategy is not
                ModelParallelStrategy.
        """
        teacher = self.teacher if self.shard_teacher else None
        shard_with_trainer(self._trainer, self.device_mesh, self.student, teacher)

    def configure_optimizers(self) -> Any:
        """Return the optimizer and, if there is one, the learning-rate schedule.

        Raises:
            MisconfigurationException: if the optimizer cannot be built.
        """
        trainable = [p for p in self.parameters() if p.requires_grad]
        optimizer = build_optimizer(self.optimizer, self.student, trainable)
        if self.scheduler is None:
            return optimizer
        settings = (self.trainer, self.scheduler_interval, self.scheduler_monitor)
        schedule = build_scheduler(self.scheduler, optimizer, *settings)
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def lr_scheduler_step(self, scheduler: Any, metric: Any | None) -> None:
        """Step a scheduler; ``metric`` is the value of the metric that it monitors, if any."""
        step_scheduler(scheduler, self.trainer, self.scheduler_interval, metric)
