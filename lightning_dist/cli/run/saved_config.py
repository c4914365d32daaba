"""Prepare a config for a checkpoint, read it back, and build the module that it describes."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

from hydra.utils import instantiate
from lightning.pytorch import LightningDataModule
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from lightning_dist.checks import check_flag
from lightning_dist.cli.errors import UserError
from lightning_dist.cli.run.initial_weights import (
    without_initial_weights,
    without_torchvision_weights,
    without_weights_of_student,
)
from lightning_dist.files.text import error_line, has_controls
from lightning_dist.files.weights import read_checkpoint, weights_only_loads
from lightning_dist.module import DistillModule

CONFIG_KEY = "lightning_dist_config"

# The old paths of classes and functions in saved configs, with their current paths.
_MOVED = {
    "lightning_dist.data.imagenet.ImageFolderDataModule": (
        "lightning_dist.data.image_folder.ImageFolderDataModule"
    ),
    "lightning_dist.schedule.warmup_multistep": "lightning_dist.training.warmup_multistep",
}


# The options of a module that describe the distillation or the output, not the student.
_NOT_SAVED = ("teacher", "teacher_metrics", "distill_loss", "distill_terms", "measure_teacher")


def to_save(config: DictConfig) -> dict[str, Any]:
    """Return the parts of a config to save: data, module and seed, but not the teacher.

    Args:
        config: the composed config ``train``.
    """
    plain = OmegaConf.to_container(config, resolve=True)
    assert isinstance(plain, dict)
    module = {k: v for k, v in plain["module"].items() if k not in _NOT_SAVED}
    if "student" in module:  # a config may name any LightningModule
        module["student"], _ = without_weights_of_student(module["student"])
    return {"module": module, "data": plain["data"], "seed": plain["seed"]}


def read_saved(path: str, trust: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read a checkpoint of ``lightning-dist train``.

    Args:
        path: the path of the checkpoint.
        trust: whether to accept a config that calls code outside the allowlist.

    Returns:
        The checkpoint and its config. Without ``trust``, nothing in the config asks for a download
        or for a file of weights.

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
        # These are slow to import, and train needs no allowlist.
        from lightning_dist.cli.run.allowlist import check_allowed, without_downloads

        check_allowed({"module": config["module"], "data": config["data"]}, path)
        config |= {key: without_downloads(config[key]) for key in ("module", "data")}
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
    while nodes:  # A loop instead of recursion, because a hostile config may contain itself.
        node = nodes.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, dict):
            target = node.get("_target_")
            if isinstance(target, str):
                node["_target_"] = _MOVED.get(target, target)
            node.pop("ema_decay", None)  # DistillModule had this option before StudentEMA existed.
            nodes += node.values()
        elif isinstance(node, (list, tuple)):
            nodes += node
    return config


def build_module(
    checkpoint: Mapping[str, Any], config: Mapping[str, Any], path: str, trust: bool
) -> DistillModule:
    """Build the module with the student of a checkpoint, without a teacher.

    Args:
        checkpoint: the checkpoint with the weights.
        config: the config of the checkpoint, as :func:`read_saved` returns it.
        path: the path of the checkpoint, for the message.
        trust: whether the network may load other weights, which the checkpoint then replaces.

    Raises:
        UserError: if the config describes no network, or the weights do not fit the network.
    """
    loads = weights_only_loads() if trust else nullcontext()
    config = without_initial_weights(config["module"])
    with _rebuilding(path, "network and weights"), loads, without_torchvision_weights():
        module = instantiate(config, teacher=None)
        module.on_load_checkpoint(dict(checkpoint))  # A subclass may prepare itself here.
        module.load_state_dict(checkpoint["state_dict"])
    return module


def build_data(
    config: Mapping[str, Any], changes: DictConfig, path: str, trust: bool, reads: bool = False
) -> Any:
    """Build the data module of a checkpoint.

    Args:
        config: the config of the checkpoint, as :func:`read_saved` returns it.
        changes: the settings of the data module that the command line changes.
        path: the path of the checkpoint, for the message.
        trust: whether to read the folders that the checkpoint names.
        reads: whether the images of the data module are read, not only its settings.

    Raises:
        UserError: if the config describes no data module; or, without ``trust``, if images are read
            from a folder that the command line does not name.
    """
    with _rebuilding(path, "data settings"):
        data = instantiate(OmegaConf.merge(config["data"], changes))
        if not isinstance(data, LightningDataModule):
            raise TypeError(f"data is a {type(data).__name__}, no data module")
    if reads and not trust:
        from lightning_dist.cli.run.allowlist import FOLDERS

        for key in FOLDERS:
            # The value is the config's, or the default.
            if getattr(data, key, None) is not None and key not in changes:
                raise UserError(
                    f"{path} names the folder or data set to read, "
                    f"{key}={str(getattr(data, key))!r:.200}: if that is where you have the data, "
                    f"add +data.{key}=... with it, or trust=true if you trust the file"
                )
    return data


@contextmanager
def _rebuilding(path: str, part: str) -> Iterator[None]:
    """Convert every error in the block to one that names the checkpoint and its part.

    Hydra, torch and the other libraries raise errors of any kind for values that do not fit.

    Raises:
        UserError: if the block raises an error.
    """
    try:
        yield
    except Exception as error:
        raise UserError(
            f"{path} is damaged, or its {part} do not fit together or not this version of "
            f"lightning-dist: {error_line(error)} (HYDRA_FULL_ERROR=1 shows where)"
        ) from error


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
            ("seed", type(parts.get("seed")) is int and 0 <= parts["seed"] < 2**32),
            ("names of classes", _all_text(parts.get("class_names"))),
            ("colours of classes", _all_colors(parts.get("class_colors"))),
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


def _all_text(names: Any) -> bool:
    return names is None or (
        isinstance(names, (list, tuple))
        and all(isinstance(name, str) and not has_controls(name) for name in names)
    )


def _all_colors(colors: Any) -> bool:
    return colors is None or (
        isinstance(colors, (list, tuple))
        and all(
            isinstance(color, (list, tuple))
            and len(color) == 3
            and all(type(value) is int and 0 <= value <= 255 for value in color)
            for color in colors
        )
    )
