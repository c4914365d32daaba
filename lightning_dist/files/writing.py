"""Write files so that an error names the file and leaves earlier files as they are."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add the path to an error of the disk that names no file, such as that of a full disk.

    Args:
        path: the file or folder that the block writes.

    Raises:
        OSError: if the block raises one; its ``filename`` is set.

    Example:
        >>> with naming(Path("report.csv")):
        ...     raise OSError(28, "No space left on device")
        Traceback (most recent call last):
        OSError: [Errno 28] No space left on device: 'report.csv'
    """
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


@contextmanager
def replaced_together(paths: Sequence[Path]) -> Iterator[list[Path]]:
    """Yield a temporary path beside each path, and replace all files when the block has ended.

    If the block fails, the earlier files are intact. A temporary file that a killed process left is
    deleted first, without following it if it is a link.

    Args:
        paths: the files to replace. A temporary path has the same suffix.

    Raises:
        OSError: if a file cannot be written or replaced.
    """
    parts = [path.with_name(f".partial-{path.name}") for path in paths]
    try:
        for part in parts:
            part.unlink(missing_ok=True)
        yield parts
        for part, path in zip(parts, paths, strict=True):
            part.replace(path)
    finally:
        for part in parts:
            part.unlink(missing_ok=True)
