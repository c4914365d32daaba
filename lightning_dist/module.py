"""DistillModule: a LightningModule with a trainable student and a frozen teacher."""

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sized
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DistributedSampler
from torchmetrics import MeanMetric, Metric, MetricCollection

from lightning_dist.callback import DistillationCallback, Nonfinite, attached_callbacks
from lightning_dist.checks import check_number
from lightning_dist.teacher import Teacher
from lightning_dist.terms import Weight


class DistillModule(LightningModule):
    """Train a student on ``(inputs, target)`` batches, distilled from a teacher where one is given.

    The teacher lives in ``self.teacher`` but is no part of the module: not in its parameters,
    state_dict or checkpoints. The distillation itself is a
    :class:`lightning_dist.DistillationCallback` that the module brings along, unless the Trainer
    has one. Subclasses override any of the steps or ``configure_*`` methods.

    Logs ``train/loss`` (total), ``train/task``, ``train/distill``, ``val/loss``, ``val/METRIC``,
    ``test/loss`` and ``test/METRIC``; with ``ema_decay`` also ``val/ema_loss``, ``val/ema_METRIC``
    and the same of ``test``.

    Args:
        student: the network to train.
        teacher: the network to distil from; ``None`` trains without distillation.
        task_loss: loss of the student's output and the target, cross-entropy by default. Validation
            and test use ``self.eval_loss``, which is the same unless a subclass sets another.
        metrics: updated with the student's output and the target in validation and test.
        optimizer: called with the student's parameters if it is an optimizer class (or a partial of
            one), otherwise with the student itself, as ``timm.optim.create_optimizer_v2`` wants it.
            AdamW by default.
        scheduler: called with the optimizer; a torch or timm scheduler (for ReduceLROnPlateau
            override ``configure_optimizers``, to name what it monitors), or what timm's
            ``create_scheduler_v2`` returns. Where it takes ``updates_per_epoch``, as that does, it
            is given how many optimizer updates an epoch of this Trainer has.
        scheduler_interval: ``"epoch"`` or ``"step"``, when the scheduler is stepped.
        distill_loss: loss of student and teacher logits, DIST by default.
        distill_weight: its weight, a number or a function of the Trainer.
        task_weight: weight of the task loss while distilling.
        nonfinite: ``"raise"`` or ``"skip"``, what the callback does where the distillation loss is
            NaN or infinite.
        channels_last: keep the student's weights in channels-last memory format, which convolutions
            hand on to their outputs.
        shard_teacher: under FSDP2, keep the teacher sharded too, but while it is called.
        ema_decay: keep an exponential moving average of the student, evaluated beside the student
            itself and saved with it; 0.9999 is usual. ``None`` keeps none.

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
        teacher: nn.Module | Teacher | None = None,
        *,
        task_loss: nn.Module | Callable[[Any, Any], Tensor] | None = None,
        metrics: Metric | MetricCollection | Mapping[str, Metric] | None = None,
        optimizer: Callable[..., Optimizer] | None = None,
        scheduler: Callable[..., Any] | None = None,
        scheduler_interval: str = "epoch",
        distill_loss: nn.Module | Callable[[Tensor, Tensor], Tensor] | None = None,
        distill_weight: Weight = 2.0,
        task_weight: float = 1.0,
        nonfinite: Nonfinite = "raise",
        channels_last: bool = False,
        shard_teacher: bool = False,
        ema_decay: float | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(student, nn.Module):
            raise TypeError(f"the student is a {type(student).__name__}: give a torch.nn.Module")
        if scheduler_interval not in ("epoch", "step"):
            raise ValueError(f"scheduler_interval is {scheduler_interval!r}: use 'epoch' or 'step'")
        if ema_decay is not None:
            check_number("ema_decay", ema_decay, least=0, most=1)
        check_number("task_weight", task_weight)
        if not callable(distill_weight):
            check_number("distill_weight", distill_weight)
        self.student = student
        if channels_last:
            student.to(memory_format=torch.channels_last)
        self.teacher = Teacher(teacher) if isinstance(teacher, nn.Module) else teacher
        self.shard_teacher = shard_teacher
        self.task_loss = nn.CrossEntropyLoss() if task_loss is None else task_loss
        self.eval_loss = self.task_loss
        self.optimizer: Callable[..., Optimizer] = optimizer or torch.optim.AdamW
        self.scheduler = scheduler
        self.scheduler_interval = scheduler_interval
        # Not registered: a loss with parameters is the callback's to hold.
        self.__dict__["distill_loss"] = distill_loss
        self.distill_weight = distill_weight
        self.task_weight = task_weight
        self.nonfinite = nonfinite
        collection: MetricCollection
        if isinstance(metrics, MetricCollection):
            collection = metrics
        else:
            collection = MetricCollection(
                dict(metrics) if isinstance(metrics, Mapping) else metrics or {}
            )
        self.val_metrics = collection.clone(prefix="val/")
        self.test_metrics = collection.clone(prefix="test/")
        prefixes = ["val/", "test/"]
        self.student_ema: AveragedModel | None = None
        if ema_decay is not None:
            self.student_ema = AveragedModel(
                student, multi_avg_fn=functools.partial(_average, ema_decay), use_buffers=True
            ).requires_grad_(False)
            self.val_ema_metrics = collection.clone(prefix="val/ema_")
            self.test_ema_metrics = collection.clone(prefix="test/ema_")
            prefixes += ["val/ema_", "test/ema_"]
        # Lightning's own mean of a number is wrong where ranks have unlike numbers of samples.
        self.mean_losses = nn.ModuleDict({prefix: MeanMetric() for prefix in prefixes})

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The student's output."""
        return self.student(*args, **kwargs)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The task loss of a batch; the callback adds the distillation loss to it."""
        inputs, target = batch
        loss = self.task_loss(self.student(inputs), target)
        self.log("train/task", loss.detach())
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if outputs is not None:  # Lightning hands over the loss divided by the accumulated batches
            loss = outputs["loss"] if isinstance(outputs, Mapping) else outputs
            self.log("train/loss", loss * self.trainer.accumulate_grad_batches, prog_bar=True)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step the optimizer, then the average of the student's weights."""
        super().optimizer_step(*args, **kwargs)
        if self.student_ema is not None:
            self.student_ema.update_parameters(self.student)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Update ``val/*``."""
        batch = self._without_repeats(batch, batch_idx, self.trainer.val_dataloaders)
        self._evaluate(batch, self.student, "val/", self.val_metrics)
        if self.student_ema is not None:
            self._evaluate(batch, self.student_ema, "val/ema_", self.val_ema_metrics)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Update ``test/*``."""
        batch = self._without_repeats(batch, batch_idx, self.trainer.test_dataloaders)
        self._evaluate(batch, self.student, "test/", self.test_metrics)
        if self.student_ema is not None:
            self._evaluate(batch, self.student_ema, "test/ema_", self.test_ema_metrics)

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        """The student's output of a batch of inputs, or of ``(inputs, target)``."""
        return self.infer(self.student, batch[0] if isinstance(batch, (tuple, list)) else batch)

    def infer(self, network: nn.Module, inputs: Any) -> Any:
        """The output of the student, or of its average, in validation, test and prediction."""
        return network(inputs)

    def _evaluate(
        self, batch: Any, network: nn.Module, prefix: str, metrics: MetricCollection
    ) -> None:
        inputs, target = batch
        mean_loss = cast(MeanMetric, self.mean_losses[prefix])
        if len(target):
            output = self.infer(network, inputs)
            metrics.update(output, target)
            mean_loss.update(self.eval_loss(output, target), weight=len(target))
        self.log(f"{prefix}loss", mean_loss)
        self.log_dict(metrics, prog_bar=prefix.startswith("val"))

    def _without_repeats(self, batch: Any, batch_idx: int, loaders: Any) -> Any:
        """The samples of a batch that are no copies.

        A DistributedSampler gives every rank as many samples, and repeats some for that, which
        would count twice. They are the last ones of the last ranks.
        """
        loader = loaders[0] if isinstance(loaders, (list, tuple)) else loaders
        sampler, size = getattr(loader, "sampler", None), getattr(loader, "batch_size", None)
        if not isinstance(sampler, DistributedSampler) or sampler.drop_last or size is None:
            return batch
        own = len(range(sampler.rank, len(cast(Sized, sampler.dataset)), sampler.num_replicas))
        inputs, target = batch
        count = max(own - batch_idx * size, 0)
        return batch if count >= len(target) else (_first(inputs, count), _first(target, count))

    def configure_distillation(self) -> DistillationCallback | None:
        """The callback that the module brings along; ``None`` trains without distillation."""
        if self.teacher is None:
            return None
        return DistillationCallback(
            self.teacher,
            student="student",
            loss=self.distill_loss,
            weight=self.distill_weight,
            task_weight=self.task_weight,
            nonfinite=self.nonfinite,
        )

    def configure_callbacks(self) -> list[Callback]:
        attached = attached_callbacks(self.trainer)
        present = [c for c in attached if isinstance(c, DistillationCallback)]
        # A callback that another module brought to the same Trainer is that module's: replace it.
        if any(c.owner in (None, self) for c in present):
            return []
        callback = self.configure_distillation()
        if callback is None:
            return []
        callback.owner = self
        # First, and not last as Lightning would have it: WeightAveraging must find the parameters
        # of its terms when it copies the module.
        others = [c for c in attached if c not in present]
        self.trainer.callbacks = [callback, *others]  # type: ignore[attr-defined]
        return []

    def configure_model(self) -> None:
        """Shard the student, and the teacher if asked to, where the strategy does that (FSDP2).

        Each is sharded as one unit. Override this to shard its blocks apart.

        Raises:
            MisconfigurationException: with ``ema_decay``; with ``shard_teacher`` elsewhere.
        """
        strategy = getattr(self._trainer, "strategy", None)
        if not isinstance(strategy, ModelParallelStrategy):
            if self.shard_teacher and self.teacher is not None and strategy is not None:
                raise MisconfigurationException(
                    "shard_teacher needs ModelParallelStrategy (trainer=fsdp2), and the strategy "
                    f"is {type(strategy).__name__}: leave shard_teacher out"
                )
            return
        if self.student_ema is not None:
            raise MisconfigurationException(
                "ema_decay averages whole students and ModelParallelStrategy shards them: train "
                "without ema_decay, or with ddp"
            )
        assert self.device_mesh is not None
        mesh = self.device_mesh["data_parallel"]
        if not isinstance(self.student, FSDPModule):  # once a strategy, whatever runs under it
            fully_shard(self.student, mesh=mesh)
        if self.shard_teacher and self.teacher is not None:
            self.teacher.shard(mesh)

    def configure_optimizers(self) -> Any:
        factory = getattr(self.optimizer, "func", self.optimizer)
        trainable = [p for p in self.parameters() if p.requires_grad]
        takes_parameters = isinstance(factory, type) and issubclass(factory, Optimizer)
        try:
            optimizer = self.optimizer(trainable if takes_parameters else self.student)
        except (TypeError, ValueError) as error:
            raise MisconfigurationException(f"the optimizer cannot be built: {error}") from error
        if not takes_parameters:
            held = {id(p) for group in optimizer.param_groups for p in group["params"]}
            rest = [p for p in trainable if id(p) not in held]
            if rest:  # a subclass's own layers, or a projection of a distillation term
                optimizer.add_param_group({"params": rest})
        if self.scheduler is None:
            return optimizer
        options = {}
        if "updates_per_epoch" in inspect.signature(self.scheduler).parameters:
            options["updates_per_epoch"] = self._updates_per_epoch()
        scheduler = self.scheduler(optimizer, **options)
        if isinstance(scheduler, tuple):  # timm's create_scheduler_v2 adds the number of epochs
            scheduler = scheduler[0]
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": self.scheduler_interval},
        }

    def _updates_per_epoch(self) -> int:
        self.trainer.fit_loop.setup_data()  # Lightning counts the batches no earlier
        return math.ceil(self.trainer.num_training_batches / self.trainer.accumulate_grad_batches)

    def lr_scheduler_step(self, scheduler: Any, metric: Any | None) -> None:
        if not hasattr(scheduler, "step_update"):
            super().lr_scheduler_step(scheduler, metric)
        elif self.scheduler_interval == "step":  # timm's schedulers are told where training is
            scheduler.step_update(num_updates=self.trainer.global_step, metric=metric)
        else:
            scheduler.step(epoch=self.current_epoch + 1, metric=metric)


def _first(samples: Any, count: int) -> Any:
    """The first samples of a batched tensor or list, in any nesting of mappings."""
    if isinstance(samples, Mapping):
        return {key: _first(value, count) for key, value in samples.items()}
    return samples[:count] if isinstance(samples, (Tensor, list, tuple)) else samples


def _average(decay: float, averaged: Any, current: Any, updates: Any) -> None:
    """torch's moving average as a function that ddp_spawn can pickle."""
    get_ema_multi_avg_fn(decay)(averaged, current, updates)
