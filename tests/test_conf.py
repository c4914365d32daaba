"""Tests that every config composes, and that the classes and functions that it names exist."""

import inspect
from importlib.resources import files

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.utils import get_method, instantiate
from lightning import Trainer
from omegaconf import OmegaConf
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

from composition import composed
from lightning_dist.cli.run.saved_config import CONFIG_KEY, read_saved, to_save
from lightning_dist.cli.run.settings import check_settings
from lightning_dist.cli.sweep.own_process import needs_own_process

CONF = "lightning_dist.conf"
# Common keys of the Trainer, each with a value that is not the default.
LIMITS = {
    "accumulate_grad_batches": 2,
    "gradient_clip_val": 1.0,
    "deterministic": True,
    "limit_train_batches": 2,
    "limit_val_batches": 2,
    "limit_test_batches": 2,
    "check_val_every_n_epoch": 2,
    "val_check_interval": 0.5,
    "max_steps": 10,
}
DETECTORS = ["scenes/detection_fasterrcnn", "scenes/detection_retinanet"]


def options(group: str) -> list[str]:
    from hydra.core.global_hydra import GlobalHydra

    with initialize_config_module(CONF, version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()

        def below(path: str) -> list[str]:
            found = [f"{path}/{name}" for name in loader.get_group_options(path)]
            for inner in loader.list_groups(path):
                found += below(f"{path}/{inner}")
            return found

        return [name.removeprefix(group + "/") for name in below(group)]


def targets(config) -> list[str]:
    if isinstance(config, dict):
        own = [config["_target_"]] if "_target_" in config else []
        return own + [t for value in config.values() for t in targets(value)]
    return [t for value in config for t in targets(value)] if isinstance(config, list) else []


def assert_all_exists(config) -> None:
    for target in targets(OmegaConf.to_container(config, resolve=False)):
        assert callable(get_method(target))


@pytest.mark.parametrize("experiment", options("experiment"))
def test_every_experiment_names_existing_targets_and_saves_a_safe_config(experiment, tmp_path):
    """A safe config lets eval, export and predict read the checkpoints without trust=true."""
    config = composed(f"experiment={experiment}")
    assert_all_exists(config)
    module = OmegaConf.to_container(config.module, resolve=True)
    assert (module["teacher"] is None) == experiment.endswith("_teacher")
    parts = [key for key in config if key not in ("callbacks", "logger")]
    saved = to_save(OmegaConf.masked_copy(config, parts))
    torch.save({CONFIG_KEY: saved, "state_dict": {}}, tmp_path / "last.ckpt")
    read_saved(str(tmp_path / "last.ckpt"), trust=False)


# The names with "/" are not losses: a file in conf/distill/dist/ only sets what a protocol has
# for DIST.
LOSSES = [name for name in options("distill") if "/" not in name]


@pytest.mark.parametrize("distill", ["none", "kd", "dist"])
@pytest.mark.parametrize(
    "experiment", ["digits", "scenes/segmentation", *DETECTORS], ids=lambda x: x.split("/")[-1]
)
def test_every_loss_fits_every_task(experiment, distill):
    """This test has one experiment per task; tests/recipes combines the recipes with the losses.

    tests/tasks/test_methods.py trains with the others.
    """
    config = composed(f"experiment={experiment}", f"distill={distill}")
    assert_all_exists(config)
    module = OmegaConf.to_container(config.module, resolve=True)
    assert (module["teacher"] is None) == (distill == "none")


@pytest.mark.parametrize("trainer", options("trainer"))
def test_dist_is_synchronised_with_every_trainer(trainer):
    assert composed(f"trainer={trainer}").distill.loss.sync is True


@pytest.mark.parametrize("spatial", [(), (5, 6)])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_in_one_process_sync_changes_no_bit(spatial, activation):
    student, teacher = (3 * torch.randn(2, 40, 7, *spatial)).unbind()
    bits = []
    for sync in (True, False):
        options = [f"distill.loss.activation={activation}", f"distill.loss.sync={sync}"]
        logits = student.clone().requires_grad_()
        loss = instantiate(composed(*options).distill.loss)(logits, teacher)
        loss.backward()
        bits.append((loss.detach(), logits.grad))
    assert all(torch.equal(synced, own) for synced, own in zip(*bits, strict=True))


@pytest.mark.parametrize(
    ("overrides", "apart"),
    [
        ([], False),
        (["trainer=cpu"], False),
        (["trainer=gpu", "trainer.devices=[3]"], False),
        (["trainer.devices='1'"], False),
        (["own_process=true"], True),
        (["trainer.devices=2"], True),
        (["trainer.devices='2'"], True),
        (["trainer.devices=[0,1]"], True),
        (["trainer.devices=auto"], True),
        (["trainer.devices=-1"], True),
        (["+trainer.num_nodes=2"], True),
        (["trainer=ddp_sim"], True),
        (["trainer=ddp", "trainer.devices=1"], True),
        (["trainer=fsdp2"], True),
        (["trainer=deepspeed"], True),
        (["trainer=multinode", "trainer.devices=1"], True),
    ],
    ids=str,
)
def test_jobs_that_may_start_several_processes_run_as_separate_commands(overrides, apart):
    assert needs_own_process(composed(*overrides)) == apart


@pytest.mark.parametrize(
    ("module", "metric"),
    [("classification", "accuracy"), ("detection", "map"), ("segmentation", "miou")],
)
def test_the_monitor_follows_the_task_and_can_be_overridden(module, metric):
    assert composed(f"module={module}").monitor == f"val/{metric}"
    assert composed(f"module={module}", "monitor=val/loss").monitor == "val/loss"


@pytest.mark.parametrize("distill", ["none", "kd", "dist"])
def test_a_protocol_sets_the_temperature_of_dist_and_leaves_that_of_kd(distill):
    expected = {"none": None, "kd": 4.0, "dist": 4.0}[distill]
    own = ["student=cifar/resnet20", "teacher=cifar/resnet56", f"distill={distill}"]
    loss = composed("protocol=cifar100", *own).distill.loss
    assert (loss and loss.tau) == expected
    tau = [] if distill == "none" else ["distill.loss.tau=2"]
    loss = composed("protocol=cifar100", *own, *tau).distill.loss
    assert (loss and loss.tau) == (2 if tau else None)


@pytest.mark.parametrize("protocol", options("protocol"))
def test_what_a_protocol_sets_for_dist_leaves_other_losses_alone(protocol):
    if protocol == "imagenet/base":  # This file is no protocol by itself.
        return
    own = [f"protocol={protocol}", "teacher=digits", "~tuned"]
    config = composed(*own, "distill=at")
    assert (config.distill.weight, config.distill.task_weight) == (1000.0, 1.0)
    assert composed(*own, "distill=lskd").distill.weight == 9.0


def test_an_empty_command_line_trains_on_digits():
    config = composed()
    assert config.data._target_.endswith(".DigitsDataModule")
    assert config.student._target_.endswith(".SmallCNN")
    assert config.teacher.weights.endswith("digits_teacher.safetensors")
    check_settings(config)


def test_other_data_do_not_get_the_teacher_of_digits():
    images = ["data=image_folder", "data.root=x", "student=timm", "student.model_name=resnet18"]
    alone = composed(*images, "distill=none")
    assert alone.module.teacher is None
    check_settings(alone)
    with pytest.raises(ValueError, match=r"no teacher is chosen.*teacher=timm.*distill=none"):
        check_settings(composed(*images))
    check_settings(composed(*images, "teacher=timm", "teacher.source=timm/resnet34"))


@pytest.mark.parametrize(
    "overrides",
    [
        [f"trainer.{key}={value}" for key, value in LIMITS.items()],
        ["data.drop_last=true", "data.pin_memory=false"],
        ["data=scenes", "data.drop_last=true", "data.pin_memory=false"],
        ["data=scenes_detection", "data.drop_last=true", "data.pin_memory=false"],
        ["~experiment"],  # Earlier versions needed it, because their default was an experiment.
    ],
    ids=lambda overrides: overrides[0],
)
def test_common_keys_can_be_overridden_without_a_plus(overrides):
    composed(*overrides)


def test_the_trainers_keys_have_lightnings_defaults():
    config = composed().trainer
    signature = inspect.signature(Trainer).parameters
    assert {key: config[key] for key in LIMITS} == {key: signature[key].default for key in LIMITS}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("distributed=true", "trainer.devices"),
        ("dist_tau=4", "distill.loss.tau"),
        ("dist_activation=sigmoid", "distill.loss.activation"),
        ("recipe=cifar100", "protocol"),
        ("+distributed=true", "trainer.devices"),
        ("+dist_tau=4", "distill.loss.tau"),
        ("+dist_activation=sigmoid", "distill.loss.activation"),
        ("+recipe=cifar100", "protocol"),
        ("+trainer.accumulate_grad_batches=2", "'trainer.accumulate_grad_batches=2'"),
        ("+data.drop_last=true", "'data.drop_last=true'"),
    ],
)
def test_an_old_name_is_refused_with_the_new_one(refused, old, new):
    assert new in refused("train", old, "print_config=false")


def test_the_error_for_an_experiment_with_a_recipe_names_the_protocol(refused, tmp_path):
    (tmp_path / "experiment").mkdir()
    text = "# @package _global_\ndefaults:\n  - /recipe/cifar100\n"
    (tmp_path / "experiment" / "mine.yaml").write_text(text)
    assert "use protocol" in refused("train", "--config-dir", str(tmp_path), "experiment=mine")


def test_the_published_runs_compress_their_gradients():
    hook = instantiate(composed("trainer=ddp_fp16").trainer.strategy.ddp_comm_hook)
    assert hook is default_hooks.fp16_compress_hook


@pytest.mark.parametrize("start", ["ddp", "ddp_spawn", "ddp_sim"])
def test_the_options_of_ddp_are_keys_of_the_trainer(start):
    keys = {"static_graph": True, "gradient_as_bucket_view": True, "find_unused_parameters": True}
    overrides = [f"trainer.strategy.{key}=true" for key in keys]
    config = composed(f"trainer={start}", "trainer.sync_batchnorm=true", *overrides)
    assert keys.items() <= instantiate(config.trainer.strategy)._ddp_kwargs.items()
    assert config.trainer.sync_batchnorm


def test_the_default_search_varies_existing_settings():
    config = composed("hydra/sweeper=optuna")
    assert callable(get_method(config.callbacks.pruning["_target_"]))
    with initialize_config_module(CONF, version_base="1.3"):
        options = ["hydra/sweeper=optuna", "hydra.sweep.dir=x"]
        sweeper = compose("train", options, return_hydra_config=True).hydra.sweeper
    assert callable(get_method(sweeper._target_))
    assert all(OmegaConf.select(config, key) is not None for key in sweeper.params)
    assert len(sweeper.params) == 4


@pytest.mark.parametrize(
    "group",
    [
        "callbacks",
        "data",
        "distill",
        "logger",
        "module",
        "optimizer",
        "scheduler",
        "student",
        "teacher",
        "trainer",
    ],
)
def test_every_option_of_every_group_names_existing_targets(group):
    for option in LOSSES if group == "distill" else options(group):
        # Composing takes much longer than reading, so only files with a defaults list are composed.
        config = OmegaConf.load(files(CONF) / group / f"{option}.yaml")
        assert_all_exists(composed(f"{group}={option}") if "defaults" in config else config)
