"""Read and write the result and the first error of a run in its folder."""

import json
import logging
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

from lightning_dist.files.text import MOST_SHOWN, error_line, read_bounded
from lightning_dist.files.writing import naming, replaced_together
from lightning_dist.report.runs import RESULT_FILE

log = logging.getLogger(__name__)

UNFINISHED = "has not ended: it was killed, or still runs"
_ERROR_FILE = "error.txt"


def read_result(folder: Path) -> dict[str, Any] | None:
    """Return the result in the folder of a run, or None if it does not exist or is damaged.

    Args:
        folder: the folder of the run.
    """
    path = folder / RESULT_FILE
    if not path.is_file():
        return None
    try:
        result = json.loads(read_bounded(path))
        whole = isinstance(result["overrides"], list) and isinstance(result["metrics"], dict)
        if whole and isinstance(result["status"], str):
            return result
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        pass
    log.warning("%s is damaged and is ignored", path)
    return None


@rank_zero_only
def write_result(folder: Path, result: dict[str, Any]) -> None:
    """Write the result of a run as one atomic change; only the first process writes.

    Args:
        folder: the folder of the run.
        result: the attribute ``result`` of :class:`lightning_dist.cli.run.run.Run`.

    Raises:
        OSError: if the disk is full, or the folder is not writable.
    """
    path = folder / RESULT_FILE
    with naming(path), replaced_together([path]) as (partial,):
        partial.write_text(json.dumps(result, indent=2) + "\n")


def record_error(folder: Path, error: BaseException) -> None:
    """Write the error of this process, unless another process of the run has written one.

    Args:
        folder: the folder of the run.
        error: the error that ends this process.
    """
    # FileExistsError: another process was first. ``error`` itself reports a full disk.
    with suppress(OSError), open(folder / _ERROR_FILE, "x") as file:
        file.write(error_line(error))


def first_error(folder: Path) -> str | None:
    """Return the first error in the processes of a run, or None if no process wrote an error.

    Args:
        folder: the folder of the run.
    """
    path = folder / _ERROR_FILE
    if not path.is_file():
        return None
    with open(path, encoding="utf-8", errors="replace") as file:
        return error_line(file.read(MOST_SHOWN))


@rank_zero_only
def forget_error(folder: Path) -> None:
    """Delete the error file of an earlier attempt.

    Args:
        folder: the folder of the run.
    """
    (folder / _ERROR_FILE).unlink(missing_ok=True)
