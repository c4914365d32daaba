"""Tests that digests are equal in every process, and differ if a relevant value differs."""

import copy
import functools

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


def closing_over(value):
    return lambda: value


def network() -> SmallCNN:
    torch.manual_seed(0)
    return SmallCNN([4, 8])


def test_equal_values_have_the_same_digest():
    teacher = Teacher(network(), class_map=[1, 0])
    before = digest(teacher)
    assert digest(Teacher(network(), class_map=[1, 0])) == before
    teacher.network.train()
    teacher(torch.zeros(1, 1, 8, 8))
    assert digest(copy.deepcopy(teacher)) == before
    assert digest({"b": 1, "a": 2}) == digest({"a": 2, "b": 1})


def test_a_call_of_a_bridge_does_not_change_its_digest():
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
        (closing_over(1), closing_over(2)),
        (lambda x=1: x, lambda x=2: x),
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
def test_different_values_have_different_digests(one, other):
    assert digest(one) != digest(other)


def test_batch_norm_statistics_change_the_digest():
    one, other = network(), network()
    other.features[1].running_mean += 1
    assert digest(one) != digest(other)


def test_lists_that_contain_themselves_have_digests():
    one: list = [1]
    one.append(one)
    other: list = [2]
    other.append(other)
    assert digest(one) != digest(other)


def test_a_compiled_network_has_the_digest_of_the_network():
    before = digest(Teacher(network()))
    compiled = torch.compile(network(), backend="eager")
    compiled.eval()(torch.zeros(1, 1, 8, 8))
    assert digest(Teacher(compiled)) == before
    in_place = network()
    in_place.features.compile(backend="eager")
    assert digest(Teacher(in_place)) == before
