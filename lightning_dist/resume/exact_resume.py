"""Runs that are interrupted and continue as if they never had been."""

import os
import random
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loops.loop import _Loop
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_dist.checks import check_number
from lightning_dist.data.seeding import derive_seeds
from lightning_dist.resume.checkpoint_io import AtomicCheckpointIO, refuse_unwritable
from lightning_dist.resume.csv_logger import ResumableCSVLogger

SIGNALS = (signal.SIGTERM, signal.SIGINT)
_STOPPED = "lightning_dist_stopped"  # in a checkpoint: whether a callback had ended the training


class Interrupted(SystemExit):
    """A signal ended the run; the exit status is 128 + its number, 143 for SIGTERM."""

    def __init__(self, number: int, status: int) -> None:
        super().__init__(status)
        self.number = number

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.number).name}"


class ExactResume(Callback):
    """Make a run that is interrupted and resumed end as it would have without the interruption.

    - SIGTERM or SIGINT, sent to any process of the run, lets the current batch end (and its
      accumulation), saves ``last.ckpt`` in the folder of the Trainer's ModelCheckpoint, and ends
      every process; the first one's exit status is 143 or 130. In an epoch's last batch and in its
      validation the epoch is ended first. A second SIGINT ends the run at once.
    - Whatever a training step draws (dropout, mixup) depends on seed, epoch, batch and process
      alone, so that no state of a generator has to be saved.
    - Checkpoints are written beside the old file, which they replace once they are complete.
    - A :class:`lightning_dist.resume.ResumableCSVLogger` continues its file at the checkpoint.

    Resume with ``trainer.fit(..., ckpt_path="last")``, or ``resume=true`` of ``lightning-dist
    train``. The result is the same to the last bit on a CPU, on a GPU as far as its kernels are
    deterministic (``Trainer(deterministic=True)``), where the order of the samples is a function of
    the epoch and the training loader has a state, as those of
    :class:`lightning_dist.data.base.ImageDataModule`. Automatic optimization only. Means over a
    training epoch (``self.log(..., on_epoch=True)`` in ``training_step``) start again where the run
    resumes, and ReduceLROnPlateau misses a step there.

    Args:
        seed: of the training steps.

    Raises:
        ValueError: if the seed is no whole number of at least 0.
        OSError: at the start of ``fit``, if the folder of the checkpoints cannot be written to;
            later, if a checkpoint cannot be written. The one before is then intact.
    """

    def __init__(self, seed: int = 0) -> None:
        check_number("seed", seed, int, least=0)
        self.seed = seed
        self._received: int | None = None
        self._saved_step: int | None = None
        self._leaves = False  # all is saved: neither batch nor epoch must begin
        self._batches = 0  # completed ones of this epoch
        self._resumes = False
        self._trains = False

    # Hooks, in the order in which Lightning calls them

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that checkpoints can be written, and see to it that they are written whole."""
        if stage != "fit":
            return
        self._received, self._saved_step, self._leaves = None, None, False
        self._batches, self._resumes, self._trains = 0, False, False
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        folder = _folder(trainer)
        if folder is not None and "://" not in folder and trainer.is_global_zero:
            refuse_unwritable(Path(folder))

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Rewind the curves, also of a run that has nothing left to train."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        self._resumes = True
        for logger in _curves(trainer):
            logger.rewind(checkpoint["global_step"])
        if checkpoint.get(_STOPPED):  # early stopping had ended it
            trainer.should_stop = True

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self._batches}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._batches = state_dict["batches"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if any(config.reduce_on_plateau for config in trainer.lr_scheduler_configs):
            rank_zero_warn(
                "ReduceLROnPlateau misses a step wherever a run resumes (Lightning skips it): the "
                "run then ends otherwise than without an interruption"
            )
        if self._resumes:
            _begin_new_epoch_after_a_whole_one(trainer)

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._listen(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._listen(trainer)
        self._trains = True
        if not self._resumes:
            for logger in _curves(trainer):
                logger.rewind(0)
        self._reseed(trainer, 0)  # in mid-epoch, on_train_epoch_start does not come

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._leaves:
            self._leave(trainer)
        self._batches = 0
        self._reseed(trainer, 0)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._leaves:  # Lightning logs a batch after on_train_batch_end, so not there
            self._leave(trainer)
        self._reseed(trainer, 1)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self._batches = batch_idx + 1
        self._reseed(trainer, 0)
        accumulates = (batch_idx + 1) % trainer.accumulate_grad_batches != 0
        # An epoch's last batch is followed by its validation, which no checkpoint could repeat.
        if self._is_asked_to_stop(trainer) and not accumulates and not trainer.is_last_batch:
            self._save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._reseed(trainer, 0)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._is_asked_to_stop(trainer):
            self._save(trainer)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Let no checkpoint be ahead of the curves on the disk."""
        self._saved_step = trainer.global_step
        checkpoint[_STOPPED] = trainer.should_stop
        for logger in trainer.loggers:
            logger.save()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._leaves:
            self._leave(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._resumes and not self._trains:
            # Lightning counts the last batch and epoch when it goes on, and logs the test by that.
            trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step
            if trainer.should_stop or trainer.global_step == trainer.max_steps:
                trainer.fit_loop.epoch_progress.increment_completed()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._listen(trainer)

    # Helpers of the hooks

    def _listen(self, trainer: Trainer) -> None:
        """Only note a signal while training. Lightning takes its handlers away when it ends."""

        own = os.getpid()

        def note(number: int, frame: Any) -> None:
            if os.getpid() != own:  # a loader's worker: the run tells it when to end
                return
            again = self._received is not None
            self._received = number
            if trainer.sanity_checking or trainer.testing:  # nothing is lost
                self._leave(trainer)
            if again and number == signal.SIGINT:
                raise KeyboardInterrupt
            rank_zero_info(f"{signal.Signals(number).name}: the run stops as soon as it is saved")

        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                signal.signal(number, note)

    def _reseed(self, trainer: Trainer, phase: int) -> None:
        """Before a batch is moved to its device (phase 0) and before its step (phase 1)."""
        place = (self.seed, trainer.current_epoch, self._batches, trainer.global_rank, phase)
        for_torch, for_numpy, for_random = derive_seeds(*place, count=3)
        torch.manual_seed(for_torch)
        np.random.seed(for_numpy)
        random.seed(for_random)

    def _is_asked_to_stop(self, trainer: Trainer) -> bool:
        received = self._received is not None
        return trainer.strategy.reduce_boolean_decision(received, all=False)

    def _save(self, trainer: Trainer) -> None:
        """Save, where there is a place for it, and leave before anything else begins."""
        folder, saver = _folder(trainer), trainer.checkpoint_callback
        if folder is not None and isinstance(saver, ModelCheckpoint):
            path = f"{folder}/last.ckpt"
            saver.last_model_path = path  # its own next one takes no other name then
            trainer.save_checkpoint(path)
        self._leaves = True

    def _leave(self, trainer: Trainer) -> None:
        number = self._received or signal.SIGTERM
        rank_zero_info(
            f"{signal.Signals(number).name}: stopped at step {trainer.global_step}, "
            f"{'which is saved' if self._saved_step == trainer.global_step else 'nothing is saved'}"
        )
        # The process that started the others is killed where one of them fails.
        raise Interrupted(number, status=128 + number if trainer.is_global_zero else 0)


def _begin_new_epoch_after_a_whole_one(trainer: Trainer) -> None:
    """Under ``max_steps`` Lightning would repeat the epoch whose end a checkpoint was taken at.

    It resumes such runs as if in mid-epoch, whatever the checkpoint says. There is no hook between
    the loading of the loops' state and its use, so the loop's own method is wrapped once.
    """
    loop = trainer.fit_loop
    reset = loop.reset

    def reset_once() -> None:
        del loop.__dict__["reset"]
        progress: Any = loop.epoch_progress.current
        if progress.ready == progress.started == progress.processed:
            _Loop.restarting.fset(loop, False)  # type: ignore[attr-defined]
        reset()

    loop.__dict__["reset"] = reset_once


def _curves(trainer: Trainer) -> list[ResumableCSVLogger]:
    return [logger for logger in trainer.loggers if isinstance(logger, ResumableCSVLogger)]


def _folder(trainer: Trainer) -> str | None:
    saver = trainer.checkpoint_callback
    quick = trainer.fast_dev_run  # type: ignore[attr-defined]
    if not isinstance(saver, ModelCheckpoint) or quick:
        return None
    return str(saver.dirpath or trainer.default_root_dir)
