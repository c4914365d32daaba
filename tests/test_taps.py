"""Tests of taps.py: it finds the logits in an output, and records outputs inside a context."""

import copy
import inspect
import types
from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lightning_dist import Teacher
from lightning_dist.taps import Snapshot, logits_of, recording, tap, with_logits
from lightning_dist.tasks.segmentation import main_and_aux

LOGITS, OTHER = torch.ones(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
Named = namedtuple("Named", ["features", "logits"])
Unnamed = namedtuple("Unnamed", ["first", "second"])


@dataclass(slots=True, frozen=True)
class Frozen:
    logits: torch.Tensor


OUTPUTS = {
    "tensor": LOGITS,
    "logits before out": {"out": OTHER, "logits": LOGITS},
    "torchvision's segmentation": OrderedDict(out=LOGITS, aux=OTHER),
    "object with logits": SimpleNamespace(logits=LOGITS, hidden=OTHER),
    "tuple": (LOGITS, OTHER),
    "list": [LOGITS, OTHER],
    "named tuple with logits": Named(OTHER, LOGITS),
    "named tuple without": Unnamed(LOGITS, OTHER),
    "frozen dataclass with slots": Frozen(LOGITS),
}


class Returns(nn.Module):
    """A network that returns a given value."""

    def __init__(self, output: object) -> None:
        super().__init__()
        self.output = output

    def forward(self, images: torch.Tensor) -> object:
        return self.output


@pytest.mark.parametrize("output", OUTPUTS.values(), ids=OUTPUTS)
def test_terms_class_maps_and_evaluation_take_the_same_logits(output):
    assert logits_of(output) is LOGITS
    assert main_and_aux(output)[0] is LOGITS
    mapped = Teacher(Returns(output), class_map=[2, 0])(torch.zeros(2, 3, 4, 4))
    assert logits_of(mapped).shape == (2, 2, 4, 4)
    assert type(mapped) is type(output)
    assert logits_of(output) is LOGITS  # The output itself does not change.


@pytest.mark.parametrize("output", [{"a": LOGITS}, {"logits": [LOGITS]}, "text", (), {}])
def test_an_output_without_logits_is_refused(output):
    with pytest.raises(ValueError, match=r"the output is a|entry 'logits' of the output is a list"):
        logits_of(output)


def test_an_entry_is_a_key_an_attribute_or_an_index():
    assert logits_of({"a": LOGITS}, "a") is LOGITS
    assert logits_of(SimpleNamespace(a=LOGITS), "a") is LOGITS
    assert logits_of((OTHER, LOGITS), 1) is LOGITS
    with pytest.raises(ValueError, match="has no entry 2: let the network return a tensor"):
        logits_of((OTHER, LOGITS), 2)


def test_logits_are_replaced_in_their_own_entry():
    changed = with_logits(Named(OTHER, LOGITS), OTHER + 2)
    assert changed.features is OTHER
    assert changed.logits.unique() == 2


@pytest.mark.parametrize("kind", ["class", "instance", "compiled", "hooked"])
def test_a_copy_made_during_a_recording_calls_its_own_layers(kind):
    class Network(nn.Linear):
        def forward(self, x, scale=1):
            return scale * super().forward(x)

    network, x = Network(3, 2), torch.ones(1, 3)
    if kind == "instance":
        network.forward = types.MethodType(Network.forward, network)
    elif kind == "compiled":
        network.compile(backend="eager")
    elif kind == "hooked":
        network.register_forward_hook(lambda *_: None)
    with recording(network, [""]) as outer, recording(network, [""]) as found:
        assert [*inspect.signature(network.forward).parameters] == ["x", "scale"]
        copied = copy.deepcopy(network)
        copied.weight.data.zero_()
        copied.bias.data.fill_(7)
        assert torch.equal(copied(x, scale=2), torch.full((1, 2), 14.0))
        network(x)
    assert torch.equal(copied(x), torch.full((1, 2), 7.0))
    assert [len(each.outputs[""]) for each in (outer, found)] == [1, 1]


def test_a_recording_ends_with_its_context_even_after_an_error():
    network = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
    with recording(network, ["", "0"]) as recorded:
        hidden = network(torch.ones(1, 3))
        with pytest.raises(RuntimeError):
            network(torch.ones(1, 4))
    network(torch.ones(1, 3))
    assert [len(recorded.outputs[path]) for path in ("", "0")] == [1, 1]
    assert logits_of(recorded.outputs[""][0]) is hidden
    assert not recorded.without_grad
    with pytest.raises(RuntimeError), recording(network, ["0"]):
        network(torch.ones(1, 4))
    assert not any(m._forward_hooks for m in network.modules())


@pytest.mark.parametrize("way", ["call", "forward"])
def test_the_output_of_forward_hooks_is_recorded_where_they_run(way):
    network = nn.Sequential(nn.Linear(2, 2))
    network[0].register_forward_hook(lambda module, args, output: 3 * output)
    x = torch.ones(1, 2)
    with recording(network, ["0"]) as recorded:
        used = network[0](x) if way == "call" else network[0].forward(x)
    (snapshot,) = recorded.outputs["0"]
    assert snapshot.output is used


def test_an_entry_is_a_path_or_a_function():
    nested = ([OTHER, {"aux.x": LOGITS}], OTHER)
    assert logits_of(nested, "0.1.aux.x") is LOGITS
    assert logits_of({"aux": SimpleNamespace(a=(OTHER, LOGITS))}, "aux.a.1") is LOGITS
    assert logits_of({"0": LOGITS}, "0") is LOGITS
    assert logits_of(nested, lambda output: output[0][1]["aux.x"]) is LOGITS
    for entry in ("0.2", "0.b", "5", "0.x.y"):
        with pytest.raises(ValueError, match=f"has no entry '{entry}'"):
            logits_of(nested, entry)
    with pytest.raises(ValueError, match="the function 'output' returns a list, no tensor"):
        logits_of(nested, lambda output: output[0])


def test_a_function_does_not_get_an_output_that_was_changed_in_place():
    snapshot = Snapshot.of({"a": torch.ones(2), "b": torch.ones(2)})
    assert logits_of(snapshot, lambda output: output["a"] + 1).sum() == 4
    snapshot.output["a"].mul_(2)
    with pytest.raises(ValueError, match="changed in place"):
        logits_of(snapshot, lambda output: output["a"] + 1)


@pytest.mark.parametrize("wrap", [Frozen, lambda x: {"a": SimpleNamespace(b=[Frozen(x)])}])
def test_a_change_in_place_is_seen_within_objects(wrap):
    logits = torch.ones(2)
    snapshot = Snapshot.of(wrap(logits))
    entry = "logits" if isinstance(snapshot.output, Frozen) else "a.b.0.logits"
    assert logits_of(snapshot, entry) is logits
    logits.mul_(2)
    with pytest.raises(ValueError, match="changed in place"):
        logits_of(snapshot, entry)


def test_an_output_that_only_the_step_can_read_is_refused():
    snapshot = Snapshot.of(x for x in [LOGITS])
    for entry in (None, next):
        with pytest.raises(ValueError, match=r"is a generator, which only the step can read: let"):
            logits_of(snapshot, entry)
    assert next(snapshot.output) is LOGITS


def test_a_tap_sees_calls_of_any_kind_and_restores_what_was_there():
    class Network(nn.Linear):
        def embed(self, x, scale):
            return scale * self(x)

    network, calls = Network(3, 2), []
    own = network.forward
    network.forward = own  # torch.compile, and DDP in Lightning, set forward on the instance.
    removes = [
        tap(network, path, before=lambda *call: calls.append(call), after=calls.append)
        for path in ("", "embed")
    ]
    x = torch.ones(1, 3)
    outputs = [network(x), network.forward(x), network.embed(x, scale=2)]
    assert [len(call) for call in calls if isinstance(call, tuple)] == [2] * 4
    assert calls[1] is outputs[0]
    assert calls[3] is outputs[1]
    assert calls[4] == ((x,), {"scale": 2})
    assert calls[-1] is outputs[2]
    for remove in reversed(removes):
        remove()
    assert network.__dict__["forward"] == own
    assert "embed" not in network.__dict__
    assert len(calls) == 8
