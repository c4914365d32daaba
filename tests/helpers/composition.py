"""A function that composes configs as the command does; it caches them, as composing is slow."""

import functools

from hydra import compose, initialize_config_module
from omegaconf import DictConfig, OmegaConf


@functools.cache
def composed(*overrides: str) -> DictConfig:
    """Return the config that ``lightning-dist train`` would run. Copy it before a change."""
    with initialize_config_module("lightning_dist.conf", version_base="1.3"):
        config = compose("train", overrides=list(overrides), return_hydra_config=True)
    config.hydra.runtime.output_dir = "outputs"
    OmegaConf.set_struct(config, False)
    del config.hydra
    # Do not resolve these parts: they contain the path of the run's folder, from Hydra's config.
    for part in ("callbacks", "logger"):
        config[part] = OmegaConf.to_container(config[part], resolve=False)
    OmegaConf.set_struct(config, True)
    return config
