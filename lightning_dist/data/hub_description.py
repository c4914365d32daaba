"""A check of the description in a folder with a data set of Hugging Face."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from lightning_dist.files.text import error_line, printable, read_bounded


def refuse_other_places(folder: Path) -> None:
    """Refuse a folder whose description makes `datasets` read files elsewhere.

    Args:
        folder: the folder of a data set; other names are not checked.

    Raises:
        ValueError: if README.md or .huggingface.yaml lists an address or a file outside of the
            folder, contains aliases, which can be repeated without end, or is damaged.
        OSError: if one of them is no regular file.
    """
    for name in ("README.md", ".huggingface.yaml"):
        path = folder / name
        if not path.exists():
            continue
        text = read_bounded(path).decode("utf-8", "replace")
        if name == "README.md":
            from huggingface_hub.repocard import REGEX_YAML_BLOCK  # as `datasets` finds it

            block = REGEX_YAML_BLOCK.search(text)
            text = block[2] if block else ""
        try:
            if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text)):
                raise ValueError(f"{path} contains YAML aliases: write their values")
            described = yaml.safe_load(text)
        except (yaml.YAMLError, RecursionError) as error:
            raise ValueError(f"{path} is no YAML: {error_line(error)}") from error
        configs = described.get("configs") if isinstance(described, dict) else None
        for value in _texts(configs):
            if "://" in value or "::" in value or value[:1] in "/\\~" or ".." in value:
                raise ValueError(
                    f"{path} lists {printable(value, 200)!r}, which is not in the folder: "
                    "correct it"
                )


def _texts(values: Any) -> Iterator[str]:
    if isinstance(values, str) and values:
        yield values
    elif isinstance(values, (dict, list)):
        for value in values.values() if isinstance(values, dict) else values:
            yield from _texts(value)
