"""A function that renames the entries of a published checkpoint by a table of patterns."""

import re
from collections.abc import Callable, Iterable, Sequence

Replacement = str | Callable[[re.Match[str]], str]


def rename_entries(
    names: Iterable[str], table: Sequence[tuple[str, Replacement]], network: str
) -> dict[str, str]:
    """Rename each name with the first entry of a table whose pattern matches its beginning.

    Args:
        names: the names of the checkpoint's entries.
        table: pairs of a regular expression, which is matched at the beginning of a name, and its
            replacement for :func:`re.sub`.
        network: the network to which the names should belong, for the error message.

    Returns:
        A dict from the old name of each entry to its new name.

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
        raise ValueError(f"{len(unknown)} entries do not belong to {network}: {first}")
    return renamed
