"""``lightning-dist train``: fit and test a student, and write a result for the report."""

import logging
import math
import multiprocessing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import rich
import rich.syntax
import rich.table
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.types import RunMode
from hydra.utils import instantiate
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from hydra_plugins.lightning_dist_optuna.sweeper import OptunaSweeper
from lightning_dist.cli.errors import UserError, is_users
from lightning_dist.cli.hydra_app import hydra_app
from lightning_dist.cli.run.callbacks import (
    CheckMonitor,
    CompareStart,
    RecordError,
    SaveConfig,
    logged_metrics,
)
from lightning_dist.cli.run.channels import channel_errors
from lightning_dist.cli.run.folder_lock import locked, release_folders
from lightning_dist.cli.run.initial_weights import (
    without_initial_weights,
    without_torchvision_weights,
    without_weights_of_student,
)
from lightning_dist.cli.run.logger_hooks import LogConfig, closed_loggers, without_loggers
from lightning_dist.cli.run.names import names_and_sizes
from lightning_dist.cli.run.num_classes import fill_num_classes
from lightning_dist.cli.run.restoring import restoring_errors
from lightning_dist.cli.run.run import Run
from lightning_dist.cli.run.saved_config import to_save
from lightning_dist.cli.run.settings import check_settings
from lightning_dist.cli.sweep.own_process import end_with_parent, needs_own_process, run_apart
from lightning_dist.files.card_files import load_initial_weights
from lightning_dist.files.locking import FolderIsInUse
from lightning_dist.files.text import error_line
from lightning_dist.files.weights import weights_only_loads
from lightning_dist.module import DistillModule
from lightning_dist.training.cards import refuse_other_number

log = logging.getLogger(__name__)


def main() -> None:
    """Run the Hydra app on ``sys.argv``.

    Raises:
        UserError: if a worker process of the launcher died.
    """
    Plugins.instance().register(OptunaSweeper)  # Hydra 1.3 does not find it in an editable install
    try:
        hydra_app("train", _job)
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in ("joblib", "ray", "submitit"):
            raise
        raise UserError(
            f"the launcher lost a job, which was killed ({type(error).__name__}): with "
            "own_process=true the other jobs continue, and resume=true with the same "
            "hydra.sweep.dir runs the missing jobs"
        ) from error
    finally:
        release_folders()


def _job(config: DictConfig) -> float | None:
    """Run one job; in a sweep, log its error and return NaN, so that the sweep continues."""
    worker = multiprocessing.get_start_method(allow_none=True) == "loky"
    if worker:  # joblib's start method "loky" cannot start the workers of a data loader.
        multiprocessing.set_start_method(None, force=True)
    end_with_parent(worker)
    run = Run(config)
    if run.has_completed():
        log.info("%s is complete: nothing to do", run.folder)
        return run.monitored
    in_sweep = HydraConfig.get().mode == RunMode.MULTIRUN
    try:
        if in_sweep and needs_own_process(config):
            run_apart(run)
        else:
            with locked(run.folder) if in_sweep else nullcontext():
                _run_here(run)
    except Exception as error:
        # A job that may not write to its folder leaves no result there that counts as a failure.
        if not in_sweep or isinstance(error, FolderIsInUse):
            raise
        number = HydraConfig.get().job.num
        reason = error_line(str(error))
        log.error("job %s failed: %s", number, reason, exc_info=not is_users(error))
        return math.nan
    return run.monitored


def _run_here(run: Run) -> None:
    with run.recorded():
        fill_num_classes(run.config)
        check_settings(run.config)
        run.begin()
        run.result |= train(run)


def train(run: Run) -> dict[str, Any]:
    """Fit and test the module that the config of a run describes.

    Args:
        run: a run that has begun and whose config has been checked.

    Returns:
        A dict with ``metrics``, the last value of every ``val/`` and ``test/`` metric, and of every
        ``teacher/`` metric if ``test_teacher`` is true; ``checkpoint``, the path of the tested
        checkpoint or ``None``; ``test_set``, which is ``"validation"`` if the data has no other
        test set; and the names of data, student and teacher, and the sizes of both networks.

    Raises:
        UserError: if settings, data and checkpoint do not fit together.
    """
    config = run.config
    if config.print_config:
        _print_config(config)
    torch.set_float32_matmul_precision(config.matmul_precision)
    datamodule = instantiate(config.data)
    # Check this before the networks are built and loaded, which may take long.
    of_data = getattr(datamodule, "num_classes", None)
    refuse_other_number(config.num_classes, of_data, "the config")
    seed_everything(config.seed, workers=True)
    with weights_only_loads():  # torchvision would unpickle a file in the cache of its downloads
        module = _build_module(config, is_resumed=run.checkpoint is not None)
    saver = SaveConfig(to_save(config))
    trainer = _build_trainer(run, saver)
    # Seed again, because the teacher may have drawn random numbers: a student must train with the
    # same random numbers with and without a teacher.
    seed_everything(config.seed, workers=True)
    with closed_loggers(trainer):
        with channel_errors(module, getattr(datamodule, "in_channels", None)):
            _fit(trainer, module, datamodule, run.checkpoint)
        metrics = saver.validation | logged_metrics(trainer, "val/")
        if not metrics:  # The checkpoint is of another program, and no epoch is left to train.
            with without_loggers(trainer):
                trainer.validate(module, datamodule=datamodule, verbose=False)
            metrics = logged_metrics(trainer, "val/")
        tested = _checkpoint_to_test(trainer.checkpoint_callback, config.test_checkpoint)
        trainer.test(module, datamodule, ckpt_path=tested, weights_only=True, verbose=False)
        metrics |= logged_metrics(trainer, "test/")
        if config.test_teacher and isinstance(module, DistillModule) and module.teacher:
            metrics |= _test_teacher(trainer, module, datamodule)
        if trainer.is_global_zero:
            _print_metrics(metrics, datamodule)
            rich.print(f"[bold]checkpoint[/bold] {tested or 'none was saved'}")
    tests_on_validation = getattr(datamodule, "tests_on_validation", False)
    return {
        "metrics": metrics,
        "checkpoint": tested,
        "test_set": "validation" if tests_on_validation else "test",
        **names_and_sizes(module, config),
    }


def _student_and_file(config: DictConfig) -> tuple[Any, str | None]:
    """Return the config of the student, and the file of weights from which the student starts.

    Both are ``None`` if the config names a LightningModule without such a student.
    """
    settings = OmegaConf.select(config, "module.student")
    if not isinstance(settings, DictConfig):
        return None, None
    return without_weights_of_student(OmegaConf.to_container(settings, resolve=True))


def _build_module(config: DictConfig, is_resumed: bool) -> LightningModule:
    """Return the module; a resumed run needs no initial weights, because it loads its own."""
    student, file = _student_and_file(config)
    if student is None:
        return instantiate(config.module)
    if not (is_resumed or file):
        return instantiate(config.module, student=instantiate(student))
    # The teacher is built outside of this context, because it needs its weights.
    with without_torchvision_weights():
        network = instantiate(without_initial_weights(student))
    if file and not is_resumed:
        load_initial_weights(network, file)
    return instantiate(config.module, student=network)


def _build_trainer(run: Run, saver: SaveConfig) -> Trainer:
    config = run.config
    trainer = instantiate(
        config.trainer,
        callbacks=[
            *(instantiate(callback) for callback in config.callbacks.values() if callback),
            saver,
            CompareStart(None if run.checkpoint else _student_and_file(config)[1]),
            CheckMonitor(config.monitor),
            LogConfig(config),
            RecordError(run.folder),
        ],
        logger=[instantiate(logger) for logger in config.logger.values() if logger],
    )
    if config.trainer.get("sync_batchnorm") and trainer.strategy.root_device.type == "cpu":
        raise UserError(
            "trainer.sync_batchnorm=true needs GPUs, but this run is on the CPU: leave it out"
        )
    return trainer


def _fit(
    trainer: Trainer,
    module: LightningModule,
    datamodule: LightningDataModule,
    checkpoint: str | None,
) -> None:
    with _as_user_errors(checkpoint):
        trainer.fit(module, datamodule=datamodule, ckpt_path=checkpoint, weights_only=True)
    # With a limit of 0, Lightning 2.6 does not count the batches: num_training_batches is infinite.
    if trainer.num_training_batches == 0 or trainer.limit_train_batches == 0:
        raise UserError(
            "there is no training batch: give the data more images, a smaller "
            "data.global_batch_size where drop_last drops the only batch, or a "
            "trainer.limit_train_batches above 0"
        )


@contextmanager
def _as_user_errors(checkpoint: str | None) -> Iterator[None]:
    """Convert the errors of Lightning and torch about settings and checkpoint to a UserError."""
    try:
        with restoring_errors(checkpoint):
            yield
    except (RuntimeError, ValueError) as error:
        if "val_check_interval" in str(error):
            raise UserError(f"trainer.val_check_interval does not fit the data: {error}") from error
        raise


def _test_teacher(
    trainer: Trainer, module: DistillModule, datamodule: LightningDataModule
) -> dict[str, float]:
    """Test the teacher as the module distils it, then log and return its metrics as ``teacher/``.

    An error in this test is logged and not raised, because the student's results are complete.
    """
    student, evaluated = module.student, module.evaluated
    try:
        # The loggers already contain the student's metrics under the prefix test/.
        with without_loggers(trainer) as metrics:
            module.evaluate_only(module.teacher_network())
            trainer.test(module, datamodule, verbose=False)
            found = logged_metrics(trainer, "test/").items()
            metrics |= {name.replace("test/", "teacher/", 1): value for name, value in found}
        return metrics
    except Exception as error:
        log.error("the teacher cannot be tested (%s: %s)", type(error).__name__, error)
        return {}
    finally:
        module.student, module.evaluated = student, evaluated


def _print_metrics(metrics: Mapping[str, float], datamodule: Any) -> None:
    """Print one table with the student's and the teacher's metrics."""
    columns = {"student": "test/", "teacher": "teacher/"}
    columns = {k: v for k, v in columns.items() if any(x.startswith(v) for x in metrics)}
    same = getattr(datamodule, "tests_on_validation", False)
    table = rich.table.Table("metric", *columns, title="test on the validation set" * same or None)
    for name in (name for name in metrics if name.startswith("test/")):
        values = [metrics.get(name.replace("test/", prefix, 1)) for prefix in columns.values()]
        table.add_row(name, *("" if value is None else repr(value) for value in values))
    rich.print(table)


def _checkpoint_to_test(saver: Any, which: str) -> str | None:
    """Return the path of the "last" or the "best" checkpoint, or None if it was not saved."""
    if which == "best":
        return str(getattr(saver, "best_model_path", "")) or None
    last = Path(getattr(saver, "dirpath", None) or "") / "last.ckpt"
    return str(last) if last.exists() else None


@rank_zero_only
def _print_config(config: DictConfig) -> None:
    rich.print(rich.syntax.Syntax(OmegaConf.to_yaml(config), "yaml", background_color="default"))
