"""Files that attack whoever reads them, and a record of what reading them does."""

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lightning_dist.cli.run.saved_config import CONFIG_KEY


class Runs:
    """An object that creates a folder when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("trace",)


def saved(contents: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(contents, buffer)
    return buffer.getvalue()


def hostile_config(data: dict | None = None, **student: object) -> dict:
    """Return the contents of a checkpoint whose config builds the student in this way."""
    module = {
        "_target_": "lightning_dist.DistillModule",
        "student": {"_target_": "timm.create_model", "model_name": "resnet18"} | student,
    }
    data = data or {"_target_": "lightning_dist.data.digits.DigitsDataModule"}
    config = {"module": module, "data": data, "seed": 0}
    return {CONFIG_KEY: config, "state_dict": {"student.a": torch.zeros(1)}}


_TOUCHES = (
    "open",
    "os.listdir",
    "os.scandir",
    "os.mkdir",
    "os.remove",
    "os.rename",
    "shutil.rmtree",
)
_CONTACTS = ("socket.connect", "socket.getaddrinfo", "urllib.Request", "subprocess.Popen")
_records: list[list[tuple[str, str]]] = []
_installed: list[bool] = []


def _record(event: str, arguments: tuple) -> None:
    if _records and event in _TOUCHES + _CONTACTS:
        path = arguments[1 if event == "socket.connect" else 0]
        _records[-1].append((event, os.fsdecode(path) if isinstance(path, bytes) else str(path)))


@contextmanager
def watched() -> Iterator[list[tuple[str, str]]]:
    """Record the files that are opened, listed or changed and the addresses that are contacted."""
    if not _installed:
        sys.addaudithook(_record)  # Python cannot remove a hook
        _installed.append(True)
    _records.append([])
    try:
        yield _records[-1]
    finally:
        _records.pop()


def contacts(record: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return [entry for entry in record if entry[0] in _CONTACTS]


def touched(record: list[tuple[str, str]], path: object) -> list[tuple[str, str]]:
    """Return the entries of files at or inside a path."""
    return [entry for entry in record if str(path) in entry[1]]
