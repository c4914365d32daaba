"""A run of a sweep as a command of its own."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from lightning_dist.cli import UserError, user_environment
from lightning_dist.cli.run.result import (
    UNFINISHED,
    config_folders,
    first_error,
    new_result,
    write_result,
)
from lightning_dist.resume import SIGNALS

_PARENT = "LIGHTNING_DIST_PARENT"
_POLL_SECONDS = 0.5


def run_apart(config: DictConfig) -> float | None:
    """One run of a sweep as a command of its own, which ends alone if it is killed.

    Runs with several processes need that: subprocess DDP starts the command line again, which would
    be the whole sweep, and leaves its rank and port in the environment, which the next run would
    take for its own.
    """
    hydra = HydraConfig.get()
    folder = Path(hydra.runtime.output_dir)
    overrides = [*hydra.overrides.task, f"hydra.job.num={hydra.job.num}"]
    overrides += [x for x in hydra.overrides.hydra if not x.startswith("hydra.mode=")]
    overrides += [f'hydra.sweep.dir="{hydra.sweep.dir}"', f'hydra.run.dir="{folder}"']
    overrides += config_folders()
    path = folder / "result.json"
    path.unlink(missing_ok=True)  # of an attempt before
    status = _run_command(["train", *overrides], hydra.runtime.cwd)
    result = json.loads(path.read_text()) if path.is_file() else new_result(config)
    if result["error"] == UNFINISHED:  # killed, as Lightning does where another rank has failed
        result["error"] = first_error(folder) or f"ended with exit status {status}"
        write_result(path, result)
    if status or result["status"] == "failed":
        raise UserError(result["error"] or f"ended with exit status {status}")
    return result["metrics"].get(config.monitor)


def needs_own_process(config: DictConfig) -> bool:
    """Return whether a job of a sweep has to run as a command of its own.

    That is where the user asks for it, and where its Trainer may start several processes: with a
    strategy, several nodes, or any ``devices`` but one (``auto`` may be several).

    Args:
        config: the job's config.
    """
    trainer = config.trainer
    devices = trainer.get("devices", "auto")
    one_device = len(devices) == 1 if OmegaConf.is_list(devices) else str(devices) == "1"
    one_process = one_device and trainer.get("num_nodes", 1) == 1
    strategy = trainer.get("strategy") not in (None, "auto")
    return config.own_process or strategy or not one_process


def end_with_parent(worker: bool) -> None:
    """Stop this run as SIGTERM does, which saves it, once the process of its sweep is gone.

    That may be killed, or go with its terminal; the run would otherwise train on, beside the one
    with which the sweep is resumed.

    Args:
        worker: whether this is a launcher's worker; else the environment tells, where there is one.
    """
    told = os.environ.pop(_PARENT, None)  # not for the processes that this one starts
    if told is None and not worker:
        return
    parent = os.getppid() if told is None else int(told)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_POLL_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def _run_command(arguments: list[str], folder: str) -> int:
    """Run the command in a process of its own and return its exit status.

    A signal is handed on, so that the run can save its state, and ends this process afterwards. The
    terminal would send Ctrl-C to both: hence the session of its own.

    Raises:
        SystemExit: with the run's status, after a signal.
    """
    command = [sys.executable, "-m", "lightning_dist", *arguments]
    process: subprocess.Popen | None = None
    received = []

    def hand_on(number: int, frame: Any) -> None:
        received.append(number)
        if process is not None:
            process.send_signal(number)

    before = {number: signal.getsignal(number) for number in SIGNALS}
    on_main_thread = threading.current_thread() is threading.main_thread()
    try:
        for number in SIGNALS if on_main_thread else ():
            signal.signal(number, hand_on)
        environment = user_environment() | {_PARENT: str(os.getpid())}
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
