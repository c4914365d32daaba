"""Run a job of a sweep as a separate command, and stop the job if the sweep's process ends."""

import os
import signal
import subprocess
import sys
import threading
import time
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from lightning_dist.cli.errors import UserError
from lightning_dist.cli.run.folder_lock import locked
from lightning_dist.cli.run.result import UNFINISHED, first_error, read_result, write_result
from lightning_dist.cli.run.run import Run, config_folders
from lightning_dist.report.runs import RESULT_FILE
from lightning_dist.resume import SIGNALS

_PARENT = "LIGHTNING_DIST_PARENT"
_POLL_SECONDS = 0.5


def run_apart(run: Run) -> None:
    """Run a job of a sweep as a separate command, so that the sweep continues if the job is killed.

    A run with several processes always needs this. Subprocess DDP runs the command line again,
    which would start the whole sweep. It also sets environment variables with its rank and port,
    which the next run would read.

    Args:
        run: the run, whose ``result`` is replaced by the result that the command has written.

    Raises:
        UserError: if the command failed; the message gives the reason.
        SystemExit: if this process received a signal.
    """
    hydra = HydraConfig.get()
    overrides = [*hydra.overrides.task, f"hydra.job.num={hydra.job.num}"]
    overrides += [x for x in hydra.overrides.hydra if not x.startswith("hydra.mode=")]
    overrides += [f'hydra.sweep.dir="{hydra.sweep.dir}"', f'hydra.run.dir="{run.folder}"']
    overrides += config_folders()
    with locked(run.folder):  # Released before the command starts, which takes the lock itself.
        # A file that exists afterwards was written by this command, not by an earlier attempt.
        (run.folder / RESULT_FILE).unlink(missing_ok=True)
    status = _run_command(["train", *overrides], hydra.runtime.cwd)
    run.result = read_result(run.folder) or run.result
    # The command was killed before it wrote its error. Lightning kills it if another rank fails.
    if run.result["error"] == UNFINISHED:
        run.result["error"] = first_error(run.folder) or f"the job ended with exit status {status}"
        write_result(run.folder, run.result)
    if status or run.result["status"] == "failed":
        raise UserError(run.result["error"] or f"the job ended with exit status {status}")


def needs_own_process(config: DictConfig) -> bool:
    """Return whether a job of a sweep has to run as a separate command.

    This is the case if the user sets ``own_process``, or if the job's Trainer may start several
    processes, because the config sets a strategy, several nodes, or anything but one device for
    ``devices`` (``auto`` may find several devices).

    Args:
        config: the config of the job.
    """
    trainer = config.trainer
    devices = trainer.get("devices", "auto")
    one_device = len(devices) == 1 if OmegaConf.is_list(devices) else str(devices) == "1"
    one_process = one_device and trainer.get("num_nodes", 1) == 1
    strategy = trainer.get("strategy") not in (None, "auto")
    return config.own_process or strategy or not one_process


def end_with_parent(worker: bool) -> None:
    """Make this process save its run and end (SIGTERM) when the process of its sweep ends.

    The process of the sweep may be killed, or end with its terminal. Without this signal, the run
    would continue, and another process that resumes the sweep would train the same run.

    Args:
        worker: True if this process is a worker that a launcher started from the sweep's process.
            It need not be True in a command that :func:`run_apart` started: such a command gets the
            sweep's process id from an environment variable.
    """
    # Remove the variable, so that the processes that this process starts do not inherit it.
    named = os.environ.pop(_PARENT, None)
    if named is None and not worker:
        return
    parent = os.getppid() if named is None else int(named)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_POLL_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def _run_command(arguments: list[str], folder: str) -> int:
    """Run the command in a new process and return its exit status.

    A signal is passed on to the command, so that the run can save its state; then this process
    ends. The command runs in a new session: in the same session, the terminal would send Ctrl-C to
    both processes.

    Raises:
        SystemExit: if a signal was received, with the exit status of the run.
    """
    command = [sys.executable, "-m", "lightning_dist", *arguments]
    process: subprocess.Popen | None = None
    received = []

    def pass_on(number: int, frame: Any) -> None:
        received.append(number)
        if process is not None:
            process.send_signal(number)

    before = {number: signal.getsignal(number) for number in SIGNALS}
    on_main_thread = threading.current_thread() is threading.main_thread()
    try:
        for number in SIGNALS if on_main_thread else ():
            signal.signal(number, pass_on)
        environment = os.environ | {_PARENT: str(os.getpid())}
        process = subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True)
        if received:
            process.send_signal(received[0])
        status = process.wait()
    finally:
        for number in SIGNALS if on_main_thread else ():
            signal.signal(number, before[number])
    if received:
        sys.exit(status if status > 0 else 128 + received[0])
    return status
