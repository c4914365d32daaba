"""Fixtures with the names, shapes and weight values of the authors' networks."""

import gzip
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor


@pytest.fixture(scope="session")
def golden_shapes(golden: Path) -> dict[str, dict[str, list[int]]]:
    """Load a dict from network names to a dict from entry names to shapes."""
    with gzip.open(golden / "state_dict_shapes.json.gz", "rt") as file:
        return json.load(file)


def _sine(shape: Sequence[int], step: float, offset: float = 0.0) -> Tensor:
    numbers = torch.arange(math.prod(shape), dtype=torch.float64)
    return torch.sin(step * numbers + offset).reshape(tuple(shape))


@pytest.fixture(scope="session")
def sine() -> Callable[..., Tensor]:
    """Return a function that fills a shape with values of a sine, for reproducible inputs."""
    return _sine


@pytest.fixture(scope="session")
def golden_value() -> Callable[[str, Sequence[int]], Tensor]:
    """Return a function that computes the weights with which the golden outputs were computed."""

    def value(name: str, shape: Sequence[int]) -> Tensor:
        if name.endswith("num_batches_tracked"):
            return torch.tensor(0)
        base = _sine(shape, 0.37, sum(name.encode()))
        if name.endswith("running_var"):
            return 1 + 0.1 * base.abs()
        if name.endswith(("running_mean", "bias")):
            return 0.1 * base
        if len(shape) == 1:
            return 1 + 0.1 * base
        return base * math.sqrt(2 / math.prod(shape[1:]))

    return value
