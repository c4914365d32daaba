"""The config inside a checkpoint: what is saved, and how it is built again without trust."""

import importlib
from collections.abc import Iterator, Mapping
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from lightning_dist.cli import UserError
from lightning_dist.module import DistillModule
from lightning_dist.weights import read_checkpoint

CONFIG_KEY = "lightning_dist_config"

# A config names code by `_target_`, and a checkpoint may come from anywhere: what it names must be
# defined in one of these.
_TRUSTED = ("lightning_dist", "timm", "torch.nn", "torch.optim", "torchmetrics", "torchvision")


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
        for target in _targets(config):
            _check_target(target, path)
    return checkpoint, config


def build_module(checkpoint: Mapping[str, Any], config: Mapping[str, Any]) -> DistillModule:
    """The module with the student of a checkpoint, without a teacher."""
    module = instantiate(config["module"], teacher=None)
    module.load_state_dict(checkpoint["state_dict"])
    return module


def _targets(config: Any) -> Iterator[str]:
    if isinstance(config, Mapping):
        for key, value in config.items():
            if key == "_target_":
                yield str(value)
            yield from _targets(value)
    elif isinstance(config, (list, tuple)):
        for value in config:
            yield from _targets(value)


def _check_target(target: str, path: str) -> None:
    """Refuse a target that is not defined in a trusted package, without importing any other."""
    parts = target.split(".")
    if any(target.startswith(f"{package}.") for package in _TRUSTED):
        found: Any = importlib.import_module(parts[0])
        for i, part in enumerate(parts[1:], start=2):
            if not hasattr(found, part):
                importlib.import_module(".".join(parts[:i]))
            found = getattr(found, part)
        home = getattr(found, "__module__", None) or ""
        if any(home == package or home.startswith(f"{package}.") for package in _TRUSTED):
            return
    raise UserError(
        f"{path} would run {target!r}, which is not part of {', '.join(_TRUSTED)}: if you trust "
        "the file, add trust=true"
    )
