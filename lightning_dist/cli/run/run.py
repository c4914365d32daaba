"""`Run`: one run of ``lightning-dist train``, from the composed config to the written result."""

import logging
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from lightning_dist.checks import check_flag
from lightning_dist.cli.errors import UserError, with_extra
from lightning_dist.cli.run.result import (
    UNFINISHED,
    first_error,
    forget_error,
    read_result,
    write_result,
)
from lightning_dist.cli.run.resuming import checkpoint_to_begin_with

log = logging.getLogger(__name__)


class Run:
    """A run: its config, its folder, the checkpoint that it goes on from, and its result.

    Args:
        config: the config ``train`` of a Hydra job, composed.

    Attributes:
        config: the same.
        folder: the output folder of the job.
        checkpoint: path of the checkpoint that the run goes on from; None before :meth:`begin`,
            and for a run that starts anew.
        result: plain data, written to the folder as ``result.json``.
    """

    def __init__(self, config: DictConfig) -> None:
        self.config = config
        self.folder = Path(HydraConfig.get().runtime.output_dir)
        self.checkpoint: str | None = None
        self.result: dict[str, Any] = _unfinished_result(config)
        self._has_begun = False

    @property
    def monitored(self) -> float | None:
        """The value of the metric ``monitor``, which a sweeper compares; None without a result."""
        return self.result["metrics"].get(self.config.monitor)

    def has_completed(self) -> bool:
        """Return whether ``resume=true`` finds this run completed; :attr:`result` is then that.

        Raises:
            UserError: if the folder holds another run.
            ValueError: if ``resume`` is neither true nor false.
        """
        check_flag("resume", self.config.resume)
        found = read_result(self.folder) if self.config.resume else None
        if found is None:
            return False
        if found["overrides"] != self.result["overrides"]:
            raise UserError(
                f"{self.folder} holds another run ({' '.join(map(str, found['overrides']))}): "
                "resume with the overrides that it was started with, or choose another folder (two "
                "sweeps are merged by lightning-dist report DIR DIR)"
            )
        if found["status"] != "completed":
            return False
        self.result = found
        return True

    def begin(self) -> None:
        """Find the checkpoint to go on from, and mark the run as begun in its folder.

        Raises:
            UserError, ValueError, FileNotFoundError: if there is no going on from the checkpoint.
        """
        self.checkpoint = checkpoint_to_begin_with(self.config, self.folder)
        self._has_begun = True
        forget_error(self.folder)
        write_result(self.folder, self.result)

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Write the result when the block ends: completed, or failed with the reason.

        The result of a completed run stays where the block ends before :meth:`begin`.
        """
        start = time.monotonic()
        try:
            yield
            self.result |= {"status": "completed", "error": None}
        except BaseException as error:
            reason = first_error(self.folder) or f"{type(error).__name__}: {error}"
            self.result["error"] = with_extra(reason)
            raise
        finally:
            self.result["seconds"] = round(time.monotonic() - start, 2)
            try:
                if self._has_begun or not _is_completed(self.folder):
                    write_result(self.folder, self.result)
            except OSError as error:  # logged, for what ended the run is the error to raise
                log.error("cannot write the result in %s: %s", self.folder, error)


def config_folders() -> list[str]:
    """Return the options of the command line that name folders of configs."""
    sources = HydraConfig.get().runtime.config_sources
    return [f"--config-dir={x.path}" for x in sources if x.provider == "command-line"]


def _unfinished_result(config: DictConfig) -> dict[str, Any]:
    """Return the result of a run that has not ended."""
    overrides = [str(override) for override in HydraConfig.get().overrides.task]
    overrides = [override for override in overrides if not override.startswith("resume=")]
    # The command runs the job alone, where there is no pruning: only a search has it.
    alone = [x for x in overrides if not x.lstrip("+~").startswith("callbacks.pruning")]
    return {
        "metrics": {},
        "checkpoint": None,
        "status": "failed",
        "error": UNFINISHED,
        "overrides": overrides,
        "command": shlex.join(["lightning-dist", "train", *alone, *config_folders()]),
        "metric": str(config.monitor).replace("val/", "test/", 1),
        "seconds": 0.0,
    }


def _is_completed(folder: Path) -> bool:
    """Return whether the folder holds the result of a run, this or another, that has completed."""
    result = read_result(folder)
    return result is not None and result["status"] == "completed"
