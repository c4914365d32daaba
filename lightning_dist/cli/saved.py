"""The config inside a checkpoint: what is saved, and how it is built again without trust."""

import importlib
from collections.abc import Iterator, Mapping
from typing import Any

from hydra.utils import instantiate
from lightning.pytorch import LightningDataModule
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_dist.cli import UserError
from lightning_dist.module import DistillModule
from lightning_dist.weights import read_checkpoint

CONFIG_KEY = "lightning_dist_config"

# A config names code by `_target_`, and a checkpoint may come from anywhere. What it names must be
# a class of one of these kinds from one of these packages, or come from a module that builds
# networks, optimizers and schedules and does nothing else.
_KINDS = (nn.Module, LightningDataModule, Optimizer, LRScheduler)
_PACKAGES = ("lightning_dist", "timm", "torch", "torchmetrics", "torchvision")
_BUILDERS = (
    "lightning_dist.models",
    "lightning_dist.schedule",
    "timm.data.mixup",
    "timm.models",
    "timm.optim",
    "timm.scheduler",
    "torchvision.models",
)


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
    """Refuse a target that is not known to be harmless, without importing any other package."""
    if target.partition(".")[0] in _PACKAGES:
        found = _locate(target)
        home = getattr(found, "__module__", None) or ""
        kind = isinstance(found, type) and issubclass(found, _KINDS)
        if (kind and _within(home, _PACKAGES)) or (callable(found) and _within(home, _BUILDERS)):
            return
    raise UserError(
        f"{path} would run {target!r}, which is no network, data module, metric, optimizer or "
        f"scheduler of {', '.join(_PACKAGES)}: if you trust the file, add trust=true"
    )


def _locate(target: str) -> Any:
    parts = target.split(".")
    found: Any = importlib.import_module(parts[0])
    for i, part in enumerate(parts[1:], start=2):
        if not hasattr(found, part):
            try:
                importlib.import_module(".".join(parts[:i]))
            except ImportError:
                return None
        found = getattr(found, part, None)
    return found


def _within(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)
