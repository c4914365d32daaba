"""Tests that the Cityscapes recipes have the paper's settings, and train their real networks."""

import gzip
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
from torchvision.transforms import v2

import composition
from lightning_dist.data.segmentation_base import RandomScale

# The settings of the paper, written independently of conf/.
RECIPES = {  # Student and teacher, under their names in golden/state_dict_shapes.json.gz
    "cityscapes/deeplabv3_r101_deeplabv3_r18": ("deeplabv3_resnet18", "deeplabv3_resnet101"),
    "cityscapes/deeplabv3_r101_pspnet_r18": ("psp_resnet18", "deeplabv3_resnet101"),
}
MEAN = [104.00698793, 116.66876762, 122.67891434]  # Blue, green and red in 0..255
# Overrides that load no weights for the student, and none for the student and the teacher.
OFFLINE = ["student.backbone_weights=null"]
UNTAUGHT = [*OFFLINE, "teacher.weights=null"]

every_recipe = pytest.mark.parametrize("recipe", RECIPES)


def composed(recipe: str, *overrides: str) -> DictConfig:
    return composition.composed(f"experiment={recipe}", *overrides)


def built(config: DictConfig) -> Any:
    with torch.device("meta"):
        return instantiate(config.module)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a small data set in Cityscapes' layout."""
    folder, rng = tmp_path_factory.mktemp("cityscapes"), np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 1)):
        for number in range(count):
            name = f"{split}/ulm/ulm_{number:06}_000019"
            for path, pixels in (
                (f"leftImg8bit/{name}_leftImg8bit.png", rng.integers(0, 256, (128, 256, 3))),
                (f"gtFine/{name}_gtFine_labelIds.png", rng.integers(0, 34, (128, 256))),
            ):
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / path)
    return folder


def test_these_are_all_recipes_of_cityscapes():
    folder = Path(__file__).resolve().parents[2] / "conf" / "experiment" / "cityscapes"
    assert {f"cityscapes/{path.stem}" for path in folder.glob("*.yaml")} == set(RECIPES)


@every_recipe
def test_networks_are_those_of_the_paper(recipe, golden):
    shapes = json.loads(gzip.decompress((golden / "state_dict_shapes.json.gz").read_bytes()))
    config = composed(recipe)
    assert config.teacher.weights.endswith("deeplabv3_resnet101_citys_best_model.pth")
    assert config.student.backbone_weights.endswith("resnet18-imagenet.pth")
    module = built(composed(recipe, *UNTAUGHT))
    for network, name in zip(
        (module.student, module.teacher.network), RECIPES[recipe], strict=True
    ):
        found = sorted(tuple(value.shape) for value in network.state_dict().values())
        assert found == sorted(map(tuple, shapes[f"cityscapes/{name}"].values()))


@every_recipe
def test_learning_rate_is_the_papers_at_every_update_of_the_run(recipe):
    config = composed(recipe, *OFFLINE, "distill=none")
    assert (config.trainer.max_steps, config.trainer.max_epochs) == (40_000, -1)
    module = built(config)
    trainer = SimpleNamespace(global_step=0, current_epoch=0)
    module.trainer = trainer
    configured = module.configure_optimizers()
    optimizer, plan = configured["optimizer"], configured["lr_scheduler"]
    assert plan["interval"] == "step"
    for update in range(40_000):
        expected = 1e-4 + (0.02 - 1e-4) * (1 - update / 40_000) ** 0.9
        rates = {group["lr"] for group in optimizer.param_groups}
        assert all(math.isclose(rate, expected, rel_tol=1e-9) for rate in rates), update
        trainer.global_step += 1
        module.lr_scheduler_step(plan["scheduler"], None)


@every_recipe
def test_optimizer_batch_and_processes_are_the_papers(recipe):
    config = composed(recipe, *OFFLINE, "distill=none")
    optimizer = instantiate(config.optimizer)(torch.nn.Linear(1, 1).parameters())
    (group,) = optimizer.param_groups
    assert type(optimizer) is torch.optim.SGD
    assert (group["momentum"], group["weight_decay"], group["nesterov"]) == (0.9, 5e-4, False)
    assert config.data.global_batch_size == 16
    assert config.trainer.devices == 8
    assert config.trainer.sync_batchnorm is True
    assert config.num_classes == 19
    assert config.module.window is None  # Whole images are evaluated, in their own size.
    assert config.data.eval_size is None


@every_recipe
@pytest.mark.parametrize(("distill", "task"), [("dist", 1.0), ("kd", 0.9)])
def test_losses_are_the_papers(recipe, distill, task):
    module = built(composed(recipe, *UNTAUGHT, f"distill={distill}"))
    callback = module.configure_distillation()
    weights = {name: term.weight for name, term in callback.terms.items()}
    assert weights == {"main": 1.0, "aux": 0.4}
    assert callback.task_weight == task
    for term in callback.terms.values():
        if distill == "dist":
            assert (term.loss.tau, term.loss.beta, term.loss.gamma) == (1.0, 1.0, 1.0)
            assert (term.loss.activation, term.loss.sync) == ("softmax", True)
        else:
            assert term.loss.tau == 4.0
    assert (module.task_loss.aux_weight, module.task_loss.ignore_index) == (0.4, 255)
    assert module.task_loss.align_corners is True
    assert built(composed(recipe, *OFFLINE, "distill=none")).configure_distillation() is None


@every_recipe
def test_images_are_prepared_as_in_the_paper(recipe, root):
    data = instantiate(composed(recipe, f"data.root={root}").data)
    scale, crop, flip, _ = data.train_transform().transforms
    assert isinstance(scale, RandomScale)
    assert scale.factors == pytest.approx([0.5 + 0.1 * step for step in range(16)])
    assert isinstance(crop, v2.RandomCrop)
    assert (tuple(crop.size), crop.pad_if_needed) == ((512, 1024), True)
    assert (type(flip), flip.p) == (v2.RandomHorizontalFlip, 0.5)
    image, mask = data.val_dataset()[0]
    pixels = np.array(Image.open(data.pairs("val")[0].image)).astype(float)
    np.testing.assert_allclose(image, (pixels[..., ::-1] - MEAN).transpose(2, 0, 1), atol=1e-3)
    assert mask.shape == (128, 256)


@pytest.mark.slow
@every_recipe
def test_two_steps_run_with_the_real_networks(recipe, root, make_trainer):
    config = composed(
        recipe,
        *UNTAUGHT,
        *("trainer=cpu", "trainer.max_steps=2"),
        *(f"data.root={root}", "data.global_batch_size=2", "data.num_workers=0"),
        "data.crop_size=[64,128]",
    )
    metrics, moved = composition.train_two_steps(config, make_trainer)
    for name in ("train/loss", "train/distill/main", "train/distill/aux", "val/miou"):
        assert metrics[name].isfinite()
    assert all(moved[name] for name in moved if name.endswith("weight"))


def test_the_docs_give_every_recipes_command():
    text = (Path(__file__).resolve().parents[2] / "docs" / "recipes.md").read_text()
    assert all(f"lightning-dist train experiment={recipe}`" in text for recipe in RECIPES)
