"""Functions that correct what Lightning's loops do when a run resumes.

They use private parts of Lightning 2.6.6: FitLoop.reset, the setter of FitLoop.restarting,
FitLoop.epoch_progress, the loop's states of loaders and its fetcher, the attribute
_batches_that_stepped of _TrainingEpochLoop, and the names of the finders' checkpoints. Check these
parts in every new release.
"""

from pathlib import Path
from typing import Any, cast

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
)
from lightning.pytorch.loops.fetchers import _DataFetcher
from lightning.pytorch.loops.loop import _Loop
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException


def is_of_a_finder(trainer: Trainer) -> bool:
    """Return whether a finder of Lightning wrote this checkpoint, to undo its own training."""
    return Path(str(trainer.ckpt_path)).name.startswith((".lr_find_", ".scale_batch_size_"))


def refuse_finders(trainer: Trainer) -> None:
    """Refuse to resume with a callback that searches the learning rate or the batch size.

    The callback would search again, and then load its own checkpoint instead of the run's:
    Lightning 2.6.6 would train from step 0 with the weights of the run and a new optimizer.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, (BatchSizeFinder, LearningRateFinder)):
            raise MisconfigurationException(
                f"a run does not resume with {type(callback).__name__}, which would search again "
                "and make Lightning forget the checkpoint: remove this callback, and set the "
                "batch size that it found; the checkpoint has the learning rate"
            )


def resume_at_the_right_batch(trainer: Trainer) -> None:
    """Let a resumed run begin the next epoch, or continue within the epoch of the checkpoint.

    Lightning 2.6.6 would repeat a complete epoch with ``max_steps``: the setter of
    ``FitLoop.restarting`` then always stores True, as if the checkpoint were from the middle of an
    epoch. Lightning would also train the batches before the checkpoint again, if the data was set
    up before the loops were restored, as by ``Trainer.estimated_stepping_batches`` in
    ``configure_optimizers``: ``FitLoop.setup_data`` loads the states of the loaders, but only the
    first time. Lightning calls no hook between the loading of the loops' state and
    ``FitLoop.reset``, so ``reset`` is replaced for one call.
    """
    loop = trainer.fit_loop
    reset = loop.reset

    def reset_once() -> None:
        del loop.__dict__["reset"]
        progress: Any = loop.epoch_progress.current
        if progress.ready == progress.started == progress.processed:
            # Call the setter of the base class, because FitLoop's own setter stores True.
            _Loop.restarting.fset(loop, False)  # type: ignore[attr-defined]
        elif loop._combined_loader_states_to_load:
            loop._load_combined_loader_states()
            iter(cast(_DataFetcher, loop._data_fetcher))
        reset()

    loop.__dict__["reset"] = reset_once


def start_epoch_again(trainer: Trainer, pl_module: LightningModule) -> None:
    """Set the state that ``on_train_epoch_start`` sets, in a run that resumes within an epoch.

    In such a run, Lightning does not call that hook. A warning names the module and the callbacks
    that override it.
    """
    for part in (pl_module, *trainer.callbacks):  # type: ignore[attr-defined]
        if isinstance(part, GradientAccumulationScheduler):
            part.on_train_epoch_start(trainer)
        elif not part.on_train_epoch_start.__module__.startswith(("lightning.", "lightning_dist.")):
            rank_zero_warn(
                f"the run resumes within an epoch, where Lightning does not call "
                f"{type(part).__name__}.on_train_epoch_start: what this hook sets must be set in "
                "on_train_start too, or the result differs from that of a run without an "
                "interruption"
            )


def count_last_batch_and_epoch(trainer: Trainer) -> None:
    """Complete the counters of a run that resumed with nothing left to train.

    Lightning 2.6.6 saves a checkpoint before it counts the last batch and epoch, and counts them
    after a resume only if the training continues. It logs a test at the step
    ``_batches_that_stepped``.
    """
    trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step
    if trainer.should_stop or trainer.global_step == trainer.max_steps:
        trainer.fit_loop.epoch_progress.increment_completed()
