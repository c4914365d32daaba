"""``Layout``: how rows and classes of logits lie in memory, and how kernels divide them."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# A thread has 4 elements of a tile (more if the rows are longer than a tile), so that the elements
# and their statistics fit in registers and several programs share a processor.
_TILE = 1024
_PER_WARP = 4 * 32
_MOST_WARPS = 16
_LEAST_COLUMNS = 16
MOST_CLASSES = 8192  # A row with more classes is read in chunks.
CHUNK, CHUNK_WARPS = 4096, 8  # the number of classes of a chunk, and of warps for it
READ = 11  # the number of strides of student, teacher and mask; those of the gradient follow
_PROGRAMS_PER_PROCESSOR = 4
_INTERPRETED_PROGRAMS = 3  # several, so that the interpreter merges their statistics too


@dataclass(frozen=True)
class Layout:
    """The sizes and strides of tensors with three dimensions of rows and one of classes.

    Attributes:
        classes: the number of classes.
        sizes: the sizes (N, H, W) of the rows' dimensions.
        strides: for each tensor, the strides of these dimensions and of the classes.
    """

    classes: int
    sizes: tuple[int, int, int]
    strides: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, tensors: Sequence[Tensor], axis: int) -> "Layout | None":
        """Return the layout of tensors of one shape, or None if it needs more dimensions.

        Dimensions that lie in memory like a single one are joined, and the order of the rows does
        not matter, so three dimensions are enough for all usual layouts.

        Args:
            tensors: the tensors; a mask has the size 1 in the dimension of the classes.
            axis: the dimension of the classes.
        """
        shape, strides = tensors[0].shape, [x.stride() for x in tensors]
        rows = [i for i in range(len(shape)) if i != axis and shape[i] > 1]
        rows.sort(key=lambda i: -strides[0][i])
        joined: list[tuple[int, tuple[int, ...]]] = []  # the size, and the stride in each tensor
        for i in rows:
            inner = tuple(stride[i] for stride in strides)
            if joined and joined[-1][1] == tuple(stride * shape[i] for stride in inner):
                joined[-1] = joined[-1][0] * shape[i], inner
            else:
                joined.append((shape[i], inner))
        if len(joined) > 3:
            return None
        joined = [(1, (0,) * len(tensors))] * (3 - len(joined)) + joined
        if joined[2][0] < _LEAST_COLUMNS:  # Tiles are cut from the last dimension.
            joined.sort(key=lambda dimension: dimension[0])
        by_tensor = tuple(
            (*(dimension[1][k] for dimension in joined), stride[axis])
            for k, stride in enumerate(strides)
        )
        return cls(shape[axis], (joined[0][0], joined[1][0], joined[2][0]), by_tensor)

    @property
    def rows(self) -> int:
        """The number of rows."""
        return self.sizes[0] * self.sizes[1] * self.sizes[2]

    @property
    def fits(self) -> bool:
        """Whether a program can hold all classes of a row."""
        return self.classes <= MOST_CLASSES

    def numbers(self) -> list[int]:
        """Return the strides of student, teacher, mask (without classes) and gradient in a list."""
        student, teacher, mask, gradient = self.strides
        return [*student, *teacher, *mask[:3], *gradient]

    def tiles(self, columns: int | None = None) -> "Tiles":
        """Return the tiles that cover all rows.

        Args:
            columns: the number of columns of a tile, a power of 2; by default at least the number
                of classes.
        """
        columns = columns or max(next_power_of_2(self.classes), _LEAST_COLUMNS)
        rows = max(1, min(_TILE // columns, next_power_of_2(self.sizes[2])))
        across = -(-self.sizes[2] // rows)
        reach = max((rows - 1) * s[2] + (self.classes - 1) * s[3] for s in self.strides)
        return Tiles(
            rows=rows,
            columns=columns,
            across=across,
            count=across * self.sizes[0] * self.sizes[1],
            wide=reach >= 2**31,
            warps=max(1, min(_MOST_WARPS, rows * columns // _PER_WARP)),
        )


@dataclass(frozen=True)
class Tiles:
    """The tiles into which a kernel divides the rows.

    Attributes:
        rows: the number of rows of a tile.
        columns: the number of its columns.
        across: the number of tiles in the last dimension of the rows.
        count: the number of tiles of all rows.
        wide: whether the offsets in a tile exceed 32 bits.
        warps: the number of warps that work on a tile.
    """

    rows: int
    columns: int
    across: int
    count: int
    wide: bool
    warps: int

    def options(self) -> dict[str, Any]:
        """Return the tile's options of a kernel."""
        return {
            "WIDE": self.wide,
            "BR": self.rows,
            "BC": self.columns,
            "num_warps": self.warps,
        }


def next_power_of_2(number: int) -> int:
    """Return the smallest power of 2 that is at least a number."""
    return 1 << max(number - 1, 0).bit_length()


def programs(device: torch.device, tiles: int) -> int:
    """Return how many programs share a number of tiles."""
    most = _INTERPRETED_PROGRAMS
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
        most = _PROGRAMS_PER_PROCESSOR * processors
    return min(tiles, most)


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which kernels start on a device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def arrange(
    axis: int, student: Tensor, teacher: Tensor, mask: Tensor | None
) -> tuple[Layout, tuple[Tensor, Tensor, Tensor]]:
    """Return the layout of logits, and the tensors that the kernels read.

    The strides are those of student, teacher, mask and the student's gradient. Tensors are copied
    only if their rows need more than three dimensions.

    Args:
        axis: the dimension of the classes.
        student: logits of any shape and layout.
        teacher: logits of the same shape.
        mask: a boolean tensor of this shape, but with size 1 in the dimension of the classes.

    Returns:
        The layout; student, teacher and the mask as bytes. Without a mask, the third tensor is one
        that no kernel reads.
    """
    tensors = student, teacher, student if mask is None else mask.view(torch.uint8)
    layout = Layout.of((*tensors, torch.empty_like(student, device="meta")), axis)
    if layout is None:
        copies = [x.contiguous() for x in tensors]
        tensors = copies[0], copies[1], copies[2]
        layout = Layout.of((*tensors, torch.empty_like(copies[0], device="meta")), axis)
        assert layout is not None
    return layout, tensors
