"""`Run`: one run of ``lightning-dist train``, from the composed config to the written result."""

import logging
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

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
from lightning_dist.files.text import error_line

log = logging.getLogger(__name__)

_DISPLAY = (
    *("print_config", "own_process", "trust", "callbacks.progress"),
    *("trainer.enable_progress_bar", "trainer.enable_model_summary"),
)


class Run:
    """A run with its config, its folder, the checkpoint to continue from, and its result.

    Args:
        config: the composed config ``train`` of a Hydra job.

    Attributes:
        config: the given config.
        folder: the output folder of the job.
        checkpoint: the path of the checkpoint from which the run continues; None before
            :meth:`begin`, and if the run starts anew.
        result: a dict of plain data, which is written to the folder as ``result.json``.
    """

    def __init__(self, config: DictConfig) -> None:
        self.config = config
        self.folder = Path(HydraConfig.get().runtime.output_dir)
        self.checkpoint: str | None = None
        self.result: dict[str, Any] = _unfinished_result(config)
        self._has_begun = False

    @property
    def monitored(self) -> float | None:
        """The value of the metric ``monitor``, for sweepers; None if the run did not complete."""
        return self.result["metrics"].get(self.config.monitor)

    def has_completed(self) -> bool:
        """Return whether ``resume`` is true and this run has completed; then load :attr:`result`.

        Raises:
            UserError: if the folder contains another run.
            ValueError: if ``resume`` is neither true nor false.
        """
        check_flag("resume", self.config.resume)
        found = read_result(self.folder) if self.config.resume else None
        if found is None:
            return False
        if _settings(found["overrides"]) != _settings(self.result["overrides"]):
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
        """Find the checkpoint to continue from, and write an unfinished result to the folder.

        Raises:
            UserError, ValueError, FileNotFoundError: if no run can continue from the checkpoint.
        """
        self.checkpoint = checkpoint_to_begin_with(self.config, self.folder)
        self._has_begun = True
        forget_error(self.folder)
        write_result(self.folder, self.result)

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Write the result when the block ends, as completed or as failed with the reason.

        If the block ends before :meth:`begin`, the result of a completed run is not replaced.

        Raises:
            OSError: if the result of a completed run cannot be written.
        """
        start = time.monotonic()
        try:
            yield
        except BaseException as error:
            reason = first_error(self.folder) or f"{type(error).__name__}: {error}"
            self.result["error"] = with_extra(error_line(reason))
            try:
                if self._has_begun or not _is_completed(self.folder):
                    self._write_result(start)
            except OSError as unwritten:  # The error of the run is raised.
                log.error("cannot write the result in %s: %s", self.folder, unwritten)
            raise
        self.result |= {"status": "completed", "error": None}
        self._write_result(start)

    def _write_result(self, start: float) -> None:
        self.result["seconds"] = round(time.monotonic() - start, 2)
        write_result(self.folder, self.result)


def config_folders() -> list[str]:
    """Return the ``--config-dir`` options of the command line."""
    sources = HydraConfig.get().runtime.config_sources
    return [f"--config-dir={x.path}" for x in sources if x.provider == "command-line"]


def _unfinished_result(config: DictConfig) -> dict[str, Any]:
    """Return the result of a run that has not ended."""
    overrides = [str(override) for override in HydraConfig.get().overrides.task]
    overrides = [override for override in overrides if not override.startswith("resume=")]
    # The command runs the job outside the search, where there is no pruning to configure.
    alone = [x for x in overrides if not x.lstrip("+~").startswith("callbacks.pruning")]
    return {
        "metrics": {},
        "checkpoint": None,
        "status": "failed",
        "error": UNFINISHED,
        "overrides": overrides,
        "command": shlex.join(["lightning-dist", "train", *alone, *config_folders()]),
        "metric": str(config.monitor).replace("val/", "test/", 1),
        "tuned": _tuned(config),
        "seconds": 0.0,
    }


def _tuned(config: DictConfig) -> str | None:
    """Return the values of the tuned settings as a short text, or None if there are none."""
    keys = [str(key) for key in config.get("tuned_keys") or []]
    names = [key.rpartition(".")[2] for key in keys]
    if len(set(names)) < len(names):
        names = keys
    values = [OmegaConf.select(config, key) for key in keys]
    shown = [f"{x:.3g}" if isinstance(x, float) else str(x) for x in values]
    return ", ".join(map(" ".join, zip(names, shown, strict=True))) or None


def _settings(overrides: Sequence[Any]) -> list[str]:
    """Return the overrides that change the run, without those that change its output only."""
    return [x for x in map(str, overrides) if x.partition("=")[0].lstrip("+~") not in _DISPLAY]


def _is_completed(folder: Path) -> bool:
    """Return whether the folder contains the result of a completed run, this or another one."""
    result = read_result(folder)
    return result is not None and result["status"] == "completed"
