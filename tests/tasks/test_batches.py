"""Tests of the batches and labels that the tasks take, and of the errors for all others."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator

from lightning_dist import DistillModule
from lightning_dist.data.scenes import SceneDetectionDataModule
from lightning_dist.tasks.classification import ClassificationModule
from lightning_dist.tasks.detection import DetectionModule
from lightning_dist.tasks.segmentation import SegmentationModule


class Output(dict):
    """An output like those of Hugging Face's models, with `logits` as a key and an attribute."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__(logits=logits)
        self.logits = logits


class Wrapped(nn.Module):
    """A network that returns its logits in a container, as Hugging Face's models do."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixel_values: Tensor) -> Output:
        return Output(self.network(pixel_values))


class Backbone(nn.Sequential):
    out_channels = 4


def detector(kind: type[nn.Module], classes: int = 3) -> nn.Module:
    backbone = Backbone(nn.Conv2d(3, 4, 3, stride=8, padding=1), nn.ReLU())
    sizes = {"min_size": 32, "max_size": 32}
    anchors = AnchorGenerator(((16,),), ((1.0,),))
    if kind is RetinaNet:
        return RetinaNet(backbone, classes, anchor_generator=anchors, **sizes)
    return FasterRCNN(backbone, classes + 1, rpn_anchor_generator=anchors, **sizes)


def images(count: int = 4) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def classify(labels: Any) -> tuple[Any, Any]:
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    return ClassificationModule(network, num_classes=3), (images(), torch.tensor(labels))


def segment(label: int, **changes: Any) -> tuple[Any, Any]:
    masks = torch.zeros(4, 8, 8, dtype=changes.get("dtype", torch.int64))
    masks[1, 2, 3] = label
    masks = masks.unsqueeze(1) if changes.get("channel") else masks
    return SegmentationModule(nn.Conv2d(3, 3, 1), num_classes=3), (images(), masks)


def detect(kind: type[nn.Module], label: int) -> tuple[Any, Any]:
    target = {"boxes": torch.tensor([[2.0, 2.0, 30.0, 30.0]]), "labels": torch.tensor([label])}
    return DetectionModule(detector(kind)), ([torch.rand(3, 32, 32)], [target])


WRONG_LABELS = {
    "class -1": (lambda: classify([0, 1, 2, -1]), "a batch has the label -1 .not -1 but -100 is"),
    "class 3": (lambda: classify([0, 1, 2, 3]), "a batch has the label 3 and num_classes is 3"),
    "column": (lambda: classify([[0], [1], [2], [0]]), r"int64 of shape \(4, 1\): give int64 \(N,"),
    "mask -1": (lambda: segment(-1), "a mask has the label -1"),
    "mask 3": (lambda: segment(3), "a mask has the label 3 and num_classes is 3"),
    "mask of int32": (lambda: segment(1, dtype=torch.int32), "the masks are torch.int32"),
    "mask with a channel": (lambda: segment(1, channel=True), r"shape \(4, 1, 8, 8\): give"),
    "box -1, one stage": (lambda: detect(RetinaNet, -1), "a target has the label -1"),
    "box 3, one stage": (lambda: detect(RetinaNet, 3), "a target has the label 3 and num_classes"),
    "box -1, two stages": (lambda: detect(FasterRCNN, -1), "a target has the label -1"),
    "box 3, two stages": (
        lambda: detect(FasterRCNN, 3),
        "a target has the label 3 and num_classes",
    ),
}


@pytest.mark.parametrize("stage", ["fit", "validate", "test"])
@pytest.mark.parametrize("name", WRONG_LABELS)
def test_labels_that_are_no_classes_are_refused_in_every_stage(make_trainer, name, stage):
    make, message = WRONG_LABELS[name]
    module, batch = make()
    with pytest.raises(ValueError, match=message):
        getattr(make_trainer(), stage)(module, DataLoader([batch], batch_size=None))


def test_ignored_pixels_are_allowed(make_trainer):
    module, batch = segment(255)
    make_trainer(max_steps=1).fit(module, DataLoader([batch], batch_size=None))


def classifier(**settings: Any) -> Any:
    network = Wrapped(nn.Sequential(nn.Flatten(), nn.Linear(192, 3)))
    return ClassificationModule(network, copy.deepcopy(network), num_classes=3, **settings)


def segmenter(**settings: Any) -> Any:
    return SegmentationModule(Wrapped(nn.Conv2d(3, 3, 1)), num_classes=3, **settings)


LABELS, MASKS = torch.tensor([0, 1, 2, 0]), torch.zeros(4, 8, 8, dtype=torch.int64)
MAPPINGS = {
    "image": (classifier, {"image": images(), "label": LABELS, "idx": LABELS}),
    "pixel_values": (classifier, {"pixel_values": images(), "labels": LABELS}),
    "mask": (segmenter, {"image": images(), "mask": MASKS}),
    "own": (lambda: classifier(batch_keys=("x", "y")), {"x": images(), "y": LABELS}),
}


@pytest.mark.parametrize("name", MAPPINGS)
def test_batches_may_be_mappings_and_outputs_hugging_faces(make_trainer, name):
    make, batch = MAPPINGS[name]
    loader, trainer = DataLoader([batch], batch_size=None), make_trainer()
    trainer.fit(make(), loader, loader)
    assert trainer.callback_metrics["train/task"] > 0
    assert trainer.callback_metrics["val/loss"] > 0
    (logits,) = trainer.predict(make(), loader)
    assert logits.shape[:2] == (4, 3)


WRONG_BATCHES = {
    "other keys": ({"img": images(), "cls": LABELS}, r"mapping with the keys 'img', 'cls': give"),
    "three items": ([images(), LABELS, LABELS], "a list of 3 items: give pairs"),
    "images alone": (
        images(2),
        "a Tensor: give pairs .* override ClassificationModule.split_batch",
    ),
}


@pytest.mark.parametrize("name", WRONG_BATCHES)
def test_other_batches_are_refused_with_their_type_and_the_method(make_trainer, name):
    batch, message = WRONG_BATCHES[name]
    with pytest.raises(TypeError, match=message):
        make_trainer().fit(classifier(), DataLoader([batch], batch_size=None))


def test_own_keys_that_are_missing_are_named():
    module = DistillModule(nn.Linear(2, 2), batch_keys=("x", "y"))
    with pytest.raises(TypeError, match="keys 'a', 'b', not 'x' and 'y': "):
        module.split_batch({"a": 1, "b": 2})


@pytest.mark.parametrize("kind", [RetinaNet, FasterRCNN])
def test_a_detector_with_other_classes_than_its_data_is_refused(make_trainer, kind):
    data = SceneDetectionDataModule(train_size=2, val_size=1, test_size=1, scene_size=32)
    module = DetectionModule(detector(kind, 91))
    message = "num_classes=91 and the data has 10 classes: .* for 10 classes, .*match_classes"
    with pytest.raises(MisconfigurationException, match=message):
        make_trainer().fit(module, data)
    module = DetectionModule(detector(kind, 10))
    module.trainer = SimpleNamespace(datamodule=data)
    module.setup("fit")


@pytest.mark.parametrize("stage", ["fit", "test"])
def test_a_network_with_other_classes_than_the_module_is_refused(make_trainer, stage):
    module = ClassificationModule(nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), num_classes=3)
    message = r"Sequential returns logits of shape \(4, 5\) and num_classes is 3"
    with pytest.raises(ValueError, match=message):
        getattr(make_trainer(), stage)(module, DataLoader([(images(), LABELS)], batch_size=None))
