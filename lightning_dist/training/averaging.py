"""StudentEMA: a callback that keeps an exponential moving average of the student's weights."""

import functools
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class StudentEMA(Callback):
    """A callback that averages the student's weights and evaluates the average too.

    Weights and buffers are averaged after each optimizer step. The average is
    ``module.student_ema``: the module's checkpoints contain it, and validation and test log
    ``val/ema_loss``, ``val/ema_METRIC``, ``test/ema_loss`` and ``test/ema_METRIC`` in addition to
    the student's own metrics. The student trains as without this callback. In contrast, Lightning's
    ``EMAWeightAveraging`` averages the whole module and validates the average instead of the
    student.

    Args:
        decay: the weight of the old average in each update, from 0 to 1; 0.9999 is usual in long
            runs.

    Raises:
        ValueError: if ``decay`` is out of range.
        MisconfigurationException: at the start of ``fit``, if the module is not a
            :class:`lightning_dist.DistillModule` or the strategy shards the student.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[StudentEMA(decay=0.999)], accelerator="cpu", logger=False)
    """

    def __init__(self, decay: float = 0.9999) -> None:
        if not 0 <= decay <= 1:
            raise ValueError(f"decay is {decay}: give a number of at least 0 and at most 1")
        self.decay = decay
        self._averaged_steps = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Copy the student, so that the average in a checkpoint can be loaded into the copy.

        Raises:
            MisconfigurationException: if the module is no DistillModule or the student is sharded.
        """
        if stage != "fit":  # The module creates the average itself if it loads one.
            return
        if not hasattr(pl_module, "evaluate_too"):
            raise MisconfigurationException(
                f"StudentEMA averages the student of a DistillModule, but the module is a "
                f"{type(pl_module).__name__}: use Lightning's EMAWeightAveraging"
            )
        if isinstance(trainer.strategy, ModelParallelStrategy):
            raise MisconfigurationException(
                "StudentEMA averages whole students, but ModelParallelStrategy shards them: train "
                "without StudentEMA, or with ddp"
            )
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        if sum(isinstance(callback, StudentEMA) for callback in callbacks) > 1:
            raise MisconfigurationException(
                "the Trainer has several StudentEMAs, which would update one average: keep one"
            )
        averaging = earlier_averaging(trainer, self)
        if averaging is not None:  # It has copied the module already, without the average.
            raise MisconfigurationException(
                f"{type(averaging).__name__} comes before StudentEMA: list StudentEMA first"
            )
        keep_average(pl_module, self.decay)
        # Run first, so that the average is up to date when another callback saves a checkpoint.
        others = [callback for callback in callbacks if callback is not self]
        trainer.callbacks = [self, *others]  # type: ignore[attr-defined]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start at the current step, which is not 0 after a checkpoint was loaded."""
        self._averaged_steps = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Update the average if the batch ended with an optimizer step."""
        if trainer.global_step != self._averaged_steps:
            self._averaged_steps = trainer.global_step
            pl_module.student_ema.update_parameters(pl_module.student)


def earlier_averaging(trainer: Trainer, callback: Callback) -> Callback | None:
    """Return the first WeightAveraging before a callback, which has copied the module, or None.

    Args:
        trainer: the Trainer of both callbacks.
        callback: the later callback.
    """
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    before = callbacks[: callbacks.index(callback)]
    return next((c for c in before if _averages(c)), None)


def _averages(callback: Callback) -> bool:
    """Return whether a callback is a WeightAveraging of ``lightning`` or ``pytorch_lightning``."""
    return any(
        kind.__name__ == WeightAveraging.__name__ and "lightning" in kind.__module__
        for kind in type(callback).__mro__
    )


def keep_average(module: Any, decay: float = 0.9999) -> None:
    """Add an average of the student to a DistillModule, and evaluate the average too.

    If the module has an average already, only its decay changes.

    Args:
        module: the module.
        decay: the weight of the old average in each update; only StudentEMA updates the average.
    """
    update = functools.partial(_average, decay)
    if module.student_ema is None:
        average = AveragedModel(module.student, multi_avg_fn=update, use_buffers=True)
        module.student_ema = average.requires_grad_(False)
        module.evaluate_too("ema_", average)
    module.student_ema.multi_avg_fn = update


def make_room_for_average(
    module: Any, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, *_: Any
) -> None:
    """Add an average of the student to a DistillModule if the weights to load contain one.

    Args:
        module: the module.
        state_dict: the weights that are about to be loaded into it.
        prefix: the first part of their names.
        metadata: not used.
        strict: whether ``load_state_dict`` refuses missing weights.

    Raises:
        MisconfigurationException: if the module has an average, but the weights do not.
    """
    found = f"{prefix}student_ema.n_averaged" in state_dict
    if found and module.student_ema is None:
        keep_average(module)
    elif strict and not found and module.student_ema is not None:
        raise MisconfigurationException(
            "the module keeps an average of the student, but the checkpoint holds none: load it "
            "into a new module, without StudentEMA"
        )


def refuse_stale_average(module: Any) -> None:
    """Refuse to train a module whose average no callback would update.

    Args:
        module: a DistillModule at the start of ``fit``.

    Raises:
        MisconfigurationException: if the module has an average and the Trainer has no StudentEMA.
    """
    kept = any(isinstance(callback, StudentEMA) for callback in module.trainer.callbacks)
    if module.student_ema is not None and not kept:
        raise MisconfigurationException(
            "the module, or the checkpoint that it loaded, holds an average of the student, but no "
            "callback would update it: add lightning_dist.StudentEMA to the Trainer's callbacks"
        )


def _average(decay: float, averaged: Any, current: Any, updates: Any) -> None:
    """Update a moving average; ddp_spawn can pickle this function, but not torch's closure."""
    if averaged[0].is_floating_point():
        get_ema_multi_avg_fn(decay)(averaged, current, updates)
        return
    # Copy counters and index buffers: a weighted mean of integers would be rounded down.
    for old, new in zip(averaged, current, strict=True):
        old.copy_(new)
