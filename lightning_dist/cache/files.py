"""The files of a teacher cache: one for each view, and one for the samples of the check."""

import contextlib
import os
import shutil
from collections.abc import Sequence
from enum import Enum
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout


class Claim(Enum):
    """The result of `ViewFiles.claim`: whether the process may write the view."""

    WRITE = "write"  # The process may write the view until it calls `release`.
    WAIT = "wait"  # Another process is writing the view.
    COMPLETE = "complete"  # The view is already complete.


class ViewFiles:
    """A folder that has one ``.npy`` file for each view, with one structured row for each sample.

    A view is written to a temporary file, which is renamed when it is complete and on disk. So a
    crash cannot leave an incomplete ``.npy`` file. A lock prevents two jobs from writing the same
    view; the system releases it if the job ends.

    Args:
        folder: the folder of the files; it is created when a view is claimed.
        rows: the number of samples.
    """

    def __init__(self, folder: Path, rows: int) -> None:
        self.folder = folder
        self.rows = rows
        self._locks: dict[int, FileLock] = {}

    def path(self, view: int) -> Path:
        """Return the path that the file of a view has when it is complete."""
        return self.folder / f"view-{view:03d}.npy"

    def open(self, view: int, fields: Sequence[str]) -> np.ndarray:
        """Memory-map the rows of a view.

        Args:
            view: the number of the view.
            fields: the names of the entries that a row must have.

        Returns:
            A structured array with one row for each sample.

        Raises:
            FileNotFoundError: if the file does not exist.
            ValueError: if the file is truncated or has other contents. Nothing is unpickled.
        """
        path = self.path(view)
        return read_rows(path, self.rows, fields, delete=path)

    def claim(self, view: int, seconds: float) -> Claim:
        """Wait until this process may write a view, or the view is complete.

        Args:
            view: the number of the view.
            seconds: the longest time to wait.

        Returns:
            ``WRITE`` if this process may write the view, ``COMPLETE`` if its file exists, ``WAIT``
            if another process is still writing it after this time.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = self._locks.setdefault(view, FileLock(self.path(view).with_suffix(".lock")))
        if not self.path(view).exists():
            try:
                lock.acquire(timeout=seconds)
            except Timeout:
                return Claim.WAIT
            if not self.path(view).exists():
                return Claim.WRITE
        self.release(view)
        return Claim.COMPLETE

    def release(self, view: int) -> None:
        """Release the lock of a view, if this process has it."""
        if view in self._locks:
            self._locks.pop(view).release()

    def missing_bytes(self, views: int, row: np.dtype) -> int:
        """Return the size of all views that are not written yet.

        Args:
            views: the number of views that the cache will have.
            row: the dtype of a row.

        Returns:
            The size in bytes.
        """
        absent = sum(not self.path(view).exists() for view in range(views))
        return absent * self.rows * row.itemsize

    def create(self, view: int, row: np.dtype) -> None:
        """Create the temporary file of a view that this process has claimed.

        Args:
            view: the number of the view.
            row: the dtype of a row.

        Raises:
            OSError: if the disk has too little free space.
        """
        size = self.rows * row.itemsize
        self._part(view).unlink(missing_ok=True)  # A run that crashed may have left this file.
        free = shutil.disk_usage(self.folder).free
        if size > free:
            raise OSError(
                f"a view of the teacher cache needs {size / 1e6:,.1f} MB and {self.folder} has "
                f"{free / 1e6:,.1f} MB left: delete other files, choose another folder "
                "(distill.cache=PATH) or switch the cache off"
            )
        header = {
            "descr": np.lib.format.dtype_to_descr(row),
            "fortran_order": False,
            "shape": (self.rows,),
        }
        with self._part(view).open("wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            file.truncate(file.tell() + size)

    def write(self, view: int, start: int, rows: np.ndarray) -> None:
        """Write rows to the temporary file of a view. Several processes may write different rows.

        Args:
            view: the number of the view.
            start: the index of the sample of the first row.
            rows: a structured array with the rows of consecutive samples.
        """
        # Use write() instead of a memory map: then a full disk causes an OSError and not a SIGBUS,
        # and two machines never write to one memory page.
        with self._part(view).open("r+b") as file:
            file.seek(-(self.rows - start) * rows.itemsize, os.SEEK_END)
            file.write(rows.tobytes())

    def flush(self, view: int) -> None:
        """Wait until the rows that this process has written to a view are on disk."""
        with self._part(view).open("r+b") as file:
            os.fsync(file.fileno())

    def commit(self, view: int) -> None:
        """Rename the temporary file of a view when all processes have written their rows."""
        _rename(self._part(view), self.path(view))

    def _part(self, view: int) -> Path:
        return self.path(view).with_suffix(".part")


def read_rows(path: Path, rows: int, fields: Sequence[str], delete: Path) -> np.ndarray:
    """Memory-map the structured rows of a file.

    Args:
        path: the path of the file.
        rows: the number of rows that the file must have.
        fields: the names of the entries that a row must have; all are floating-point numbers.
        delete: the file or folder that the user should delete if the file is damaged, for the
            error message.

    Returns:
        A structured array of shape ``(rows,)``.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if the file is truncated or has other contents. Nothing is unpickled.
    """
    advice = f"delete {'it' if delete == path else delete}, so that the next run computes it again"
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError:
        raise
    except Exception as error:  # Damaged files cause errors of many kinds.
        raise ValueError(f"{path} is damaged ({error}): {advice}") from error
    shape, names = getattr(found, "shape", None), getattr(found, "dtype", np.dtype("V")).names
    floats = all(found.dtype[name].base.kind == "f" for name in names or ())
    if shape != (rows,) or names != tuple(fields) or not floats:
        raise ValueError(f"{path} is not a file of {rows} rows of {', '.join(fields)}: {advice}")
    return found


def write_rows(path: Path, rows: np.ndarray) -> None:
    """Write structured rows to a temporary file, and rename it when it is complete.

    Args:
        path: the path of the file; only one process may write it at a time.
        rows: a structured array.
    """
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        np.save(file, rows)
        file.flush()
        os.fsync(file.fileno())
    _rename(part, path)


def _rename(part: Path, path: Path) -> None:
    """Rename a complete file, and wait until its new name is on disk."""
    os.replace(part, path)
    with contextlib.suppress(OSError):  # Windows cannot open folders.
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
