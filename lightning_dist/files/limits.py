"""Checks of weight files that bound the time and the memory that reading them takes."""

import os
import re
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_dist.files.pickles import refuse_strange_old_format, refuse_strange_pickles

# A header of safetensors and the directory of an archive list tensors: about 100 bytes for each.
_MOST_HEADER = 8 * 2**20
# Limits for the contents of a file, far above those of a checkpoint.
_MOST_DEPTH, _MOST_VALUES = 64, 2_000_000
# The tensors in a file share storages, such as tied weights, but not in large numbers.
_MOST_SHARED, _SMALL = 8, 64 * 2**20


def refuse_holes(file: Path) -> None:
    """Raise an error if a file is mostly holes, which take no place on the disk.

    A few bytes of an archive can unpack to such a file, and it would be read as zeros.

    Raises:
        ValueError: if the file is much larger than what the disk stores of it.
    """
    size = file.stat().st_size
    if size > _SMALL and size > _MOST_SHARED * (stored := _stored_bytes(file)) + _SMALL:
        raise ValueError(f"it has {size} bytes, and only {stored} of them are on the disk")


def _stored_bytes(file: Path) -> int:
    """Return the size of a file without its holes; a file system may not tell where they are."""
    seek_data, seek_hole = getattr(os, "SEEK_DATA", None), getattr(os, "SEEK_HOLE", None)
    size = file.stat().st_size
    if seek_data is None or seek_hole is None:
        return size
    stored = end = 0
    with open(file, "rb", buffering=0) as opened:
        while end < size:
            try:
                start = opened.seek(end, seek_data)
            except OSError:  # There are no more data.
                break
            end = opened.seek(start, seek_hole)
            stored += end - start
    return stored


def refuse_strange_safetensors(file: Path) -> None:
    """Raise an error if the header of a safetensors file is longer than any network needs.

    Raises:
        ValueError: if the header is too long.
    """
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
    if length > _MOST_HEADER:
        raise ValueError(f"its header has {length} bytes, more than {_MOST_HEADER}")


def refuse_strange_torch_file(file: Path) -> None:
    """Raise an error if the file has a structure that is unsafe to read and not from torch.save.

    torch.save does not compress. Without compressed entries, a small file cannot fill the memory.
    An entry with a path such as ``../x`` is harmless here, because torch reads entries into memory.
    But a program that unpacks the archive would write a file outside its target folder.

    Raises:
        ValueError: if the archive has a directory that is not directly before its end, or an entry
            that is compressed, overlaps with another entry or has a path that leads out of the
            archive; or if a pickle in the file is refused by
            :func:`lightning_dist.files.pickles.refuse_strange_pickles`.
    """
    with open(file, "rb") as opened:
        is_archive = opened.read(2) == b"PK"
    if not is_archive:
        refuse_strange_old_format(file)
        return
    _refuse_other_directory(file)
    with zipfile.ZipFile(file) as archive:
        if sum(entry.file_size for entry in archive.infolist()) > file.stat().st_size:
            raise ValueError("its entries overlap or are compressed")
        for entry in archive.infolist():
            # torch reads the original name, without regard to case.
            name = f"{entry.orig_filename!r:.100}"
            parts = re.split(r"[/\\]", entry.orig_filename)
            if ".." in parts or parts[0] == "" or re.match("[A-Za-z]:", parts[0]):
                raise ValueError(f"its entry {name} leads out of the archive")
            if entry.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"its entry {name} is compressed")
            if parts[-1].lower() == "data.pkl":
                with archive.open(entry) as opened:
                    refuse_strange_pickles(opened)


def refuse_too_much(contents: Any, file: Path) -> None:
    """Raise an error if the contents of a small torch file would fill the memory when copied.

    A list that contains another list twice takes a few bytes in a file, but forty such levels are
    10^12 values for a program that copies them. A tensor can repeat one stored number.

    Args:
        contents: the contents of the file.
        file: the file, whose size bounds the sizes of the tensors.

    Raises:
        ValueError: if values are nested too deeply, or if values or tensors take too much memory.
    """
    most = _MOST_SHARED * file.stat().st_size + _SMALL
    # A list that is in several lists is measured once: its values, bytes and levels.
    measured: dict[int, tuple[int, int, int]] = {}

    def measure(node: Any, depth: int) -> tuple[int, int, int]:
        if isinstance(node, Tensor):
            found = (1, _bytes_of(node), 0)
        elif not isinstance(node, (dict, list, tuple, set)):
            return 1, 0, 0
        elif depth > _MOST_DEPTH or id(node) in measured:
            found = measured.get(id(node), (0, 0, 1))
        else:
            children = [*node, *node.values()] if isinstance(node, dict) else node
            parts = [measure(child, depth + 1) for child in children]
            counts, sizes, levels = zip((1, 0, 0), *parts, strict=True)
            found = measured[id(node)] = sum(counts), sum(sizes), 1 + max(levels)
        count, size, height = found
        if depth + height > _MOST_DEPTH:
            raise ValueError(f"its values are nested more than {_MOST_DEPTH} levels deep")
        if count > _MOST_VALUES:
            raise ValueError(f"it has more than {_MOST_VALUES} values")
        if size > most:
            raise ValueError("its tensors are larger than what it stores")
        return found

    measure(contents, 0)


def _bytes_of(tensor: Tensor) -> int:
    """Return the bytes that a copy of a tensor takes; 0 if it has no plain values."""
    if tensor.is_meta or tensor.layout != torch.strided:
        return 0
    return tensor.numel() * tensor.element_size()


# The records at the end of a zip archive: the signature and the fields that say where the list of
# its entries, the central directory, is. The record with 64-bit numbers comes before the other.
_END, _LOCATOR, _END64 = "<4s4H2LH", "<4sLQL", "<4sQ2H2L4Q"


def _refuse_other_directory(file: Path) -> None:
    """Raise an error if the directory of an archive is long, or not where the archive's end says.

    Python looks for the directory directly before the end of the file, and torch at the recorded
    place. An archive can have one directory at each, and Python then checks other entries than
    torch reads.

    Raises:
        ValueError: if the end of the archive is damaged, or records another place or a directory
            that is too long.
    """
    end, locator, end64 = map(struct.calcsize, (_END, _LOCATOR, _END64))
    size = file.stat().st_size
    with open(file, "rb") as opened:
        opened.seek(max(0, size - end - locator - end64))
        tail = opened.read()
    signature, _, _, _, _, length, start, comment = struct.unpack(_END, tail[-end:])
    if signature != b"PK\x05\x06" or comment:
        raise ValueError("it does not end like an archive: it is damaged or cut off")
    stop = size - end
    before = tail[-end - locator : -end]
    if before[:4] == b"PK\x06\x07":
        stop -= locator + end64
        _, _, place, _ = struct.unpack(_LOCATOR, before)
        signature, *_, length, start = struct.unpack(_END64, tail[: -end - locator])
        if place != stop or signature != b"PK\x06\x06":
            raise ValueError("it has its directory at another place than its end records")
    if length > _MOST_HEADER:
        raise ValueError(f"its directory has {length} bytes, more than {_MOST_HEADER}")
    if start + length != stop:
        raise ValueError("it has its directory at another place than its end records")
