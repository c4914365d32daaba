"""Callbacks of every run: they save its config, check its monitor, and record its first error."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_dist.cli.errors import UserError
from lightning_dist.cli.run.result import record_error
from lightning_dist.cli.run.saved_config import CONFIG_KEY

VALIDATION_KEY = "lightning_dist_validation"


class SaveConfig(Callback):
    """Put the composed config into every checkpoint, so that other verbs need nothing else.

    The names and colours of the data's classes are saved with it: they may be known from files
    alone. So is the last validation, which a run that resumes after it may not repeat.

    Args:
        config: plain data, from :func:`lightning_dist.cli.run.saved_config.to_save`.

    Attributes:
        validation: the metrics of the last validation before the run was resumed.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        self.validation: dict[str, float] = {}

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
        self.validation = checkpoint.get(VALIDATION_KEY, {})


class CheckMonitor(Callback):
    """Refuse a monitored metric that validation does not log, before the first epoch.

    Args:
        metric: the monitored one, such as ``val/accuracy``.
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
    """Record the first error among the processes of a run: it causes what the others raise later.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        if trainer.world_size > 1:
            record_error(self.folder, exception)


def logged_metrics(trainer: Trainer, prefix: str) -> dict[str, float]:
    """Return the last value of each metric that was logged under a prefix.

    Args:
        trainer: of the run.
        prefix: such as ``"val/"``; the names keep it.
    """
    metrics = trainer.callback_metrics.items()
    return {name: float(value) for name, value in metrics if name.startswith(prefix)}
