"""``lightning-dist train``: compose, fit, test, and leave a result for the report."""

import logging
import math
import multiprocessing
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
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
from lightning_dist.checks import check_flag, check_number
from lightning_dist.cli import UserError, hydra_app, is_users, with_extra
from lightning_dist.cli.renamed_keys import refuse_renamed_keys
from lightning_dist.cli.run.logger_hooks import LogConfig, closed_loggers, without_loggers
from lightning_dist.cli.run.result import (
    RecordError,
    completed,
    first_error,
    forget_error,
    is_completed,
    new_result,
    resume_from,
    write_result,
)
from lightning_dist.cli.run.saved_config import CONFIG_KEY, to_save
from lightning_dist.cli.sweep.own_process import end_with_parent, needs_own_process, run_apart
from lightning_dist.module import DistillModule

log = logging.getLogger(__name__)

VALIDATION_KEY = "lightning_dist_validation"


class SaveConfig(Callback):
    """Put the composed config into every checkpoint, so that other verbs need nothing else.

    The names and colours of the data's classes go with it: they may be known from files alone. So
    does the last validation, which a run that resumes after it may not repeat.
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
        checkpoint[VALIDATION_KEY] = self.validation | _numbers(trainer, "val/")

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.validation = checkpoint.get(VALIDATION_KEY, {})


class CheckMonitor(Callback):
    """Refuse a monitored metric that validation does not log, before the first epoch."""

    def __init__(self, metric: str) -> None:
        self.metric = metric

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        logged = list(trainer.callback_metrics)
        if self.metric not in logged:
            raise UserError(
                f"monitor is {self.metric!r}, which validation does not log: use "
                f"{' or '.join(logged)}"
            )


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
    worker = multiprocessing.get_start_method(allow_none=True) == "loky"
    if worker:  # in joblib's workers data loaders would start theirs as joblib does, which fails
        multiprocessing.set_start_method(None, force=True)
    end_with_parent(worker)
    hydra = HydraConfig.get()
    done = completed(config) if config.resume else None
    if done is not None:
        log.info("%s is complete: nothing to do", hydra.runtime.output_dir)
        return done["metrics"].get(config.monitor)
    if hydra.mode != RunMode.MULTIRUN:
        return _run(config)
    try:
        return run_apart(config) if needs_own_process(config) else _run(config)
    except Exception as error:
        log.error("job %s failed: %s", hydra.job.num, error, exc_info=not is_users(error))
        return math.nan


def _run(config: DictConfig) -> float | None:
    """One run; its result is written whether it succeeds or fails."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    result = new_result(config)
    keep = is_completed(folder / "result.json")  # until this run is known to begin
    start = time.monotonic()
    try:
        check(config)
        checkpoint = resume_from(config)
        keep = False
        forget_error(folder)
        write_result(folder / "result.json", result)
        outcome = train(config, checkpoint)
        result |= {"status": "completed", "error": None, **outcome}
    except BaseException as error:
        reason = first_error(folder) or f"{type(error).__name__}: {error}"
        result |= {"error": with_extra(reason)}
        raise
    finally:
        result["seconds"] = round(time.monotonic() - start, 2)
        try:
            if not keep:
                write_result(folder / "result.json", result)
        except OSError as error:  # a full disk: what ended the run is to be told, not this
            log.error("cannot write %s: %s", folder / "result.json", error)
    return result["metrics"].get(config.monitor)


def train(config: DictConfig, checkpoint: str | None) -> dict[str, Any]:
    """Fit and test what a composed config describes.

    Args:
        config: the config ``train``, composed and checked.
        checkpoint: what the run begins with, if it goes on.

    Returns:
        ``metrics``, the last value of every ``val/`` and ``test/`` metric, with ``test_teacher``
        also the teacher's as ``teacher/``; ``checkpoint``, the path of the one that was tested, or
        ``None``; and what :func:`_networks` says.
    """
    if config.print_config:
        _print_config(config)
    torch.set_float32_matmul_precision(config.matmul_precision)
    seed_everything(config.seed, workers=True)
    module = instantiate(config.module)
    datamodule = instantiate(config.data)
    saver = SaveConfig(to_save(config))
    trainer = instantiate(
        config.trainer,
        callbacks=[
            *(instantiate(callback) for callback in config.callbacks.values() if callback),
            saver,
            CheckMonitor(config.monitor),
            LogConfig(config),
            RecordError(Path(HydraConfig.get().runtime.output_dir)),
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
        outcome = _fit_and_test(config, checkpoint, trainer, module, datamodule, saver)
    return outcome | _networks(module, config)


def _fit_and_test(
    config: DictConfig,
    checkpoint: str | None,
    trainer: Trainer,
    module: LightningModule,
    datamodule: LightningDataModule,
    saver: SaveConfig,
) -> dict[str, Any]:
    with _users_errors(checkpoint):
        trainer.fit(module, datamodule=datamodule, ckpt_path=checkpoint, weights_only=True)
    # Where the limit is 0 Lightning counts nothing: the number stays infinite.
    if trainer.num_training_batches == 0 or trainer.limit_train_batches == 0:
        raise UserError(
            "there is no training batch: give the data more images, a smaller "
            "data.global_batch_size where drop_last drops the only batch, or a "
            "trainer.limit_train_batches above 0"
        )
    metrics = saver.validation | _numbers(trainer, "val/")
    if not metrics:  # resumed from another program's checkpoint with nothing left to train
        with without_loggers(trainer):
            trainer.validate(module, datamodule=datamodule, verbose=False)
        metrics = _numbers(trainer, "val/")
    tested = _saved(trainer.checkpoint_callback, config.test_checkpoint)
    trainer.test(module, datamodule=datamodule, ckpt_path=tested, weights_only=True)
    metrics |= _numbers(trainer, "test/")
    if config.test_teacher and config.distill.teacher is not None:
        teacher = instantiate(config.distill.teacher).as_network()
        with without_loggers(trainer) as of_teacher:  # there, test/ is the student's
            changes = {"student": teacher, "teacher": None}
            if "ema_decay" in config.module:  # the teacher has no average
                changes["ema_decay"] = None
            trainer.test(instantiate(config.module, **changes), datamodule)
            found = _numbers(trainer, "test/").items()
            of_teacher |= {name.replace("test/", "teacher/", 1): value for name, value in found}
        metrics |= of_teacher
    if trainer.is_global_zero:
        rich.print(f"[bold]checkpoint[/bold] {tested or 'none was saved'}")
    return {"metrics": metrics, "checkpoint": tested}


@contextmanager
def _users_errors(checkpoint: str | None) -> Iterator[None]:
    """Tell what Lightning and torch find wrong with settings and checkpoint as the user's error."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        text = str(error)
        if checkpoint is not None and re.search("loading state_dict|loaded state dict", text):
            raise UserError(
                f"{checkpoint} does not fit this run's networks and optimizer: resume with the "
                f"settings that it was trained with ({text})"
            ) from error
        if "val_check_interval" in text:
            raise UserError(f"trainer.val_check_interval does not fit the data: {text}") from error
        raise


def _networks(module: LightningModule, config: DictConfig) -> dict[str, Any]:
    """How large the student is, who the teacher is, and how large that is, for the report."""
    if not isinstance(module, DistillModule):  # a config may name any LightningModule
        return {}
    networks = {"student_parameters": sum(x.numel() for x in module.student.parameters())}
    if module.teacher is None:
        return networks | {"teacher": None, "teacher_parameters": None}
    # Its file in conf/teacher, unless that loads one by name; and its weights, where they are one.
    settings = config.module.teacher
    settings = settings.get("teacher", settings)  # within a cached one
    name = settings.get("source") or HydraConfig.get().runtime.choices.get("teacher", "teacher")
    weights = settings.get("weights")
    size = sum(x.numel() for x in module.teacher.network.parameters())
    name = f"{name} ({Path(weights).name})" if isinstance(weights, str) else name
    return networks | {"teacher": name, "teacher_parameters": size}


def check(config: DictConfig) -> None:
    """What neither Hydra nor the objects of the config would refuse before training."""
    refuse_renamed_keys(config)
    check_number("seed", config.seed, int, least=0, most=2**32 - 1)
    check_number("num_classes", config.num_classes, int, least=1)
    for key in ("max_epochs", "max_steps"):
        if config.trainer.get(key) is not None:
            check_number(f"trainer.{key}", config.trainer[key], int, least=-1)
    if config.trainer.get("accumulate_grad_batches") is not None:
        accumulated = config.trainer.accumulate_grad_batches
        check_number("trainer.accumulate_grad_batches", accumulated, int, least=1)
    strategy = config.trainer.get("strategy")
    if OmegaConf.is_config(strategy) and strategy.get("stage") == 3:
        raise ValueError(
            "trainer.strategy.stage is 3, and DeepSpeed loads its checkpoints to train on, not for "
            "the test of a run: use stage 2, or trainer=fsdp2 to shard the parameters"
        )
    distill_teacher = config.distill.teacher
    if OmegaConf.is_config(distill_teacher) and distill_teacher.get("teacher", "") is None:
        raise ValueError(
            "no teacher is chosen, and these data come with none: add one, such as teacher=timm "
            "teacher.source=timm/resnet34.tv_in1k, or train the student alone by distill=none"
        )
    for key in ("test_teacher", "resume", "own_process", "print_config", "trust"):
        check_flag(key, config[key])
    choices = {
        "matmul_precision": ("highest", "high", "medium"),
        "test_checkpoint": ("last", "best"),
    }
    for key, known in choices.items():
        if config[key] not in known:
            raise ValueError(f"{key} is {config[key]!r}: use {' or '.join(known)}")


def _saved(saver: Any, which: str) -> str | None:
    """The path of the "last" or "best" checkpoint, if it was saved."""
    if which == "best":
        return str(getattr(saver, "best_model_path", "")) or None
    last = Path(getattr(saver, "dirpath", None) or "") / "last.ckpt"
    return str(last) if last.exists() else None


def _numbers(trainer: Trainer, prefix: str) -> dict[str, float]:
    metrics = trainer.callback_metrics.items()
    return {name: float(value) for name, value in metrics if name.startswith(prefix)}


@rank_zero_only
def _print_config(config: DictConfig) -> None:
    rich.print(rich.syntax.Syntax(OmegaConf.to_yaml(config), "yaml", background_color="default"))
