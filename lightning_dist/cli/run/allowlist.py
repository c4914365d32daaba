"""An allowlist of the code that the config in a checkpoint may call without ``trust=true``."""

import importlib
import inspect
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
from lightning_dist.files.text import error_line, has_controls
from lightning_dist.models.detection import TimmPyramid
from lightning_dist.models.segmentation import deeplabv3, pspnet
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
# The only functions that a config may prepare for a later call, as training does: the others build
# networks, and one that is called later can load weights, because its caller gives the arguments.
_FOR_LATER = (
    timm.optim.create_optimizer_v2,
    timm.scheduler.create_scheduler_v2,
    warmup_multistep,
)
_PACKAGES = ("lightning_dist", "timm", "torch", "torchmetrics", "torchvision")

# With these arguments and names timm reads a file or downloads from a hub, and this package passes
# them to timm unchanged. timm 1.0.26 drops blanks and control characters of a name.
_TIMM_LOADS = re.compile("checkpoint_path|cache_dir|pretrained_.*")
_TIMM_SOURCE = re.compile("(hf|local)[-_](hub|dir):", re.IGNORECASE)
_BLANKS = re.compile(r"[\x00-\x20\x7f-\xa0]+")
# These functions and classes pass an argument to timm as the name of a network.
_TIMM_NAMES = {
    timm.create_model: "model_name",
    TimmPyramid: "name",
    deeplabv3: "backbone",
    pspnet: "backbone",
}

# The arguments of data modules that name a folder or a data set of a hub.
FOLDERS = ("root", "path", "val_root")
# Arguments that only training reads, and that are removed from a config that is not trusted.
ONLY_TRAINING = ("unlabeled", "unlabeled_share")

# Limits for the levels and values of a config, far above those of the configs that train saves.
_MAX_DEPTH, _MAX_VALUES = 32, 100_000


def check_allowed(config: Any, path: str) -> None:
    """Refuse a config that can do more than build networks, data, optimizers and schedules.

    Downloads and files of weights are not refused here: :func:`without_downloads` removes them from
    the config.

    Args:
        config: the config as plain data, before Hydra instantiates it.
        path: the file that contains the config, for the message.

    Raises:
        UserError: if a value is refused; the message names the value.
    """
    for count, node in enumerate(_nodes(config, path)):
        # A small config can have endless values: if each list contains the next list twice, the
        # number of values doubles at every level.
        if count > _MAX_VALUES:
            raise UserError(f"{path} is damaged: its config has more than {_MAX_VALUES} values")
        if isinstance(node, Mapping):
            for key in node:
                _check_text(key, path)
                # rich would interpret square brackets in a metric's name.
                if isinstance(key, str) and "[" in key:
                    raise _refusal(path, f"contains markup in {key!r:.100}")
                if isinstance(key, str) and _TIMM_LOADS.fullmatch(key) and node[key] is not None:
                    raise _refusal(path, f"would load {key}={node[key]!r:.100}")
            if "_target_" in node:
                _check_call(node, path)
        else:
            _check_text(node, path)


def _nodes(config: Any, path: str) -> Iterator[Any]:
    """Yield a config and every value inside it; a mapping comes before its values."""
    nodes = [(config, 0)]
    while nodes:
        node, depth = nodes.pop()
        if depth > _MAX_DEPTH:
            raise UserError(f"{path} is damaged: its config is nested without end")
        yield node
        if isinstance(node, (Mapping, list, tuple)):
            values = node.values() if isinstance(node, Mapping) else node
            nodes += [(value, depth + 1) for value in values]


def without_downloads(config: Any) -> Any:
    """Return a copy of an allowed config that downloads nothing and reads no file of weights.

    The checkpoint contains the weights of its network. Names of torchvision's weights are not
    removed here, because torchvision builds other layers with them.

    Args:
        config: the config as plain data, which :func:`check_allowed` has accepted.
    """
    if isinstance(config, (list, tuple)):
        return [without_downloads(value) for value in config]
    if not isinstance(config, Mapping):
        return config
    removed = {"download": False, "backbone_weights": None} | dict.fromkeys(ONLY_TRAINING)
    if not str(config.get("_target_")).startswith("torchvision."):
        removed["pretrained"] = False
    return {
        key: removed[key] if key in removed else without_downloads(value)
        for key, value in config.items()
    }


def _check_text(value: Any, path: str) -> None:
    """Refuse an interpolation, a name for which timm loads a file, and an address.

    OmegaConf resolves an interpolation when the value is read, and a resolver is a function call.
    ``train`` resolves a config before it saves it, so a config of ``train`` has no interpolation.
    """
    if not isinstance(value, str):
        return
    if "${" in value:
        raise _refusal(path, f"would resolve {value!r:.100}")
    if _TIMM_SOURCE.match(_BLANKS.sub("", value)):
        raise _refusal(path, f"would load {value!r:.100}")
    if has_controls(value):
        raise _refusal(path, f"contains control characters in {value!r:.100}")


def _check_call(node: Mapping[str, Any], path: str) -> None:
    target = node["_target_"]
    found = _locate(target, path) if isinstance(target, str) else None
    if not (_is_known_class(found) or _is_known_function(found)):
        raise _refusal(
            path,
            f"would run {target!r:.100}, which is no network, data module, metric, optimizer or "
            f"scheduler of {', '.join(_PACKAGES)}",
        )
    # The other arguments are checked by name, and positional arguments have no name.
    named_only = not isinstance(found, type) or _within(
        found.__module__, ("lightning_dist", "timm")
    )
    if node.get("_args_") and named_only:
        raise _refusal(path, f"would run {target!r:.100} with arguments that it does not name")
    if node.get("_partial_") and (found in _TIMM_NAMES or not isinstance(found, type)):
        if found not in _FOR_LATER:
            raise _refusal(path, f"would run {target!r:.100} later, with arguments of others")
    elif found in _TIMM_NAMES:
        _check_timm_name(found, node, path)
    if isinstance(found, type) and issubclass(found, LightningDataModule):
        _check_inside(node, path)


def _check_timm_name(found: Any, node: Mapping[str, Any], path: str) -> None:
    """Refuse a name that is no network of timm: timm would load it from a file or a hub."""
    argument = _TIMM_NAMES[found]
    default = inspect.signature(found).parameters[argument].default
    name = node.get(argument, default)
    is_name = isinstance(name, str) and re.fullmatch(r"[\w.-]+", name) and timm.is_model(name)
    if not is_name:
        raise _refusal(path, f"would load {name!r:.100}, no network of timm")


def _check_inside(node: Mapping[str, Any], path: str) -> None:
    """Refuse a data module whose files are outside the folder that its ``root`` names."""
    for key, value in node.items():
        if key in (*FOLDERS, *ONLY_TRAINING) or not isinstance(value, str):
            continue
        is_absolute = value.startswith(("/", "\\")) or re.match("[A-Za-z]:", value)
        if is_absolute or ".." in re.split(r"[/\\]", value):
            raise _refusal(path, f"would read {key}={value!r:.100}")


def _is_known_class(found: Any) -> bool:
    return isinstance(found, type) and any(
        issubclass(found, kind) and _within(found.__module__, homes) for kind, homes in _CLASSES
    )


def _is_known_function(found: Any) -> bool:
    if not isinstance(found, FunctionType):
        return False
    if found in _FUNCTIONS:
        return True
    if _within(found.__module__, ("lightning_dist.models",)):
        # The other functions there rename weights by regular expressions, which may take forever.
        built = found.__annotations__.get("return")
        return isinstance(built, type) and issubclass(built, nn.Module)
    name = found.__name__
    if timm.is_model(name) and timm.models.model_entrypoint(name) is found:
        return True
    models = torchvision.models
    return any(models.get_model_builder(name) is found for name in models.list_models())


def _locate(target: str, path: str) -> Any:
    """Return the object that Hydra would call, or None; import only packages that are allowed.

    Raises:
        UserError: if an allowed module or object exists but cannot be imported.
    """
    parts = target.split(".")
    if parts[0] not in _PACKAGES or any(part.startswith("_") or not part for part in parts):
        return None
    found: Any = importlib.import_module(parts[0])
    for i, part in enumerate(parts[1:], start=2):
        module = ".".join(parts[:i])
        try:
            if not hasattr(found, part):
                importlib.import_module(module)
            found = getattr(found, part, None)
        except ModuleNotFoundError:  # Hydra could not import it either.
            return None
        # Importing a module, or reading an attribute such as torch.classes.a.b, can raise any
        # error.
        except Exception as error:
            raise UserError(
                f"{path} names {target!r:.100}, and the import of {module!r:.100} failed: "
                f"{error_line(error)}"
            ) from error
    return found


def _within(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def _refusal(path: str, what: str) -> UserError:
    return UserError(f"{path} {what}: if you trust the file, add trust=true")
