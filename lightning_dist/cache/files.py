"""The files of a teacher cache: one a view, complete or absent, read as data."""

import contextlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout


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
        """The file of a view that is complete."""
        return self.folder / f"view-{view:03d}.npy"

    def open(self, view: int, fields: Sequence[str]) -> np.ndarray:
        """The rows of a view, memory-mapped.

        Args:
            view: its number.
            fields: names of the entries that a row must have.

        Raises:
            FileNotFoundError: if it is not there.
            ValueError: if the file is truncated, or holds something else. Nothing is unpickled.
        """
        path = self.path(view)
        try:
            found = np.load(path, mmap_mode="r", allow_pickle=False)
        except OSError:
            raise
        except Exception as error:  # whatever a reader meets in bytes that are no array
            raise ValueError(f"{path} is damaged ({error}): delete it, to fill it anew") from error
        shape, names = getattr(found, "shape", None), getattr(found, "dtype", np.dtype("V")).names
        if shape != (self.rows,) or names != tuple(fields) or not _all_floats(found.dtype):
            raise ValueError(
                f"{path} is no view of {self.rows} rows of {', '.join(fields)}: delete it, to fill "
                "it anew"
            )
        return found

    def claim(self, view: int, seconds: float) -> str:
        """Wait a while for the right to write a view.

        Returns:
            ``"complete"`` where there is nothing to write, ``"ours"`` where this process may write
            until it calls `release`, ``"theirs"`` where another one still does.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = self._locks.setdefault(view, FileLock(self.path(view).with_suffix(".lock")))
        if not self.path(view).exists():
            try:
                lock.acquire(timeout=seconds)
            except Timeout:
                return "theirs"
            if not self.path(view).exists():
                return "ours"
        self.release(view)
        return "complete"

    def release(self, view: int) -> None:
        """Let others write."""
        if view in self._locks:
            self._locks.pop(view).release()

    def missing_bytes(self, views: int, row: np.dtype) -> int:
        """What is still to be written until all views are there."""
        absent = sum(not self.path(view).exists() for view in range(views))
        return absent * self.rows * row.itemsize

    def create(self, view: int, row: np.dtype) -> None:
        """Begin a view that this process has claimed.

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
        """Put rows into a view that was begun; several processes may, each its own rows."""
        # Written, not mapped: a full disk is then an error, and pages that two machines share stay
        # whole.
        with self._part(view).open("r+b") as file:
            file.seek(-(self.rows - start) * rows.itemsize, os.SEEK_END)
            file.write(rows.tobytes())

    def flush(self, view: int) -> None:
        """Wait until what this process has written is on disk."""
        with self._part(view).open("r+b") as file:
            os.fsync(file.fileno())

    def commit(self, view: int) -> None:
        """Give a view, to which all have written, its name."""
        os.replace(self._part(view), self.path(view))
        with contextlib.suppress(OSError):  # not every system opens folders
            folder = os.open(self.folder, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def _part(self, view: int) -> Path:
        return self.path(view).with_suffix(".part")


def _all_floats(row: np.dtype) -> bool:
    return all(row[name].base.kind == "f" for name in row.names or ())
