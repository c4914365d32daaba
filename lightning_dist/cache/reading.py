"""`AnswerReader`, which reads a teacher's outputs for a batch in the process that loads it."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_dist.cache.files import ViewFiles, read_rows
from lightning_dist.cache.rows import FINGERPRINT
from lightning_dist.data.views import KeyedBatch


class RowFile:
    """A complete view, whose rows are read one by one.

    With a memory map, Linux would also read 128 KB or more around each row that is not in memory.

    Args:
        path: the path of the view.
        rows: the number of rows that it must have.
        fields: the names of the entries that a row must have.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if the file is truncated or has other contents. Nothing is unpickled.
    """

    def __init__(self, path: Path, rows: int, fields: Sequence[str]) -> None:
        mapped: Any = read_rows(path, rows, fields, delete=path)
        self.path, self.dtype, self._offset = path, mapped.dtype, mapped.offset
        self._file = path.open("rb", buffering=0)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Return the rows of some samples.

        Args:
            indices: the positions of the samples, ``(N,)``.

        Returns:
            A structured array of shape ``(N,)``.

        Raises:
            ValueError: if the file has become shorter.
        """
        file, size = self._file.fileno(), self.dtype.itemsize
        # pread, because worker processes that were forked share the position of the open file.
        rows = [os.pread(file, size, self._offset + index * size) for index in indices.tolist()]
        if any(len(row) != size for row in rows):
            raise ValueError(f"{self.path} is damaged (truncated): delete it")
        return np.frombuffer(b"".join(rows), self.dtype)


class AnswerReader:
    """A function that adds the teacher's outputs to a training batch.

    The data module calls it for each batch in the process that loads the batch, so that worker
    processes read ahead. A copy in another process opens the files itself.

    Args:
        files: the files of the views.
        row: the dtype of a row.
    """

    def __init__(self, files: ViewFiles, row: np.dtype) -> None:
        self.files = files
        self.row = row
        # An example of what a sample takes in shared memory, for the data module's estimate.
        self.adds = torch.empty(row.itemsize, dtype=torch.uint8, device="meta")
        # Only one view is open, because each open one holds a file descriptor.
        self._open: tuple[int, RowFile] | None = None

    def __call__(self, batch: KeyedBatch) -> KeyedBatch:
        """Add the outputs to a batch, if its view is complete."""
        try:
            batch.answers = self.read(batch)
        except (OSError, ValueError):
            # The view may not be complete yet. The training step reads again what is missing, and
            # its errors are those of the main process.
            batch.answers = None
        return batch

    def open(self, view: int) -> RowFile:
        """Return the rows of a view, whose file is kept open until another view is needed.

        Raises:
            FileNotFoundError: if the view is not complete.
            ValueError: if its file is damaged.
        """
        if self._open is None or self._open[0] != view:
            self.close()
            names = self.row.names or ()
            self._open = view, RowFile(self.files.path(view), self.files.rows, names)
        return self._open[1]

    def close(self) -> None:
        """Close the file of the open view."""
        self._open = None

    def read(self, batch: KeyedBatch) -> dict[str, Tensor]:
        """Return a batch's outputs as bytes, after comparing its images with those of the rows.

        Returns:
            A dict from the names of the entries of a row to the bytes of their numbers, uint8
            ``(N, bytes)``.

        Raises:
            FileNotFoundError: if the batch's view is not complete.
            ValueError: if the view's file is damaged, or has the outputs for other images.
        """
        rows = self.open(batch.view).read(batch.indices)
        same = np.isclose(rows[FINGERPRINT], batch.fingerprints, rtol=1e-6, atol=1e-4)
        if not same.all():
            raise ValueError(
                f"sample {batch.indices[~same][0]} in view {batch.view} is another image than when "
                f"the teacher's outputs in {self.files.path(batch.view)} were computed: the data, "
                f"or the code that augments it, has changed. Delete {self.files.folder}, so that "
                "the next run computes it again"
            )
        names = [name for name in rows.dtype.names or () if name != FINGERPRINT]
        columns = {name: np.array(rows[name]).reshape(len(rows), -1) for name in names}
        return {name: torch.from_numpy(x.view(np.uint8)) for name, x in columns.items()}

    def numbers(self, name: str, answers: dict[str, Tensor]) -> Tensor:
        """Return the numbers of an entry, in the dtype of the file, from what :meth:`read` returns.

        Args:
            name: the name of the entry.
            answers: the bytes, on any device.
        """
        base, shape = self.row[name].base, self.row[name].shape
        return answers[name].view(getattr(torch, base.name)).reshape(-1, *shape)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_open": None}
