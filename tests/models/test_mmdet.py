"""Tests that MMDetection's checkpoints load into the parts that distillation calls."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision

from lightning_dist.models.mmdet import cascade_rcnn, convert_mmdetection, retinanet
from lightning_dist.tasks.detection_heads import OneStageClassifier, TwoStageClassifier
from lightning_dist.teacher import Teacher


def published_backbone(name):
    """Return a ResNet's weights under MMDetection's names, which are also torchvision's names."""
    body = torchvision.models.get_model(name, weights=None)
    return {f"backbone.{k}": v for k, v in body.state_dict().items() if not k.startswith("fc.")}


def layer(name, *shape):
    weight = torch.randn(*shape) / math.sqrt(math.prod(shape[1:]))
    return {f"{name}.weight": weight, f"{name}.bias": 0.1 * torch.randn(shape[0])}


def published_cascade(backbone="resnext101_64x4d", classes=80, width=1024):
    """Return random weights as in MMDetection's Cascade Mask R-CNN with an FPN."""
    state = published_backbone(backbone)
    for i, channels in enumerate((256, 512, 1024, 2048)):
        state |= layer(f"neck.lateral_convs.{i}.conv", 256, channels, 1, 1)
        state |= layer(f"neck.fpn_convs.{i}.conv", 256, 256, 3, 3)
    state |= layer("rpn_head.rpn_conv", 256, 256, 3, 3)
    state |= layer("rpn_head.rpn_cls", 3, 256, 1, 1) | layer("rpn_head.rpn_reg", 12, 256, 1, 1)
    for stage in range(3):
        head = f"roi_head.bbox_head.{stage}"
        state |= layer(f"{head}.shared_fcs.0", width, 256 * 49) | layer(
            f"{head}.shared_fcs.1", width, width
        )
        state |= layer(f"{head}.fc_cls", classes + 1, width) | layer(f"{head}.fc_reg", 4, width)
        state |= layer(f"roi_head.mask_head.{stage}.convs.0.conv", 256, 256, 3, 3)
        state |= layer(f"roi_head.mask_head.{stage}.conv_logits", classes, 256, 1, 1)
    return state


def published_retinanet(backbone="resnext101_64x4d", classes=80):
    """Return random weights as in MMDetection's RetinaNet."""
    state = published_backbone(backbone)
    for i, channels in enumerate((512, 1024, 2048)):
        state |= layer(f"neck.lateral_convs.{i}.conv", 256, channels, 1, 1)
    for i in range(5):
        state |= layer(f"neck.fpn_convs.{i}.conv", 256, 2048 if i == 3 else 256, 3, 3)
    for i in range(4):
        state |= layer(f"bbox_head.cls_convs.{i}.conv", 256, 256, 3, 3)
        state |= layer(f"bbox_head.reg_convs.{i}.conv", 256, 256, 3, 3)
    state |= layer("bbox_head.retina_cls", 9 * classes, 256, 3, 3)
    return state | layer("bbox_head.retina_reg", 36, 256, 3, 3)


@pytest.mark.parametrize(
    ("build", "published"),
    [(cascade_rcnn, published_cascade), (retinanet, published_retinanet)],
    ids=["cascade", "retinanet"],
)
def test_every_published_entry_has_a_counterpart_of_the_same_shape(build, published):
    with torch.device("meta"):
        state, network = published(), build()
    converted = convert_mmdetection(state)
    expected = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    assert {name: tuple(value.shape) for name, value in converted.items()} == expected


def convolve(state, name, x, stride=1):
    weight = state[f"{name}.weight"]
    padding = weight.shape[-1] // 2
    return F.conv2d(x, weight, state[f"{name}.bias"], stride=stride, padding=padding)


def pyramid(state, images, stages):
    """Run torchvision's ResNet, and compute the FPN from the entries of the checkpoint."""
    body = torchvision.models.resnet50(weights=None).eval()
    body.load_state_dict(
        {k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")},
        strict=False,
    )
    x = body.maxpool(body.relu(body.bn1(body.conv1(images))))
    maps = []
    for number in range(1, 5):
        x = body.get_submodule(f"layer{number}")(x)
        maps.append(x)
    maps = maps[-stages:]
    merged = [convolve(state, f"neck.lateral_convs.{i}.conv", m) for i, m in enumerate(maps)]
    for i in reversed(range(stages - 1)):
        merged[i] = merged[i] + F.interpolate(merged[i + 1], merged[i].shape[2:], mode="nearest")
    levels = [convolve(state, f"neck.fpn_convs.{i}.conv", m) for i, m in enumerate(merged)]
    return levels, maps[-1]


def roi_align(features, box, stride):
    """Compute 7 x 7 bins by RoIAlign in NumPy, with half-pixel alignment and adaptive sampling."""
    features = features.numpy().astype(np.float64)
    x1, y1, x2, y2 = (side / stride - 0.5 for side in box)
    high, wide = (y2 - y1) / 7, (x2 - x1) / 7
    rows, columns = math.ceil(high), math.ceil(wide)
    channels, height, width = features.shape
    out = np.zeros((channels, 7, 7))

    def at(y, x):
        if y < -1 or y > height or x < -1 or x > width:
            return np.zeros(channels)
        y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
        top, left = int(y), int(x)
        bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
        a, b = y - top, x - left
        return (1 - a) * ((1 - b) * features[:, top, left] + b * features[:, top, right]) + a * (
            (1 - b) * features[:, bottom, left] + b * features[:, bottom, right]
        )

    for i in range(7):
        for j in range(7):
            points = [
                at(y1 + high * (i + (r + 0.5) / rows), x1 + wide * (j + (c + 0.5) / columns))
                for r in range(rows)
                for c in range(columns)
            ]
            out[:, i, j] = np.mean(points, axis=0)
    return torch.from_numpy(out)


@pytest.mark.slow
def test_the_first_stages_class_scores_equal_an_independent_computation(tmp_path):
    state = published_cascade("resnet50", classes=5, width=32)
    torch.save({"meta": {"epoch": 20}, "state_dict": state}, tmp_path / "cascade.pth")
    network = cascade_rcnn("resnet50", num_classes=5, width=32)
    teacher = Teacher(network, tmp_path / "cascade.pth")
    asked = TwoStageClassifier(teacher.network).eval()
    images = torch.randn(2, 3, 128, 192)
    boxes = [
        torch.tensor([[3.0, 5.0, 40.0, 50.0], [0.0, 0.0, 190.0, 127.0]]),
        torch.tensor([[60.3, 20.7, 170.2, 110.1]]),
    ]
    with torch.no_grad():
        asked(images)
        found = asked.roi({}, boxes, [(128, 192)] * 2)
        levels, _ = pyramid(state, images, 4)
    rows = []
    for image, of_image in enumerate(boxes):
        for box in of_image.tolist():
            side = math.sqrt((box[2] - box[0]) * (box[3] - box[1]))
            level = min(max(math.floor(math.log2(side / 56 + 1e-6)), 0), 3)
            x = roi_align(levels[level][image], box, 4 * 2**level).flatten()
            for i in range(2):
                name = f"roi_head.bbox_head.0.shared_fcs.{i}"
                x = (state[f"{name}.weight"].double() @ x + state[f"{name}.bias"].double()).relu()
            name = "roi_head.bbox_head.0.fc_cls"
            logits = state[f"{name}.weight"].double() @ x + state[f"{name}.bias"].double()
            # MMDetection has the background as the last class.
            rows.append(torch.cat([logits[-1:], logits[:-1]]))
    torch.testing.assert_close(found.double(), torch.stack(rows), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_retinanets_class_maps_equal_an_independent_computation(tmp_path):
    state = published_retinanet("resnet50", classes=3)
    torch.save({"state_dict": state}, tmp_path / "retinanet.pth")
    teacher = Teacher(retinanet("resnet50", num_classes=3), tmp_path / "retinanet.pth")
    asked, found = OneStageClassifier(teacher.network).eval(), []
    asked.logits.register_forward_hook(lambda _, args, output: found.append(output))
    images = torch.randn(1, 3, 128, 128)
    with torch.no_grad():
        asked(images)
        levels, last = pyramid(state, images, 3)
        levels.append(convolve(state, "neck.fpn_convs.3.conv", last, stride=2))
        levels.append(convolve(state, "neck.fpn_convs.4.conv", levels[-1], stride=2))
        for x, maps in zip(levels, found, strict=True):
            for i in range(4):
                x = convolve(state, f"bbox_head.cls_convs.{i}.conv", x).relu()
            expected = convolve(state, "bbox_head.retina_cls", x)
            torch.testing.assert_close(maps, expected, rtol=1e-3, atol=1e-4)
    assert len(found) == 5


def test_names_of_another_detector_are_listed():
    with pytest.raises(ValueError, match=r"1 entries .*transformer\.encoder"):
        convert_mmdetection(
            {"neck.lateral_convs.0.conv.bias": torch.zeros(1)}
            | {"transformer.encoder": torch.zeros(1)}
        )
