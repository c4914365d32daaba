"""The files of a teacher cache: one for each view, and one for the samples of the check."""

import contextlib
import io
import os
import re
import shutil
import stat
import zlib
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import BinaryIO

import numpy as np
from filelock import FileLock, Timeout

from lightning_dist.files.locking import file_lock
from lightning_dist.files.text import read_bounded
from lightning_dist.files.writing import naming

PAGE = 4096  # The bytes that a system reads from a disk at least.
_LINE = re.compile(r"(\d{1,15}) (\d{1,15}) ([0-9a-f]{8})")
_CHUNK = 2**24  # bytes that are read at once
_MOST_TRIED = 4  # times that all rows may be listed
# The version 1.0 of NumPy's format; the header of a later version can have 4 GB.
_START = b"\x93NUMPY\x01\x00"


class Claim(Enum):
    """The result of `ViewFiles.claim`: whether the process may write the view."""

    WRITE = "write"  # The process may write the view until it calls `release`.
    WAIT = "wait"  # Another process is writing the view.
    COMPLETE = "complete"  # The view is already complete.


class ViewFiles:
    """A folder that has one ``.npy`` file for each view, with one structured row for each sample.

    A view is written in blocks of rows to a temporary file, which is renamed when it is complete
    and on disk. So a crash cannot leave an incomplete ``.npy`` file. The blocks that are written
    are listed in text files beside it, so that a later run continues there. A lock prevents two
    runs from writing the same view; the system releases it if the run ends.

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
        lock = self._locks.setdefault(view, file_lock(self.path(view).with_suffix(".lock")))
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

    def begin(self, view: int, row: np.dtype) -> list[tuple[int, int]]:
        """Prepare the temporary file of a view that this process has claimed.

        A file that an earlier run has left is continued: the rows of its blocks that are listed as
        written, and have the listed checksum, are kept.

        Args:
            view: the number of the view.
            row: the dtype of a row.

        Returns:
            The ranges of rows that are still to be written, each as its start and its end.

        Raises:
            OSError: if the disk has too little free space.
        """
        part, header = self._part(view), header_of(row, self.rows)
        size = len(header) + self.rows * row.itemsize
        begun = _begins_with(part, header, size)
        missing = self._missing(view, row) if begun else [(0, self.rows)]
        needed = sum(end - start for start, end in missing) * row.itemsize
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise OSError(
                f"a view of the teacher cache needs {needed / 1e6:,.1f} MB and {self.folder} has "
                f"{free / 1e6:,.1f} MB left: delete other files, choose another folder "
                "(distill.cache=PATH) or switch the cache off"
            )
        if not begun:  # There is no file, or one of other rows.
            part.unlink(missing_ok=True)
            self._unlist(view)
            with naming(part), part.open("wb") as file:
                file.write(header)
                file.truncate(size)
        return missing

    def write(self, view: int, start: int, rows: np.ndarray, process: int) -> None:
        """Write a block to the temporary file of a view, and list it as written.

        Several processes may write different blocks.

        Args:
            view: the number of the view.
            start: the index of the sample of the first row.
            rows: a structured array with the rows of consecutive samples.
            process: the number of this process, which has a list of its own.
        """
        content = rows.tobytes()
        # Use write() instead of a memory map: then a full disk causes an OSError and not a SIGBUS,
        # and two machines never write to one memory page.
        part, written = self._part(view), self._list(view, process)
        with naming(part), part.open("r+b") as file:
            file.seek(-(self.rows - start) * rows.itemsize, os.SEEK_END)
            file.write(content)
        # The checksum makes it unnecessary to wait here until the block is on disk: after a power
        # failure, a listed block whose rows are missing does not have its checksum.
        # The line feed comes first, because a killed process may have left an incomplete line.
        line = f"\n{start} {start + len(rows)} {zlib.crc32(content):08x}"
        with naming(written), written.open("a") as file:
            file.write(line)

    def flush(self, view: int) -> None:
        """Wait until the rows that this process has written to a view are on disk."""
        part = self._part(view)
        with naming(part), part.open("r+b") as file:
            os.fsync(file.fileno())

    def commit(self, view: int) -> None:
        """Rename the temporary file of a view when all processes have written their rows."""
        _rename(self._part(view), self.path(view))
        self._unlist(view)

    def _part(self, view: int) -> Path:
        return self.path(view).with_suffix(".part")

    def _list(self, view: int, process: int) -> Path:
        """Return the path of a process's list: a line of start, end and checksum per block."""
        return self.path(view).with_suffix(f".blocks-{process}")

    def _lists(self, view: int) -> list[Path]:
        return sorted(self.folder.glob(f"{self.path(view).stem}.blocks-*"))

    def _unlist(self, view: int) -> None:
        for path in self._lists(view):
            path.unlink(missing_ok=True)

    def _missing(self, view: int, row: np.dtype) -> list[tuple[int, int]]:
        """Return the ranges of rows that are not in a listed block with its checksum."""
        texts = [_text_of(path) for path in self._lists(view)]
        # An incomplete line does not match.
        found = [_LINE.fullmatch(line) for text in texts for line in text.splitlines()]
        listed = sorted((int(m[1]), int(m[2]), int(m[3], 16)) for m in found if m)
        missing, end, tried = [], 0, 0
        with self._part(view).open("rb") as file:
            for start, stop, checksum in [*listed, (self.rows, self.rows, 0)]:
                if not end <= start <= stop <= self.rows:
                    continue
                tried += stop - start
                # A list from elsewhere can have the same rows in any number of blocks.
                if start < stop and tried > _MOST_TRIED * self.rows:
                    continue
                file.seek(-(self.rows - start) * row.itemsize, os.SEEK_END)
                if _checksum(file, (stop - start) * row.itemsize) != checksum:
                    continue
                if start > end:
                    missing.append((end, start))
                end = stop
        return missing


def _is_own(path: Path) -> bool:
    """Return whether a path is a regular file, and no link to a file elsewhere."""
    try:
        found = path.lstat()
    except OSError:
        return False
    return stat.S_ISREG(found.st_mode) and found.st_nlink == 1


def _text_of(path: Path) -> str:
    """Return the text of a list of blocks; delete the file if it is a link or too long."""
    with contextlib.suppress(OSError, ValueError):
        if _is_own(path):
            return read_bounded(path).decode(errors="replace")
    path.unlink(missing_ok=True)
    return ""


def _checksum(file: BinaryIO, size: int) -> int:
    checksum = 0
    while size > 0 and (content := file.read(min(size, _CHUNK))):
        checksum = zlib.crc32(content, checksum)
        size -= len(content)
    return checksum


def header_of(row: np.dtype, rows: int) -> bytes:
    """Return the header of a ``.npy`` file, filled with spaces so that the rows begin a page."""
    file = io.BytesIO()
    descr = np.lib.format.dtype_to_descr(row)
    np.lib.format.write_array_header_1_0(
        file, {"descr": descr, "fortran_order": False, "shape": (rows,)}
    )
    content = file.getvalue()
    # 8 bytes of magic, then the length of the text as two bytes, then the text and a line feed.
    text = content[10:-1].ljust(PAGE - 11) + b"\n"
    return content[:8] + len(text).to_bytes(2, "little") + text


def _begins_with(path: Path, header: bytes, size: int) -> bool:
    """Return whether a file has this size and begins with this header."""
    try:
        if not _is_own(path):
            return False
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_size == size and file.read(len(header)) == header
    except OSError:
        return False


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
        if path.exists() and not path.is_file():
            raise ValueError("it is no regular file")
        with path.open("rb") as file:
            if file.read(len(_START)) != _START:
                raise ValueError("it is of another version of NumPy's format")
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
    part.unlink(missing_ok=True)  # A link there could lead to a file elsewhere.
    with naming(part), part.open("wb") as file:
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
