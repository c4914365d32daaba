"""Tests of when the worker processes of a loader end, and of batches that they cannot pass on."""

import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch.utils.data import DataLoader, default_collate

import loading as loading_script
from disk import almost_full_disk
from lightning_dist.cli.errors import one_line_errors
from lightning_dist.data.loaders import collate_as_lists
from lightning_dist.data.workers import start_worker
from processes import wait_until

SECONDS = 60  # A process ends within two seconds, but starts slowly on a busy machine.


@pytest.fixture
def loading(processes) -> Callable[[str], tuple[subprocess.Popen, list[int]]]:
    """Return a function that starts the script `loading.py`, and returns it and its workers."""

    def start(argument: str) -> tuple[subprocess.Popen, list[int]]:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        script = processes.start(Path(loading_script.__file__), argument, **pipes)
        return script, [int(pid) for pid in script.stdout.readline().split()]

    return start


def run(pid: int) -> bool:
    """Return whether a process still runs."""
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


@pytest.mark.parametrize("how", ["returns", "is killed"])
def test_workers_end_with_the_process_of_their_loaders(loading, how):
    script, workers = loading("stuck")
    assert len(workers) == 3
    assert all(map(run, workers))
    if how == "is killed":
        script.kill()
    else:
        script.stdin.write("\n")
        script.stdin.flush()
    assert script.wait(SECONDS) == (0 if how == "returns" else -signal.SIGKILL)
    wait_until(lambda: not any(map(run, workers)), SECONDS)


def test_workers_go_on_after_a_signal_to_all_processes_and_end_with_the_loaders(loading):
    script, workers = loading("complete")
    for number in (signal.SIGINT, signal.SIGTERM):
        for worker in workers:
            os.kill(worker, number)
    script.stdin.write("\n")
    script.stdin.flush()
    assert script.stdout.readline().split() == ["3", "3", "3"]  # the batches after the first one
    assert script.wait(SECONDS) == 0
    wait_until(lambda: not any(map(run, workers)), SECONDS)


def batches(samples: list[Any], collate: Callable[[Any], Any]) -> Iterator[Any]:
    """Yield batches of two samples from a worker."""
    loading = iter(
        DataLoader(
            samples,
            batch_size=2,
            num_workers=1,
            collate_fn=collate,
            worker_init_fn=start_worker,
            timeout=SECONDS,
        )
    )
    try:
        yield from loading
    finally:
        # The garbage collector would end the queues first, and then wait for the worker.
        loading._shutdown_workers()


@pytest.mark.parametrize("collate", [default_collate, collate_as_lists])
def test_a_batch_that_does_not_fit_in_shared_memory_ends_a_command_with_one_line(collate, capsys):
    """The third batch does not fit, so that no estimate from the first sample can find it."""
    samples = [torch.zeros(10 if index < 4 else 1000) for index in range(8)]
    loading = batches([(sample, 0) for sample in samples], collate)
    with almost_full_disk(2000):
        assert [next(loading)[0][0].shape[-1] for _ in range(2)] == [10, 10]
        with pytest.raises(SystemExit), one_line_errors():
            next(loading)
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search("File too large.*: set data.num_workers=0, .*--shm-size", line)


def test_a_batch_that_cannot_be_pickled_ends_the_loading_and_is_named():
    with pytest.raises(ValueError, match="cannot pass on a batch: cannot pickle 'generator'"):
        next(batches([(index for index in [0])] * 2, list))
