"""Correct or forget the paths in a checkpoint that are not in the folder of the run."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_dist.files.text import printable

# Keys of a callback's state under which there are paths. ModelCheckpoint of Lightning 2.6 has
# dirpath, best_model_path, kth_best_model_path, last_model_path and best_k_models.
_PATH_KEY = re.compile("(.+_)?(path|dir|dirpath|file|filename|filepath|folder|url)s?")
_PATHS_AS_KEYS = "best_k_models"


def follow_moved_folder(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Correct the paths in a checkpoint of the run's own folder, if the folder was moved.

    Without this correction, ModelCheckpoint of Lightning 2.6 would forget its best checkpoint, and
    overwrite it with a worse one.

    Args:
        trainer: the trainer, which loads the checkpoint.
        checkpoint: the loaded checkpoint, which is changed in place.
    """
    loaded = Path(str(trainer.ckpt_path)).parent.resolve()
    for saver in trainer.checkpoint_callbacks:
        state = (checkpoint.get("callbacks") or {}).get(saver.state_key)
        folder = getattr(saver, "dirpath", None)
        if not isinstance(state, dict) or not folder or loaded != Path(folder).resolve():
            continue
        before = state.get("dirpath")
        if not isinstance(before, str) or before == folder:
            continue

        def own(path: Any, before: str = before, folder: Any = folder) -> Any:
            moved = isinstance(path, str) and str(Path(path).parent) == before
            return str(Path(folder) / Path(path).name) if moved else path

        for key in ("best_model_path", "kth_best_model_path", "last_model_path"):
            if key in state:
                state[key] = own(state[key])
        if isinstance(state.get(_PATHS_AS_KEYS), dict):
            state[_PATHS_AS_KEYS] = {own(k): v for k, v in state[_PATHS_AS_KEYS].items()}
        state["dirpath"] = folder


def drop_foreign_paths(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Remove the states of callbacks that name a path outside of the run's checkpoint folders.

    ModelCheckpoint deletes the files and folders that its state names, when better checkpoints
    replace them. In a checkpoint from elsewhere, its state can name any file. A warning names each
    dropped state.

    Args:
        trainer: the trainer whose ModelCheckpoints have the folders.
        checkpoint: the loaded checkpoint, which is changed in place.

    Raises:
        ValueError: if a state of ModelCheckpoint has another form than Lightning's.
    """
    savers = [saver for saver in trainer.checkpoint_callbacks if isinstance(saver, ModelCheckpoint)]
    folders = [str(saver.dirpath) for saver in savers if saver.dirpath is not None]
    states = checkpoint.get("callbacks") or {}
    for key, state in list(states.items()):
        _refuse_other_types(state)
        foreign = [
            path for path, is_folder in _paths(state) if not _within(path, folders, is_folder)
        ]
        if foreign:
            del states[key]
            rank_zero_warn(
                f"the state of {printable(str(key), 100)} in the checkpoint is not used, because "
                f"it names {printable(str(foreign[0]), 200)}, which is not in the folder of this "
                "run's checkpoints: the best checkpoints before this one are forgotten"
            )


def _refuse_other_types(state: Mapping[str, Any]) -> None:
    """Raise an error if scores or paths in a state of ModelCheckpoint have another type.

    Raises:
        ValueError: if a score or a path has another type.
    """
    for name in ("best_model_path", "kth_best_model_path", "last_model_path", "dirpath"):
        if not isinstance(state.get(name), (str, bytes, type(None))):
            raise ValueError(f"{name} of ModelCheckpoint is a {type(state[name]).__name__}")
    best = state.get(_PATHS_AS_KEYS, {})
    scores = [state.get(name) for name in ("best_model_score", "current_score", "kth_value")]
    scores += best.values() if isinstance(best, Mapping) else [best]
    for score in scores:
        is_one = isinstance(score, Tensor) and score.numel() == 1
        if not is_one and not isinstance(score, (int, float, type(None))):
            raise ValueError(f"a score of ModelCheckpoint is a {type(score).__name__}")


def _paths(state: Any, key: str = "") -> Iterator[tuple[Any, bool]]:
    """Yield the paths in a callback's state, and whether each is the folder of the checkpoints."""
    if isinstance(state, Mapping):
        if key == _PATHS_AS_KEYS:
            yield from ((path, False) for path in state)
        for name, value in state.items():
            yield from _paths(value, str(name))
    elif isinstance(state, (list, tuple, set)):
        for value in state:
            yield from _paths(value, key)
    elif isinstance(state, (str, bytes)) and state and _PATH_KEY.fullmatch(key):
        yield state, key == "dirpath"


def _within(path: Any, folders: Sequence[str], is_folder: bool) -> bool:
    """Return whether a path is inside one of the folders; a folder may also be equal to one."""
    if not isinstance(path, str):
        return False
    if is_folder and path in folders:
        return True
    # The path is a URL, which can only be in a folder with a URL.
    if "://" in path or "::" in path:
        own = [folder.rstrip("/") + "/" for folder in folders if "://" in folder]
        return ".." not in path.split("/") and path.startswith(tuple(own))
    try:
        resolved = Path(path).resolve()
        local = [Path(folder).resolve() for folder in folders if "://" not in folder]
    # No file can have this name, or the links form a loop.
    except (OSError, ValueError, RuntimeError):
        return False
    return any(folder in resolved.parents or (is_folder and folder == resolved) for folder in local)
