"""A disk that is full for what a test writes."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def almost_full_disk(left: int) -> Iterator[None]:
    """Let no file of this process become larger than `left` bytes, as on a disk that fills up."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (left, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
