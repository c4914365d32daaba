"""What the loggers of a run are told besides metrics: its config first, and when it ends."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from omegaconf import DictConfig, OmegaConf


class LogConfig(Callback):
    """Log the whole config as hyper-parameters, in the process that logs the metrics."""

    def __init__(self, config: DictConfig) -> None:
        self.settings: Any = OmegaConf.to_container(config, resolve=True)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for logger in trainer.loggers:
            logger.log_hyperparams(self.settings)


@contextmanager
def closed_loggers(trainer: Trainer) -> Iterator[None]:
    """Close what the next run of a sweep would take for its own: the run of Weights & Biases."""
    failed = True
    try:
        yield
        failed = False
    finally:
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.experiment.finish(exit_code=int(failed))


@contextmanager
def without_loggers(trainer: Trainer) -> Iterator[dict[str, float]]:
    """Keep what happens here from the loggers; they get the metrics put in the dict, if any."""
    loggers, trainer.loggers = trainer.loggers, []
    metrics: dict[str, float] = {}
    try:
        yield metrics
    finally:
        trainer.loggers = loggers
    for logger in loggers if metrics else ():
        logger.log_metrics(metrics, step=trainer.global_step)
        logger.save()
