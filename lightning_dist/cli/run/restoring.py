"""Convert errors that Lightning raises for a damaged checkpoint to an error of one line."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from numbers import Number
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.connectors import checkpoint_connector
from torch import Tensor

from lightning_dist.cli.errors import UserError
from lightning_dist.files.text import error_line


@contextmanager
def restoring_errors(checkpoint: str | None) -> Iterator[None]:
    """Convert errors that a damaged or foreign checkpoint causes to one that names the file.

    Lightning, torch and the callbacks raise errors of any kind while they restore states of another
    form, and optimizers in the first step.

    Args:
        checkpoint: the path of the checkpoint, or None if the run starts anew.

    Raises:
        UserError: if the block raises an error while the checkpoint is restored, or in the code of
            an optimizer or a scheduler.
    """
    try:
        yield
    except Exception as error:
        part = _restored_part(error)
        memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if checkpoint is None or part is None or isinstance(error, UserError) or memory:
            raise
        raise UserError(
            f"{checkpoint} does not fit this run's networks and optimizer, or is damaged: resume "
            f"with the settings that it was trained with ({part}: {error_line(error)}; "
            "HYDRA_FULL_ERROR=1 shows where)"
        ) from error


def _restored_part(error: BaseException) -> str | None:
    """Return the part of a checkpoint to which an error belongs, or None."""
    parts, module = [], ""
    traceback = error.__traceback__
    while traceback is not None:
        frame = traceback.tb_frame
        module = frame.f_globals.get("__name__", "")
        if module == checkpoint_connector.__name__:
            parts.append(frame.f_code.co_name)
        traceback = traceback.tb_next
    # Here, `module` is the one that raised the error.
    if module.startswith(("torch.optim", "timm.optim", "timm.scheduler")):
        return "optimizers and schedulers"
    found = [part for part in parts if part.startswith(("restore_", "resume_"))]
    return found[-1].replace("restore_", "").replace("_", " ") if found else None


def refuse_other_types(trainer: Trainer, checkpoint: Mapping[str, Any]) -> None:
    """Refuse settings of optimizers and schedulers that have other types than this run's own.

    torch stores them without a check, and would fail in the first step or at the end of an epoch.

    Args:
        trainer: the trainer, with new optimizers and schedulers.
        checkpoint: the loaded checkpoint.

    Raises:
        UserError: if a setting has another type.
    """
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    for scheduler, saved in zip(schedulers, checkpoint["lr_schedulers"], strict=False):
        # The scheduler stores all entries as its attributes.
        hidden = [key for key in saved if callable(getattr(type(scheduler), str(key), None))]
        if hidden or not _alike(scheduler.state_dict(), saved):
            raise _other_types(f"the {type(scheduler).__name__} in lr_schedulers")
    for optimizer, saved in zip(trainer.optimizers, checkpoint["optimizer_states"], strict=False):
        settings = [{k: v for k, v in x.items() if k != "params"} for x in optimizer.param_groups]
        if not _alike(settings, saved.get("param_groups")):
            raise _other_types(f"the {type(optimizer).__name__} in optimizer_states")


def _other_types(what: str) -> UserError:
    return UserError(
        f"the checkpoint is damaged: the settings of {what} have other types than this run's"
    )


def _alike(own: Any, saved: Any) -> bool:
    """Return whether a saved value and all values in it have the types of the run's own value."""
    if isinstance(own, Mapping):
        if not isinstance(saved, Mapping):
            return False
        kinds = {type(key) for key in own}
        return all(type(key) in kinds for key in saved if kinds) and all(
            _alike(own[key], saved[key]) for key in own.keys() & saved.keys()
        )
    if isinstance(own, (list, tuple)):
        if not isinstance(saved, (list, tuple)):
            return False
        return all(_alike(own[0], value) for value in saved if own)
    if _is_number(own):
        return _is_number(saved)
    return not isinstance(own, str) or isinstance(saved, str)


def _is_number(value: Any) -> bool:
    return isinstance(value, Number) or (isinstance(value, Tensor) and value.numel() == 1)
