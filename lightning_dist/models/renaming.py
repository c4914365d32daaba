"""Translate the names of a published checkpoint's entries by a table of patterns."""

import re
from collections.abc import Callable, Iterable, Sequence

Replacement = str | Callable[[re.Match[str]], str]


def rename_entries(
    names: Iterable[str], table: Sequence[tuple[str, Replacement]], network: str
) -> dict[str, str]:
    """Replace the beginning of each name by the first pattern in a table that matches it.

    Args:
        names: names of a checkpoint's entries.
        table: pairs of a regular expression, matched at the beginning of a name, and its
            replacement as :func:`re.sub` takes it.
        network: network that the names should be of, for the error message.

    Returns:
        The new name of each entry.

    Raises:
        ValueError: if no pattern matches some names; the message lists the first ones.

    Example:
        >>> rename_entries(["neck.weight"], [(r"neck\\.", "fpn.")], "a detector")
        {'neck.weight': 'fpn.weight'}
    """
    renamed, unknown = {}, []
    for name in names:
        for pattern, replacement in table:
            new, count = re.subn(f"^{pattern}", replacement, name)
            if count:
                renamed[name] = new
                break
        else:
            unknown.append(name)
    if unknown:
        first = ", ".join(unknown[:8]) + (" ..." if len(unknown) > 8 else "")
        raise ValueError(f"{len(unknown)} entries are not of {network}: {first}")
    return renamed
