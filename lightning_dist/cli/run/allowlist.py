"""An allowlist of the code that the config in a checkpoint may call without ``trust=true``."""

import importlib
import re
from collections.abc import Iterator, Mapping
from types import FunctionType
from typing import Any

import timm
import timm.data
import timm.optim
import timm.scheduler
import torchvision
from lightning.pytorch import LightningDataModule
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_dist.cli.errors import UserError
from lightning_dist.training import warmup_multistep

# A subclass of a base class is allowed in the packages next to it, because the constructors there
# only build objects. Whole libraries are not allowed: torchmetrics.text and timm.task load files by
# name, and torch.distributed writes code.
_CLASSES: tuple[tuple[type, tuple[str, ...]], ...] = (
    (
        nn.Module,
        (
            "lightning_dist",
            "timm.layers",
            "timm.loss",
            "timm.models",
            "torch.nn",
            "torchmetrics.aggregation",
            "torchmetrics.classification",
            "torchmetrics.collections",
            "torchmetrics.detection",
            "torchmetrics.regression",
            "torchmetrics.segmentation",
            "torchvision.models",
            "torchvision.ops",
            "torchvision.transforms",
        ),
    ),
    (LightningDataModule, ("lightning_dist.data",)),
    (Optimizer, ("timm.optim", "torch.optim")),
    (LRScheduler, ("torch.optim.lr_scheduler",)),
    (Scheduler, ("timm.scheduler",)),
    (timm.data.Mixup, ("timm.data.mixup",)),
)
_FUNCTIONS = (
    timm.create_model,
    timm.optim.create_optimizer_v2,
    timm.scheduler.create_scheduler_v2,
    torchvision.models.get_model,
    warmup_multistep,
)
_PACKAGES = ("lightning_dist", "timm", "torch", "torchmetrics", "torchvision")

# With these arguments and names timm reads a file or downloads from a hub, and this package passes
# them to timm unchanged.
_TIMM_LOADS = re.compile("checkpoint_path|cache_dir|pretrained_.*")
_TIMM_SOURCE = re.compile("(hf|local)[-_](hub|dir):", re.IGNORECASE)

# Limits for the levels and values of a config, far above those of the configs that train saves.
_MAX_DEPTH, _MAX_VALUES = 32, 100_000


def check_allowed(config: Any, path: str) -> None:
    """Refuse a config that can do more than build networks, data, optimizers and schedules.

    Args:
        config: the config as plain data, before Hydra instantiates it.
        path: the file that contains the config, for the message.

    Raises:
        UserError: if a value is refused; the message names the value.
    """
    for count, node in enumerate(_nodes(config, path)):
        # If each list contains the next list twice, the number of values doubles at every level.
        if count > _MAX_VALUES:
            raise UserError(f"{path} is damaged: its config has more than {_MAX_VALUES} values")
        if isinstance(node, Mapping):
            for key in node:
                _check_text(key, path)
                if isinstance(key, str) and _TIMM_LOADS.fullmatch(key) and node[key] is not None:
                    raise _refusal(path, f"would load {key}={node[key]!r:.100}")
            if "_target_" in node:
                _check_call(node, path)
        else:
            _check_text(node, path)


def _nodes(config: Any, path: str, depth: int = 0) -> Iterator[Any]:
    """Yield a config and every value inside it; a mapping comes before its values."""
    if depth > _MAX_DEPTH:
        raise UserError(f"{path} is damaged: its config is nested without end")
    yield config
    if isinstance(config, (Mapping, list, tuple)):
        for value in config.values() if isinstance(config, Mapping) else config:
            yield from _nodes(value, path, depth + 1)


def _check_text(value: Any, path: str) -> None:
    """Refuse an interpolation, or a name for which timm loads a file.

    OmegaConf resolves an interpolation when the value is read, and a resolver is a function call.
    ``train`` resolves a config before it saves it, so a config of ``train`` has no interpolation.
    """
    if isinstance(value, str) and "${" in value:
        raise _refusal(path, f"would resolve {value!r:.100}")
    if isinstance(value, str) and _TIMM_SOURCE.match(value):
        raise _refusal(path, f"would load {value!r:.100}")


def _check_call(node: Mapping[str, Any], path: str) -> None:
    target = node["_target_"]
    found = _locate(target) if isinstance(target, str) else None
    if not (_is_known_class(found) or _is_known_function(found)):
        raise _refusal(
            path,
            f"would run {target!r:.100}, which is no network, data module, metric, optimizer or "
            f"scheduler of {', '.join(_PACKAGES)}",
        )
    # The other arguments are checked by name, and positional arguments have no name.
    if node.get("_args_") and not _is_known_class(found):
        raise _refusal(path, f"would run {target!r} with arguments that it does not name")
    if found is timm.create_model and not timm.is_model(str(node.get("model_name"))):
        raise _refusal(path, f"would load {node.get('model_name')!r:.100}, no network of timm")


def _is_known_class(found: Any) -> bool:
    return isinstance(found, type) and any(
        issubclass(found, kind) and _within(found.__module__, homes) for kind, homes in _CLASSES
    )


def _is_known_function(found: Any) -> bool:
    if not isinstance(found, FunctionType):
        return False
    if found in _FUNCTIONS or _within(found.__module__, ("lightning_dist.models",)):
        return True
    name = found.__name__
    if timm.is_model(name) and timm.models.model_entrypoint(name) is found:
        return True
    models = torchvision.models
    return any(models.get_model_builder(name) is found for name in models.list_models())


def _locate(target: str) -> Any:
    """Return the object that Hydra would call, or None; import only packages that are allowed."""
    parts = target.split(".")
    if parts[0] not in _PACKAGES or any(part.startswith("_") or not part for part in parts):
        return None
    found: Any = importlib.import_module(parts[0])
    for i, part in enumerate(parts[1:], start=2):
        if not hasattr(found, part):
            try:
                importlib.import_module(".".join(parts[:i]))
            except Exception:  # an import can raise anything, and Hydra could not import it either
                return None
        found = getattr(found, part, None)
    return found


def _within(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def _refusal(path: str, what: str) -> UserError:
    return UserError(f"{path} {what}: if you trust the file, add trust=true")
