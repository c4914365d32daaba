"""Errors of the command: one line for what the user can fix, a traceback for a bug."""

import errno
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from lightning_dist.cli.renamed_keys import with_new_name

FULL_ERROR = "HYDRA_FULL_ERROR"  # set to 1 by a user who wants tracebacks


class UserError(Exception):
    """An error in what the user asked for; its message is printed as one line."""


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Exit with one line where the block raises an error of the user's.

    Every error keeps its traceback where the user has set ``HYDRA_FULL_ERROR=1``.

    Raises:
        SystemExit: with status 1, in place of an error of the user's.
    """
    try:
        yield
    except Exception as error:
        if os.environ.get(FULL_ERROR) == "1" or not is_users(error):
            raise
        fail(with_new_name(str(error).partition("Config search path")[0]))


def is_users(error: Exception) -> bool:
    """Return whether the user can fix what an error reports, so that its message is enough.

    Args:
        error: raised anywhere below a verb.
    """
    if isinstance(error, (*_kinds_of_libraries(), FileNotFoundError, UserError)):
        return True
    if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
        return True
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    raiser = traceback.tb_frame.f_globals.get("__name__", "") if traceback else ""
    if raiser.partition(".")[0] in ("hydra", "omegaconf", "antlr4"):  # they read the command line
        return True
    kinds = (ValueError, OSError, FloatingPointError, ImportError)
    return isinstance(error, kinds) and raiser.startswith("lightning_dist.")


def fail(message: str, status: int = 1) -> NoReturn:
    """Print an error on one line and exit.

    Args:
        message: of any number of lines.
        status: of the process; 2 for a command line that cannot be read.

    Raises:
        SystemExit: always.
    """
    print(f"lightning-dist: error: {with_extra(' '.join(message.split()))}", file=sys.stderr)
    sys.exit(status)


def with_extra(message: str) -> str:
    """Return an error message, with the command that installs the optional package it names.

    Args:
        message: stays as it is where it names no optional package, or one that is installed.
    """
    for extra, (named, module) in _EXTRAS.items():
        if named in message and importlib.util.find_spec(module) is None:
            return f"{message} (to install what it needs: pip install 'lightning-dist[{extra}]')"
    return message


# Errors of libraries that report what the user gave, each with the module that defines it.
_LIBRARY_ERRORS = {
    "HydraException": "hydra.errors",
    "MisconfigurationException": "lightning.pytorch.utilities.exceptions",
    "OmegaConfBaseException": "omegaconf.errors",
}


def _kinds_of_libraries() -> tuple[type[Exception], ...]:
    """Return the classes of library errors; one whose module is not loaded raised nothing."""
    return tuple(
        getattr(sys.modules[module], name)
        for name, module in _LIBRARY_ERRORS.items()
        if module in sys.modules
    )


# No space, no permission, a file in the place of a folder: the user's wherever they are raised.
_DISK_ERRORS = (
    errno.EACCES,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EISDIR,
    errno.ENOSPC,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
)

# Each extra of this package: the word in an error by which to recognise it, and its module.
_EXTRAS = {
    "deepspeed": ("DeepSpeed", "deepspeed"),
    "joblib": ("hydra/launcher/joblib", "hydra_plugins.hydra_joblib_launcher"),
    "mlflow": ("MLFlowLogger", "mlflow"),
    "optuna": ("optuna", "optuna"),
    "ray": ("hydra/launcher/ray", "hydra_plugins.hydra_ray_launcher"),
    "submitit": ("hydra/launcher/submitit", "hydra_plugins.hydra_submitit_launcher"),
    "tensorboard": ("TensorBoardLogger", "tensorboard"),
    "wandb": ("WandbLogger", "wandb"),
}
