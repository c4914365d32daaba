"""``lightning-dist train``: compose, fit, test, and leave a result for the report."""

import json
import logging
import math
import multiprocessing
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import rich
import rich.syntax
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.types import RunMode
from hydra.utils import instantiate
from lightning.pytorch import (
    Callback,
    LightningDataModule,
    LightningModule,
    Trainer,
    seed_everything,
)
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from hydra_plugins.lightning_dist_optuna.sweeper import OptunaSweeper
from lightning_dist.cli import UserError, hydra_app, is_users, user_environment, with_extra
from lightning_dist.cli.loggers import LogConfig, closed_loggers, without_loggers
from lightning_dist.cli.saved import CONFIG_KEY, to_save
from lightning_dist.weights import read_checkpoint

log = logging.getLogger(__name__)
_UNFINISHED = "has not ended: it was killed, or still runs"


class SaveConfig(Callback):
    """Put the composed config into every checkpoint, so that other verbs need nothing else.

    The names and colours of the data's classes go with it: they may be known from files alone.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        of_classes = {name: getattr(data, name, None) for name in ("class_names", "class_colors")}
        checkpoint[CONFIG_KEY] = self.config | of_classes


def main() -> None:
    """Run the Hydra app on ``sys.argv``.

    Raises:
        UserError: if a launcher's worker died.
    """
    Plugins.instance().register(OptunaSweeper)  # Hydra misses it in an editable install
    try:
        hydra_app("train", _job)
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in ("joblib", "ray", "submitit"):
            raise
        raise UserError(
            f"the launcher lost a job, which was killed ({type(error).__name__}): own_process=true "
            "lets the others go on, and resume=true with the same hydra.sweep.dir runs what is "
            "missing"
        ) from error


def _job(config: DictConfig) -> float | None:
    """One run, alone or in a sweep, which goes on where a run fails."""
    if multiprocessing.get_start_method(allow_none=True) == "loky":
        # In joblib's workers data loaders would start theirs as joblib does, which fails.
        multiprocessing.set_start_method(None, force=True)
    hydra = HydraConfig.get()
    done = _completed(config) if config.resume else None
    if done is not None:
        log.info("%s is complete: nothing to do", hydra.runtime.output_dir)
        return done["metrics"].get(config.monitor)
    if hydra.mode != RunMode.MULTIRUN:
        return _run(config)
    try:
        apart = config.distributed or config.own_process
        return _run_in_a_process(config) if apart else _run(config)
    except Exception as error:
        log.error("job %s failed: %s", hydra.job.num, error, exc_info=not is_users(error))
        return math.nan


def _run_in_a_process(config: DictConfig) -> float | None:
    """One run of a sweep as a command of its own, which ends alone if it is killed.

    Runs with several processes need that: subprocess DDP starts the command line again, which would
    be the whole sweep, and leaves its rank and port in the environment, which the next run would
    take for its own.
    """
    hydra = HydraConfig.get()
    folder = Path(hydra.runtime.output_dir)
    overrides = [*hydra.overrides.task, f"hydra.job.num={hydra.job.num}"]
    overrides += [x for x in hydra.overrides.hydra if not x.startswith("hydra.mode=")]
    overrides += [f'hydra.sweep.dir="{hydra.sweep.dir}"', f'hydra.run.dir="{folder}"']
    for source in hydra.runtime.config_sources:
        if source.provider == "command-line":
            overrides.append(f"--config-dir={source.path}")
    path = folder / "result.json"
    path.unlink(missing_ok=True)  # of an attempt before
    status = subprocess.run(
        [sys.executable, "-m", "lightning_dist", "train", *overrides],
        cwd=hydra.runtime.cwd,
        env=user_environment(),
    ).returncode
    result = json.loads(path.read_text()) if path.is_file() else _new_result(config)
    if result["error"] == _UNFINISHED:  # killed, as Lightning does where another rank has failed
        result["error"] = f"ended with exit status {status}"
        _write(path, result)
    if status or result["status"] == "failed":
        raise UserError(result["error"] or f"ended with exit status {status}")
    return result["metrics"].get(config.monitor)


def _run(config: DictConfig) -> float | None:
    """One run; its result is written whether it succeeds or fails."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    result = _new_result(config)
    _write(folder / "result.json", result)
    start = time.monotonic()
    try:
        outcome = train(config)
        result |= {"status": "completed", "error": None, **outcome}
    except BaseException as error:
        result |= {"error": with_extra(f"{type(error).__name__}: {error}")}
        raise
    finally:
        result["seconds"] = round(time.monotonic() - start, 2)
        _write(folder / "result.json", result)
    return result["metrics"].get(config.monitor)


def _completed(config: DictConfig) -> dict[str, Any] | None:
    """The result in this run's folder, if it has completed.

    Raises:
        UserError: if it is another run's.
    """
    path = Path(HydraConfig.get().runtime.output_dir) / "result.json"
    if not path.is_file():
        return None
    result = json.loads(path.read_text())
    if result["overrides"] != _new_result(config)["overrides"]:
        raise UserError(
            f"{path.parent} holds another run ({' '.join(result['overrides'])}): resume with the "
            "overrides that it was started with, or choose another folder"
        )
    return result if result["status"] == "completed" else None


def _last_checkpoint(config: DictConfig) -> str | None:
    """Where a run that was interrupted continues, if it got so far.

    Raises:
        UserError: if the checkpoint is another run's.
    """
    path = Path(HydraConfig.get().runtime.output_dir) / "checkpoints" / "last.ckpt"
    if not path.exists():
        return None
    saved = read_checkpoint(path).get(CONFIG_KEY, {})
    if any(saved.get(key) != value for key, value in to_save(config).items()):
        raise UserError(
            f"{path} is of a run with other data, networks or settings: resume with the overrides "
            "that it was started with, or choose another folder"
        )
    return str(path)


def _new_result(config: DictConfig) -> dict[str, Any]:
    """The result of a run that has not completed."""
    overrides = [str(override) for override in HydraConfig.get().overrides.task]
    overrides = [override for override in overrides if not override.startswith("resume=")]
    return {
        "status": "failed",
        "error": _UNFINISHED,
        "overrides": overrides,
        "command": " ".join(["lightning-dist train", *overrides]),
        "metric": config.monitor.replace("val/", "test/", 1),
        "seconds": 0.0,
    }


@rank_zero_only
def _write(path: Path, result: dict[str, Any]) -> None:
    path.write_text(json.dumps({"metrics": {}, "checkpoint": None, **result}, indent=2) + "\n")


def train(config: DictConfig) -> dict[str, Any]:
    """Fit and test what a composed config describes.

    Args:
        config: the config ``train``, composed.

    Returns:
        ``metrics``, the last value of every ``val/`` and ``test/`` metric, with ``test_teacher``
        also the teacher's as ``teacher/``; and ``checkpoint``, the path of the one that was tested,
        or ``None``.
    """
    if config.print_config:
        _print_config(config)
    torch.set_float32_matmul_precision(config.matmul_precision)
    seed_everything(config.seed, workers=True)
    module = instantiate(config.module)
    datamodule = instantiate(config.data)
    trainer = instantiate(
        config.trainer,
        callbacks=[
            *(instantiate(callback) for callback in config.callbacks.values() if callback),
            SaveConfig(to_save(config)),
            LogConfig(config),
        ],
        logger=[instantiate(logger) for logger in config.logger.values() if logger],
    )
    if config.trainer.get("sync_batchnorm") and trainer.strategy.root_device.type == "cpu":
        raise UserError(
            "trainer.sync_batchnorm=true needs GPUs, and this run is on the CPU: leave it out"
        )
    # The teacher drew random numbers too: students with and without one must train on the same.
    seed_everything(config.seed, workers=True)
    with closed_loggers(trainer):
        return _fit_and_test(config, trainer, module, datamodule)


def _fit_and_test(
    config: DictConfig, trainer: Trainer, module: LightningModule, datamodule: LightningDataModule
) -> dict[str, Any]:
    resume = config.ckpt_path or (_last_checkpoint(config) if config.resume else None)
    trainer.fit(module, datamodule=datamodule, ckpt_path=resume, weights_only=True)
    metrics = _numbers(trainer, "val/")
    if not metrics:  # a run that resumes where nothing is left to train
        trainer.validate(module, datamodule=datamodule, verbose=False)
        metrics = _numbers(trainer, "val/")
    tested = _saved(trainer.checkpoint_callback, config.test_checkpoint)
    trainer.test(module, datamodule=datamodule, ckpt_path=tested, weights_only=True)
    metrics |= _numbers(trainer, "test/")
    if config.test_teacher and config.distill.teacher is not None:
        teacher = instantiate(config.distill.teacher).as_network()
        with without_loggers(trainer) as of_teacher:  # there, test/ is the student's
            trainer.test(instantiate(config.module, student=teacher, teacher=None), datamodule)
            found = _numbers(trainer, "test/").items()
            of_teacher |= {name.replace("test/", "teacher/", 1): value for name, value in found}
        metrics |= of_teacher
    if trainer.is_global_zero:
        rich.print(f"[bold]checkpoint[/bold] {tested or 'none was saved'}")
    return {"metrics": metrics, "checkpoint": tested}


def _saved(saver: Any, which: str) -> str | None:
    """The path of the "last" or "best" checkpoint, if it was saved."""
    path = str(getattr(saver, f"{which}_model_path", ""))
    if not path and which == "last" and getattr(saver, "save_last", False):
        # ddp_spawn saves in other processes, which hand back the best path alone
        last = Path(saver.dirpath) / f"{saver.CHECKPOINT_NAME_LAST}{saver.FILE_EXTENSION}"
        path = str(last) if last.exists() else ""
    return path or None


def _numbers(trainer: Trainer, prefix: str) -> dict[str, float]:
    metrics = trainer.callback_metrics.items()
    return {name: float(value) for name, value in metrics if name.startswith(prefix)}


@rank_zero_only
def _print_config(config: DictConfig) -> None:
    rich.print(rich.syntax.Syntax(OmegaConf.to_yaml(config), "yaml", background_color="default"))
