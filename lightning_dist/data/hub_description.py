"""A check of the descriptions in a folder with a data set of Hugging Face."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from lightning_dist.files.text import error_line, printable, read_bounded

# Limits of a description, far above those of the list of all classes of ImageNet-21k. The parser in
# Python takes minutes for a longer one.
_MOST_EVENTS, _MOST_LEVELS = 100_000, 32
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the first is ten times as fast
# The files of `save_to_disk`, each with the entry that lists other files.
_SAVED = {"dataset_dict.json": "splits", "*/state.json": "_data_files", "*/dataset_info.json": ""}


def refuse_other_places(folder: Path) -> None:
    """Refuse a folder whose descriptions make `datasets` read files elsewhere, or read forever.

    Args:
        folder: the folder of a data set; other names are not checked.

    Raises:
        ValueError: if a description lists an address or a file outside of the folder, contains
            aliases, which can be repeated without end, or is too long or damaged.
        OSError: if one of them is no regular file.
    """
    for name in ("README.md", ".huggingface.yaml"):
        path = folder / name
        if not path.exists():
            continue
        # `datasets` reads a description also after a byte order mark.
        text = read_bounded(path).decode("utf-8", "replace").lstrip("\ufeff")
        if name == "README.md":
            from huggingface_hub.repocard import REGEX_YAML_BLOCK  # as `datasets` finds it

            block = REGEX_YAML_BLOCK.search(text)
            text = block[2] if block else ""
        try:
            _refuse_long_yaml(text, path)
            described = yaml.load(text, _LOADER)
        except (yaml.YAMLError, RecursionError) as error:
            raise ValueError(f"{path} is no YAML: {error_line(error)}") from error
        _refuse_places(described, "configs", path)
    for pattern, key in _SAVED.items():
        for path in folder.glob(pattern):
            try:
                described = json.loads(read_bounded(path))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path} is no JSON: {error_line(error)}") from error
            _refuse_places(described, key, path)


def _refuse_long_yaml(text: str, path: Path) -> None:
    """Raise an error if a document takes much longer to parse than to read.

    Raises:
        ValueError: if it has aliases, too many values or too many levels.
    """
    level = 0
    for count, event in enumerate(yaml.parse(text, _LOADER)):
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(f"{path} contains YAML aliases: write their values")
        level += isinstance(event, yaml.CollectionStartEvent)
        level -= isinstance(event, yaml.CollectionEndEvent)
        if count > _MOST_EVENTS or level > _MOST_LEVELS:
            raise ValueError(
                f"the YAML of {path} has more than {_MOST_EVENTS} values or {_MOST_LEVELS} levels"
            )


def _refuse_places(described: Any, key: str, path: Path) -> None:
    """Raise an error if an entry of a description contains an address or a path out of the folder.

    Raises:
        ValueError: if it does; the message names the file and the value.
    """
    for value in _texts(described.get(key) if isinstance(described, dict) else None):
        if "://" in value or "::" in value or value[:1] in "/\\~" or ".." in value:
            raise ValueError(
                f"{path} lists {printable(value, 200)!r}, which is not in the folder: correct it"
            )


def _texts(values: Any) -> Iterator[str]:
    if isinstance(values, str) and values:
        yield values
    elif isinstance(values, (dict, list)):
        for value in values.values() if isinstance(values, dict) else values:
            yield from _texts(value)
