"""Functions that compute a view of a teacher cache: each process computes a share of its blocks."""

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

from lightning_dist.cache.digest import digest
from lightning_dist.cache.files import ViewFiles
from lightning_dist.cache.rows import TeacherRows, fields_of

if TYPE_CHECKING:
    from lightning_dist.data.base import ImageDataModule


def fill(
    view: int,
    files: ViewFiles,
    data: "ImageDataModule",
    answers: TeacherRows,
    row: np.dtype,
    trainer: Trainer,
) -> None:
    """Compute a view that the first process has claimed; all processes call this function.

    The rows that an earlier run has written are kept. The others are computed in blocks, each a
    batch of the teacher; a signal ends the run between two blocks. The states of the global random
    generators are restored afterwards.

    Args:
        view: the number of the view.
        files: the folder to write the view to.
        data: the data module that loads the view.
        answers: the object that computes the rows. It moves the teacher to the device, and back to
            the CPU.
        row: the dtype of a row in the file.
        trainer: the Trainer whose processes share the work.

    Raises:
        MisconfigurationException: if the rows differ in shape, or if :meth:`TeacherRows.rows`
            refuses a batch.
        OSError: if the disk has too little free space.
        SystemExit: if a process of the run received a signal that ends it.
    """
    strategy, world, rank = trainer.strategy, trainer.world_size, trainer.global_rank
    device, seconds = strategy.root_device, time.monotonic()
    missing = _begin(view, files, data, row) if trainer.is_global_zero else []
    blocks = blocks_of(strategy.broadcast(missing), data.batch_size)
    with answers.on_device(device), kept_generators(device):
        own = iter(data.view_dataloader(view, blocks[rank::world]))
        try:
            for _ in range(0, len(blocks), world):  # All processes take part in each round.
                end_if_signalled(trainer)
                batch = next(own, None)
                if batch is None:
                    continue
                rows = answers.rows(batch, device)
                if fields_of(rows.dtype) != fields_of(row):
                    raise MisconfigurationException(
                        f"the teacher's outputs have different shapes: {row} and {rows.dtype}. Use "
                        "images of one size, or the teacher without a cache (distill.cache=off)"
                    )
                padded = np.zeros(len(rows), row)
                padded[:] = rows
                files.write(view, int(batch.indices[0]), padded, process=rank)
        finally:
            del own  # This ends its worker processes.
    files.flush(view)
    strategy.barrier()
    if trainer.is_global_zero:
        files.commit(view)
    strategy.barrier()
    rank_zero_info(f"teacher cache: view {view} took {time.monotonic() - seconds:.1f} s")


def blocks_of(missing: Sequence[tuple[int, int]], size: int) -> list[range]:
    """Cut ranges of rows into blocks that begin at multiples of a size.

    So a row has the same neighbours in its block, and the same bits, whether or not the filling was
    interrupted.

    Args:
        missing: ranges of rows, each as its start and its end.
        size: the largest number of rows of a block.

    Example:
        >>> blocks_of([(2, 7), (9, 10)], size=4)
        [range(2, 4), range(4, 7), range(9, 10)]
    """
    blocks = []
    for start, end in missing:
        edges = [start, *range((start // size + 1) * size, end, size), end]
        blocks += [range(a, b) for a, b in pairwise(edges)]
    return blocks


def end_if_signalled(trainer: Trainer) -> None:
    """End the run, in all processes, if one of them has received a signal that ends it.

    A callback that handles signals, such as :class:`lightning_dist.resume.ExactResume`, ends the
    run by a method of the same name. Without one, this does what Lightning does after a batch.

    Args:
        trainer: the Trainer, which is in a training step.

    Raises:
        SystemExit: if there was a signal.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        end = getattr(callback, "end_if_signalled", None)
        if end is not None:
            end(trainer)
            return
    if trainer.strategy.reduce_boolean_decision(trainer.received_sigterm, all=False):
        raise SIGTERMException


@contextmanager
def kept_generators(device: torch.device) -> Iterator[Callable[[], bool]]:
    """Restore the states of the global random generators when the context ends.

    Args:
        device: the device whose generator is restored as well, in addition to those of the CPU,
            NumPy and Python.

    Returns:
        A context manager. Its value is a function that returns True if random numbers were drawn.
    """
    generators: list[tuple[Callable[[], Any], Callable[[Any], Any]]] = [
        (torch.get_rng_state, torch.set_rng_state),
        (np.random.get_state, np.random.set_state),
        (random.getstate, random.setstate),
    ]
    if device.type != "cpu":
        module = torch.get_device_module(device)
        generators.append((module.get_rng_state, module.set_rng_state))
    before = [get() for get, _ in generators]
    try:
        yield lambda: digest([get() for get, _ in generators]) != digest(before)
    finally:
        for (_, put), state in zip(generators, before, strict=True):
            put(state)


def _begin(
    view: int, files: ViewFiles, data: "ImageDataModule", row: np.dtype
) -> list[tuple[int, int]]:
    """Log the cache's size, prepare the view's file, and return the ranges of missing rows."""
    views = data.train_views().count
    rank_zero_info(
        f"teacher cache: filling view {view} in {files.folder}; {views} views of "
        f"{files.rows:,} samples take {views * files.rows * row.itemsize / 1e6:,.1f} MB, "
        f"of which {files.missing_bytes(views, row) / 1e6:,.1f} MB are still to be written"
    )
    missing = files.begin(view, row)
    found = files.rows - sum(end - start for start, end in missing)
    if found:
        rank_zero_info(f"teacher cache: {found:,} samples of view {view} are already written")
    return missing
