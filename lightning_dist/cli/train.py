"""``lightning-dist train``: compose, fit, test, and leave a result for the report."""

import json
import logging
import math
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import rich
import rich.syntax
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from lightning_dist.checks import check_number
from lightning_dist.cli import UserError, hydra_app, is_users, user_environment
from lightning_dist.cli.saved import CONFIG_KEY, to_save
from lightning_dist.module import DistillModule
from lightning_dist.resume import SIGNALS
from lightning_dist.weights import read_checkpoint

log = logging.getLogger(__name__)

TESTED = ("last", "best")


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


class CheckMonitor(Callback):
    """Refuse a monitored metric that validation does not log, before the first epoch."""

    def __init__(self, metric: str) -> None:
        self.metric = metric

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        logged = [name for name in trainer.callback_metrics if name.startswith("val/")]
        if self.metric.startswith("val/") and self.metric not in logged:
            raise UserError(
                f"monitor is {self.metric!r}, which validation does not log: use "
                f"{' or '.join(logged)}"
            )


def main() -> None:
    """Run the Hydra app on ``sys.argv``."""
    hydra_app("train", _job)


def _job(config: DictConfig) -> float | None:
    """One run, alone or in a sweep, which goes on where a run fails."""
    hydra = HydraConfig.get()
    done = _completed(config) if config.resume else None
    if done is not None:
        log.info("%s is complete: nothing to do", hydra.runtime.output_dir)
        return done["metrics"].get(config.monitor)
    if hydra.mode != RunMode.MULTIRUN:
        return _run(config)
    try:
        return _run_in_a_process(config) if config.distributed else _run(config)
    except Exception as error:
        log.error("job %s failed: %s", hydra.job.num, error, exc_info=not is_users(error))
        return math.nan


def _run_in_a_process(config: DictConfig) -> float | None:
    """One run of a sweep with several processes, as a command of its own.

    Subprocess DDP starts the command line again, which would be the whole sweep, and leaves its
    rank and port in the environment, which the next run would take for its own.
    """
    hydra = HydraConfig.get()
    folder = Path(hydra.runtime.output_dir)
    overrides = [*hydra.overrides.task, f'hydra.run.dir="{folder}"']
    path = folder / "result.json"
    path.unlink(missing_ok=True)  # of an attempt before
    status = _run_command(["train", *overrides], hydra.runtime.cwd)
    if not path.is_file():  # killed, as Lightning does where another rank has failed
        _write(path, _new_result(config) | {"error": f"ended with exit status {status}"})
    result = json.loads(path.read_text())
    if status or result["status"] == "failed":
        raise UserError(result["error"] or f"ended with exit status {status}")
    return result["metrics"].get(config.monitor)


def _run_command(arguments: list[str], folder: str) -> int:
    """Run the command in a process of its own and return its exit status.

    A signal is handed on, so that the run can save its state, and ends this process afterwards. The
    terminal would send Ctrl-C to both: hence the session of its own.

    Raises:
        SystemExit: with the run's status, after a signal.
    """
    command = [sys.executable, "-m", "lightning_dist", *arguments]
    process = subprocess.Popen(command, cwd=folder, env=user_environment(), start_new_session=True)
    received = []

    def hand_on(number: int, frame: Any) -> None:
        received.append(number)
        process.send_signal(number)

    before = {number: signal.getsignal(number) for number in SIGNALS}
    on_main_thread = threading.current_thread() is threading.main_thread()
    try:
        for number in SIGNALS if on_main_thread else ():
            signal.signal(number, hand_on)
        status = process.wait()
    finally:
        for number in SIGNALS if on_main_thread else ():
            signal.signal(number, before[number])
    if received:
        sys.exit(status if status > 0 else 128 + received[0])
    return status


def _run(config: DictConfig) -> float | None:
    """One run; its result is written whether it succeeds or fails."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    result = _new_result(config)
    start = time.monotonic()
    try:
        outcome = train(config)
        result |= {"status": "completed", "error": None, **outcome}
    except BaseException as error:
        result |= {"error": f"{type(error).__name__}: {error}"}
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
        "error": None,
        "overrides": overrides,
        "command": shlex.join(["lightning-dist", "train", *overrides]),
        "metric": config.monitor.replace("val/", "test/", 1),
        "seconds": 0.0,
    }


@rank_zero_only
def _write(path: Path, result: dict[str, Any]) -> None:
    text = json.dumps({"metrics": {}, "checkpoint": None, **result}, indent=2) + "\n"
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(path)


def train(config: DictConfig) -> dict[str, Any]:
    """Fit and test what a composed config describes.

    Args:
        config: the config ``train``, composed.

    Returns:
        ``metrics``, the last value of every ``val/`` and ``test/`` metric, with ``test_teacher``
        also the teacher's as ``teacher/``; ``checkpoint``, the path of the one that was tested, or
        ``None``; and what :func:`_networks` says.
    """
    check(config)
    if config.print_config:
        _print_config(config)
    torch.set_float32_matmul_precision(config.matmul_precision)
    seed_everything(config.seed, workers=True)
    module = instantiate(config.module)
    networks = _networks(module, config)
    datamodule = instantiate(config.data)
    trainer = instantiate(
        config.trainer,
        callbacks=[
            *(instantiate(callback) for callback in config.callbacks.values() if callback),
            SaveConfig(to_save(config)),
            CheckMonitor(config.monitor),
        ],
        logger=[instantiate(logger) for logger in config.logger.values() if logger],
    )
    # The teacher drew random numbers too: students with and without one must train on the same.
    seed_everything(config.seed, workers=True)
    resume = config.ckpt_path or (_last_checkpoint(config) if config.resume else None)
    if config.ckpt_path:
        read_checkpoint(config.ckpt_path)  # its errors name the file and the mend
    trainer.fit(module, datamodule=datamodule, ckpt_path=resume, weights_only=True)
    metrics = _numbers(trainer, "val/")
    if not metrics:  # a run that resumes where nothing is left to train, and has logged these
        loggers, trainer.loggers = trainer.loggers, []
        trainer.validate(module, datamodule=datamodule, verbose=False)
        trainer.loggers = loggers
        metrics = _numbers(trainer, "val/")
    tested = _saved(trainer.checkpoint_callback, config.test_checkpoint)
    trainer.test(module, datamodule=datamodule, ckpt_path=tested, weights_only=True)
    metrics |= _numbers(trainer, "test/")
    if config.test_teacher and config.distill.teacher is not None:
        teacher = instantiate(config.distill.teacher).as_network()
        trainer.test(instantiate(config.module, student=teacher, teacher=None), datamodule)
        found = _numbers(trainer, "test/").items()
        metrics |= {name.replace("test/", "teacher/", 1): value for name, value in found}
    if trainer.is_global_zero:
        rich.print(f"[bold]checkpoint[/bold] {tested or 'none was saved'}")
    return {"metrics": metrics, "checkpoint": tested, **networks}


def _networks(module: LightningModule, config: DictConfig) -> dict[str, Any]:
    """How large the student is, who the teacher is, and how large that is, for the report."""
    if not isinstance(module, DistillModule):  # a config may name any LightningModule
        return {}
    networks = {"student_parameters": sum(x.numel() for x in module.student.parameters())}
    if module.teacher is None:
        return networks | {"teacher": None, "teacher_parameters": None}
    # Its file in conf/teacher, unless that loads one by name; and its weights, where they are one.
    settings = config.module.teacher
    name = settings.get("source") or HydraConfig.get().runtime.choices.get("teacher", "teacher")
    weights = settings.get("weights")
    size = sum(x.numel() for x in module.teacher.network.parameters())
    name = f"{name} ({Path(weights).name})" if isinstance(weights, str) else name
    return networks | {"teacher": name, "teacher_parameters": size}


def check(config: DictConfig) -> None:
    """What neither Hydra nor the objects of the config would refuse before training."""
    check_number("seed", config.seed, int, least=0, most=2**32 - 1)
    check_number("num_classes", config.num_classes, int, least=1)
    for key in ("max_epochs", "max_steps"):
        if config.trainer.get(key) is not None:
            check_number(f"trainer.{key}", config.trainer[key], int, least=-1)
    choices = {"matmul_precision": ("highest", "high", "medium"), "test_checkpoint": TESTED}
    for key, known in choices.items():
        if config[key] not in known:
            raise ValueError(f"{key} is {config[key]!r}: use {' or '.join(known)}")


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
