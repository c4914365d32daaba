"""Log hyper-parameters, run without the loggers, and close W&B between the runs of a sweep."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from omegaconf import DictConfig, OmegaConf


class LogConfig(Callback):
    """Log the whole config as hyper-parameters, in the process that logs the metrics.

    Args:
        config: the composed config.
    """

    def __init__(self, config: DictConfig) -> None:
        self.settings: Any = OmegaConf.to_container(config, resolve=True)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for logger in trainer.loggers:
            logger.log_hyperparams(self.settings)


@contextmanager
def closed_loggers(trainer: Trainer) -> Iterator[None]:
    """Close the run of Weights & Biases at the end of the block.

    The W&B run is global to the process, so the next run of a sweep would log to it too.

    Args:
        trainer: the trainer that has the loggers.
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
        trainer: the trainer, whose loggers are restored at the end of the block.

    Returns:
        An empty dict; the metrics that the block adds to it are logged at the end of the block.
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
