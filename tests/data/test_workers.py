"""Tests of when the worker processes of a loader end, and of batches that they cannot pass on."""

import multiprocessing
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from disk import almost_full_disk
from lightning_dist.cli.errors import one_line_errors
from lightning_dist.data.base import ImageDataModule
from lightning_dist.data.loaders import collate_as_lists
from lightning_dist.data.workers import start_worker
from processes import wait_until

SECONDS = 30  # A process ends within two seconds, but may take longer on a busy machine.
HELD: list[Any] = []  # The iterators that a process still has when it exits.


class Samples(Dataset):
    """Eight images, of which the last four never come if the data set is stuck."""

    def __init__(self, stuck: bool) -> None:
        self.stuck = stuck

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        while self.stuck and index >= 4:
            time.sleep(1)
        return torch.zeros(1, 4, 4), 0


class Data(ImageDataModule):
    """A data module whose loaders have one worker each, and batches of two images."""

    num_classes, class_names, location = 2, None, "nowhere"
    mean, std, image_size, in_channels = (0.5,), (0.5,), 4, 1

    def __init__(self, stuck: bool) -> None:
        super().__init__(global_batch_size=2, num_workers=1)
        self.stuck = stuck

    def train_dataset(self) -> Dataset:
        return Samples(stuck=False)

    def val_dataset(self) -> Dataset:
        return Samples(self.stuck)


def load(messages: Connection, stuck: bool) -> None:
    """Take a batch of each loader; after a message, take the others, unless the data is stuck."""
    os.setsid()
    torch.set_num_threads(1)  # as torch's workers do, because the threads of OpenMP are not forked
    data = Data(stuck)
    HELD.extend(
        [
            iter(data.train_dataloader()),
            iter(data.val_dataloader()),
            iter(data.view_dataloader(0, range(8))),
        ]
    )
    for batches in HELD:
        next(batches)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    messages.send([process.pid for process in multiprocessing.active_children()])
    messages.recv()
    messages.send(0 if stuck else [len(list(batches)) for batches in HELD])


Loading = tuple[Any, Connection, list[int]]


@pytest.fixture
def loading() -> Iterator[Callable[[bool], Loading]]:
    """Return a function that starts `load`, and returns its process, messages and workers."""
    started: list[int] = []

    def start(stuck: bool) -> Loading:
        context = multiprocessing.get_context("fork")
        messages, others = context.Pipe()
        process = context.Process(target=load, args=(others, stuck))
        process.start()
        started.append(process.pid)
        assert messages.poll(SECONDS)
        workers = messages.recv()
        started.extend(workers)
        return process, messages, workers

    yield start
    for pid in started:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def run(pid: int) -> bool:
    """Return whether a process still runs."""
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


@pytest.mark.parametrize("how", ["returns", "is killed"])
def test_workers_end_with_the_process_of_their_loaders(loading, how):
    process, messages, workers = loading(stuck=True)
    assert len(workers) == 3
    assert all(map(run, workers))
    messages.send("go on")
    if how == "is killed":
        process.kill()
    process.join(SECONDS)
    assert process.exitcode == (0 if how == "returns" else -signal.SIGKILL)
    wait_until(lambda: not any(map(run, workers)), SECONDS)


def test_workers_go_on_after_a_signal_to_all_processes_and_end_with_the_loaders(loading):
    process, messages, workers = loading(stuck=False)
    for number in (signal.SIGINT, signal.SIGTERM):
        for worker in workers:
            os.kill(worker, number)
    messages.send("go on")
    assert messages.poll(SECONDS)
    assert messages.recv() == [3, 3, 3]  # the batches after the first one
    process.join(SECONDS)
    assert process.exitcode == 0
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
