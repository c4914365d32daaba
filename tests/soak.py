"""A script that interrupts and resumes a run, and compares it with an uninterrupted run.

`python -m tests.soak` prints one line for each round; the last line counts rounds and mismatches.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.helpers.interruption import OVERRIDES, differences
from tests.helpers.processes import Processes

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGKILL)
# Before and after training, a signal ends a process as it ends every other one.
STATUS = {
    signal.SIGTERM: (143, -signal.SIGTERM),
    signal.SIGINT: (130, -signal.SIGINT),
    signal.SIGKILL: (-signal.SIGKILL,),
}
VARIANTS = {
    "one-process": ["trainer=cpu"],
    # The run ends within an epoch, and not with a validation.
    "rare-validation": [
        "trainer=cpu",
        "trainer.check_val_every_n_epoch=3",
        "trainer.max_steps=35",
    ],
    "two-processes": ["trainer=ddp_sim"],
    "timm-schedule": ["trainer=cpu", "scheduler=timm", "scheduler.factory.warmup_epochs=1"],
    "warm-up": [
        *("trainer=cpu", "scheduler=warmup_multistep", "scheduler.factory.milestones=[2]"),
        "scheduler.factory.warmup_updates=15",
    ],
    "validation-within-epochs": ["trainer=cpu", "trainer.val_check_interval=0.3"],
    "overfitting": ["trainer=cpu", "+trainer.overfit_batches=9"],
    "overfitting-two-processes": ["trainer=ddp_sim", "+trainer.overfit_batches=9"],
    "cached-teacher": ["trainer=cpu", "distill.cache={folder}/cache", "module.mixup=null"],
}


def start(processes: Processes, folder: Path, *overrides: str) -> subprocess.Popen:
    """Start a run in the folder, as a command in its own process."""
    own = [override.format(folder=folder.parent) for override in overrides]
    command = ["-m", "lightning_dist", "train", *OVERRIDES, *own, f"hydra.run.dir={folder}"]
    with open(folder.with_suffix(".log"), "a") as log:
        return processes.start(*command, stdout=log, stderr=log, start_new_session=True)


def interrupt(
    run: subprocess.Popen, folder: Path, rows: int, number: signal.Signals, everyone: bool
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
            os.killpg(run.pid, number) if everyone else run.send_signal(number)
            status = run.wait(timeout=120)
            return None if status == 0 and had_completed else status
        time.sleep(0.002)
    return None


def has_completed(folder: Path) -> bool:
    """Return whether the run in the folder has written its complete result."""
    result = folder / "result.json"
    return result.exists() and json.loads(result.read_text())["status"] == "completed"


def soak(
    processes: Processes, folder: Path, rounds: int, *overrides: str, draw: random.Random
) -> list[str]:
    """Complete a run, and interrupt and resume it `rounds` times; return the mismatches."""
    whole = folder / "whole"
    assert start(processes, whole, *overrides).wait() == 0, whole.with_suffix(".log").read_text()
    rows = (whole / "logs" / "metrics.csv").read_bytes().count(b"\n")
    mismatches = []
    for index in range(rounds):
        resumed = folder / str(index)
        history = []
        for _ in range(draw.randint(1, 2)):
            number, row = draw.choice(SIGNALS), draw.randrange(rows)
            everyone = draw.random() < 0.5  # A terminal and SLURM send a signal to all processes.
            run = start(processes, resumed, *overrides, "resume=true")
            status = interrupt(run, resumed, row, number, everyone)
            whom = "all" if everyone else "the first process"
            history.append(f"{number.name} to {whom} after {row} rows: {status}")
            if status is not None and status not in STATUS[number]:
                mismatches.append(f"round {index}: exit status {status} after {number.name}")
        if start(processes, resumed, *overrides, "resume=true").wait() != 0:
            raise RuntimeError(resumed.with_suffix(".log").read_text())
        found = differences(whole, resumed)
        mismatches += [f"round {index}: {what}" for what in found]
        print(f"round {index}: {', '.join(history)}; {', '.join(found) or 'identical'}", flush=True)
    return mismatches


def main() -> None:
    """Run the comparison for every variant."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0, help="of the places and signals")
    parser.add_argument("--folder", type=Path, help="keep the runs here")
    parser.add_argument(
        "--variants", nargs="+", default=[*VARIANTS], choices=VARIANTS, help="share the rounds"
    )
    options = parser.parse_args()
    draw = random.Random(options.seed)
    folder = options.folder or Path(tempfile.mkdtemp())
    mismatches = []
    for index, variant in enumerate(options.variants):
        rounds = len(range(index, options.rounds, len(options.variants)))
        print(f"{rounds} rounds of {variant}: {' '.join(VARIANTS[variant])}")
        (folder / variant).mkdir(parents=True)
        with Processes() as processes:
            found = soak(processes, folder / variant, rounds, *VARIANTS[variant], draw=draw)
        mismatches += found
    for mismatch in mismatches:
        print(mismatch)
    print(f"{options.rounds} rounds, {len(mismatches)} mismatches")
    sys.exit(bool(mismatches))


if __name__ == "__main__":
    main()
