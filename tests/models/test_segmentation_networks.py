"""Tests that the segmentation networks are the published ones, and dilated as asked."""

import numpy as np
import pytest
import torch

from lightning_dist.models.segmentation import convert_published, deeplabv3, pspnet

PUBLISHED = {
    "deeplabv3_resnet18": lambda: deeplabv3("resnet18", width=128),
    "deeplabv3_resnet101": lambda: deeplabv3("resnet101", width=256),
    "psp_resnet18": lambda: pspnet("resnet18", width=128),
}

every_network = pytest.mark.parametrize("name", PUBLISHED)


def test_every_published_network_can_be_built(golden_shapes):
    published = {key for key in golden_shapes if key.startswith("cityscapes/")}
    assert published == {f"cityscapes/{name}" for name in PUBLISHED}


@every_network
def test_published_weights_give_the_published_outputs(
    name, golden, golden_shapes, golden_value, sine
):
    shapes = golden_shapes[f"cityscapes/{name}"]
    published = {key: golden_value(key, shape) for key, shape in shapes.items()}
    network = PUBLISHED[name]().double().eval()
    network.load_state_dict(convert_published(published))
    with torch.no_grad():
        outputs = network(sine((1, 3, 64, 96), 0.01))
    with np.load(golden / "model_outputs_float64.npz") as file:
        for head in ("out", "aux"):
            expected = file[f"cityscapes/{name}/{head}"]
            error = np.abs(outputs[head].numpy() - expected).max() / np.abs(expected).max()
            assert error < 1e-9


def test_names_of_another_network_are_listed(golden_shapes):
    with pytest.raises(ValueError, match=r"2 entries .*fc\.weight, fc\.bias"):
        convert_published({"fc.weight": torch.zeros(1), "fc.bias": torch.zeros(1)})


@pytest.mark.parametrize("builder", [deeplabv3, pspnet])
@pytest.mark.parametrize("backbone", ["resnet18", "test_resnet", "mobilenetv3_small_050"])
@pytest.mark.parametrize("training", [True, False])
def test_both_heads_answer_at_the_output_stride(builder, backbone, training):
    network = builder(backbone, num_classes=7, width=16).train(training)
    outputs = network(torch.randn(2, 3, 65, 96))
    assert {name: tuple(x.shape) for name, x in outputs.items()} == {
        "out": (2, 7, 9, 12),
        "aux": (2, 7, 9, 12),
    }
    alone = builder(backbone, num_classes=7, width=16, aux=False).train(training)
    assert list(alone(torch.randn(2, 3, 64, 96))) == ["out"]


def test_every_parameter_gets_a_gradient():
    network = deeplabv3("test_resnet", num_classes=5, width=8)
    outputs = network(torch.randn(2, 3, 64, 64))
    sum(x.square().sum() for x in outputs.values()).backward()
    assert [name for name, p in network.named_parameters() if p.grad is None] == []


def test_a_backbone_that_cannot_be_dilated_is_an_error():
    with pytest.raises(ValueError, match="no_such_net"):
        deeplabv3("no_such_net")
    with pytest.raises(ValueError, match="output_stride"):
        deeplabv3("vgg11")
