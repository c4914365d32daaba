"""What a run leaves in its folder: its result, and a checkpoint to go on from."""

import json
import logging
import shlex
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig

from lightning_dist.checks import check_flag
from lightning_dist.cli import UserError
from lightning_dist.cli.run.saved_config import CONFIG_KEY, to_save
from lightning_dist.weights import read_checkpoint

log = logging.getLogger(__name__)

_ERROR = "error.txt"
UNFINISHED = "has not ended: it was killed, or still runs"


def completed(config: DictConfig) -> dict[str, Any] | None:
    """The result in this run's folder, if it has completed.

    Raises:
        UserError: if it is another run's.
        ValueError: if ``resume`` is neither true nor false.
    """
    check_flag("resume", config.resume)
    path = Path(HydraConfig.get().runtime.output_dir) / "result.json"
    result = _read_result(path)
    if result is None:
        return None
    if result["overrides"] != new_result(config)["overrides"]:
        raise UserError(
            f"{path.parent} holds another run ({' '.join(map(str, result['overrides']))}): resume "
            "with the overrides that it was started with, or choose another folder (two sweeps are "
            "merged by lightning-dist report DIR DIR)"
        )
    return result if result["status"] == "completed" else None


def is_completed(path: Path) -> bool:
    """Whether a result is that of a run, this one or another, that has completed."""
    result = _read_result(path)
    return result is not None and result["status"] == "completed"


def _read_result(path: Path) -> dict[str, Any] | None:
    """A result, or None where there is none that can be read: the run then begins again."""
    if not path.is_file():
        return None
    try:
        result = json.loads(path.read_text())
        known = isinstance(result["overrides"], list) and isinstance(result["metrics"], dict)
        if known and isinstance(result["status"], str):
            return result
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    log.warning("%s is damaged: it counts as none", path)
    return None


def resume_from(config: DictConfig) -> str | None:
    """The checkpoint with which a run begins: its own, or the one that the user names.

    Raises:
        UserError: if its own is another run's, or if it is nothing that a run can begin with.
        ValueError, FileNotFoundError: if the other is no checkpoint; they name it and the mend.
    """
    named = config.ckpt_path
    if config.resume or named == "last":
        own = _last_checkpoint(config)
        if own is not None or named == "last":
            return own
    if named is not None:
        named = str(named)
        _read_resumable(named, config)
    return named


def _last_checkpoint(config: DictConfig) -> str | None:
    """Where a run that was interrupted continues, if it got so far.

    Raises:
        UserError: if the checkpoint is another run's.
    """
    path = Path(HydraConfig.get().runtime.output_dir) / "checkpoints" / "last.ckpt"
    if not path.exists():
        log.warning("there is nothing to resume in %s: the run begins", path.parents[1])
        return None
    checkpoint = _read_resumable(str(path), config)
    if checkpoint is None:
        return str(path)
    saved = checkpoint.get(CONFIG_KEY)
    saved = saved if isinstance(saved, Mapping) else {}
    if any(saved.get(key) != value for key, value in to_save(config).items()):
        raise UserError(
            f"{path} is of a run with other data, networks or settings: resume with the overrides "
            "that it was started with, or choose another folder"
        )
    return str(path)


# What Lightning reads of a checkpoint without asking whether it is there.
_PARTS: dict[str, type] = {
    "pytorch-lightning_version": str,
    "state_dict": Mapping,
    "epoch": int,
    "global_step": int,
    "loops": Mapping,
    "callbacks": Mapping,
    "optimizer_states": list,
    "lr_schedulers": list,
}


def _read_resumable(path: str, config: DictConfig) -> dict[str, Any] | None:
    """The checkpoint, or None for a folder, which its strategy alone can read.

    A folder's pieces are pickles, which run what they hold while they are read.

    Raises:
        UserError: if it is a folder without ``trust=true``, or no whole checkpoint.
    """
    if Path(path).expanduser().is_dir():
        if not config.trust:
            raise UserError(
                f"{path} is a folder, whose pieces can run code when they are read: if you trust "
                "it, add trust=true; otherwise give a checkpoint that is one file"
            )
        return None
    checkpoint = read_checkpoint(path)
    missing = [key for key, kind in _PARTS.items() if not isinstance(checkpoint.get(key), kind)]
    if not missing and not checkpoint["loops"].get("fit_loop"):
        missing = ["loops"]
    if missing:
        raise UserError(
            f"{path} is no checkpoint that a run can go on from, it has no {', '.join(missing)}: "
            "give one that 'lightning-dist train' has written; weights alone are for "
            "teacher.weights"
        )
    return checkpoint


def new_result(config: DictConfig) -> dict[str, Any]:
    """The result of a run that has not completed."""
    overrides = [str(override) for override in HydraConfig.get().overrides.task]
    overrides = [override for override in overrides if not override.startswith("resume=")]
    # Only a search has pruning: the command of one of its trials runs alone.
    alone = [x for x in overrides if not x.lstrip("+~").startswith("callbacks.pruning")]
    return {
        "status": "failed",
        "error": UNFINISHED,
        "overrides": overrides,
        "command": shlex.join(["lightning-dist", "train", *alone, *config_folders()]),
        "metric": config.monitor.replace("val/", "test/", 1),
        "seconds": 0.0,
    }


def config_folders() -> list[str]:
    """The options of the command line that name folders of configs."""
    sources = HydraConfig.get().runtime.config_sources
    return [f"--config-dir={x.path}" for x in sources if x.provider == "command-line"]


class RecordError(Callback):
    """Keep the first error among a run's processes: what the others raise then follows from it.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / _ERROR

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        # A file that is there is another process's; a full disk is told by the exception itself.
        with suppress(OSError):
            if trainer.world_size > 1:
                with open(self.path, "x") as file:
                    file.write(f"{type(exception).__name__}: {exception}")


def first_error(folder: Path) -> str | None:
    """The first error among the processes of a run, where there were several."""
    path = folder / _ERROR
    return path.read_text() if path.is_file() else None


@rank_zero_only
def forget_error(folder: Path) -> None:
    """Before a run begins."""
    (folder / _ERROR).unlink(missing_ok=True)


@rank_zero_only
def write_result(path: Path, result: dict[str, Any]) -> None:
    text = json.dumps({"metrics": {}, "checkpoint": None, **result}, indent=2) + "\n"
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(path)
