"""Read the metadata of an ONNX file without its graph, which onnx would copy into memory."""

import mmap
from collections.abc import Iterator
from pathlib import Path

from lightning_dist.files.text import MOST_READ

# The numbers of the fields in ONNX's protocol buffers: ModelProto.metadata_props, and its entries'
# key and value.
_METADATA, _KEY, _VALUE = 14, 1, 2
# A model has one field for each function and each entry of its metadata, and a few others.
_MOST_FIELDS = 100_000


def onnx_metadata(path: Path) -> dict[str, str]:
    """Return the metadata of a model.

    Args:
        path: the ``.onnx`` file.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is damaged, or its metadata is too long.
    """
    found: dict[str, str] = {}
    with (
        open(path, "rb") as opened,
        mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as file,
    ):
        for field, start, stop in _fields(file, 0, len(file)):
            if field != _METADATA:
                continue
            if stop - start > MOST_READ:
                raise ValueError(f"an entry of its metadata has {stop - start} bytes")
            parts = {number: file[a:b].decode() for number, a, b in _fields(file, start, stop)}
            found[parts.get(_KEY, "")] = parts.get(_VALUE, "")
    return found


def _fields(file: mmap.mmap, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield the number, start and end of each field that contains bytes."""
    for _ in range(_MOST_FIELDS):
        if at >= end:
            return
        tag, at = _number(file, at)
        kind, length = tag & 7, 0
        if kind == 0:
            _, at = _number(file, at)
        elif kind == 2:
            length, at = _number(file, at)
        elif kind in (1, 5):
            length = 8 if kind == 1 else 4
        else:
            raise ValueError(f"it has a field of the unknown kind {kind}")
        if at + length > end:
            raise ValueError("it is cut off")
        if kind == 2:
            yield tag >> 3, at, at + length
        at += length
    raise ValueError(f"it has more than {_MOST_FIELDS} fields")


def _number(file: mmap.mmap, at: int) -> tuple[int, int]:
    """Return a number of variable length, and the place after it."""
    number = 0
    for shift in range(0, 70, 7):
        if at >= len(file):
            raise ValueError("it is cut off")
        byte = file[at]
        at += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, at
    raise ValueError("it has a number of more than 10 bytes")
