"""DistillModule: a LightningModule with a trainable student and a frozen teacher."""

import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel
from torchmetrics import MetricCollection

from lightning_dist.callback import ONLY, DistillationCallback, attached_callbacks
from lightning_dist.checks import check_number
from lightning_dist.losses import DISTLoss
from lightning_dist.teacher import TeacherBase, as_teacher, shard_teacher
from lightning_dist.terms import Nonfinite, Term, Weight
from lightning_dist.training.averaging import make_room_for_average
from lightning_dist.training.evaluation import (
    EvaluationMetrics,
    Metrics,
    count_samples,
    without_repeats,
)
from lightning_dist.training.optimization import (
    build_optimizer,
    build_scheduler,
    is_plateau,
    step_scheduler,
)


class DistillModule(LightningModule):
    """Train a student on ``(inputs, target)`` batches, distilled from a teacher where one is given.

    The teacher lives in ``self.teacher`` but is no part of the module: not in its parameters,
    state_dict or checkpoints. The distillation itself is a
    :class:`lightning_dist.DistillationCallback` that the module brings along, unless the Trainer
    has one. Subclasses override any of the steps or ``configure_*`` methods.

    Logs ``train/loss`` (total), ``train/task``, ``train/distill``, ``val/loss``, ``val/METRIC``,
    ``test/loss`` and ``test/METRIC``; with :class:`lightning_dist.StudentEMA` also
    ``val/ema_loss``, ``val/ema_METRIC`` and the same of ``test``.

    Args:
        student: the network to train.
        teacher: the network to distil from; ``None`` trains without distillation.
        task_loss: loss of the student's output and the target, cross-entropy by default. Validation
            and test use ``self.eval_loss``, which is the same unless a subclass sets another.
        metrics: updated with the student's output and the target in validation and test.
        optimizer: called with the student's parameters if it is an optimizer class (or a partial of
            one), otherwise with the student itself, as ``timm.optim.create_optimizer_v2`` wants it.
            AdamW by default.
        scheduler: called with the optimizer; a torch or timm scheduler, or what timm's
            ``create_scheduler_v2`` returns. Where it takes ``updates_per_epoch``, as that does, it
            is given how many optimizer updates an epoch of this Trainer has.
        scheduler_interval: ``"epoch"`` or ``"step"``, when the scheduler is stepped.
        scheduler_monitor: the metric of a scheduler that lowers the rate on a plateau; give the
            scheduler ``mode="max"`` where more is better.
        distill_loss: loss of student and teacher logits, DIST by default.
        distill_weight: its weight, a number or a function of the Trainer.
        task_weight: weight of the task loss while distilling.
        nonfinite: ``"raise"`` or ``"skip"``, what the callback does where the distillation loss is
            NaN or infinite.
        channels_last: keep the student's weights in channels-last memory format, which convolutions
            hand on to their outputs.
        shard_teacher: under FSDP2, keep the teacher sharded too, but while it is called.

    Raises:
        TypeError: if ``student`` is not a module.
        ValueError: if an option is out of range.

    Example:
        >>> module = DistillModule(nn.Linear(4, 3), teacher=nn.Linear(4, 3))
        >>> sorted(module.state_dict())
        ['student.bias', 'student.weight']
    """

    distill_loss: Callable[[Tensor, Tensor], Tensor] | None

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | TeacherBase | None = None,
        *,
        task_loss: nn.Module | Callable[[Any, Any], Tensor] | None = None,
        metrics: Metrics = None,
        optimizer: Callable[..., Optimizer] | None = None,
        scheduler: Callable[..., Any] | None = None,
        scheduler_interval: str = "epoch",
        scheduler_monitor: str = "val/loss",
        distill_loss: nn.Module | Callable[[Tensor, Tensor], Tensor] | None = None,
        distill_weight: Weight = 2.0,
        task_weight: float = 1.0,
        nonfinite: Nonfinite = "raise",
        channels_last: bool = False,
        shard_teacher: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(student, nn.Module):
            raise TypeError(f"the student is a {type(student).__name__}: give a torch.nn.Module")
        if scheduler_interval not in ("epoch", "step"):
            raise ValueError(f"scheduler_interval is {scheduler_interval!r}: use 'epoch' or 'step'")
        check_number("task_weight", task_weight)
        if not callable(distill_weight):
            check_number("distill_weight", distill_weight)
        self.student = student
        if channels_last:
            student.to(memory_format=torch.channels_last)
        self.student_ema: AveragedModel | None = None  # StudentEMA sets it
        self.teacher = None if teacher is None else as_teacher(teacher)
        self.teacher_inputs: Mapping[str, str] = {"": ""}  # the callback's option "inputs"
        self.shard_teacher = shard_teacher
        self.task_loss = nn.CrossEntropyLoss() if task_loss is None else task_loss
        self.eval_loss = self.task_loss
        self.optimizer: Callable[..., Optimizer] = optimizer or torch.optim.AdamW
        self.scheduler = scheduler
        self.scheduler_interval = scheduler_interval
        self.scheduler_monitor = scheduler_monitor
        # Set past nn.Module: a loss with parameters belongs to the callback, not to this module.
        self.__dict__["distill_loss"] = distill_loss
        self.distill_weight = distill_weight
        self.task_weight = task_weight
        self.nonfinite = nonfinite
        self._evaluated: dict[str, nn.Module] = {}
        self.metrics = nn.ModuleDict()  # of each evaluated network, by the prefix of their names
        self._add_metrics(metrics, "")

    def evaluate_too(self, name: str, network: nn.Module) -> None:
        """Evaluate another network beside the student in validation and test.

        Args:
            name: first part of its metrics' names: ``"ema_"`` gives ``val/ema_METRIC``.
            network: takes the student's inputs and returns the student's kind of output.
        """
        self._evaluated[name] = network
        self._add_metrics(self.val_metrics, name)
        self.metrics.to(self.device)

    @property
    def val_metrics(self) -> MetricCollection:
        """The student's metrics in validation."""
        return cast(EvaluationMetrics, self.metrics["val/"]).collection

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the student's output."""
        return self.student(*args, **kwargs)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the task loss of a batch; the callback adds the distillation loss to it."""
        inputs, target = batch
        loss = self.task_loss(self.student(inputs), target)
        self.log("train/task", loss.detach())
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log ``train/loss``, the loss that was trained on, distillation included."""
        if outputs is not None:  # Lightning divides the loss by the number of accumulated batches
            loss = outputs["loss"] if isinstance(outputs, Mapping) else outputs
            self.log("train/loss", loss * self.trainer.accumulate_grad_batches, prog_bar=True)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Update ``val/*``."""
        self._evaluate(
            self._without_repeats(batch, batch_idx, self.trainer.val_dataloaders), "val/"
        )

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Update ``test/*``."""
        loaders = self.trainer.test_dataloaders
        self._evaluate(self._without_repeats(batch, batch_idx, loaders), "test/")

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        """Return the student's output of a batch of inputs, or of ``(inputs, target)``."""
        return self.infer(self.student, batch[0] if isinstance(batch, (tuple, list)) else batch)

    def infer(self, network: nn.Module, inputs: Any) -> Any:
        """Return what validation, test and prediction take as the output of a network.

        Args:
            network: the student, or an average of it.
            inputs: the first part of a batch.
        """
        return network(inputs)

    def _evaluate(self, batch: Any, split: str) -> None:
        for name, network in {"": self.student, **self._evaluated}.items():
            self._update(batch, network, cast(EvaluationMetrics, self.metrics[f"{split}{name}"]))

    def _update(self, batch: Any, network: nn.Module, metrics: EvaluationMetrics) -> None:
        """Update and log the metrics of one network."""
        inputs, target = batch
        count = count_samples(inputs)
        if count:
            output = self.infer(network, inputs)
            metrics.collection.update(output, target)
            metrics.mean_loss.update(self.eval_loss(output, target), weight=count)
        self.log(f"{metrics.prefix}loss", metrics.mean_loss)
        self.log_dict(metrics.collection, prog_bar=metrics.prefix.startswith("val"))

    def _add_metrics(self, metrics: Metrics, name: str) -> None:
        for prefix in (f"val/{name}", f"test/{name}"):
            self.metrics[prefix] = EvaluationMetrics(metrics, prefix)

    def _without_repeats(self, batch: Any, batch_idx: int, loaders: Any) -> Any:
        return without_repeats(batch, batch_idx, loaders)

    def configure_terms(self) -> Mapping[str, Term]:
        """Return the distillation terms by name; override it to distil other parts."""
        loss = DISTLoss() if self.distill_loss is None else self.distill_loss
        return {ONLY: Term(loss, self.distill_weight)}

    def configure_distillation(self) -> DistillationCallback | None:
        """Return the callback of this module, or ``None`` to train without distillation."""
        if self.teacher is None:
            return None
        return DistillationCallback(
            self.teacher,
            student="student",
            terms=self.configure_terms(),
            inputs=self.teacher_inputs,
            task_weight=self.task_weight,
            nonfinite=self.nonfinite,
        )

    def configure_callbacks(self) -> list[Callback]:
        """Put the distillation callback in front of the Trainer's, unless the Trainer has one."""
        attached = attached_callbacks(self.trainer)
        present = [c for c in attached if isinstance(c, DistillationCallback)]
        # A callback that another module brought to the same Trainer is that module's: replace it.
        if any(c.owner in (None, self) for c in present):
            return []
        callback = self.configure_distillation()
        if callback is None:
            return []
        callback.owner = self
        # Lightning would append it. It must be first: WeightAveraging must find the parameters of
        # its terms when it copies the module.
        others = [c for c in attached if c not in present]
        self.trainer.callbacks = [callback, *others]  # type: ignore[attr-defined]
        return []

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Make room for the average of the student, if the checkpoint holds one."""
        make_room_for_average(self, checkpoint)

    def configure_model(self) -> None:
        """Shard the student, and the teacher if asked to, where the strategy does that (FSDP2).

        Each is sharded as one unit. Override this to shard its blocks apart.

        Raises:
            MisconfigurationException: with ``shard_teacher`` under another strategy.
        """
        strategy = getattr(self._trainer, "strategy", None)
        sharding = isinstance(strategy, ModelParallelStrategy)
        if sharding:
            assert self.device_mesh is not None
            mesh = self.device_mesh["data_parallel"]
            # Lightning calls this hook again for validate and test: shard only once.
            if not isinstance(self.student, FSDPModule):
                fully_shard(self.student, mesh=mesh)
        if self.shard_teacher and self.teacher is not None and strategy is not None:
            if not sharding:
                raise MisconfigurationException(
                    "shard_teacher needs ModelParallelStrategy (trainer=fsdp2), and the strategy "
                    f"is {type(strategy).__name__}: leave shard_teacher out"
                )
            shard_teacher(self.teacher, mesh)

    def configure_optimizers(self) -> Any:
        """Return the optimizer and, where there is one, the learning-rate schedule.

        Raises:
            MisconfigurationException: if the optimizer cannot be built.
        """
        trainable = [p for p in self.parameters() if p.requires_grad]
        optimizer = build_optimizer(self.optimizer, self.student, trainable)
        if self.scheduler is None:
            return optimizer
        scheduler = build_scheduler(self.scheduler, optimizer, self._updates_per_epoch)
        settings = {"scheduler": scheduler, "interval": self.scheduler_interval}
        if is_plateau(scheduler):
            settings |= {"reduce_on_plateau": True, "monitor": self.scheduler_monitor}
        return {"optimizer": optimizer, "lr_scheduler": settings}

    def _updates_per_epoch(self) -> int:
        self.trainer.fit_loop.setup_data()  # Lightning counts the batches no earlier
        return math.ceil(self.trainer.num_training_batches / self.trainer.accumulate_grad_batches)

    def lr_scheduler_step(self, scheduler: Any, metric: Any | None) -> None:
        """Step a torch scheduler as Lightning does, and a timm scheduler with its position.

        Args:
            scheduler: the scheduler.
            metric: the value of the monitored metric, of a scheduler that waits for a plateau.
        """
        if not hasattr(scheduler, "step_update"):
            super().lr_scheduler_step(scheduler, metric)
        else:
            step_scheduler(scheduler, self.trainer, self.scheduler_interval, metric)
