"""Configs as the command composes them; each is composed once, since that takes long."""

import functools

from hydra import compose, initialize_config_module
from omegaconf import DictConfig, OmegaConf


@functools.cache
def composed(*overrides: str) -> DictConfig:
    """Return what ``lightning-dist train`` would run; to be read, not changed."""
    with initialize_config_module("lightning_dist.conf", version_base="1.3"):
        config = compose("train", overrides=list(overrides), return_hydra_config=True)
    config.hydra.runtime.output_dir = "outputs"
    OmegaConf.set_struct(config, False)
    del config.hydra
    for part in ("callbacks", "logger"):  # they name the folder of a run, which is hydra's
        config[part] = OmegaConf.to_container(config[part], resolve=False)
    OmegaConf.set_struct(config, True)
    return config
