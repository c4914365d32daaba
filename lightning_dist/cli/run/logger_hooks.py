"""Hyper-parameters for the loggers, and closing W&B between the runs of a sweep."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from omegaconf import DictConfig, OmegaConf


class LogConfig(Callback):
    """Log the whole config as hyper-parameters, in the process that logs the metrics.

    Args:
        config: composed.
    """

    def __init__(self, config: DictConfig) -> None:
        self.settings: Any = OmegaConf.to_container(config, resolve=True)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for logger in trainer.loggers:
            logger.log_hyperparams(self.settings)


@contextmanager
def closed_loggers(trainer: Trainer) -> Iterator[None]:
    """Close the run of Weights & Biases at the end of the block.

    It is global to the process, so that the next run of a sweep would go on logging to it.

    Args:
        trainer: whose loggers are closed.
    """
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
    """Run the block without the trainer's loggers.

    Args:
        trainer: gets its loggers back at the end of the block.

    Returns:
        An empty dict; the metrics that the block puts into it are logged after all.
    """
    loggers, trainer.loggers = trainer.loggers, []
    metrics: dict[str, float] = {}
    try:
        yield metrics
    finally:
        trainer.loggers = loggers
    for logger in loggers if metrics else ():
        logger.log_metrics(metrics, step=trainer.global_step)
        logger.save()
