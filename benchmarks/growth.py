"""`Row` and `Cost`: what ``benchmarks.scale`` measures at two sizes, and how the cost grows."""

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Cost:
    """Holds what one size costs.

    Attributes:
        seconds: the CPU time, or None if it is not measured.
        size: the bytes that are read, written or kept, or None if they are not measured.
    """

    seconds: float | None = None
    size: float | None = None


@dataclass(frozen=True)
class Row:
    """A row of the table: something that is measured at two sizes, a factor of 10 apart.

    Attributes:
        item: the name of what is measured; ``python -m benchmarks.scale WORD`` selects by it.
        counts: what the size counts, such as "terms".
        sizes: the two sizes.
        measure: a function that gets a size and an empty folder, and returns the cost. What it
            writes to the folder is deleted.
        of_bytes: what the bytes are, such as "written".
    """

    item: str
    counts: str
    sizes: tuple[int, int]
    measure: Callable[[int, Path], Cost]
    of_bytes: str = ""


def forked(call: Callable[[], object], field: str) -> Cost:
    """Run a function in a forked process, and return its CPU seconds and how a field has grown.

    Args:
        call: the function.
        field: "Private_Dirty", the memory that the process does not share, or "VmHWM", the peak of
            its memory. Linux counts both; elsewhere there are no bytes.
    """
    read_end, write_end = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            before, start = _memory(field), time.process_time()
            call()
            found = time.process_time() - start, _memory(field) - before
            os.write(write_end, json.dumps(found).encode())
        finally:
            os._exit(0)
    os.close(write_end)
    with open(read_end) as pipe:
        seconds, size = json.loads(pipe.read())
    os.waitpid(process, 0)
    return Cost(seconds, size or None)


def _memory(field: str) -> int:
    file = Path("/proc/self/status" if field == "VmHWM" else "/proc/self/smaps_rollup")
    lines = file.read_text().splitlines() if file.exists() else []
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def exponent(sizes: tuple[int, int], small: float | None, large: float | None) -> float | None:
    """Return the power of the size with which a cost grows; None if it is not measured.

    Example:
        >>> exponent((10, 100), 2.0, 20.0), exponent((10, 100), 3.0, 3.0)
        (1.0, 0.0)
    """
    if not small or not large:
        return None
    return math.log(large / small) / math.log(sizes[1] / sizes[0])
