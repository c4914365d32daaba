"""``ExactResume``: a callback that gives a resumed run the result of an uninterrupted run."""

import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_dist.checks import check_number
from lightning_dist.resume.checkpoint_io import AtomicCheckpointIO, refuse_unwritable
from lightning_dist.resume.csv_logger import ResumableCSVLogger
from lightning_dist.resume.foreign_paths import drop_foreign_paths, follow_moved_folder
from lightning_dist.resume.loops import (
    count_last_batch_and_epoch,
    is_of_a_finder,
    refuse_finders,
    resume_at_the_right_batch,
    start_epoch_again,
)
from lightning_dist.resume.signals import (
    Interrupted,
    install_handler,
    keep_status,
    remove_handler,
)

# This entry of a checkpoint is True if a callback, such as EarlyStopping, has ended the training.
_STOPPED = "lightning_dist_stopped"


class ExactResume(Callback):
    """A callback that gives an interrupted and resumed run the result of an uninterrupted run.

    - After SIGTERM or SIGINT, sent to any process of the run, the run completes the current batch
      and its gradient accumulation, saves ``last.ckpt`` in the folder of the Trainer's
      ModelCheckpoint, and ends every process. The exit status of the first process is 143 or 130.
      If the signal comes in the last batch of an epoch or in the validation after it, the run
      completes the epoch first. A second SIGINT ends the run immediately.
    - The random numbers of a training step (dropout, mixup) depend only on seed, epoch, batch and
      process, so that no state of a random generator has to be saved.
    - A checkpoint is written to a temporary file, which replaces the old one when it is complete.
    - A path in the state of a callback is used only if it is in the folder of the checkpoints.
    - A :class:`lightning_dist.resume.ResumableCSVLogger` deletes the rows after the checkpoint and
      appends new rows.

    Resume with ``trainer.fit(..., ckpt_path="last")``, or ``resume=true`` of ``lightning-dist
    train``. On a CPU the result is the same to the last bit; on a GPU it is the same if its kernels
    are deterministic (``Trainer(deterministic=True)``). The order of the samples must be a function
    of the epoch, and the training loader must have a state, as the loaders of
    :class:`lightning_dist.data.base.ImageDataModule` do. Manual optimization is not supported.
    After a resume within an epoch, means over that training epoch (``self.log(...,
    on_epoch=True)`` in ``training_step``) do not include its earlier batches. Lightning skips one
    step of ReduceLROnPlateau at each resume.

    Args:
        seed: a whole number from which the random numbers of the training steps are derived.

    Raises:
        ValueError: if the seed is not a whole number of at least 0.
        OSError: at the start of ``fit``, if no file can be written to the folder of the
            checkpoints; later, if a checkpoint cannot be written. The previous checkpoint is then
            intact.
    """

    def __init__(self, seed: int = 0) -> None:
        check_number("seed", seed, int, least=0)
        self.seed = seed
        self._received: int | None = None
        self._saved_step: int | None = None
        # It is True after the run was saved because of a signal: no further batch or epoch may
        # begin.
        self._must_end = False
        self._batches = 0  # The number of completed batches of this epoch.
        self._resumes = False
        self._trains = False
        # While it is True, hooks notice a stored signal and end the run.
        self._is_training = False
        self._started_epoch = False

    # Hooks, in the order in which Lightning calls them

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Handle signals; in ``fit``, check the folder and replace the writer of checkpoints."""
        self._is_training = False
        install_handler(trainer, self._handle_signal)
        if stage != "fit":
            return
        self._received, self._saved_step, self._must_end = None, None, False
        self._batches, self._resumes, self._trains, self._started_epoch = 0, False, False, False
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        folder = _checkpoint_folder(trainer)
        if folder is not None and "://" not in folder and trainer.is_global_zero:
            refuse_unwritable(Path(folder))

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Follow a moved folder, forget paths of other runs, and rewind the CSV files.

        Lightning calls this hook before it loads the states of all callbacks, and even if nothing
        is left to train.
        """
        if trainer.state.fn != TrainerFn.FITTING or is_of_a_finder(trainer):
            return
        refuse_finders(trainer)
        follow_moved_folder(trainer, checkpoint)
        drop_foreign_paths(trainer, checkpoint)
        self._resumes, self._saved_step = True, checkpoint["global_step"]
        for logger in _csv_loggers(trainer):
            logger.rewind(checkpoint["global_step"])
        if checkpoint.get(_STOPPED):
            trainer.should_stop = True
        resume_at_the_right_batch(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Return the number of completed batches of the epoch, which the checkpoint stores."""
        return {"batches": self._batches}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the number of completed batches of the epoch from a checkpoint."""
        check_number("the number of completed batches", state_dict["batches"], int, least=0)
        self._batches = state_dict["batches"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn of ReduceLROnPlateau."""
        if any(config.reduce_on_plateau for config in trainer.lr_scheduler_configs):
            rank_zero_warn(
                "Lightning skips one step of ReduceLROnPlateau at each resume: the result of a "
                "resumed run then differs from that of a run without an interruption"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Empty a new run's CSV files, and seed the first batch."""
        self._trains = self._is_training = True
        if not self._resumes:
            for logger in _csv_loggers(trainer):
                logger.rewind(0)
        # If the run resumes within an epoch, Lightning does not call on_train_epoch_start.
        self._reseed(trainer, 0)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the run if it was saved because of a signal; otherwise seed the first batch."""
        if self._must_end:
            self._end_run(trainer)
        self._started_epoch = True
        self._batches = 0
        self._reseed(trainer, 0)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """End the run if it was saved because of a signal; otherwise seed the training step."""
        # Do not end the run in on_train_batch_end: Lightning logs the batch's metrics after it.
        if self._must_end:
            self._end_run(trainer)
        if self._resumes and not self._started_epoch:
            self._started_epoch = True
            start_epoch_again(trainer, pl_module)
        self._reseed(trainer, 1)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Seed the next batch, and save if a process received a signal."""
        self._batches = batch_idx + 1
        self._reseed(trainer, 0)
        accumulates = (batch_idx + 1) % trainer.accumulate_grad_batches != 0
        # Do not save after the last batch of an epoch: a run that resumes from there would skip the
        # validation of the epoch. on_train_epoch_end saves instead.
        if self._any_received_signal(trainer) and not accumulates and not trainer.is_last_batch:
            self._save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Seed the next batch, because the validation may have drawn random numbers."""
        if not trainer.sanity_checking:
            self._reseed(trainer, 0)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save if a process received a signal."""
        if self._any_received_signal(trainer):
            self._save(trainer)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Write the loggers' rows before the checkpoint, so that no row before it can be lost."""
        self._saved_step = trainer.global_step
        checkpoint[_STOPPED] = trainer.should_stop
        for logger in trainer.loggers:
            logger.save()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the run if a process received a signal, also after the last checkpoint."""
        self._is_training = False
        if self._must_end or self._any_received_signal(trainer):
            self._end_run(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Correct the counters, so that a later test is logged at the right step and epoch."""
        if self._resumes and not self._trains:
            count_last_batch_and_epoch(trainer)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Keep the exit status of a run that a signal ends."""
        if isinstance(exception, Interrupted):
            keep_status(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the handling of signals to Lightning again, and end the run after a signal.

        Python ignores an exception that a signal's handler raises while an object is deleted.
        """
        remove_handler(trainer)
        if self._received is not None:
            self._end_run(trainer)

    def end_if_signalled(self, trainer: Trainer) -> None:
        """End the run within a training step if a process received a signal.

        A step that takes minutes calls this, such as one that fills a teacher cache. The batch is
        not completed and nothing is saved: a resumed run continues from the last checkpoint.
        """
        if self._any_received_signal(trainer):
            self._end_run(trainer)

    # Helpers of the hooks

    def _handle_signal(self, trainer: Trainer, number: int) -> None:
        """Store a signal during training, so that a hook ends the run; otherwise end it now."""
        again = self._received is not None
        self._received = number
        if not self._is_training:  # Nothing is left to save.
            self._end_run(trainer)
        if again and number == signal.SIGINT:
            raise KeyboardInterrupt
        rank_zero_info(f"{signal.Signals(number).name}: the run will be saved and then stopped")

    def _reseed(self, trainer: Trainer, phase: int) -> None:
        """Seed all random generators with numbers derived from epoch, batch, process and phase.

        Phase 0 seeds the transfer of a batch to its device, and phase 1 its training step.
        """
        place = (self.seed, trainer.current_epoch, self._batches, trainer.global_rank, phase)
        generated = np.random.SeedSequence(place).generate_state(3)
        for_torch, for_numpy, for_random = generated.tolist()
        if trainer.strategy.root_device.type == "cpu":
            # torch 2.14's manual_seed also formats a stack trace for CUDA, even if there is no GPU,
            # which takes longer than the step of a small network.
            torch.default_generator.manual_seed(for_torch)
        else:
            torch.manual_seed(for_torch)
        np.random.seed(for_numpy)
        random.seed(for_random)

    def _any_received_signal(self, trainer: Trainer) -> bool:
        """Return True, in all processes, if any process of the run received a signal."""
        received = self._received is not None
        return trainer.strategy.reduce_boolean_decision(received, all=False)

    def _save(self, trainer: Trainer) -> None:
        """Save a checkpoint if there is a folder for it, and make the next hook end the run."""
        folder, saver = _checkpoint_folder(trainer), trainer.checkpoint_callback
        if folder is not None and isinstance(saver, ModelCheckpoint):
            path = f"{folder}/last.ckpt"
            # Without this, ModelCheckpoint would write its next checkpoint to last-v1.ckpt.
            saver.last_model_path = path
            trainer.save_checkpoint(path)
        self._must_end = True

    def _end_run(self, trainer: Trainer) -> None:
        """Raise the exception that ends this process."""
        number = self._received or signal.SIGTERM
        rank_zero_info(
            f"{signal.Signals(number).name}: stopped at step {trainer.global_step}, "
            f"{'which is saved' if self._saved_step == trainer.global_step else 'nothing is saved'}"
        )
        # The other ranks exit with status 0. If one of them failed, Lightning's launcher would kill
        # rank 0 before rank 0 could exit with its own status.
        raise Interrupted(number, status=128 + number if trainer.is_global_zero else 0)


def _csv_loggers(trainer: Trainer) -> list[ResumableCSVLogger]:
    return [logger for logger in trainer.loggers if isinstance(logger, ResumableCSVLogger)]


def _checkpoint_folder(trainer: Trainer) -> str | None:
    """Return the folder of the Trainer's ModelCheckpoint; None if nothing is saved."""
    saver = trainer.checkpoint_callback
    quick = trainer.fast_dev_run  # type: ignore[attr-defined]
    if not isinstance(saver, ModelCheckpoint) or quick:
        return None
    return str(saver.dirpath or trainer.default_root_dir)
