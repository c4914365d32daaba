"""The files of a teacher cache: one of each view and one of samples, complete or absent."""

import contextlib
import os
import shutil
from collections.abc import Sequence
from enum import Enum
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout


class Claim(Enum):
    """The answer to a process that wants to write a view."""

    WRITE = "write"  # it may, until it calls `release`
    WAIT = "wait"  # another process writes it
    COMPLETE = "complete"  # there is nothing to write


class ViewFiles:
    """A folder that has one ``.npy`` file a view, of one structured row a sample.

    A view is written under another name and gets its own once it is complete and on disk, so that
    a crash leaves no half of one. A lock, which ends with the process that holds it, keeps two jobs
    from writing the same view.

    Args:
        folder: where they are; made when something is written.
        rows: number of samples.
    """

    def __init__(self, folder: Path, rows: int) -> None:
        self.folder = folder
        self.rows = rows
        self._locks: dict[int, FileLock] = {}

    def path(self, view: int) -> Path:
        """Return the file of a view that is complete."""
        return self.folder / f"view-{view:03d}.npy"

    def open(self, view: int, fields: Sequence[str]) -> np.ndarray:
        """Memory-map the rows of a view.

        Args:
            view: its number.
            fields: names of the entries that a row must have.

        Returns:
            A structured array with one row for each sample.

        Raises:
            FileNotFoundError: if it is not there.
            ValueError: if the file is truncated, or holds something else. Nothing is unpickled.
        """
        path = self.path(view)
        return read_rows(path, self.rows, fields, delete=path)

    def claim(self, view: int, seconds: float) -> Claim:
        """Wait for the right to write a view.

        Args:
            view: its number.
            seconds: how long to wait at most.

        Returns:
            Whether this process may write the view.
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
        """Let other processes write a view."""
        if view in self._locks:
            self._locks.pop(view).release()

    def missing_bytes(self, views: int, row: np.dtype) -> int:
        """Return the size of all views that are still to be written.

        Args:
            views: number of views that the cache will have.
            row: what is stored for a sample.

        Returns:
            Their size in bytes.
        """
        absent = sum(not self.path(view).exists() for view in range(views))
        return absent * self.rows * row.itemsize

    def create(self, view: int, row: np.dtype) -> None:
        """Begin a view that this process has claimed.

        Args:
            view: its number.
            row: what is stored for a sample.

        Raises:
            OSError: if the disk has no room for it.
        """
        size = self.rows * row.itemsize
        self._part(view).unlink(missing_ok=True)  # of a run that crashed
        free = shutil.disk_usage(self.folder).free
        if size > free:
            raise OSError(
                f"a view of the teacher cache needs {size / 1e6:,.1f} MB and {self.folder} has "
                f"{free / 1e6:,.1f} MB left: make room, choose another folder (distill.cache=PATH) "
                "or switch the cache off"
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
        """Write rows into a view that was begun; several processes may, each its own rows.

        Args:
            view: its number.
            start: sample of the first row.
            rows: structured array of consecutive samples.
        """
        # write() instead of a memory map: a full disk raises OSError rather than SIGBUS, and two
        # machines never write one page.
        with self._part(view).open("r+b") as file:
            file.seek(-(self.rows - start) * rows.itemsize, os.SEEK_END)
            file.write(rows.tobytes())

    def flush(self, view: int) -> None:
        """Wait until what this process has written to a view is on disk."""
        with self._part(view).open("r+b") as file:
            os.fsync(file.fileno())

    def commit(self, view: int) -> None:
        """Give a view, to which all processes have written, its name."""
        _rename(self._part(view), self.path(view))

    def _part(self, view: int) -> Path:
        return self.path(view).with_suffix(".part")


def read_rows(path: Path, rows: int, fields: Sequence[str], delete: Path) -> np.ndarray:
    """Memory-map the structured rows of a file.

    Args:
        path: the file.
        rows: how many rows it must have.
        fields: names of the entries that a row must have, all of them floating-point numbers.
        delete: file or folder that the error message advises to delete.

    Returns:
        A structured array ``(rows,)``.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is truncated, or holds something else. Nothing is unpickled.
    """
    advice = f"delete {'it' if delete == path else delete}, to fill it anew"
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError:
        raise
    except Exception as error:  # whatever a reader meets in bytes that are no array
        raise ValueError(f"{path} is damaged ({error}): {advice}") from error
    shape, names = getattr(found, "shape", None), getattr(found, "dtype", np.dtype("V")).names
    floats = all(found.dtype[name].base.kind == "f" for name in names or ())
    if shape != (rows,) or names != tuple(fields) or not floats:
        raise ValueError(f"{path} is not a file of {rows} rows of {', '.join(fields)}: {advice}")
    return found


def write_rows(path: Path, rows: np.ndarray) -> None:
    """Write structured rows to a file that is complete or absent whenever the process ends.

    Args:
        path: the file, which only one process may write at a time.
        rows: structured array.
    """
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        np.save(file, rows)
        file.flush()
        os.fsync(file.fileno())
    _rename(part, path)


def _rename(part: Path, path: Path) -> None:
    """Give a complete file its name, also on disk."""
    os.replace(part, path)
    with contextlib.suppress(OSError):  # Windows cannot open folders
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
