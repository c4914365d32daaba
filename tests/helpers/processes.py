"""A class that starts processes for a test and kills them, with their children, at its end."""

import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import suppress

import psutil

TIMEOUT = 600  # In seconds. A test needs a few seconds, but much more on a busy machine.


class Processes:
    """A context manager that starts Python processes and, at its end, kills those that still run.

    The started processes and their children are found by an environment variable with a random
    name. So the processes of other tests are never killed.
    """

    def __init__(self) -> None:
        self._mark = f"STARTED_BY_{uuid.uuid4().hex}"

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *_: object) -> None:
        # Repeat, because a process may start another one after the list was made.
        while alive := self.alive():
            for process in alive:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(alive, timeout=10)

    def start(
        self, *arguments: object, env: dict[str, str] | None = None, **options: object
    ) -> subprocess.Popen:
        """Start Python with these arguments, and add ``env`` to its environment variables."""
        command = [sys.executable, *map(str, arguments)]
        return subprocess.Popen(
            command, env=os.environ | (env or {}) | {self._mark: "1"}, text=True, **options
        )

    def run(
        self, *arguments: object, timeout: float = TIMEOUT, **options: object
    ) -> subprocess.CompletedProcess:
        """Start Python with these arguments, wait for its end, and return its status and output."""
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = self.start(*arguments, **pipes, **options)
        stdout, stderr = process.communicate(timeout=timeout)
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)

    def alive(self) -> list[psutil.Process]:
        """Return the running processes that this object started, and their children."""
        return [process for process in psutil.process_iter() if self._is_marked(process)]

    def _is_marked(self, process: psutil.Process) -> bool:
        with suppress(psutil.Error):  # The process has ended, or belongs to another user.
            return self._mark in process.environ()
        return False


def wait_until(condition: Callable[[], bool], timeout: float = TIMEOUT) -> None:
    """Wait until the condition is true; fail after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"the condition was still false after {timeout} seconds"
        time.sleep(0.05)
