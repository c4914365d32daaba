"""Prepare a config for a checkpoint, read it back, and build the module that it describes."""

from collections.abc import Mapping
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from lightning_dist.checks import check_flag
from lightning_dist.cli.errors import UserError
from lightning_dist.module import DistillModule
from lightning_dist.weights import read_checkpoint

CONFIG_KEY = "lightning_dist_config"

# The old paths of classes and functions in saved configs, with their current paths.
_MOVED = {
    "lightning_dist.data.imagenet.ImageFolderDataModule": (
        "lightning_dist.data.image_folder.ImageFolderDataModule"
    ),
    "lightning_dist.schedule.warmup_multistep": "lightning_dist.training.warmup_multistep",
}


def to_save(config: DictConfig) -> dict[str, Any]:
    """Return the parts of a config to save: data, module and seed, but not the teacher.

    Args:
        config: the composed config ``train``.
    """
    plain = OmegaConf.to_container(config, resolve=True)
    assert isinstance(plain, dict)
    module = {k: v for k, v in plain["module"].items() if k not in ("teacher", "distill_loss")}
    return {"module": module, "data": plain["data"], "seed": plain["seed"]}


def read_saved(path: str, trust: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read a checkpoint of ``lightning-dist train``.

    Args:
        path: the path of the checkpoint.
        trust: whether to accept a config that calls code outside the allowlist.

    Returns:
        The checkpoint and its config.

    Raises:
        UserError: if the file does not exist, is damaged or was not written by
            ``lightning-dist train``, or if its config calls code outside the allowlist.
    """
    check_flag("trust", trust)
    try:
        checkpoint = read_checkpoint(path)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(str(error)) from error
    if CONFIG_KEY not in checkpoint:
        raise UserError(f"{path} holds no config: it was not written by 'lightning-dist train'")
    config = config_in(checkpoint)
    _check_structure(checkpoint, config, path)
    if not trust:
        from lightning_dist.cli.run.allowlist import check_allowed  # slow; train needs no allowlist

        check_allowed({"module": config["module"], "data": config["data"]}, path)
    return checkpoint, config


def config_in(checkpoint: Mapping[str, Any]) -> Any:
    """Return the config inside a checkpoint, with the current paths of classes and no old options.

    Args:
        checkpoint: the loaded checkpoint, whose config is changed in place.

    Returns:
        The entry for the config, which can be any object, because it has not been checked.
    """
    config = checkpoint.get(CONFIG_KEY)
    nodes, seen = [config], set()
    while nodes:  # no recursion: a hostile config may contain itself
        node = nodes.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, dict):
            target = node.get("_target_")
            if isinstance(target, str):
                node["_target_"] = _MOVED.get(target, target)
            node.pop("ema_decay", None)  # an option that DistillModule had before StudentEMA
            nodes += node.values()
        elif isinstance(node, (list, tuple)):
            nodes += node
    return config


def build_module(
    checkpoint: Mapping[str, Any], config: Mapping[str, Any], path: str
) -> DistillModule:
    """Build the module with the student of a checkpoint, without a teacher.

    Args:
        checkpoint: the checkpoint with the weights.
        config: the config of the checkpoint, as :func:`read_saved` returns it.
        path: the path of the checkpoint, for the message.

    Raises:
        UserError: if the config describes no network, or the weights do not fit the network.
    """
    try:
        module = instantiate(config["module"], teacher=None)
        module.on_load_checkpoint(dict(checkpoint))  # A subclass may prepare itself here.
        module.load_state_dict(checkpoint["state_dict"])
    except (InstantiationException, RuntimeError, AttributeError, TypeError) as error:
        raise UserError(
            f"{path} holds weights and a config that do not fit together, or not this version of "
            f"lightning-dist: {error}"
        ) from error
    return module


def _check_structure(checkpoint: Mapping[str, Any], config: Any, path: str) -> None:
    """Refuse a checkpoint without the entries that every run saves.

    Raises:
        UserError: if entries are missing; the message names them.
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
            f"{path} is damaged, because it has no {' or '.join(missing)}: give a checkpoint that "
            "'lightning-dist train' has written"
        )


def _all_tensors(state: Mapping[Any, Any]) -> bool:
    return all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items())
