"""Every config composes, and names things that exist."""

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.utils import get_method, instantiate
from omegaconf import OmegaConf
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

from composition import composed
from lightning_dist.cli.run.saved_config import CONFIG_KEY, read_saved, to_save

CONF = "lightning_dist.conf"
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
def test_every_experiment_names_what_exists_and_saves_a_harmless_config(experiment, tmp_path):
    """So that eval, export and predict take its checkpoints without trust=true."""
    config = composed(f"experiment={experiment}")
    assert_all_exists(config)
    module = OmegaConf.to_container(config.module, resolve=True)
    assert (module["teacher"] is None) == experiment.endswith("_teacher")
    parts = [key for key in config if key not in ("callbacks", "logger")]
    saved = to_save(OmegaConf.masked_copy(config, parts))
    torch.save({CONFIG_KEY: saved, "state_dict": {}}, tmp_path / "last.ckpt")
    read_saved(str(tmp_path / "last.ckpt"), trust=False)


@pytest.mark.parametrize("distill", options("distill"))
@pytest.mark.parametrize(
    "experiment", ["digits", "scenes/segmentation", *DETECTORS], ids=lambda x: x.split("/")[-1]
)
def test_every_loss_fits_every_task(experiment, distill):
    """Each of the papers' recipes is composed with each loss in tests/recipes."""
    config = composed(f"experiment={experiment}", f"distill={distill}")
    assert_all_exists(config)
    module = OmegaConf.to_container(config.module, resolve=True)
    assert (module["teacher"] is None) == (distill == "none")


@pytest.mark.parametrize("trainer", options("trainer"))
def test_dist_is_synchronised_where_there_are_several_processes(trainer):
    config = composed(f"trainer={trainer}")
    several = config.trainer.devices != 1 or config.trainer.get("num_nodes", 1) != 1
    assert config.distill.loss.sync == several


def test_the_published_runs_compress_their_gradients():
    hook = instantiate(composed("trainer=ddp_fp16").trainer.strategy.ddp_comm_hook)
    assert hook is default_hooks.fp16_compress_hook


@pytest.mark.parametrize("start", ["ddp", "ddp_spawn", "ddp_sim"])
def test_the_switches_of_ddp_are_keys_of_the_trainer(start):
    keys = {"static_graph": True, "gradient_as_bucket_view": True, "find_unused_parameters": True}
    overrides = [f"trainer.strategy.{key}=true" for key in keys]
    config = composed(f"trainer={start}", "trainer.sync_batchnorm=true", *overrides)
    assert keys.items() <= instantiate(config.trainer.strategy)._ddp_kwargs.items()
    assert config.trainer.sync_batchnorm


def test_the_search_is_over_settings_that_exist():
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
def test_every_option_of_every_group_names_what_exists(group):
    for option in options(group):
        assert_all_exists(composed(f"{group}={option}"))
