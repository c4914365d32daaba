"""`PruneTrial`: report the validations of an Optuna trial, and end a trial that Optuna prunes."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from hydra_plugins.lightning_dist_optuna.sweeper import PRUNED, STUDY, open_storage
from lightning_dist.cli.errors import UserError


class Pruned(UserError):  # noqa: N818 - it is no error
    """The exception that ends a trial early, because its pruner does not expect a good result."""


class PruneTrial(Callback):
    """Report ``monitor`` after each validation, and end the run if the pruner decides so.

    Args:
        storage: the journal file of the sweeper.
        trial: the number of the trial.
        monitor: the metric to report.
        pruner: an Optuna pruner; its steps are epochs.

    Raises:
        UserError: before training, if the journal file does not exist.
        Pruned: after a validation, in all processes of the run, if the pruner ends the trial.
    """

    def __init__(self, storage: str, trial: int, monitor: str, pruner: Any) -> None:
        self.storage = Path(storage)
        self.trial = trial
        self.monitor = monitor
        self.pruner = pruner

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not self.storage.exists():
            raise UserError(
                f"there is no study {self.storage}: hydra/sweeper=optuna needs the option -m, so "
                "that the sweeper creates the study"
            )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        if self.monitor not in trainer.callback_metrics:
            raise MisconfigurationException(
                f"pruning needs {self.monitor!r}, but validation logged only "
                f"{', '.join(map(repr, trainer.callback_metrics))}: set monitor"
            )
        value = float(trainer.callback_metrics[self.monitor])
        hopeless = trainer.is_global_zero and self._report(trainer.current_epoch, value)
        if trainer.strategy.reduce_boolean_decision(hopeless, all=False):
            raise Pruned(
                f"epoch {trainer.current_epoch}: {self.monitor} is {value:.4g}, and "
                f"{type(self.pruner).__name__} ended the trial"
            )

    def _report(self, epoch: int, value: float) -> bool:
        """Report a validation to the study, and return whether the trial should end."""
        import optuna

        storage = open_storage(self.storage)
        study = optuna.load_study(study_name=STUDY, storage=storage)
        study_id = storage.get_study_id_from_name(STUDY)
        trial_id = storage.get_trial_id_from_study_id_trial_number(study_id, self.trial)
        storage.set_trial_intermediate_value(trial_id, epoch, value)
        prune = self.pruner.prune(study, storage.get_trial(trial_id))
        if prune:
            storage.set_trial_user_attr(trial_id, PRUNED, True)
        return prune
