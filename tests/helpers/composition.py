"""Functions that compose configs as the command does, and train what a config describes."""

import functools
from collections.abc import Callable
from typing import Any

import lightning as L
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf


@functools.cache
def composed(*overrides: str) -> DictConfig:
    """Return the config that ``lightning-dist train`` would run. Copy it before a change.

    Configs are cached, because composing is slow.
    """
    with initialize_config_module("lightning_dist.conf", version_base="1.3"):
        config = compose("train", overrides=list(overrides), return_hydra_config=True)
    config.hydra.runtime.output_dir = "outputs"
    OmegaConf.set_struct(config, False)
    del config.hydra
    # Do not resolve these parts: they contain the path of the run's folder, from Hydra's config.
    for part in ("callbacks", "logger"):
        config[part] = OmegaConf.to_container(config[part], resolve=False)
    # The command removes this key before it builds the student.
    if config.student and config.student.get("weights", "") is None:
        del config.student.weights
    OmegaConf.set_struct(config, True)
    return config


def train_two_steps(
    config: DictConfig, make_trainer: Callable[..., L.Trainer], **options: Any
) -> tuple[dict[str, Any], dict[str, bool]]:
    """Train the module of a config on its data for two steps, and validate it.

    Returns:
        The logged metrics, and a dict from the name of each parameter of the student to whether it
        has changed.
    """
    module = instantiate(config.module)
    before = {name: p.detach().clone() for name, p in module.student.named_parameters()}
    trainer = make_trainer(max_steps=2, num_sanity_val_steps=0, **options)
    trainer.fit(module, instantiate(config.data))
    assert trainer.global_step == 2
    after = module.student.named_parameters()
    return trainer.callback_metrics, {name: not p.equal(before[name]) for name, p in after}
