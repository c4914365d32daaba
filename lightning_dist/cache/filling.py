"""Filling a view of a teacher cache: every process of a run computes its share of the rows."""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_dist.cache.files import ViewFiles
from lightning_dist.data.views import KeyedBatch
from lightning_dist.taps import logits_of as select
from lightning_dist.taps import record_outputs as record
from lightning_dist.teacher import Teacher

if TYPE_CHECKING:
    from lightning_dist.data.base import ImageDataModule

PRINTS = "(images)"  # the entry of a row that tells its image from others

Tap = tuple[str, str | int | None]  # a part of the teacher, and the entry of its output


def name_of(tap: Tap) -> str:
    """The entry of a row that holds a tap."""
    part, entry = tap
    return (part or "(output)") + ("" if entry is None else f"[{entry!r}]")


@dataclass
class Answers:
    """What a teacher says of batches, as rows.

    Args:
        teacher: is asked.
        taps: what is taken from it.
        stored: dtype of the rows' numbers.
    """

    teacher: Teacher
    taps: Sequence[Tap]
    stored: np.dtype

    def rows(self, batch: KeyedBatch, device: torch.device) -> np.ndarray:
        """The rows of a batch, one a sample, computed on a device where the teacher is.

        Raises:
            MisconfigurationException: if there is no one answer a sample, or the stored dtype
                cannot hold it.
        """
        columns = {PRINTS: batch.prints}
        for tap, answer in self._ask(batch.inputs.to(device)).items():
            if answer.shape[:1] != (len(batch.prints),):
                raise MisconfigurationException(
                    f"the teacher's {name_of(tap)} gives {tuple(answer.shape)} for "
                    f"{len(batch.prints)} images: a CachedTeacher needs one answer an image "
                    "(distill.cache=off asks the teacher itself)"
                )
            column = answer.float().cpu().numpy()
            with np.errstate(over="ignore"):
                columns[name_of(tap)] = column.astype(self.stored)
            if not np.isfinite(columns[name_of(tap)]).all():
                raise MisconfigurationException(
                    f"the teacher's {name_of(tap)} has values up to {np.abs(column).max():.3g}, "
                    f"which {self.stored} cannot hold: give CachedTeacher dtype='float32' "
                    "(distill.cache_dtype=float32), or a teacher whose outputs are finite"
                )
        kinds = [(name, column.dtype, column.shape[1:]) for name, column in columns.items()]
        rows = np.empty(len(batch.prints), np.dtype(kinds))
        for name, column in columns.items():
            rows[name] = column
        return rows

    @torch.no_grad()
    def _ask(self, images: Tensor) -> dict[Tap, Tensor]:
        """What the teacher itself says of a batch."""
        outputs: dict[str, list[Any]] = {part: [] for part, _ in self.taps}
        with ExitStack() as hooks:
            for part in outputs:
                if part:
                    hooks.callback(record(self.teacher.network.get_submodule(part), outputs[part]))
            whole = self.teacher(images)
        if "" in outputs:
            outputs[""].append(whole)
        for part, calls in outputs.items():
            if len(calls) != 1:
                raise MisconfigurationException(
                    f"the teacher's {part!r} was called {len(calls)} times for one batch: a "
                    "CachedTeacher keeps one answer (distill.cache=off asks the teacher itself)"
                )
        return {tap: select(outputs[tap[0]][0], tap[1]) for tap in self.taps}


def fill(
    view: int, files: ViewFiles, data: "ImageDataModule", answers: Answers, trainer: Trainer
) -> None:
    """Compute a view that the first process has claimed; all processes call this.

    Args:
        view: its number.
        files: where it goes.
        data: shows the view.
        answers: the teacher's, which moves to the device and back to the CPU.
        trainer: whose processes share the work.

    Raises:
        MisconfigurationException: if the rows differ in shape, or see :meth:`Answers.rows`.
        OSError: if there is no room for them.
    """
    strategy, network = trainer.strategy, answers.teacher.network
    share = np.array_split(np.arange(files.rows), trainer.world_size)[trainer.global_rank]
    begun, seconds = None, time.monotonic()
    network.to(strategy.root_device)
    answers.teacher.freeze()
    try:
        for batch in data.view_dataloader(view, share.tolist()):
            rows = answers.rows(batch, strategy.root_device)
            if begun is None:
                begun = _begin(view, files, data, rows.dtype, trainer)
            if rows.dtype != begun:
                raise MisconfigurationException(
                    f"the teacher's answers differ in shape: {begun} and {rows.dtype}. A "
                    "CachedTeacher needs images of one size (distill.cache=off asks the teacher "
                    "itself)"
                )
            files.write(view, int(batch.indices[0]), rows)
    finally:
        network.to("cpu")
    if begun is None:  # more processes than samples
        _begin(view, files, data, np.dtype("V"), trainer)
    files.flush(view)
    strategy.barrier()
    if trainer.is_global_zero:
        files.commit(view)
    strategy.barrier()
    rank_zero_info(f"teacher cache: view {view} took {time.monotonic() - seconds:.1f} s")


def _begin(
    view: int, files: ViewFiles, data: "ImageDataModule", row: np.dtype, trainer: Trainer
) -> np.dtype:
    """Say how much is to come, and make the file; the first process's kind of row."""
    if trainer.is_global_zero:
        views = data.train_views().count
        rank_zero_info(
            f"teacher cache: filling view {view} in {files.folder}; {views} views of "
            f"{files.rows:,} samples take {views * files.rows * row.itemsize / 1e6:,.1f} MB, "
            f"of which {files.missing_bytes(views, row) / 1e6:,.1f} MB are still to be written"
        )
        files.create(view, row)
    return trainer.strategy.broadcast(row)
