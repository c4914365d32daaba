"""Tests that every recipe has the paper's settings, and runs with its real networks."""

import copy
import functools
import gzip
import json
import math
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from hydra import compose, initialize_config_module
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import instantiate
from lightning.pytorch import Callback
from omegaconf import DictConfig
from PIL import Image
from timm.layers import DropPath
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torchvision.datasets import CIFAR100

import composition
from formats import write_cifar

PAPER = yaml.safe_load((Path(__file__).parent / "paper.yaml").read_text())
RECIPES = list(PAPER["recipes"])
TABLES = [
    *("cifar100", "cifar100_further", "imagenet", "imagenet_ofa"),
    *("imagenet_stronger_teacher", "imagenet_stronger_strategy"),
]
UPDATES_PER_EPOCH = 10

# The recipes that are trained for two steps. Together they have all tables, data sets, optimizers,
# augmentations and averages. (test_networks_are_those_of_the_paper builds the networks of all.)
TRAINED = [
    "cifar100/resnet50_mobilenetv2",
    "cifar100/resnet32x4_shufflenetv1",
    "imagenet/resnet50_mobilenetv1",
    "imagenet_stronger_teacher/resnet50_resnet34",
    "imagenet_stronger_strategy/resnet50_sb_efficientnet_b0",
    "imagenet_stronger_strategy/swin_l_swin_t",
    "tiny_imagenet/resnet34_resnet18",
    "cifar100_further/vgg13_vgg8",
    "imagenet_ofa/resnet50_deit_tiny",
    "imagenet_ofa/swin_t_mobilenetv2",
    "tiny_imagenet_mdistiller/resnet18_shufflenetv2",
]

every_recipe = pytest.mark.parametrize("recipe", RECIPES)


def composed(recipe: str, *overrides: str) -> DictConfig:
    return composition.composed(f"experiment={recipe}", *overrides)


def offline(recipe: str) -> list[str]:
    """Return overrides that leave the teacher without pretrained weights."""
    pretrained = [] if recipe.startswith("cifar100") else ["teacher.pretrained=false"]
    return [*pretrained, "teacher.weights=null"]


def expected(recipe: str) -> SimpleNamespace:
    """Return the settings that the paper gives for a recipe."""
    strategy, student, teacher, own = PAPER["recipes"][recipe]
    values = PAPER["strategies"].get(strategy) or PAPER["own"][strategy]
    values = {**PAPER["strategies"].get(values.get("like"), {}), **values}
    lr = {**values["lr"], **own.get("lr", {})}
    return SimpleNamespace(**{**values, **own, "lr": lr, "student": student, "teacher": teacher})


def built(config: DictConfig, **others: Any) -> Any:
    """Build the module of a config on the meta device, without memory for the weights."""
    with torch.device("meta"):
        return instantiate(config.module, **others)


@functools.cache
def alone(recipe: str) -> Any:
    """Build the module that trains a recipe's student without a teacher, once for all tests."""
    return built(composed(recipe, "distill=none"))


# Small data sets in the formats of the real ones


def write_image(path: Path, size: int, rng: np.random.Generator) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(path)


def write_imagenet(root: Path) -> None:
    """Write the folders of the 1,000 classes, each with a link to the same image."""
    write_image(root / "image.JPEG", 240, np.random.default_rng(0))
    for number in range(1000):
        for split in ("train", "val"):
            folder = root / split / f"n{number:08}"
            folder.mkdir(parents=True)
            (folder / f"{split}_{number}.JPEG").hardlink_to(root / "image.JPEG")


def write_tiny_imagenet(root: Path) -> None:
    """Write the folders of the 200 classes, each with a link to the same image."""
    write_image(root / "val" / "images" / "val_0.JPEG", 64, np.random.default_rng(0))
    wnids = [f"n{number:08}" for number in range(200)]
    for wnid in wnids:
        folder = root / "train" / wnid / "images"
        folder.mkdir(parents=True)
        (folder / f"{wnid}_0.JPEG").hardlink_to(root / "val" / "images" / "val_0.JPEG")
    (root / "val" / "val_annotations.txt").write_text(f"val_0.JPEG\t{wnids[0]}\t0\t0\t63\t63\n")
    (root / "wnids.txt").write_text("\n".join(wnids))
    (root / "words.txt").write_text(f"{wnids[0]}\tgoldfish\n")


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Write a data set of each kind, and return their folders."""
    folder = tmp_path_factory.mktemp("data")
    roots = {kind: folder / kind for kind in ("cifar", "imagenet", "tiny")}
    with pytest.MonkeyPatch.context() as patch:
        write_cifar(roots["cifar"], CIFAR100, patch)
        write_imagenet(roots["imagenet"])
        write_tiny_imagenet(roots["tiny"])
        yield roots


# The settings, one by one


def test_every_recipe_of_the_paper_has_an_experiment_and_no_other_does():
    folder = Path(__file__).resolve().parents[2] / "conf" / "experiment"
    groups = {recipe.split("/")[0] for recipe in RECIPES}
    files = [path for group in groups for path in (folder / group).glob("*.yaml")]
    assert {f"{path.parent.name}/{path.stem}" for path in files} == set(RECIPES)
    assert all(len(path.read_text().splitlines()) < 15 for path in files)


@every_recipe
def test_networks_are_those_of_the_paper(recipe, golden):
    paper, config = expected(recipe), composed(recipe)
    weights = config.teacher.weights
    pretrained = config.teacher.get("pretrained", False)
    assert (weights is None) == pretrained  # The weights are from a file or from timm.
    assert pretrained == ("." in paper.teacher)
    config = composed(recipe, *offline(recipe))
    module = built(config)
    teacher = module.teacher.network
    shapes = json.loads(gzip.decompress((golden / "state_dict_shapes.json.gz").read_bytes()))
    for network, name in [
        (module.student, paper.student),
        (module.teacher.network, paper.teacher),
    ]:
        if f"cifar/{name}" in shapes and (recipe.startswith("cifar100") or network is not teacher):
            found = {key: list(value.shape) for key, value in network.state_dict().items()}
            expected_shapes = shapes[f"cifar/{name}"]
            for key in list(expected_shapes)[-2:]:  # the head's weight and bias
                expected_shapes[key] = [paper.classes, *expected_shapes[key][1:]]
            assert found == expected_shapes
            continue
        architecture, _, tag = name.partition(".")
        assert network.pretrained_cfg["architecture"] == architecture
        assert not tag or network.pretrained_cfg["tag"] == tag
        assert not tag or tuple(network.pretrained_cfg["mean"]) == tuple(paper.mean)
        assert network.num_classes == paper.classes
        if paper.classes == 1000:
            count = sum(parameter.numel() for parameter in network.parameters())
            assert count == PAPER["parameters"][architecture]


def test_a_teacher_sees_the_images_in_its_own_normalisation_and_size():
    recipe = "imagenet/resnet34_resnet18"
    own = built(composed(recipe, *offline(recipe))).teacher.inputs
    assert own.affine is None  # This teacher has the normalisation of the student.
    assert own.size == (224, 224)
    config = composed(recipe, *offline(recipe), "teacher.source=timm/vit_base_patch16_384")
    bridge = built(config).teacher.inputs
    assert bridge.size == (384, 384)
    white = (1 - np.array(config.data.mean)) / np.array(config.data.std)
    scale, shift = np.array(bridge.affine).T
    # The ViT has mean 0.5 and std 0.5, so a white pixel becomes (1 - 0.5) / 0.5.
    np.testing.assert_allclose(white * scale + shift, 1, rtol=1e-6)


@every_recipe
def test_dropout_and_drop_path_are_those_of_the_paper(recipe):
    paper = expected(recipe)
    student = alone(recipe).student
    drop_paths = [m.drop_prob for m in student.modules() if isinstance(m, DropPath)]
    assert max(drop_paths, default=0.0) == pytest.approx(getattr(paper, "drop_path", 0.0))
    dropouts = [m.p for m in student.modules() if isinstance(m, nn.Dropout)]
    rates = [*dropouts, getattr(student, "drop_rate", 0.0)]
    assert max(rates) == getattr(paper, "dropout", 0.0)


def paper_lr(lr: dict[str, Any], epochs: int, update: int) -> float:
    """Return the learning rate of an optimizer update by the paper's rule."""
    time = Fraction(update, UPDATES_PER_EPOCH)  # The time in epochs, without rounding.
    if lr.get("whole_epochs"):  # timm's scripts of that time change the rate once an epoch
        time = Fraction(math.floor(time))
    warmup = lr.get("warmup", 0)
    if time < warmup:
        return lr["start"] + (lr["base"] - lr["start"]) * float(time / warmup)
    if "cosine_to" in lr:
        share = (1 + math.cos(math.pi * float(time / epochs))) / 2
        return lr["cosine_to"] + (lr["base"] - lr["cosine_to"]) * share
    if "milestones" in lr:
        return lr["base"] * lr["factor"] ** sum(time >= m for m in lr["milestones"])
    start = 0 if lr.get("whole_epochs") else warmup
    return lr["base"] * lr["factor"] ** ((time - start) // Fraction(str(lr["every"])))


def on_a_stub(module: Any) -> SimpleNamespace:
    """Give a module a placeholder Trainer that has the attributes for building a schedule."""
    trainer = SimpleNamespace(
        callbacks=[],
        fit_loop=SimpleNamespace(setup_data=lambda: None),
        num_training_batches=UPDATES_PER_EPOCH,
        accumulate_grad_batches=1,
        global_step=0,
        current_epoch=0,
    )
    module.trainer = trainer
    return trainer  # Return it, because the module has only a weak reference to it.


@every_recipe
def test_learning_rate_is_the_papers_at_every_update_of_the_run(recipe):
    paper, module = expected(recipe), alone(recipe)
    assert composed(recipe, "distill=none").trainer.max_epochs == paper.epochs
    trainer = on_a_stub(module)
    configured = module.configure_optimizers()
    optimizer, plan = configured["optimizer"], configured["lr_scheduler"]
    for update in range(paper.epochs * UPDATES_PER_EPOCH):
        rate = paper_lr(paper.lr, paper.epochs, update)
        for group in optimizer.param_groups:
            assert math.isclose(group["lr"], rate, rel_tol=1e-9), f"update {update}"
        # Without this attribute, torch warns that the optimizer was never stepped.
        optimizer._opt_called = True
        trainer.global_step += 1
        trainer.current_epoch = update // UPDATES_PER_EPOCH
        if plan["interval"] == "step" or (update + 1) % UPDATES_PER_EPOCH == 0:
            module.lr_scheduler_step(plan["scheduler"], None)


def kind_of(network: nn.Module) -> dict[int, str]:
    """Return a dict from ids of parameters to kinds: "norm", or the last part of its name."""
    kinds = {id(p): name.split(".")[-1] for name, p in network.named_parameters()}
    norms = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm)
    for layer in network.modules():
        if isinstance(layer, norms):
            kinds |= {id(p): "norm" for p in layer.parameters(recurse=False)}
    return kinds


@every_recipe
def test_optimizer_and_weight_decay_are_the_papers(recipe):
    paper, module = expected(recipe), alone(recipe)
    trainer = on_a_stub(module)  # Keep a reference, because the module's own reference is weak.
    assert trainer is not None
    optimizer = module.configure_optimizers()["optimizer"]
    assert type(optimizer).__name__ == paper.optimizer["name"]
    kinds = kind_of(module.student)
    for group in optimizer.param_groups:
        for option, value in paper.optimizer.items():
            found = group.get(option, value if option == "name" else None)
            assert (list(found) if isinstance(value, list) else found) == value
        for parameter in group["params"]:
            spared = kinds.pop(id(parameter)) in paper.spared
            assert group["weight_decay"] == (0.0 if spared else paper.weight_decay)
    assert not kinds  # Every parameter is in a group.


@every_recipe
def test_losses_are_the_papers(recipe):
    paper = expected(recipe)
    for distill, values in PAPER["distill"].items():
        config = composed(recipe, *[f"distill={distill}"] if distill != "dist" else [])
        module = built(config, student=nn.Linear(1, 1), teacher=nn.Linear(1, 1))
        callback = module.configure_distillation()
        (term,) = callback.terms.values()
        own = getattr(paper, "weight", None) if distill == "dist" else None
        assert (callback.task_weight, term.weight) == (values["task"], own or values["weight"])
        assert term.loss.tau == values.get("tau", paper.tau)
        if distill == "dist":
            assert (term.loss.beta, term.loss.gamma) == (values["beta"], values["gamma"])
            assert term.loss.activation == "softmax"
    supervised = alone(recipe)
    assert supervised.configure_distillation() is None
    assert supervised.task_loss.label_smoothing == getattr(paper, "label_smoothing", 0.0)
    mixing, mixup = getattr(paper, "mixup", None), supervised.mixup
    assert (mixup is None) == (mixing is None)
    if mixing:
        assert (mixup.mixup_alpha, mixup.cutmix_alpha) == (mixing["mixup"], mixing["cutmix"])
        assert mixup.label_smoothing == mixing["label_smoothing"]
        assert mixup.num_classes == paper.classes


@every_recipe
def test_ema_is_the_papers(recipe):
    decay = getattr(expected(recipe), "ema", None)
    config = composed(recipe, "distill=none")
    ema = config.callbacks.get("ema")
    assert (ema and ema.decay) == decay


@every_recipe
def test_batch_and_processes_are_the_papers(recipe):
    paper, config = expected(recipe), composed(recipe)
    assert config.data.global_batch_size == paper.batch
    assert config.num_classes == paper.classes
    assert config.trainer.devices == paper.gpus
    assert config.trainer.accumulate_grad_batches == 1
    assert config.trainer.gradient_clip_val == getattr(paper, "gradient_clip", None)
    if paper.gpus > 1:
        assert instantiate(config.trainer.strategy)._ddp_comm_hook is fp16_compress_hook


@every_recipe
def test_images_are_prepared_as_in_the_paper(recipe, roots):
    paper = expected(recipe)
    size, settings = paper.data["size"], paper.data
    data = instantiate(composed(recipe).data, root=str(roots[settings["kind"]]))
    assert (data.image_size, list(data.mean), list(data.std)) == (size, paper.mean, paper.std)
    train = data.train_dataset()
    if settings["kind"] == "cifar":
        assert (train.padding, train.flip) == (settings["padding"], True)
        assert data.val_dataset().padding == 0
        assert len(data.val_dataset()) == 200  # Like the paper, it validates on all test images.
        return
    steps = {type(step).__name__: step for step in train.transform.transforms}
    assert steps.pop("RandomHorizontalFlip").p == 0.5
    if settings["kind"] == "tiny":
        assert ("RandomCrop" in steps) == ("padding" in settings)
        assert ("RandomRotation" in steps) == ("rotation" in settings)
        if "padding" in settings:
            crop = steps["RandomCrop"]
            assert (crop.size, crop.padding) == ((size, size), settings["padding"])
        else:
            turned = settings["rotation"]
            assert list(steps["RandomRotation"].degrees) == [-turned, turned]
        return
    crop = steps.pop("RandomResizedCropAndInterpolation")
    assert (crop.size, crop.scale) == ((size, size), (0.08, 1.0))
    if "magnitude" in settings:
        augment = steps.pop("RandAugment")
        assert augment.num_layers == 2
        assert {op.magnitude for op in augment.ops} == {settings["magnitude"]}
        assert {op.magnitude_std for op in augment.ops} == {settings["mstd"]}
        erasing = steps.pop("RandomErasing")
        assert (erasing.probability, erasing.per_pixel) == (settings["erasing"], True)
    assert set(steps) == {"MaybeToTensor", "Normalize"}
    resize, centre, *_ = data.val_dataset().transform.transforms
    assert (resize.size, tuple(centre.size)) == (settings["resize"], (size, size))


# The tables of the paper


@pytest.mark.parametrize("table", TABLES)
def test_a_sweep_preset_trains_every_pair_of_a_table_with_every_loss(table):
    with initialize_config_module("lightning_dist.conf", version_base="1.3"):
        config = compose("train", overrides=[f"+sweep={table}"], return_hydra_config=True)
    arguments = [f"{key}={value}" for key, value in config.hydra.sweeper.params.items()]
    overrides = OverridesParser.create().parse_overrides(arguments)
    (jobs,) = BasicSweeper.split_arguments(overrides, max_batch_size=None)
    pairs = [recipe for recipe in RECIPES if recipe.startswith(f"{table}/")]
    assert sorted(jobs) == sorted(
        [f"experiment={pair}", f"distill={distill}"]
        for pair in pairs
        for distill in ("none", "kd", "dist")
    )


def test_the_docs_give_the_command_of_every_recipe_and_table():
    text = (Path(__file__).resolve().parents[2] / "docs" / "recipes.md").read_text()
    for recipe in RECIPES:
        assert f"lightning-dist train experiment={recipe}" in text
    for table in TABLES:
        assert f"lightning-dist train -m +sweep={table}`" in text


# Two steps of a recipe


@pytest.mark.slow
@pytest.mark.parametrize("recipe", TRAINED)
def test_two_steps_run_with_the_real_networks(recipe, roots, make_trainer):
    kind = expected(recipe).data["kind"]
    batch = 8 if kind == "cifar" else 2
    overrides = [
        *offline(recipe),
        "trainer=cpu",
        f"data.root={roots[kind]}",
        f"data.global_batch_size={batch}",
        "data.num_workers=0",
    ]
    # Swin-L has 0.8 GB of weights, so a smaller Swin is the teacher here.
    if "swin_l" in recipe:
        overrides.append("teacher.source=timm/swin_tiny_patch4_window7_224")
    config = composed(recipe, *overrides)
    metrics, moved = composition.train_two_steps(
        config,
        make_trainer,
        limit_train_batches=2,
        limit_val_batches=1,
        gradient_clip_val=config.trainer.gradient_clip_val,
        callbacks=[instantiate(config.callbacks["ema"])] if "ema" in config.callbacks else [],
    )
    for name in ("train/loss", "train/task", "train/distill", "val/loss", "val/accuracy"):
        assert metrics[name].isfinite()
    assert ("val/ema_accuracy" in metrics) == hasattr(expected(recipe), "ema")
    stem, *_, head = moved.values()
    assert stem
    assert head


# The trajectory of the weights


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lr", "free"),
    [
        pytest.param(5e-5, True, id="the-rate-after-epoch-210"),
        # With random weights and this learning rate, a rounding error grows tenfold in each step,
        # in any program. So each step of the plain loop starts from Lightning's weights.
        pytest.param(0.05, False, id="the-first-rate-step-by-step"),
    ],
)
def test_the_steps_equal_a_plain_loop(lr, free, roots, make_trainer, reference_dist_loss):
    """The losses and the weights are equal after each step."""
    config = composed(
        "cifar100/resnet56_resnet20",
        "teacher.weights=null",
        "+teacher.dtype=float64",
        "trainer=cpu",
        f"data.root={roots['cifar']}",
        "data.global_batch_size=8",
        "data.num_workers=0",
        f"optimizer.lr={lr}",
    )
    module = instantiate(config.module).double()
    student = copy.deepcopy(module.student)
    teacher = copy.deepcopy(module.teacher.network)
    batches, losses, states = [], [], []

    class Record(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            states.append(copy.deepcopy(pl_module.student.state_dict()))

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            batches.append([part.clone() for part in batch])
            losses.append(outputs["loss"].item())

    trainer = make_trainer(
        max_steps=8, limit_val_batches=0, precision="64-true", callbacks=[Record()]
    )
    trainer.fit(module, instantiate(config.data))
    assert (len(losses), batches[0][0].dtype) == (8, torch.float64)
    states.append(module.student.state_dict())

    optimizer = torch.optim.SGD(student.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
    student.train()
    plain = []
    for (images, labels), before, after in zip(batches, states, states[1:], strict=False):
        if not free:
            student.load_state_dict(before)
        logits = student(images)
        with torch.no_grad():
            target = teacher(images)
        loss = F.cross_entropy(logits, labels) + 2 * reference_dist_loss(logits, target, tau=4.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        plain.append(loss.item())
        torch.testing.assert_close(student.state_dict(), after, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(losses, plain, rtol=0, atol=1e-9)
