"""Tests that the CIFAR networks have the names, shapes and outputs of the published ones."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_dist.models import cifar

Shapes = dict[str, dict[str, list[int]]]

GOLDEN_NAMES = {
    "resnet50": "ResNet50",
    "mobilenet_v2_half": "MobileNetV2",
    "shufflenet_v1": "ShuffleV1",
    "shufflenet_v2": "ShuffleV2",
}

every_network = pytest.mark.parametrize("name", cifar.__all__)


def build(name: str, num_classes: int = 100) -> nn.Module:
    return getattr(cifar, name)(num_classes=num_classes)


def golden_key(name: str) -> str:
    return f"cifar/{GOLDEN_NAMES.get(name, name)}"


def test_every_published_network_has_a_builder(golden_shapes: Shapes):
    published = {key for key in golden_shapes if key.startswith("cifar/")}
    assert {golden_key(name) for name in cifar.__all__} == published


@every_network
def test_names_and_shapes_are_those_of_published_checkpoints(name: str, golden_shapes: Shapes):
    ours = [(key, list(tensor.shape)) for key, tensor in build(name).state_dict().items()]
    assert ours == list(golden_shapes[golden_key(name)].items())


@every_network
def test_outputs_equal_those_of_the_published_network(
    name: str, golden: Path, golden_value: Callable[..., Tensor], sine: Callable[..., Tensor]
):
    network = build(name).double().eval()
    state = {key: golden_value(key, value.shape) for key, value in network.state_dict().items()}
    network.load_state_dict(state)
    with torch.no_grad():
        logits = network(sine((2, 3, 32, 32), 0.01)).numpy()
    expected = np.load(golden / "model_outputs_float64.npz")[golden_key(name)]
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-9 * np.abs(expected).max())


@every_network
def test_backward_pass_gives_every_parameter_a_gradient(name: str):
    torch.manual_seed(0)
    network = build(name, num_classes=7)
    logits = network(torch.randn(2, 3, 32, 32))
    assert logits.shape == (2, 7)
    assert network.num_classes == 7
    logits.square().sum().backward()
    without = [key for key, value in network.named_parameters() if value.grad is None]
    assert without == []
    weights = {key: value for key, value in network.named_parameters() if value.ndim > 1}
    assert [key for key, value in weights.items() if not value.grad.any()] == []
    assert all(value.grad.isfinite().all() for value in network.parameters())


@pytest.mark.parametrize("name", ["resnet20", "resnet50", "wrn_16_2", "vgg8", "mobilenet_v2_half"])
def test_convolutions_are_initialised_by_their_fan_out(name: str):
    torch.manual_seed(0)
    convolutions = [layer for layer in build(name).modules() if isinstance(layer, nn.Conv2d)]
    # Test a layer with different numbers of input and output channels, because fan-in and fan-out
    # are equal otherwise.
    widening = [layer for layer in convolutions if layer.in_channels != layer.out_channels]
    largest = max(widening, key=lambda layer: layer.weight.numel())
    expected = math.sqrt(2 / (largest.out_channels * math.prod(largest.kernel_size)))
    assert largest.weight.std().item() == pytest.approx(expected, rel=0.03)
