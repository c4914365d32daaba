"""`TeacherRows`, which computes a teacher's outputs as the structured rows of a cache's files."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_dist.cache.files import PAGE
from lightning_dist.data.views import KeyedBatch
from lightning_dist.taps import logits_of, record_outputs
from lightning_dist.teacher import Teacher
from lightning_dist.teacher.base import Tap

FINGERPRINT = "(images)"  # The entry of a row that contains the fingerprint of its image.
MOST_PADDED = 1.06  # The largest size of a padded row, as a multiple of its size without padding.


def name_of(tap: Tap) -> str:
    """Return the name of the entry of a row that contains a teacher's output.

    Args:
        tap: a dotted path of a part of the teacher ("" is the teacher itself), and a key or index
            of the part's output (None takes its logits).
    """
    part, entry = tap
    return (part or "(output)") + ("" if entry is None else f"[{entry!r}]")


def fields_of(row: np.dtype) -> list[tuple[str, np.dtype]]:
    """Return the names and dtypes of the entries of a row, without padding."""
    return [(name, row[name]) for name in row.names or ()]


def row_in_file(row: np.dtype, stored: np.dtype) -> np.dtype:
    """Return the dtype of a row in a view's file.

    A row that is a little smaller than a page, or a half or quarter of one, is padded to that size,
    so that it lies in one page: reading it then takes one page and not two.

    Args:
        row: the dtype of a row that :class:`TeacherRows` has computed in any dtype.
        stored: the dtype of the numbers in the file.
    """
    packed = np.dtype(
        [
            (name, kind if name == FINGERPRINT else (stored, kind.shape))
            for name, kind in fields_of(row)
        ]
    )
    fitting = [PAGE // parts for parts in (4, 2, 1) if PAGE // parts > packed.itemsize]
    if not fitting or fitting[0] > MOST_PADDED * packed.itemsize:
        return packed
    descr: Any = [*packed.descr, ("", f"|V{fitting[0] - packed.itemsize}")]
    return np.lib.format.descr_to_dtype(descr)


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
