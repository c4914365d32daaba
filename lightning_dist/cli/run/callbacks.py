"""Callbacks of every run that save its config, check its monitor, and record its first error."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from lightning_dist.cli.errors import UserError
from lightning_dist.cli.run.restoring import refuse_other_types
from lightning_dist.cli.run.result import record_error
from lightning_dist.cli.run.saved_config import CONFIG_KEY
from lightning_dist.files.card_files import read_card
from lightning_dist.resume.foreign_paths import drop_foreign_paths
from lightning_dist.training.cards import card_of_data, differences

VALIDATION_KEY = "lightning_dist_validation"


class SaveConfig(Callback):
    """Save the config in every checkpoint, so that other verbs need only the checkpoint.

    The names and colours of the classes are saved too, because some data sets read them from files.
    The last validation is saved too, because a run that resumes after it may not repeat it.

    Args:
        config: the config as plain data, from :func:`lightning_dist.cli.run.saved_config.to_save`.

    Attributes:
        validation: the metrics of the last validation before the run was resumed.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        self.validation: dict[str, float] = {}
        self._restored: dict[str, Any] | None = None

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        of_classes = {name: getattr(data, name, None) for name in ("class_names", "class_colors")}
        checkpoint[CONFIG_KEY] = self.config | of_classes
        checkpoint[VALIDATION_KEY] = self.validation | logged_metrics(trainer, "val/")

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        drop_foreign_paths(trainer, checkpoint)  # also in a run without ExactResume
        self.validation = checkpoint.get(VALIDATION_KEY, {})
        self._restored = checkpoint if trainer.state.fn == TrainerFn.FITTING else None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        restored, self._restored = self._restored, None
        # Under FSDP2, Lightning loads the checkpoint only after this hook.
        if restored is not None:
            refuse_other_types(trainer, restored)


class CompareStart(Callback):
    """Warn if the student's file of weights was trained on other images or classes than the data.

    Args:
        file: the file, or ``None`` if the student starts from none.
    """

    def __init__(self, file: str | None) -> None:
        self.file = file

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        card = None if self.file is None else read_card(self.file)
        for line in differences(card, card_of_data(trainer)):
            rank_zero_warn(
                f"the student starts from {self.file}, which was trained with {line}: unless "
                "the student has to learn the new ones, use the same in the data"
            )


class CheckMonitor(Callback):
    """Refuse a monitored metric that validation does not log, before the first epoch.

    Args:
        metric: the monitored metric, such as ``val/accuracy``.
    """

    def __init__(self, metric: str) -> None:
        self.metric = metric

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        logged = list(trainer.callback_metrics)
        if self.metric not in logged:
            raise UserError(
                f"monitor is {self.metric!r}, which validation does not log: use "
                f"{' or '.join(logged)}"
            )


class RecordError(Callback):
    """Record the first error in the processes of a run, because it causes the later errors.

    Args:
        folder: the folder of the run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        if trainer.world_size > 1:
            record_error(self.folder, exception)


def logged_metrics(trainer: Trainer, prefix: str) -> dict[str, float]:
    """Return the last value of each logged metric whose name starts with a prefix.

    Args:
        trainer: the trainer of the run.
        prefix: the prefix, such as ``"val/"``; the returned names include it.
    """
    metrics = trainer.callback_metrics.items()
    return {name: float(value) for name, value in metrics if name.startswith(prefix)}
