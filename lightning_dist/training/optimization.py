"""Functions that build and step the optimizer and the learning-rate schedule of a module."""

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ChainedScheduler, LinearLR, MultiStepLR, ReduceLROnPlateau


def build_optimizer(
    factory: Callable[..., Optimizer], student: nn.Module, parameters: Sequence[nn.Parameter]
) -> Optimizer:
    """Build an optimizer for all trainable parameters of a module.

    Args:
        factory: an optimizer class or a partial of one, which is called with the parameters; or a
            function of the student, such as ``timm.optim.create_optimizer_v2``, which can use other
            settings for biases and norms; or another function of the parameters. A function is
            called with the student first.
        student: the student.
        parameters: all trainable parameters: those of the student, of a subclass's own layers and
            of distillation terms. A separate group gets the parameters that the factory left out.

    Returns:
        The optimizer.

    Raises:
        MisconfigurationException: if the factory raises a TypeError or a ValueError.
    """
    function = getattr(factory, "func", factory)
    takes_parameters = isinstance(function, type) and issubclass(function, Optimizer)
    try:
        try:
            optimizer = factory(list(parameters) if takes_parameters else student)
        # The factory may fail because it expects the student's parameters.
        except TypeError as error:
            if takes_parameters:
                raise
            try:
                optimizer = factory(list(parameters))
            # The factory accepts the student, so its error has another cause.
            except (AttributeError, TypeError):
                raise error from None
    except (TypeError, ValueError) as error:
        raise MisconfigurationException(f"the optimizer cannot be built: {error}") from error
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    rest = [p for p in parameters if id(p) not in held]
    if rest:
        optimizer.add_param_group({"params": rest})
    return optimizer


def build_scheduler(
    factory: Callable[..., Any],
    optimizer: Optimizer,
    trainer: Trainer,
    interval: str,
    monitor: str,
) -> dict[str, Any]:
    """Build a learning-rate schedule and the settings with which Lightning steps it.

    Args:
        factory: a torch or timm scheduler or a partial of one, or timm's ``create_scheduler_v2``.
            It is called with the optimizer and, if it takes ``updates_per_epoch``, with the number
            of optimizer updates in an epoch of the Trainer.
        optimizer: the optimizer.
        trainer: the Trainer.
        interval: the interval at which the scheduler is stepped, ``"epoch"`` or ``"step"``.
        monitor: the name of the metric for a scheduler that lowers the rate on a plateau.

    Returns:
        The entry ``lr_scheduler`` of the dict that ``configure_optimizers`` returns.

    Raises:
        MisconfigurationException: if the metric is a loss and the scheduler expects it to rise,
            which is the default of timm's plateau scheduler; or if the number of updates in an
            epoch is needed but the data have no length, or the number changes between epochs.
    """
    options = {}
    if "updates_per_epoch" in inspect.signature(factory).parameters:
        options["updates_per_epoch"] = _count_updates(trainer)
    scheduler = factory(optimizer, **options)
    if isinstance(scheduler, tuple):  # create_scheduler_v2 also returns the number of epochs
        scheduler = scheduler[0]
    # Lightning's ReduceLROnPlateau contains the name of its metric.
    monitor = getattr(scheduler, "monitor", monitor)
    settings = {"scheduler": scheduler, "interval": interval}
    inner = getattr(scheduler, "lr_scheduler", scheduler)  # timm wraps torch's scheduler
    if not isinstance(inner, ReduceLROnPlateau):
        return settings
    if inner.mode == "max" and monitor.endswith("loss"):
        raise MisconfigurationException(
            f"the scheduler lowers the learning rate when {monitor} stops rising: give the "
            "scheduler mode='min', or set scheduler_monitor to a metric that should rise"
        )
    return settings | {"reduce_on_plateau": True, "monitor": monitor}


def _count_updates(trainer: Trainer) -> int:
    """Return the number of optimizer updates in an epoch.

    Raises:
        MisconfigurationException: if the data have no length, or the number changes.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, GradientAccumulationScheduler) and len(callback.scheduling) > 1:
            raise MisconfigurationException(
                "the scheduler counts the updates of an epoch, but GradientAccumulationScheduler "
                "changes their number between epochs: set the Trainer's accumulate_grad_batches "
                "instead of this callback"
            )
    # This counts the batches of an epoch, for which Lightning sets the data up. Lightning then does
    # not load the states of the loaders after a resume; ExactResume corrects that.
    trainer.fit_loop.setup_data()
    if math.isinf(trainer.num_training_batches):
        raise MisconfigurationException(
            "the scheduler counts the updates of an epoch, but the training data have no "
            "length (an IterableDataset): set the Trainer's limit_train_batches to the number "
            "of batches in an epoch"
        )
    return math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)


def step_scheduler(scheduler: Any, trainer: Trainer, interval: str, metric: Any | None) -> None:
    """Step a torch scheduler as Lightning does, or a timm scheduler to the current epoch or update.

    Args:
        scheduler: the scheduler.
        trainer: the Trainer.
        interval: the interval at which the scheduler is stepped, ``"epoch"`` or ``"step"``.
        metric: the value of the monitored metric, or ``None``.
    """
    if not hasattr(scheduler, "step_update"):  # a torch scheduler
        scheduler.step(*[] if metric is None else [metric])
    elif interval == "step":
        scheduler.step_update(num_updates=trainer.global_step, metric=metric)
    else:
        scheduler.step(epoch=trainer.current_epoch + 1, metric=metric)


def warmup_multistep(
    optimizer: Optimizer,
    milestones: Sequence[int],
    updates_per_epoch: int,
    *,
    gamma: float = 0.1,
    warmup_updates: int = 500,
    warmup_factor: float = 0.001,
) -> ChainedScheduler:
    """Return a linear warm-up counted in updates, followed by drops counted in epochs.

    Args:
        optimizer: the optimizer whose learning rates are scheduled.
        milestones: the epochs after which the learning rate drops.
        updates_per_epoch: the number of optimizer updates in an epoch.
        gamma: the factor of each drop.
        warmup_updates: the length of the warm-up in updates.
        warmup_factor: the factor of the learning rate in the first update.

    Returns:
        A scheduler to step after every update.
    """
    drops = [epoch * updates_per_epoch for epoch in milestones]
    return ChainedScheduler(
        [
            LinearLR(optimizer, warmup_factor, total_iters=warmup_updates),
            MultiStepLR(optimizer, drops, gamma),
        ]
    )
