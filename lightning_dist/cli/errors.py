"""Print an error that the user can fix as one line, and a bug with its traceback."""

import errno
import importlib.util
import os
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from lightning_dist.cli.renamed_keys import with_new_name
from lightning_dist.files.text import error_line

FULL_ERROR = "HYDRA_FULL_ERROR"  # set to 1 by a user who wants tracebacks


class UserError(Exception):
    """An error that the user can fix; its message is printed as one line."""


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Exit with one line if the block raises an error that the user can fix.

    If the user has set ``HYDRA_FULL_ERROR=1``, every error is raised, with its traceback.

    Raises:
        SystemExit: with status 1, if the block raised an error that the user can fix.
    """
    try:
        yield
    except Exception as error:
        if os.environ.get(FULL_ERROR) == "1" or not is_users(error):
            raise
        text = error_of_worker(error) or str(error)
        message = with_new_name(text.partition("Config search path")[0])
        fail(with_quotes(message, getattr(error, "override", None)))


def is_users(error: Exception) -> bool:
    """Return whether the user can fix what an error reports, so that its message is enough.

    Args:
        error: an error that the code of a verb raised.
    """
    if isinstance(error, (*_kinds_of_libraries(), FileNotFoundError, UserError)):
        return True
    if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
        return True
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    raiser = traceback.tb_frame.f_globals.get("__name__", "") if traceback else ""
    if raiser.partition(".")[0] in (
        "hydra",
        "omegaconf",
        "antlr4",
    ):  # these packages parse the command line
        return True
    of_package = raiser.startswith("lightning_dist.") and isinstance(error, _PACKAGE_ERRORS)
    return of_package or error_of_worker(error) is not None


def error_of_worker(error: Exception) -> str | None:
    """Return the message of an error that the user can fix, from a worker of a data loader.

    This package raised it, or torch because the shared memory is full. torch raises such an error
    again in the main process, with the worker's traceback as its message. The result is ``None``
    for every other error.

    Args:
        error: an error that the code of a verb raised.
    """
    text = str(error)
    files = re.findall(r'File "([^"]+)", line', text)
    if "in DataLoader worker process" not in text or not files:
        return None
    message = text.rpartition(f"\n{type(error).__name__}: ")[2].strip()
    if os.path.join("lightning_dist", "") in files[-1]:
        return message if isinstance(error, _PACKAGE_ERRORS) else None
    from lightning_dist.data.shared_memory import with_advice  # This imports torch, which is slow.

    advised = with_advice(message)
    return None if advised == message else advised


def fail(message: str, status: int = 1) -> NoReturn:
    """Print an error on one line and exit.

    Args:
        message: the message, which may have several lines. It may contain names from a file:
            control characters are escaped, and the middle of a long message is left out.
        status: the exit status; 2 means that the command line cannot be parsed.

    Raises:
        SystemExit: always.
    """
    print(f"lightning-dist: error: {with_extra(error_line(message))}", file=sys.stderr)
    sys.exit(status)


def with_quotes(message: str, override: str | None) -> str:
    """Add the quoted form of an argument that Hydra's grammar does not accept.

    Args:
        message: the message.
        override: the argument, which Hydra's error contains; ``None`` for every other error.

    Example:
        >>> print(with_quotes("mismatched input", "ckpt=epoch=0.ckpt"))
        Hydra cannot read ckpt=epoch=0.ckpt (mismatched input): quote it: 'ckpt="epoch=0.ckpt"'
    """
    key, _, value = (override or "").partition("=")
    if not key or not value or value[0] in "[{$":  # a list that is not closed needs no quotes
        return message
    value = os.path.expanduser(value).replace('"', '\\"')
    quoted = shlex.quote(f'{key}="{value}"')
    reason = message.partition("See https")[0].strip().splitlines()
    return f"Hydra cannot read {override} ({reason[0]}): quote it: {quoted}"


def with_extra(message: str) -> str:
    """Add the command that installs an optional package to an error that names the package.

    Args:
        message: the message, which is returned unchanged if it names no optional package, or only
            one that is installed.
    """
    for extra, (named, module) in _EXTRAS.items():
        if named in message and importlib.util.find_spec(module) is None:
            return f"{message} (to install the package: pip install 'lightning-dist[{extra}]')"
    return message


# Library errors that report wrong input of the user, each with the module that defines it.
_LIBRARY_ERRORS = {
    "HydraException": "hydra.errors",
    "MisconfigurationException": "lightning.pytorch.utilities.exceptions",
    "OmegaConfBaseException": "omegaconf.errors",
}


def _kinds_of_libraries() -> tuple[type[Exception], ...]:
    """Return the classes of library errors; a module that is not loaded cannot have raised one."""
    return tuple(
        getattr(sys.modules[module], name)
        for name, module in _LIBRARY_ERRORS.items()
        if module in sys.modules
    )


# The kinds of errors with which this package reports what the user can fix.
_PACKAGE_ERRORS = (ValueError, OSError, FloatingPointError, ImportError)

# The user can fix a full disk, a missing permission or a file in the place of a folder, whichever
# code raises the error.
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

# Each extra of this package, with the word by which an error is recognised, and its module.
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
