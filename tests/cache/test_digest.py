"""Digests: equal in every process, and different where something that counts differs."""

import copy
import functools
import importlib
import linecache
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from lightning_dist.cache.digest import digest
from lightning_dist.models.small import SmallCNN
from lightning_dist.teacher import EnsembleTeacher, InputBridge, Teacher


class Scaled(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self._scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._scale * x


class Renamed(Scaled):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self._scale


def network() -> SmallCNN:
    torch.manual_seed(0)
    return SmallCNN([4, 8])


def test_equal_things_have_one_digest():
    teacher = Teacher(network(), class_map=[1, 0])
    before = digest(teacher)
    assert digest(Teacher(network(), class_map=[1, 0])) == before
    teacher.network.train()
    teacher(torch.zeros(1, 1, 8, 8))
    assert digest(copy.deepcopy(teacher)) == before
    assert digest({"b": 1, "a": 2}) == digest({"a": 2, "b": 1})


def test_a_bridge_that_has_worked_is_the_same_bridge():
    bridge = InputBridge([0.5], [0.5], [0.1], [0.2])
    before = digest(bridge)
    bridge(torch.zeros(1, 1, 4, 4))
    assert digest(bridge) == before


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Scaled(1.0), Scaled(2.0)),
        (Scaled(1.0), Renamed(1.0)),
        (nn.ReLU(), nn.GELU()),
        (nn.Linear(2, 2), nn.Linear(2, 2)),
        (nn.MaxPool2d(2), nn.MaxPool2d(2, ceil_mode=True)),
        (torch.zeros(2), torch.zeros(1, 2)),
        (torch.zeros(2), torch.zeros(2, dtype=torch.int32)),
        (torch.zeros(2, dtype=torch.bfloat16), torch.ones(2, dtype=torch.bfloat16)),
        (["ab", "c"], ["a", "bc"]),
        (1, "1"),
        (functools.partial(int, base=2), functools.partial(int, base=3)),
        (lambda x: x, lambda x: x + 1),
        (Teacher(network()), Teacher(network(), class_map=[0])),
        (Teacher(network()), Teacher(network(), dtype="bfloat16")),
        (
            Teacher(network(), inputs=InputBridge([0.5], [0.5], [0.1], [0.2])),
            Teacher(network(), inputs=InputBridge([0.5], [0.5], [0.1], [0.2], size=16)),
        ),
        (EnsembleTeacher([network()]), EnsembleTeacher([network()], mean="logits")),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_counts_changes_the_digest(one, other):
    assert digest(one) != digest(other)


def test_batch_norm_statistics_count():
    one, other = network(), network()
    other.features[1].running_mean += 1
    assert digest(one) != digest(other)


def test_a_circle_ends():
    one: list = [1]
    one.append(one)
    other: list = [2]
    other.append(other)
    assert digest(one) != digest(other)


HELPERS = """
SCALES = {"gain": 2.0}

def norm(x, power=2):
    return [v**power for v in x]

def unrelated():
    return 1
"""
NETWORK = """
import functools
import helpers
import torch
from helpers import SCALES
from torch import nn

SHIFT = 1.0
KINDS = {"a", "b", "c", "d"}

def twice(x):
    return 2 * shifted(x)

@functools.cache
def shifted(x):
    return x + SHIFT if x not in KINDS else x

def unrelated():
    return [x for x in KINDS]

class Net(nn.Module):
    @torch.no_grad()
    def forward(self, x):
        return self.scaled(helpers.norm(x))

    @staticmethod
    def scaled(x):
        return [twice(v) * SCALES["gain"] for v in x]
"""


@pytest.fixture
def of_files(tmp_path, monkeypatch):
    """The digest of a network whose code is in two files, with some of their text replaced."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # it knows a file by its second

    def run(old: str = "", new: str = "") -> str:
        for name, text in [("helpers", HELPERS), ("network", NETWORK)]:
            (tmp_path / f"{name}.py").write_text(text.replace(old, new) if old else text)
            monkeypatch.delitem(sys.modules, name, raising=False)
        importlib.invalidate_caches()
        linecache.checkcache()
        return digest(importlib.import_module("network").Net())

    yield run
    for name in ("helpers", "network"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("2 * shifted(x)", "3 * shifted(x)"),
        ("x + SHIFT", "x - SHIFT"),
        ("SHIFT = 1.0", "SHIFT = 1.5"),
        ('"gain": 2.0', '"gain": 2.5'),
        ("v**power", "v + power"),
        ("power=2", "power=3"),
        ('"d"}', '"e"}'),
    ],
)
def test_code_and_values_outside_the_class_that_it_uses_count(of_files, old, new):
    assert of_files(old, new) != of_files()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("return 1", "return 2"),
        ("[x for x in KINDS]", "{x for x in KINDS}"),
        ("\ndef twice", "\nTHERE = 1\n\ndef unrelated_too():\n    return 2\n\ndef twice"),
    ],
)
def test_code_that_it_does_not_use_does_not_count(of_files, old, new):
    assert of_files(old, new) == of_files()


def test_a_value_that_changes_after_its_first_digest_counts(of_files):
    before = of_files()
    network = sys.modules["network"]
    assert digest(network.Net()) == before
    network.SHIFT = 3.0
    assert digest(network.Net()) != before


def test_every_process_has_the_same_digest_of_code(of_files, tmp_path):
    """Sets of strings have an order of their own in each process."""
    code = (
        "import network; from lightning_dist.cache.digest import digest; print(digest(network.Net))"
    )
    of_files()
    folders = os.pathsep.join([str(tmp_path), *sys.path])
    digests = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONPATH": folders, "PYTHONHASHSEED": str(seed)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in range(3)
    }
    assert len(digests) == 1
