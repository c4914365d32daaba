"""Lock the folder of a run or a sweep, before Hydra writes to it."""

from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig

from lightning_dist.cli.errors import fail
from lightning_dist.files.locking import FolderLock

_held = ExitStack()


class LockFolder(Callback):
    """A Hydra callback that refuses a folder in which another process trains."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        _hold(config, config.hydra.run.dir)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        _hold(config, config.hydra.sweep.dir)


def release_folders() -> None:
    """Release all folders that :class:`LockFolder` has locked."""
    _held.close()


def locked(folder: Path) -> AbstractContextManager:
    """Return a context manager that locks a folder, in the first process of a run only.

    Args:
        folder: the folder of the run.
    """
    rank = rank_zero_only.rank  # type: ignore[attr-defined]
    return FolderLock(folder) if rank == 0 else nullcontext()


def _hold(config: DictConfig, folder: str) -> None:
    """Lock a folder of ``train`` until :func:`release_folders` is called."""
    if config.hydra.job.config_name != "train":
        return
    try:
        _held.enter_context(locked(Path(folder)))
    except OSError as error:  # Hydra 1.3 would log a warning and continue.
        fail(str(error))
