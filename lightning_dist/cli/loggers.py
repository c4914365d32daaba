"""What the loggers of a run are told besides metrics: its config first, and when it ends."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import WandbLogger
from omegaconf import DictConfig, OmegaConf


@contextmanager
def logged_run(trainer: Trainer, config: DictConfig) -> Iterator[None]:
    """Log the config as hyper-parameters; close what would go on in a sweep's next run."""
    loggers = list(trainer.loggers)
    settings: Any = OmegaConf.to_container(config, resolve=True)
    for logger in loggers:
        logger.log_hyperparams(settings)
    failed = True
    try:
        yield
        failed = False
    finally:
        for logger in loggers:
            if isinstance(logger, WandbLogger):  # its next logger would take this run for its own
                logger.experiment.finish(exit_code=int(failed))


@contextmanager
def without_loggers(trainer: Trainer) -> Iterator[dict[str, float]]:
    """Keep what happens here from the loggers; they get the metrics that are put in the dict."""
    loggers, trainer.loggers = trainer.loggers, []
    metrics: dict[str, float] = {}
    try:
        yield metrics
    finally:
        trainer.loggers = loggers
    for logger in loggers:
        logger.log_metrics(metrics, step=trainer.global_step)
        logger.save()
