"""The config inside a checkpoint: what is saved, and how it is built again without trust."""

from collections.abc import Mapping
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from lightning_dist.cli import UserError
from lightning_dist.module import DistillModule
from lightning_dist.weights import read_checkpoint

CONFIG_KEY = "lightning_dist_config"


def to_save(config: DictConfig) -> dict[str, Any]:
    """What a checkpoint keeps of the composed config: the data and the module, not the teacher."""
    plain = OmegaConf.to_container(config, resolve=True)
    assert isinstance(plain, dict)
    module = {k: v for k, v in plain["module"].items() if k not in ("teacher", "distill_loss")}
    return {"module": module, "data": plain["data"], "seed": plain["seed"]}


def read_saved(path: str, trust: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read a checkpoint of ``lightning-dist train``.

    Args:
        path: the checkpoint.
        trust: build from its config whatever code that names.

    Returns:
        The checkpoint and its config.

    Raises:
        UserError: no such file, damaged, not of ``lightning-dist train``, or naming other code.
    """
    try:
        checkpoint = read_checkpoint(path)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(str(error)) from error
    if CONFIG_KEY not in checkpoint:
        raise UserError(f"{path} holds no config: it was not written by 'lightning-dist train'")
    config = checkpoint[CONFIG_KEY]
    if not trust:
        from lightning_dist.cli.harmless import check_harmless  # whose imports train can do without

        check_harmless({"module": config["module"], "data": config["data"]}, path)
    return checkpoint, config


def build_module(checkpoint: Mapping[str, Any], config: Mapping[str, Any]) -> DistillModule:
    """The module with the student of a checkpoint, without a teacher."""
    module = instantiate(config["module"], teacher=None)
    module.load_state_dict(checkpoint["state_dict"])
    return module
