"""Find and check the checkpoint from which a run continues."""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from lightning_dist.cli.errors import UserError
from lightning_dist.cli.run.callbacks import VALIDATION_KEY
from lightning_dist.cli.run.saved_config import config_in, to_save
from lightning_dist.files.weights import read_checkpoint

log = logging.getLogger(__name__)


def checkpoint_to_begin_with(config: DictConfig, folder: Path) -> str | None:
    """Return the path of the checkpoint from which a run continues, or None if it starts anew.

    Args:
        config: the config ``train``. With ``resume=true`` or ``ckpt_path=last`` the run continues
            from the last checkpoint in its folder, otherwise from the file ``ckpt_path``.
        folder: the folder of the run.

    Raises:
        UserError: if another run wrote the checkpoint in the folder, or if no run can continue
            from the checkpoint.
        ValueError, FileNotFoundError: if ``ckpt_path`` is not a checkpoint.
    """
    named = config.ckpt_path
    if config.resume or named == "last":
        own = _last_checkpoint(config, folder)
        if own is not None or named == "last":
            return own
    if named is not None:
        named = str(named)
        _read_resumable(named, config.trust)
    return named


def _last_checkpoint(config: DictConfig, folder: Path) -> str | None:
    """Return the path of the last checkpoint in the folder of a run, or None if there is none.

    Raises:
        UserError: if another run wrote the checkpoint.
    """
    path = folder / "checkpoints" / "last.ckpt"
    if not path.exists():
        log.warning("there is nothing to resume in %s: the run begins", folder)
        return None
    checkpoint = _read_resumable(str(path), config.trust)
    if checkpoint is None:
        return str(path)
    saved = config_in(checkpoint)
    saved = saved if isinstance(saved, Mapping) else {}
    if any(saved.get(key) != value for key, value in to_save(config).items()):
        raise UserError(
            f"{path} is from a run with other data, networks or settings: resume with the "
            "overrides of that run, or choose another folder"
        )
    return str(path)


_MOST_CALLBACKS = 100  # Lightning warns of each callback that this run lacks.
# The entries of a checkpoint that Lightning 2.6 reads without a check.
_ENTRIES: dict[str, type] = {
    "pytorch-lightning_version": str,
    "state_dict": Mapping,
    "epoch": int,
    "global_step": int,
    "loops": Mapping,
    "callbacks": Mapping,
    "optimizer_states": list,
    "lr_schedulers": list,
}


def _read_resumable(path: str, trust: bool) -> dict[str, Any] | None:
    """Return the checkpoint, or None if it is a folder, which only the strategy can read.

    The files in such a folder are pickles, and a pickle can run any code when it is loaded.

    Raises:
        UserError: if it is a folder and ``trust`` is false, or if an entry is missing.
    """
    if Path(path).expanduser().is_dir():
        if not trust:
            raise UserError(
                f"{path} is a folder of pickles, which can run code when they are loaded: if you "
                "trust it, add trust=true; otherwise give a checkpoint that is one file"
            )
        return None
    checkpoint = read_checkpoint(path)
    _check_entries(checkpoint, path)
    return checkpoint


def _check_entries(checkpoint: Mapping[str, Any], path: str) -> None:
    """Refuse a checkpoint with entries that Lightning cannot read.

    Raises:
        UserError: if an entry is missing or has another form; the message names it.
    """
    missing = [key for key, kind in _ENTRIES.items() if not isinstance(checkpoint.get(key), kind)]
    fit_loop = None if missing else checkpoint["loops"].get("fit_loop")
    if not missing and not (isinstance(fit_loop, Mapping) and fit_loop):
        missing = ["loops"]
    if missing:
        raise UserError(
            f"{path} is no checkpoint that a run can continue from, because it has no "
            f"{', '.join(missing)}: give a checkpoint of 'lightning-dist train'; use "
            "teacher.weights for a file with weights only"
        )
    states = checkpoint["callbacks"]
    groups = checkpoint["optimizer_states"]
    broken = {
        "pytorch-lightning_version": not _is_version(checkpoint["pytorch-lightning_version"]),
        "callbacks": len(states) > _MOST_CALLBACKS
        or not all(_is_name(key) and isinstance(states[key], Mapping) for key in states),
        "optimizer_states": not all(isinstance(state, Mapping) for state in groups),
        "lr_schedulers": not all(isinstance(x, Mapping) for x in checkpoint["lr_schedulers"]),
        "loops": not _are_counters(checkpoint["loops"]),
        VALIDATION_KEY: not _are_numbers(checkpoint.get(VALIDATION_KEY, {})),
    }
    if found := [key for key, is_broken in broken.items() if is_broken]:
        raise UserError(
            f"{path} is damaged, because its {' and '.join(found)} have another form than "
            "Lightning's: give a checkpoint of 'lightning-dist train'"
        )


def _is_version(text: str) -> bool:
    return len(text) < 100 and re.fullmatch(r"\d+\.\d+\.\d+[\w.+-]*", text, re.ASCII) is not None


def _is_name(key: Any) -> bool:
    return isinstance(key, str) and len(key) < 1000 and key.isprintable()


def _are_numbers(metrics: Any) -> bool:
    """Return whether a value is the metrics of a validation, which the run's result contains."""
    return isinstance(metrics, Mapping) and all(
        _is_name(name) and name.startswith("val/") and isinstance(value, float)
        for name, value in metrics.items()
    )


def _are_counters(state: Any, key: Any = None) -> bool:
    """Return whether all counters in the state of Lightning's loops are whole numbers."""
    if key == "_batches_that_stepped":
        return type(state) is int and state >= 0
    if not isinstance(state, Mapping):
        return key not in ("total", "current")
    if key in ("total", "current"):
        names = {"ready", "started", "processed", "completed"}
        return state.keys() <= names and all(type(x) is int and x >= 0 for x in state.values())
    return all(_are_counters(value, name) for name, value in state.items())
