"""Tests of Teacher: the network stays frozen, and its logits have the student's classes."""

import copy
import pickle
from collections import namedtuple

import pytest
import torch
from torch import nn

from lightning_dist import DistillModule, Teacher
from lightning_dist.teacher import EnsembleTeacher, InputBridge
from normalisation import MEAN, OURS, STD, as_student, raw_images

Output = namedtuple("Output", ["aux", "logits"])


# The class map


class Answers(nn.Module):
    def __init__(self, answer) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, x):
        return self.answer


@pytest.mark.parametrize(
    ("wrap", "pick"),
    [
        (lambda x: x, lambda out: out),
        (lambda x: (x, "aux"), lambda out: out[0]),
        (lambda x: [x, "aux"], lambda out: out[0]),
        (lambda x: {"aux": 1, "logits": x}, lambda out: out["logits"]),
        (lambda x: {"out": x, "aux": 1}, lambda out: out["out"]),
        (lambda x: Output(1, x), lambda out: out.logits),
    ],
    ids=["tensor", "tuple", "list", "logits", "torchvision segmentation", "named tuple"],
)
@pytest.mark.parametrize("spatial", [(), (3, 2)])
def test_the_logits_are_gathered_into_the_students_classes(wrap, pick, spatial):
    logits = torch.rand(2, 5, *spatial)
    output = wrap(logits)
    mapped = Teacher(Answers(output), class_map=[4, 0, 0])(torch.rand(1))
    assert type(mapped) is type(output)
    expected = torch.stack([logits[:, 4], logits[:, 0], logits[:, 0]], dim=1)
    assert torch.equal(pick(mapped), expected)
    assert torch.equal(pick(output), logits)
    assert len(mapped) == len(output)


def test_an_object_with_logits_is_mapped_in_a_copy():
    class Holder:
        logits = torch.rand(2, 5)

    assert Teacher(Answers(Holder()), class_map=[3])(torch.rand(1)).logits.shape == (2, 1)
    assert Holder.logits.shape == (2, 5)


def test_a_class_map_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="class_map has the index 5 and Linear 3 classes"):
        Teacher(nn.Linear(4, 3), class_map=[0, 5])(torch.rand(2, 4))
    with pytest.raises(ValueError, match="counted from 0"):
        Teacher(nn.Linear(4, 3), class_map=[0, -1])
    with pytest.raises(ValueError, match="output is a str and has none of 'logits'"):
        Teacher(Answers("text"), class_map=[0])(torch.rand(1))


# Tests that every teacher must pass


def every_kind() -> list[Teacher]:
    return [
        Teacher(nn.Conv2d(3, 4, 3), channels_last=True, inputs=InputBridge(MEAN, STD, **OURS)),
        EnsembleTeacher([nn.Conv2d(3, 4, 3), Teacher(nn.Conv2d(3, 5, 3), class_map=[4, 1, 2, 3])]),
    ]


@pytest.mark.parametrize("teacher", every_kind(), ids=repr)
def test_a_teacher_stays_frozen_and_single(teacher):
    x = as_student(raw_images())
    module = DistillModule(nn.Conv2d(3, 4, 3), teacher)
    module.train()
    teacher.network.train()
    assert not teacher(x).requires_grad
    assert not any(m.training for m in teacher.network.modules())
    assert not any(p.requires_grad for p in teacher.network.parameters())
    assert sorted(module.state_dict()) == ["student.bias", "student.weight"]
    assert copy.deepcopy(module).teacher is teacher


@pytest.mark.parametrize("teacher", every_kind(), ids=repr)
def test_a_teacher_that_was_pickled_answers_the_same(teacher):
    x = as_student(raw_images())
    expected = teacher(x)
    copied = pickle.loads(pickle.dumps(teacher))
    assert torch.equal(copied(x), expected)
    assert torch.equal(copied.to("cpu")(x), expected)


def test_channels_last_reaches_the_network_and_its_images():
    formats = []
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())
    network.register_forward_pre_hook(
        lambda _, args: formats.append(args[0].is_contiguous(memory_format=torch.channels_last))
    )
    plain = copy.deepcopy(network)
    x = raw_images()
    teacher = Teacher(network, channels_last=True)
    torch.testing.assert_close(teacher(x), Teacher(plain)(x))
    assert formats == [True, False]
    assert network[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_a_dtype_that_is_none_is_refused():
    with pytest.raises(ValueError, match="dtype is 'bf16': use a name such as 'bfloat16'"):
        Teacher(nn.Linear(4, 3), dtype="bf16")


def test_a_compiled_teacher_runs_compiled_unless_a_part_is_tapped(monkeypatch):
    calls = []

    def without_code_generation(network):
        compiled = real(network, backend="eager")
        return lambda *args: calls.append(args) or compiled(*args)

    real = torch.compile
    monkeypatch.setattr(torch, "compile", without_code_generation)
    network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    teacher = Teacher(network, compile=True)
    x = torch.rand(5, 4)
    torch.testing.assert_close(teacher(x), network(x).detach())
    assert len(calls) == 1
    assert torch.equal(pickle.loads(pickle.dumps(teacher))(x), teacher(x))
    assert len(calls) == 3
    heard = []
    handle = network[0].register_forward_hook(lambda *_: heard.append(1))
    teacher(x)
    assert (len(heard), len(calls)) == (1, 3)
    handle.remove()
    teacher(x)
    assert (len(heard), len(calls)) == (1, 4)


def test_a_teacher_as_a_network_gives_what_the_teacher_gives():
    plain = Teacher(nn.Linear(4, 3))
    assert plain.as_network() is plain.network
    mapped = Teacher(nn.Linear(4, 3), class_map=[2, 0])
    inputs = torch.randn(5, 4)
    torch.testing.assert_close(mapped.as_network()(inputs), mapped(inputs))
    ensemble = EnsembleTeacher([nn.Linear(4, 3), nn.Linear(4, 3)])
    torch.testing.assert_close(ensemble.as_network()(inputs), ensemble(inputs))


def test_a_part_is_asked_frozen_and_with_its_inputs_as_they_are():
    bridge = InputBridge([0.0] * 3, [1.0] * 3, [0.5] * 3, [0.5] * 3)
    network = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2))
    teacher = Teacher(network, inputs=bridge)
    network.train()
    x = torch.randn(2, 2, 4, 4)
    output = teacher.ask("1", (x,), {})
    assert not output.requires_grad
    torch.testing.assert_close(output, x / (1 + 1e-5) ** 0.5)
    images = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(teacher.ask("", (images,), {}), teacher(images))


def test_a_class_map_applies_to_class_dim():
    logits = torch.randn(2, 5, 6)
    for class_dim, size in ((-1, 6), (1, 5), (0, 2)):
        teacher = Teacher(nn.Identity(), class_map=[size - 1, 0, 0], class_dim=class_dim)
        expected = logits.movedim(class_dim, 0)[[size - 1, 0, 0]].movedim(0, class_dim)
        assert torch.equal(teacher(logits), expected)
    first = Teacher(nn.Identity(), class_map=range(4), class_dim=-1)(logits)
    assert torch.equal(first, logits[..., :4])
    assert first.data_ptr() == logits.data_ptr(), "a view"
    with pytest.raises(ValueError, match="class_dim=1 for"):
        Teacher(nn.Identity(), class_map=[0, 1])(logits)
    with pytest.raises(ValueError, match="has the index 9 and Identity 6 classes"):
        Teacher(nn.Identity(), class_map=[0, 9], class_dim=-1)(logits)
