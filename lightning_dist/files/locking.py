"""`FolderLock`: a lock that lets one process at a time write to a folder.

If the lock is taken, the error names the process that holds it.
"""

import os
import socket
from datetime import datetime
from pathlib import Path
from types import TracebackType

from filelock import FileLock, Timeout

from lightning_dist.files.text import printable

# After a sweep was killed, its job may still be saving its state. A process that continues the
# sweep waits this long for the job.
PATIENCE_SECONDS = 10.0


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
        self._lock = FileLock(folder / ".lock")

    def __enter__(self) -> "FolderLock":
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=PATIENCE_SECONDS)
        except Timeout:
            raise FolderIsInUse(
                f"{self.folder} is in use by {self._read_holder()}: wait until it has ended, or "
                "choose another folder"
            ) from None
        now = datetime.now().isoformat(" ", "seconds")
        self._holder.write_text(f"process {os.getpid()} on {socket.gethostname()} since {now}")
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
            return printable(self._holder.read_text(errors="replace"), 200) or "another process"
        except OSError:
            return "another process"
