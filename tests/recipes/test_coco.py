"""Tests that the COCO recipes have the paper's settings, and train their real students."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from PIL import Image
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

import composition

# The settings of the paper, written independently of conf/.
TWO, ONE = "coco/fasterrcnn_x101_r50", "coco/retinanet_x101_r50"
RECIPES = [TWO, f"{TWO}_mimic", ONE, f"{ONE}_mimic"]
LR = {TWO: 0.02, ONE: 0.01}
UPDATES = 7330  # The updates of an epoch: 117,266 training images with boxes, in batches of 16.
OFFLINE = ["student.weights_backbone=null", "teacher.weights=null"]

every_recipe = pytest.mark.parametrize("recipe", RECIPES)


def composed(recipe: str, *overrides: str) -> DictConfig:
    return composition.composed(f"experiment={recipe}", *overrides)


def built(config: DictConfig) -> Any:
    """Build the module on the meta device, without memory for the weights."""
    with torch.device("meta"):
        student = instantiate(config.student)
        teacher = instantiate(config.teacher) if config.distill.teacher else None
    return instantiate(config.module, student=student, teacher=teacher)


def test_these_are_all_recipes_of_coco():
    folder = Path(__file__).resolve().parents[2] / "conf" / "experiment" / "coco"
    assert {f"coco/{path.stem}" for path in folder.glob("*.yaml")} == set(RECIPES)


@every_recipe
def test_networks_are_those_of_the_paper(recipe):
    config = composed(recipe)
    assert config.student.weights_backbone == "IMAGENET1K_V1"
    assert "x101_64x4d_fpn" in config.teacher.weights
    module = built(composed(recipe, *OFFLINE))
    kind = "FasterRCNN" if recipe.startswith(TWO) else "RetinaNet"
    assert type(module.student).__name__ == kind
    body = module.student.backbone.body
    assert sum(p.numel() for p in body.parameters()) == pytest.approx(23.5e6, rel=0.01)
    teacher = module.teacher.network.backbone.body
    assert (len(teacher.layer3), teacher.layer1[0].conv2.groups) == (23, 64)
    assert teacher.layer1[0].conv2.out_channels == 64 * 4
    if kind == "FasterRCNN":
        assert module.student.roi_heads.box_predictor.cls_score.out_features == 81
        assert module.student.roi_heads.fg_bg_sampler.batch_size_per_image == 512
        assert module.label_offset == 1
    else:
        assert module.student.head.classification_head.num_classes == 80
        assert module.label_offset == 0
    transform = module.student.transform
    assert (list(transform.min_size), transform.max_size) == ([800], 1333)


def test_the_stem_the_first_stage_and_the_batch_norms_are_frozen(tmp_path, monkeypatch):
    """The recipes load weights for the backbone; here they are random."""
    weights = _resnet50().state_dict()
    monkeypatch.setattr(
        "torchvision.models.resnet.ResNet50_Weights.get_state_dict", lambda *_, **__: weights
    )
    for recipe in (TWO, ONE):
        student = instantiate(composed(recipe).student)
        trained = {
            n.split(".")[0] for n, p in student.backbone.body.named_parameters() if p.requires_grad
        }
        assert trained == {"layer2", "layer3", "layer4"}
        norms = [m for m in student.modules() if isinstance(m, (nn.BatchNorm2d, FrozenBatchNorm2d))]
        assert norms
        assert all(isinstance(m, FrozenBatchNorm2d) for m in norms)


def _resnet50() -> nn.Module:
    from torchvision.models import resnet50

    return resnet50(weights=None)


def test_several_scales_can_be_trained_on():
    config = composed(TWO, *OFFLINE, "student.min_size=[640,672,800]")
    assert list(built(config).student.transform.min_size) == [640, 672, 800]


@every_recipe
def test_learning_rate_is_the_papers_at_every_update_of_the_run(recipe):
    config = composed(recipe, *OFFLINE, "distill=none")
    assert config.trainer.max_epochs == 24
    module = built(config)
    trainer = SimpleNamespace(
        callbacks=[],
        fit_loop=SimpleNamespace(setup_data=lambda: None),
        num_training_batches=UPDATES,
        accumulate_grad_batches=1,
        global_step=0,
        current_epoch=0,
    )
    module.trainer = trainer
    configured = module.configure_optimizers()
    optimizer, plan = configured["optimizer"], configured["lr_scheduler"]
    (group,) = optimizer.param_groups
    assert type(optimizer) is torch.optim.SGD
    assert (group["momentum"], group["weight_decay"], group["nesterov"]) == (0.9, 1e-4, False)
    assert plan["interval"] == "step"
    base = LR[recipe.removesuffix("_mimic")]
    for update in range(24 * UPDATES):
        factor = 0.001 + 0.999 * update / 500 if update < 500 else 1.0
        factor *= 0.1 ** ((update >= 16 * UPDATES) + (update >= 22 * UPDATES))
        assert math.isclose(group["lr"], base * factor, rel_tol=1e-9), update
        trainer.global_step += 1
        module.lr_scheduler_step(plan["scheduler"], None)


@every_recipe
def test_losses_batch_and_processes_are_the_papers(recipe):
    config = composed(recipe, *OFFLINE)
    callback = built(config).configure_distillation()
    assert callback.task_weight == 1.0
    terms = callback.terms
    loss = terms["class"].loss
    assert (loss.tau, loss.beta, loss.gamma, loss.sync) == (1.0, 1.0, 1.0, True)
    assert loss.activation == ("softmax" if recipe.startswith(TWO) else "sigmoid")
    assert {term.weight for term in terms.values()} == {1.0}
    mimicked = {term.output for name, term in terms.items() if name != "class"}
    last = {"3", "pool"} if recipe.startswith(TWO) else {"p6", "p7"}
    assert mimicked == ({"0", "1", "2"} | last if recipe.endswith("mimic") else set())
    for name, term in terms.items():
        if name != "class":
            projection = term.loss.projection
            assert projection.weight.shape == (256, 256, 1, 1)
    assert config.data.global_batch_size == 16
    assert config.trainer.devices == 8
    data = instantiate(config.data)
    assert (data.flip, data.num_classes, data.skip_empty) == (0.5, 80, True)
    assert built(composed(recipe, *OFFLINE, "distill=none")).configure_distillation() is None


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a small data set in COCO's layout."""
    folder, rng = tmp_path_factory.mktemp("coco"), np.random.default_rng(0)
    (folder / "annotations").mkdir()
    for split, count in (("train2017", 4), ("val2017", 1)):
        (folder / split).mkdir()
        images, annotations = [], []
        for number in range(count):
            name = f"{number:012}.jpg"
            pixels = rng.integers(0, 256, (80, 100, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / split / name)
            images.append({"id": number, "file_name": name})
            box = {"bbox": [10.0, 20.0, 40.0, 30.0], "area": 900.0, "iscrowd": 0}
            annotations.append(
                {"id": number + 1, "image_id": number, "category_id": 3 + number, **box}
            )
        categories = [{"id": 1 + i, "name": f"thing {i}"} for i in range(80)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        path = folder / "annotations" / f"instances_{split}.json"
        path.write_text(json.dumps(content))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [f"{TWO}_mimic", f"{ONE}_mimic"])
def test_two_steps_run_with_the_real_students(recipe, root, make_trainer):
    config = composed(
        recipe,
        *OFFLINE,
        # ResNeXt-101 has 0.4 GB of weights, so the teacher has a ResNet-50 here.
        "teacher.network.backbone=resnet50",
        *("trainer=cpu", "student.min_size=96", "student.max_size=128"),
        *(f"data.root={root}", "data.global_batch_size=2", "data.num_workers=0"),
    )
    metrics, moved = composition.train_two_steps(config, make_trainer)
    for name in ("train/loss", "train/distill/class", "val/map"):
        assert metrics[name].isfinite()
    assert sum(name.startswith("train/distill/mimic_") for name in metrics) == 5
    assert any(moved[name] for name in moved if "body.layer4" in name)
    assert any(moved[name] for name in moved if "fpn" in name)


def test_the_docs_give_every_recipes_command():
    text = (Path(__file__).resolve().parents[2] / "docs" / "recipes.md").read_text()
    assert all(f"lightning-dist train experiment={recipe}`" in text for recipe in RECIPES)
