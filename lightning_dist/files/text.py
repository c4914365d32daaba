"""Functions that read small files, and make text safe for a terminal, a log and a spreadsheet."""

import os
import re
import stat
from pathlib import Path
from typing import Any

# The longest text that is shown. The message of a run that failed is an error line, which is cut
# at fewer characters.
MOST_SHOWN, MOST_IN_A_LINE = 20_000, 2_000

# The largest file of JSON or text that is read: a parser needs some twenty times as much memory.
MOST_READ = 8 * 2**20

# A spreadsheet evaluates a cell as a formula if it begins with one of these characters; the last
# four are the wide forms of the first four.
_FORMULA = tuple("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20")


_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def read_bounded(path: str | Path, most: int = MOST_READ) -> bytes:
    """Return the contents of a file, which must be regular and not too large.

    The reason is that a pipe or a device may never end, and that a few bytes of an archive can
    unpack to a sparse file of any size.

    Args:
        path: the file, or a link to one.
        most: the largest size in bytes.

    Raises:
        OSError: if there is no file, or it is no regular file.
        ValueError: if it is too large.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(f"{path} is no regular file")
    with open(path, "rb") as file:
        contents = file.read(most + 1)
    if len(contents) > most:
        raise ValueError(f"{path} has more than {most} bytes")
    return contents


def printable(text: str, most: int = MOST_SHOWN) -> str:
    """Return text on one line: control characters, which a terminal would execute, are escaped.

    Args:
        text: the text, which can be of any length.
        most: the number of characters to keep; the middle of a longer text is left out.

    Example:
        >>> printable("a\\x1b[2J"), printable("0123456789", most=4)
        ('a\\\\x1b[2J', '01 ... (6 characters) ... 89')
    """
    if len(text) > most:
        half = most // 2
        middle = f" ... ({len(text) - 2 * half} characters) ... "
        text = text[:half] + middle + text[len(text) - half :]
    return "".join(c if c.isprintable() else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()


def has_controls(text: str) -> bool:
    """Return whether text contains control characters, with which escape sequences begin.

    Surrogates, which cannot be encoded, count as control characters.
    """
    return _CONTROLS.search(text) is not None


def error_line(error: BaseException | str) -> str:
    """Return an error as one line that is short and safe to print.

    Args:
        error: the error, which gives its type and its message, or a message.
    """
    text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    return printable(" ".join(text.split()), MOST_IN_A_LINE)


def csv_cell(value: Any) -> Any:
    """Return a value for a CSV file, with a quote before text that a spreadsheet would evaluate.

    Control characters, which a terminal would execute, are escaped.

    Args:
        value: the value of a cell; a number, and text that is a number, are returned unchanged.

    Example:
        >>> csv_cell("=1+1"), csv_cell("-0.5"), csv_cell(-0.5)
        ("'=1+1", '-0.5', -0.5)
    """
    if value is None or isinstance(value, (int, float)):
        return value
    text = str(value)
    # A spreadsheet drops leading blanks.
    is_formula = text.lstrip(" ").startswith(_FORMULA) and not _is_number(text)
    if has_controls(text):
        text = "".join(_escaped(c) if has_controls(c) else c for c in text)
    return f"'{text}" if is_formula else text


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return text.isprintable()
