"""Save the config inside a checkpoint, read it, and build the module that it describes."""

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

# Classes that saved configs name by a path that they no longer have, with the path of today.
_MOVED = {
    "lightning_dist.data.imagenet.ImageFolderDataModule": (
        "lightning_dist.data.image_folder.ImageFolderDataModule"
    ),
    "lightning_dist.schedule.warmup_multistep": "lightning_dist.training.warmup_multistep",
}


def to_save(config: DictConfig) -> dict[str, Any]:
    """Return what a checkpoint keeps of a config: data, module and seed, but not the teacher.

    Args:
        config: the config ``train``, composed.
    """
    plain = OmegaConf.to_container(config, resolve=True)
    assert isinstance(plain, dict)
    module = {k: v for k, v in plain["module"].items() if k not in ("teacher", "distill_loss")}
    return {"module": module, "data": plain["data"], "seed": plain["seed"]}


def read_saved(path: str, trust: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read a checkpoint of ``lightning-dist train``.

    Args:
        path: the checkpoint.
        trust: accept a config that names any code.

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
    config = config_in(checkpoint)
    _check_structure(checkpoint, config, path)
    if not trust:
        from lightning_dist.cli.run.allowlist import check_allowed  # train does without its imports

        check_allowed({"module": config["module"], "data": config["data"]}, path)
    return checkpoint, config


def config_in(checkpoint: Mapping[str, Any]) -> Any:
    """Return the config inside a checkpoint, with today's paths of its classes and options.

    Args:
        checkpoint: as it was read; its config is changed in place.

    Returns:
        Whatever the file holds in the place of a config; nothing of it has been checked.
    """
    config = checkpoint.get(CONFIG_KEY)
    nodes, seen = [config], set()
    while nodes:  # no recursion: a hostile config contains itself
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
        checkpoint: with the weights.
        config: of the checkpoint, as :func:`read_saved` returns it.
        path: the file of the checkpoint, for the message.

    Raises:
        UserError: if the config describes no network, or one that the weights do not fit.
    """
    try:
        module = instantiate(config["module"], teacher=None)
        module.on_load_checkpoint(dict(checkpoint))
        module.load_state_dict(checkpoint["state_dict"])
    except (InstantiationException, RuntimeError, AttributeError, TypeError) as error:
        raise UserError(
            f"{path} holds weights and a config that do not fit together, or not this version of "
            f"lightning-dist: {error}"
        ) from error
    return module


def _check_structure(checkpoint: Mapping[str, Any], config: Any, path: str) -> None:
    """Refuse a checkpoint without the entries that a run has saved.

    Raises:
        UserError: naming what is missing.
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
