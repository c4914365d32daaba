"""Tests that a saved run is rebuilt without the files and downloads that began it."""

import pytest
import torch
import torchvision
from torch import nn

from lightning_dist.cli.run.initial_weights import (
    without_initial_weights,
    without_torchvision_weights,
)
from lightning_dist.cli.run.saved_config import build_module
from lightning_dist.models.segmentation import deeplabv3

SEGMENTATION = "lightning_dist.tasks.segmentation.SegmentationModule"


@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_, **__: pytest.fail("download"))


def test_a_network_is_rebuilt_where_its_initial_weights_are_gone():
    options = {"backbone": "resnet18", "num_classes": 3, "width": 8}
    student = {
        "_target_": "lightning_dist.models.segmentation.deeplabv3",
        "backbone_weights": "gone/resnet18.pth",
        **options,
    }
    network = deeplabv3(**options)
    state = {f"student.{name}": value for name, value in network.state_dict().items()}
    config = {"module": {"_target_": SEGMENTATION, "student": student, "num_classes": 3}}
    module = build_module({"state_dict": state}, config, "last.ckpt", trust=False)
    for name, value in module.student.state_dict().items():
        assert torch.equal(value, network.state_dict()[name])
    assert config["module"]["student"]["backbone_weights"] == "gone/resnet18.pth"


def test_a_backbone_of_torchvision_keeps_its_kind_of_norms_without_a_download(offline):
    with without_torchvision_weights():
        network = torchvision.models.detection.retinanet_resnet50_fpn(
            weights_backbone="IMAGENET1K_V1", num_classes=3
        )
    assert isinstance(network.backbone.body.bn1, torchvision.ops.FrozenBatchNorm2d)
    layer = nn.Linear(2, 2)
    layer.load_state_dict({"weight": torch.ones(2, 2), "bias": torch.ones(2)})
    assert float(layer.weight[0, 0]) == 1, "load_state_dict is as before"


def test_only_arguments_of_known_packages_change():
    config = {"_target_": "timm.create_model", "pretrained": True, "inner": [{"pretrained": True}]}
    assert without_initial_weights(config) == config | {"pretrained": False}
