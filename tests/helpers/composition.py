"""A function that composes configs as the command does, each only once because that is slow."""

import functools

from hydra import compose, initialize_config_module
from omegaconf import DictConfig, OmegaConf


@functools.cache
def composed(*overrides: str) -> DictConfig:
    """Return the config that ``lightning-dist train`` would run; do not change it."""
    with initialize_config_module("lightning_dist.conf", version_base="1.3"):
        config = compose("train", overrides=list(overrides), return_hydra_config=True)
    config.hydra.runtime.output_dir = "outputs"
    OmegaConf.set_struct(config, False)
    del config.hydra
    # These contain the path of the run's folder, which comes from the config of Hydra.
    for part in ("callbacks", "logger"):
        config[part] = OmegaConf.to_container(config[part], resolve=False)
    OmegaConf.set_struct(config, True)
    return config
