"""`FolderLock`: a lock that lets one process at a time write to a folder.

If the lock is taken, the error names the process that holds it.
"""

import os
import socket
from datetime import datetime
from pathlib import Path
from types import TracebackType

from filelock import FileLock, Timeout

from lightning_dist.files.text import printable, read_bounded
from lightning_dist.files.writing import naming

# After a sweep was killed, its job may still be saving its state. A process that continues the
# sweep waits this long for the job.
PATIENCE_SECONDS = 10.0
_MOST_OF_HOLDER = 2000  # bytes


def file_lock(path: Path) -> FileLock:
    """Return the lock of a file, which may not be a link, nor a hard link.

    Earlier versions of filelock empty the file to which a link leads.

    Args:
        path: the path of the file, which need not exist.

    Raises:
        OSError: if there is something else than a regular file.
    """
    if path.is_symlink() or (path.exists() and not (path.is_file() and path.stat().st_nlink == 1)):
        raise OSError(f"{path} is a link or no regular file: remove it")
    return FileLock(path)


class FolderIsInUse(OSError):  # noqa: N818 - the name says what is wrong
    """The error of a process that may not write to a folder, because another process does."""


class FolderLock:
    """A context manager that holds the lock of a folder.

    The operating system releases the lock when its process ends, however it ends. So a process that
    was killed locks nothing. The file with the name of the holder is only for the message.

    Args:
        folder: the folder, which is created with its parents.

    Raises:
        FolderIsInUse: at the start of the block, if another process holds the lock.
        OSError: at the start of the block, if the folder cannot be created or written to.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> "FolderLock":
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = file_lock(self.folder / ".lock")
        try:
            self._lock.acquire(timeout=PATIENCE_SECONDS)
        except Timeout:
            raise FolderIsInUse(
                f"{self.folder} is in use by {self._read_holder()}: wait until it has ended, or "
                "choose another folder"
            ) from None
        now = datetime.now().isoformat(" ", "seconds")
        try:
            self._holder.unlink(missing_ok=True)  # A link there could lead to a file elsewhere.
            with naming(self._holder):
                self._holder.write_text(
                    f"process {os.getpid()} on {socket.gethostname()} since {now}"
                )
        except OSError:
            self._lock.release()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._holder.unlink(missing_ok=True)
        self._lock.release()

    @property
    def _holder(self) -> Path:
        return self.folder / ".lock-holder"

    def _read_holder(self) -> str:
        try:
            text = read_bounded(self._holder, _MOST_OF_HOLDER).decode(errors="replace")
        except (OSError, ValueError):
            return "another process"
        return printable(text, 200) or "another process"
