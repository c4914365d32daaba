"""Processes that a test starts, and ends with all that these have started."""

import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import suppress

import psutil

TIMEOUT = 600  # seconds for what takes a few: two processes on a busy machine are slow


class Processes:
    """Start Python as processes, and kill those that are left at the end of the ``with``.

    They, and all that they start, have a variable in their environment whose name is drawn once: so
    the processes of other tests, and of other checkouts, are never found.
    """

    def __init__(self) -> None:
        self._mark = f"STARTED_BY_{uuid.uuid4().hex}"

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *_: object) -> None:
        while alive := self.alive():  # one may have started another since they were listed
            for process in alive:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(alive, timeout=10)

    def start(
        self, *arguments: object, env: dict[str, str] | None = None, **options: object
    ) -> subprocess.Popen:
        """Start Python with these arguments, and with ``env`` added to the environment."""
        command = [sys.executable, *map(str, arguments)]
        return subprocess.Popen(
            command, env=os.environ | (env or {}) | {self._mark: "1"}, text=True, **options
        )

    def run(
        self, *arguments: object, timeout: float = TIMEOUT, **options: object
    ) -> subprocess.CompletedProcess:
        """Start Python with these arguments and return its status and output when it has ended."""
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = self.start(*arguments, **pipes, **options)
        stdout, stderr = process.communicate(timeout=timeout)
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)

    def alive(self) -> list[psutil.Process]:
        """Return the processes that were started here, by themselves or by one another."""
        return [process for process in psutil.process_iter() if self._is_marked(process)]

    def _is_marked(self, process: psutil.Process) -> bool:
        with suppress(psutil.Error):  # it may end meanwhile, or belong to another user
            return self._mark in process.environ()
        return False


def wait_until(condition: Callable[[], bool], timeout: float = TIMEOUT) -> None:
    """Return when the condition holds; fail when it does not within so many seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout} seconds"
        time.sleep(0.05)
