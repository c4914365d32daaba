"""Functions that compute a view of a teacher cache: each process computes a share of the rows."""

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_dist.cache.digest import digest
from lightning_dist.cache.files import ViewFiles
from lightning_dist.data.views import KeyedBatch
from lightning_dist.taps import logits_of, record_outputs
from lightning_dist.teacher import Teacher
from lightning_dist.teacher.base import Tap

if TYPE_CHECKING:
    from lightning_dist.data.base import ImageDataModule

FINGERPRINT = "(images)"  # The entry of a row that contains the fingerprint of its image.


def name_of(tap: Tap) -> str:
    """Return the name of the entry of a row that contains a teacher's output.

    Args:
        tap: a dotted path of a part of the teacher ("" is the teacher itself), and a key or index
            of the part's output (None takes its logits).
    """
    part, entry = tap
    return (part or "(output)") + ("" if entry is None else f"[{entry!r}]")


@dataclass
class TeacherRows:
    """An object that computes a teacher's outputs for batches, as structured rows.

    Args:
        teacher: the teacher, without a cache.
        taps: the outputs that a row contains, as in :func:`name_of`.
        stored: the dtype of the numbers in the rows.
    """

    teacher: Teacher
    taps: Sequence[Tap]
    stored: np.dtype

    @contextmanager
    def on_device(self, device: torch.device) -> Iterator[None]:
        """Move the frozen teacher to a device; after the ``with`` block it is on the CPU."""
        self.teacher.freeze()
        self.teacher.network.to(device)
        try:
            yield
        finally:
            self.teacher.network.to("cpu")

    def rows(self, batch: KeyedBatch, device: torch.device) -> np.ndarray:
        """Compute the rows of a batch on the teacher's device.

        Args:
            batch: a batch of N images on the CPU, and their fingerprints.
            device: the device of the teacher.

        Returns:
            A structured array of shape ``(N,)``.

        Raises:
            MisconfigurationException: if the teacher does not return one output for each image, if
                an output is NaN, or if it is too large for the stored dtype.
        """
        columns = {FINGERPRINT: batch.fingerprints}
        for tap, answer in self._outputs(batch.inputs.to(device, copy=True)).items():
            if answer.shape[:1] != (len(batch.fingerprints),):
                raise MisconfigurationException(
                    f"the teacher's {name_of(tap)} has the shape {tuple(answer.shape)} for "
                    f"{len(batch.fingerprints)} images: a CachedTeacher needs one output for each "
                    "image. Use the teacher without a cache (distill.cache=off)"
                )
            columns[name_of(tap)] = self._narrowed(name_of(tap), answer)
        kinds = [(name, column.dtype, column.shape[1:]) for name, column in columns.items()]
        rows = np.empty(len(batch.fingerprints), np.dtype(kinds))
        for name, column in columns.items():
            rows[name] = column
        return rows

    def _narrowed(self, name: str, answer: Tensor) -> np.ndarray:
        """Return an output in the stored dtype; refuse NaN, and numbers that would overflow."""
        wide = answer.to(torch.promote_types(answer.dtype, torch.float32)).cpu().numpy()
        if np.isnan(wide).any():
            raise MisconfigurationException(
                f"the teacher's {name} is NaN for some training images: check the teacher's "
                "weights, its dtype and the normalisation of its images"
            )
        with np.errstate(over="ignore"):
            narrow = wide.astype(self.stored)
        if (np.isinf(narrow) & np.isfinite(wide)).any():
            largest = np.abs(wide[np.isfinite(wide)]).max()
            advice = "use CachedTeacher with dtype='float32' (distill.cache_dtype=float32), or use "
            raise MisconfigurationException(
                f"the teacher's {name} has values up to {largest:.3g}, which are too large for "
                f"{self.stored}: {advice if self.stored.itemsize < 4 else 'use '}a teacher whose "
                "outputs are smaller"
            )
        return narrow

    @torch.no_grad()
    def _outputs(self, images: Tensor) -> dict[Tap, Tensor]:
        """Call the teacher with images, and return the outputs that a row contains."""
        outputs: dict[str, list[Any]] = {part: [] for part, _ in self.taps}
        with ExitStack() as taps:
            for part, found in outputs.items():
                if part:
                    taps.callback(record_outputs(self.teacher.network, part, found))
            whole = self.teacher(images)
        if "" in outputs:
            outputs[""].append(whole)
        for part, calls in outputs.items():
            if len(calls) != 1:
                raise MisconfigurationException(
                    f"the teacher's {part!r} was called {len(calls)} times for one batch, but a "
                    "CachedTeacher stores one output. Use the teacher without a cache "
                    "(distill.cache=off)"
                )
        return {tap: logits_of(outputs[tap[0]][0], tap[1]) for tap in self.taps}


def fill(
    view: int, files: ViewFiles, data: "ImageDataModule", answers: TeacherRows, trainer: Trainer
) -> None:
    """Compute a view that the first process has claimed; all processes call this function.

    The states of the global random generators are restored afterwards.

    Args:
        view: the number of the view.
        files: the folder to write the view to.
        data: the data module that loads the view.
        answers: the object that computes the rows. It moves the teacher to the device, and back to
            the CPU.
        trainer: the Trainer whose processes share the work.

    Raises:
        MisconfigurationException: if the rows differ in shape, or if :meth:`TeacherRows.rows`
            refuses a batch.
        OSError: if the disk has too little free space.
    """
    strategy = trainer.strategy
    device = strategy.root_device
    share = np.array_split(np.arange(files.rows), trainer.world_size)[trainer.global_rank]
    begun, seconds = None, time.monotonic()
    with answers.on_device(device), kept_generators(device):
        for batch in data.view_dataloader(view, share.tolist()):
            rows = answers.rows(batch, device)
            if begun is None:
                begun = _begin(view, files, data, rows.dtype, trainer)
            if rows.dtype != begun:
                raise MisconfigurationException(
                    f"the teacher's outputs have different shapes: {begun} and {rows.dtype}. Use "
                    "images of one size, or the teacher without a cache (distill.cache=off)"
                )
            files.write(view, int(batch.indices[0]), rows)
    if begun is None:  # This process has no rows, because there are more processes than samples.
        _begin(view, files, data, np.dtype("V"), trainer)
    files.flush(view)
    strategy.barrier()
    if trainer.is_global_zero:
        files.commit(view)
    strategy.barrier()
    rank_zero_info(f"teacher cache: view {view} took {time.monotonic() - seconds:.1f} s")


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
    view: int, files: ViewFiles, data: "ImageDataModule", row: np.dtype, trainer: Trainer
) -> np.dtype:
    """Log the cache's size, create the view's file, and return the rows' dtype (first process)."""
    if trainer.is_global_zero:
        views = data.train_views().count
        rank_zero_info(
            f"teacher cache: filling view {view} in {files.folder}; {views} views of "
            f"{files.rows:,} samples take {views * files.rows * row.itemsize / 1e6:,.1f} MB, "
            f"of which {files.missing_bytes(views, row) / 1e6:,.1f} MB are still to be written"
        )
        files.create(view, row)
    return trainer.strategy.broadcast(row)
