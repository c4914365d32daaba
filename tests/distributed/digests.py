"""A script that writes the digest of objects whose order or address differs in each process."""

import os
from pathlib import Path

import torch
from torch import nn

from lightning_dist.cache.digest import digest


def digest_of_all() -> str:
    """Return one digest of a compiled network, a set, an object without data, and a function."""
    torch.manual_seed(0)
    network = torch.compile(nn.Linear(2, 2), backend="eager")
    return digest([network, {"a", "b", "c"}, object(), lambda: 1, {"b": 1, "a": 2}])


def main(out: str) -> None:
    """Write the digest to a file of this process.

    Args:
        out: the folder for the files.
    """
    Path(out).mkdir(exist_ok=True)
    (Path(out) / f"{os.getpid()}.txt").write_text(digest_of_all())
