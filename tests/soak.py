"""A script that interrupts and resumes runs, and compares them with uninterrupted runs.

`python -m tests.soak` prints one line for each round and one for each variant; the last line counts
rounds and mismatches.
"""

import argparse
import json
import math
import os
import random
import runpy
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import psutil
from PIL import Image
from sklearn.datasets import load_digits

# The runs need these modules, which are imported once, before the runs are forked.
import lightning_dist.cli.train
import lightning_dist.data.image_folder
import lightning_dist.tasks.classification  # noqa: F401
from tests.helpers.interruption import OVERRIDES, OVERRIDES_OF_ANY_DATA, differences
from tests.helpers.processes import wait_until

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGKILL)
# Before and after training, a signal ends a process as it ends every other one.
STATUS = {
    signal.SIGTERM: (143, -signal.SIGTERM),
    signal.SIGINT: (130, -signal.SIGINT),
    signal.SIGKILL: (-signal.SIGKILL,),
}
# After a signal, a run completes its epoch at most. On a busy machine that can take a minute.
PATIENCE_SECONDS = 300
VARIANTS = {
    "one-process": [*OVERRIDES, "trainer=cpu"],
    # The run ends within an epoch, and not with a validation.
    "rare-validation": [
        *(*OVERRIDES, "trainer=cpu", "scheduler=poly", "data.num_workers=0"),
        *("trainer.check_val_every_n_epoch=3", "trainer.max_steps=35"),
    ],
    "two-processes": [
        *(*OVERRIDES, "trainer=ddp_sim"),
        *("scheduler=multistep", "scheduler.factory.milestones=[1,3]"),
    ],
    "timm-by-update": [
        *(*OVERRIDES, "trainer=cpu", "scheduler=timm", "scheduler.factory.warmup_epochs=1"),
    ],
    "timm-by-epoch": [
        *(*OVERRIDES, "trainer=cpu", "scheduler=timm", "scheduler.factory.warmup_epochs=1"),
        *("scheduler.factory.step_on_epochs=true", "scheduler.interval=epoch"),
    ],
    "warm-up": [
        *(*OVERRIDES, "trainer=cpu"),
        *("scheduler=warmup_multistep", "scheduler.factory.milestones=[2]"),
        *("scheduler.factory.warmup_updates=15", "data.num_workers=2"),
    ],
    "validation-within-epochs": [
        *(*OVERRIDES, "trainer=cpu", "trainer.val_check_interval=0.3"),
        *("scheduler=step", "scheduler.factory.step_size=1"),
    ],
    "changing-accumulation": [
        *(*OVERRIDES, "trainer=cpu", "trainer.accumulate_grad_batches=1"),
        "+callbacks.accumulation={_target_:lightning.pytorch.callbacks."
        "GradientAccumulationScheduler,scheduling:{0:1,1:3,3:2}}",
    ],
    "overfitting": [
        *(*OVERRIDES, "trainer=cpu", "scheduler=constant", "+trainer.overfit_batches=9"),
    ],
    "overfitting-two-processes": [
        *(*OVERRIDES, "trainer=ddp_sim", "+trainer.overfit_batches=9"),
    ],
    "cached-teacher": [
        *(*OVERRIDES, "trainer=cpu", "distill.cache={folder}/cache", "module.mixup=null"),
        "data.num_workers=2",
    ],
    "few-labels-two-processes": [
        *(*OVERRIDES, "trainer=ddp_sim", "module.mixup=null"),
        *("data.labels=300", "data.unlabeled_share=0.75"),
    ],
    "unlabeled-images": [
        *(*OVERRIDES_OF_ANY_DATA, "trainer=cpu", "module.mixup=null"),
        *("data=image_folder", "data.root={folder}/images"),
        *("data.image_size=8", "data.unlabeled={folder}/images/more", "data.unlabeled_share=0.5"),
        *("data.num_workers=2", "student.in_channels=3", "teacher.weights=null"),
        *("teacher.network.channels=[8,8]", "+teacher.network.in_channels=3"),
    ],
}


def write_images(root: Path) -> None:
    """Write digits as a folder of images: for training, for validation and without a label."""
    digits = load_digits()
    for index in range(1000):
        label = digits.target[index]
        part = f"train/{label}" if index < 300 else f"val/{label}" if index < 400 else "more"
        (root / part).mkdir(parents=True, exist_ok=True)
        pixels = (digits.images[index] * 15.9).astype("uint8")
        Image.fromarray(pixels).save(root / part / f"{index}.png")


class Run:
    """A run in a process of its own, as `python -m lightning_dist train` starts it.

    The process is forked, because to import the libraries takes longer than to train.

    Args:
        folder: the folder of the run; its output is appended to the file `folder`.log.
        overrides: the arguments of the command; {folder} is the folder of all runs of a variant.
    """

    def __init__(self, folder: Path, *overrides: str) -> None:
        sys.stdout.flush()
        self.pid = os.fork()
        if not self.pid:
            os.setsid()
            log = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            own = [override.replace("{folder}", str(folder.parent)) for override in overrides]
            sys.argv = ["lightning-dist", "train", *own, f"hydra.run.dir={folder}"]
            runpy.run_module("lightning_dist", run_name="__main__", alter_sys=True)
            sys.exit()
        self._status: int | None = None

    def poll(self) -> int | None:
        """Return the exit status, negative after a signal, or None if the run has not ended."""
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._status = os.waitstatus_to_exitcode(status) if pid else None
        return self._status

    def wait(self, seconds: float = math.inf) -> int:
        """Wait until the run has ended, and return its exit status."""
        wait_until(lambda: self.poll() is not None, seconds)
        assert self._status is not None
        return self._status

    def processes(self) -> list[psutil.Process]:
        """Return the living processes of the run, whose session has the number of the first one."""
        return [process for process in psutil.process_iter() if self._is_own(process)]

    def end(self) -> None:
        """Kill all processes of the run."""
        while alive := self.processes():
            for process in alive:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            self.poll()

    def _is_own(self, process: psutil.Process) -> bool:
        with suppress(psutil.NoSuchProcess, ProcessLookupError):
            ended = process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
            return os.getsid(process.pid) == self.pid and not ended
        return False


def complete(folder: Path, *overrides: str) -> None:
    """Start a run in the folder, and wait until it has completed."""
    if Run(folder, *overrides).wait() != 0:
        raise RuntimeError(folder.with_suffix(".log").read_text())


def interrupt(
    run: Run, folder: Path, rows: int, number: signal.Signals, everyone: bool
) -> int | None:
    """Send a signal after `rows` rows of the log; return the exit status.

    Return None if the run had completed before the signal. A run that ignores it returns 0.
    """
    log = folder / "logs" / "metrics.csv"
    before, known = log.stat().st_mtime_ns if log.exists() else 0, None
    while run.poll() is None:
        # At first the file contains the rows of the previous attempt, and then those that a resume
        # keeps.
        changed = log.exists() and log.stat().st_mtime_ns > before
        count = log.read_bytes().count(b"\n") if changed else 0
        if count and known is None:
            known = count if before else 0
        if known is not None and count > max(rows, known):
            had_completed = has_completed(folder)
            (os.killpg if everyone else os.kill)(run.pid, number)
            status = run.wait(PATIENCE_SECONDS)
            return None if status == 0 and had_completed else status
        time.sleep(0.002)
    return None


def has_completed(folder: Path) -> bool:
    """Return whether the run in the folder has written its complete result."""
    result = folder / "result.json"
    return result.exists() and json.loads(result.read_text())["status"] == "completed"


def play(
    whole: Path, resumed: Path, overrides: list[str], draw: random.Random
) -> tuple[list[str], list[str]]:
    """Interrupt a run once or twice, let it complete, and compare it with the whole run.

    Return what was done, as text, and the mismatches.
    """
    rows = (whole / "logs" / "metrics.csv").read_bytes().count(b"\n")
    history, mismatches = [], []
    for _ in range(draw.randint(1, 2)):
        number, row = draw.choice(SIGNALS), draw.randrange(rows)
        everyone = draw.random() < 0.5  # A terminal and SLURM send a signal to all processes.
        run = Run(resumed, *overrides, "resume=true")
        try:
            status = interrupt(run, resumed, row, number, everyone)
            wait_until(lambda run=run: not run.processes(), PATIENCE_SECONDS)
        except AssertionError:
            left = ", ".join(str(process.pid) for process in run.processes())
            mismatches.append(f"the processes {left} did not end after {number.name}")
            status = None
        finally:
            run.end()
        whom = "all" if everyone else "the first process"
        result = "had completed" if status is None else status
        history.append(f"{number.name} to {whom} after {row} rows: {result}")
        if status is not None and status not in STATUS[number]:
            mismatches.append(f"exit status {status} after {number.name}")
    complete(resumed, *overrides, "resume=true")
    return history, mismatches + differences(whole, resumed)


def main() -> None:
    """Play the rounds, which the variants share in turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0, help="of the places and signals")
    parser.add_argument("--folder", type=Path, help="keep the runs here")
    parser.add_argument(
        "--variants", nargs="+", default=[*VARIANTS], choices=VARIANTS, help="share the rounds"
    )
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp())
    rounds, interruptions, found = Counter(), Counter(), Counter()
    for index in range(options.rounds):
        variant = options.variants[index % len(options.variants)]
        overrides = VARIANTS[variant]
        runs = folder / variant
        if not runs.exists():
            runs.mkdir(parents=True)
            write_images(runs / "images")
            complete(runs / "whole", *overrides)
        draw = random.Random(f"{options.seed}, {index}")
        history, mismatches = play(runs / "whole", runs / str(index), overrides, draw)
        rounds[variant] += 1
        interruptions[variant] += sum("had completed" not in line for line in history)
        found[variant] += len(mismatches)
        result = ", ".join(mismatches) or "identical"
        print(f"round {index}, {variant}: {', '.join(history)}; {result}", flush=True)
    for variant in rounds:
        own = " ".join(x for x in VARIANTS[variant] if x not in OVERRIDES)
        print(
            f"{variant}: {rounds[variant]} rounds, {interruptions[variant]} interruptions, "
            f"{found[variant]} mismatches: {own}"
        )
    print(f"{options.rounds} rounds, {found.total()} mismatches")
    sys.exit(bool(found.total()))


if __name__ == "__main__":
    main()
