"""The config inside a checkpoint: what is saved, and how it is built again without trust."""

from collections.abc import Mapping
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from lightning_dist.checks import check_flag
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
    check_flag("trust", trust)
    try:
        checkpoint = read_checkpoint(path)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(str(error)) from error
    if CONFIG_KEY not in checkpoint:
        raise UserError(f"{path} holds no config: it was not written by 'lightning-dist train'")
    config = checkpoint[CONFIG_KEY]
    _check_structure(checkpoint, config, path)
    if not trust:
        from lightning_dist.cli.run.allowlist import (
            check_harmless,
        )  # whose imports train can do without

        check_harmless({"module": config["module"], "data": config["data"]}, path)
    return checkpoint, config


def build_module(
    checkpoint: Mapping[str, Any], config: Mapping[str, Any], path: str
) -> DistillModule:
    """The module with the student of a checkpoint, without a teacher.

    Raises:
        UserError: if the config describes no network, or one that the weights do not fit.
    """
    try:
        module = instantiate(config["module"], teacher=None)
        module.load_state_dict(checkpoint["state_dict"])
    except (InstantiationException, RuntimeError, AttributeError, TypeError) as error:
        raise UserError(
            f"{path} holds weights and a config that do not fit together, or not this version of "
            f"lightning-dist: {error}"
        ) from error
    return module


def _check_structure(checkpoint: Mapping[str, Any], config: Any, path: str) -> None:
    """Refuse a checkpoint without the parts that a run has saved.

    Raises:
        UserError: naming the part.
    """
    state, parts = checkpoint.get("state_dict"), config if isinstance(config, Mapping) else {}
    missing = [
        name
        for name, whole in (
            ("weights", isinstance(state, Mapping) and _all_tensors(state)),
            ("module", isinstance(parts.get("module"), Mapping)),
            ("data", isinstance(parts.get("data"), Mapping)),
            ("seed", type(parts.get("seed")) is int),
        )
        if not whole
    ]
    if missing:
        raise UserError(
            f"{path} is damaged, it has no {' or '.join(missing)}: give a checkpoint as "
            "'lightning-dist train' has written it"
        )


def _all_tensors(state: Mapping[Any, Any]) -> bool:
    return all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items())
