"""What a run leaves in its folder: its result, and a checkpoint to go on from."""

import json
import logging
import shlex
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig

from lightning_dist.cli import UserError
from lightning_dist.cli.saved import CONFIG_KEY, to_save
from lightning_dist.weights import read_checkpoint

log = logging.getLogger(__name__)

UNFINISHED = "has not ended: it was killed, or still runs"


def completed(config: DictConfig) -> dict[str, Any] | None:
    """The result in this run's folder, if it has completed.

    Raises:
        UserError: if it is another run's.
    """
    path = Path(HydraConfig.get().runtime.output_dir) / "result.json"
    if not path.is_file():
        return None
    result = json.loads(path.read_text())
    if result["overrides"] != new_result(config)["overrides"]:
        raise UserError(
            f"{path.parent} holds another run ({' '.join(result['overrides'])}): resume with the "
            "overrides that it was started with, or choose another folder "
            "or choose another hydra.sweep.dir and merge: lightning-dist report OLD NEW"
        )
    return result if result["status"] == "completed" else None


def resume_from(config: DictConfig) -> str | None:
    """The checkpoint with which a run begins: its own, or the one that the user names.

    Raises:
        UserError: if its own is another run's.
        ValueError, FileNotFoundError: if the other is no checkpoint; they name it and the mend.
    """
    named = config.ckpt_path
    if config.resume or named == "last":
        own = _last_checkpoint(config)
        if own is not None or named == "last":
            return own
    if named and not Path(named).is_dir():  # as DeepSpeed's is
        read_checkpoint(named)
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
    if path.is_dir():  # DeepSpeed's, which holds pieces and is its own to read
        return str(path)
    saved = read_checkpoint(path).get(CONFIG_KEY, {})
    if any(saved.get(key) != value for key, value in to_save(config).items()):
        raise UserError(
            f"{path} is of a run with other data, networks or settings: resume with the overrides "
            "that it was started with, or choose another folder"
        )
    return str(path)


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


@rank_zero_only
def write_result(path: Path, result: dict[str, Any]) -> None:
    text = json.dumps({"metrics": {}, "checkpoint": None, **result}, indent=2) + "\n"
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(path)
