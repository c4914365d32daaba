"""Tests that the segmentation networks have the published outputs and load published weights."""

import numpy as np
import pytest
import safetensors.torch
import torch

from lightning_dist.models.segmentation import convert_published, deeplabv3, pspnet
from lightning_dist.teacher import Teacher

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


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_published_file_loads_as_a_teachers_weights(
    prefix, tmp_path, golden_shapes, golden_value, sine
):
    shapes = golden_shapes["cityscapes/psp_resnet18"]
    published = {key: golden_value(key, shape).float() for key, shape in shapes.items()}
    torch.save({prefix + key: value for key, value in published.items()}, tmp_path / "psp.pth")
    teacher = Teacher(pspnet("resnet18", width=128), tmp_path / "psp.pth")
    assert teacher.network.backbone.conv1[0].weight.equal(published["pretrained.conv1.weight"])
    safetensors.torch.save_model(teacher.network, tmp_path / "ours.safetensors")
    again = Teacher(pspnet("resnet18", width=128), tmp_path / "ours.safetensors")
    images = sine((1, 3, 64, 96), 0.01).float()
    torch.testing.assert_close(again(images), teacher(images))


def test_a_backbones_weights_load_under_published_and_timms_names(
    tmp_path, golden_shapes, golden_value
):
    prefix = "pretrained."
    published = {
        key.removeprefix(prefix): golden_value(key, shape).float()
        for key, shape in golden_shapes["cityscapes/psp_resnet18"].items()
        if key.startswith(prefix)
    }
    published["fc.weight"] = torch.zeros(1000, 512)
    torch.save(published, tmp_path / "published.pth")
    network = pspnet(backbone_weights=tmp_path / "published.pth")
    assert network.backbone.layer4[1].conv2.weight.equal(published["layer4.1.conv2.weight"])
    torch.save(network.backbone.state_dict(), tmp_path / "timm.pth")
    again = deeplabv3(backbone_weights=tmp_path / "timm.pth")
    assert again.backbone.conv1[6].weight.equal(published["conv3.weight"])
    with pytest.raises(ValueError, match=r"timm\.pth does not fit"):
        deeplabv3("resnet34", backbone_weights=tmp_path / "timm.pth")


def test_names_of_another_network_are_listed(golden_shapes):
    with pytest.raises(ValueError, match=r"2 entries .*fc\.weight, fc\.bias"):
        convert_published({"fc.weight": torch.zeros(1), "fc.bias": torch.zeros(1)})


@pytest.mark.parametrize("builder", [deeplabv3, pspnet])
@pytest.mark.parametrize("backbone", ["resnet18", "test_resnet", "mobilenetv3_small_050"])
@pytest.mark.parametrize("training", [True, False])
def test_both_heads_have_the_resolution_of_the_output_stride(builder, backbone, training):
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
