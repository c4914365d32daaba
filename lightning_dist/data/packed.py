"""Sequences whose items lie in a few buffers, so that a worker process does not copy them.

A worker is a fork of the main process and shares its memory. Reading a Python object changes its
reference count, so the worker gets a copy of that part of the memory: in the end, a copy of all
paths of the data set. The items here are created when they are read.
"""

import operator
import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


class PackedPaths(Sequence[str]):
    """Paths in one buffer, with the places where they end: 8 bytes a path besides its characters.

    Args:
        paths: the paths.

    Example:
        >>> paths = PackedPaths(["a/one.png", "b/two.png"])
        >>> len(paths), paths[-1]
        (2, 'b/two.png')
    """

    def __init__(self, paths: Iterable[str | os.PathLike[str]]) -> None:
        encoded = [os.fsencode(path) for path in paths]
        self._characters = b"".join(encoded)
        self._ends = np.cumsum([len(path) for path in encoded], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: Any) -> Any:
        """Return the path at an index; a slice is refused with a TypeError."""
        index = range(len(self))[operator.index(index)]
        start = self._ends[index - 1] if index else 0
        return os.fsdecode(self._characters[start : self._ends[index]])


class LabelledPaths(Sequence[tuple[str, int]]):
    """The path and the label of each image, 16 bytes an image besides the characters.

    Args:
        paths: the paths.
        labels: the label of each path.

    Attributes:
        paths: the paths.
        labels: the labels, int64 ``(N,)``.
    """

    def __init__(self, paths: Iterable[str | os.PathLike[str]], labels: Iterable[int]) -> None:
        self.paths = PackedPaths(paths)
        self.labels: Tensor = torch.from_numpy(np.fromiter(labels, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: Any) -> Any:
        """Return the path and the label at an index."""
        return self.paths[index], int(self.labels[index])
