"""`names_and_sizes`: the names and sizes of data, student and teacher, for the report."""

from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from lightning.pytorch import LightningModule
from omegaconf import DictConfig

from lightning_dist.module import DistillModule


def names_and_sizes(module: LightningModule, config: DictConfig) -> dict[str, Any]:
    """Return the names of data, student and teacher, and the numbers of parameters.

    Args:
        module: the trained module.
        config: the config of the run.
    """
    names: dict[str, Any] = {"data": _data(config.data)}
    if not isinstance(module, DistillModule):  # a config may name any LightningModule
        return names
    names["student"] = _network(config.module.student)
    names["student_parameters"] = sum(x.numel() for x in module.student.parameters())
    if module.teacher is None:
        return names | {"teacher": None, "teacher_parameters": None}
    size = sum(x.numel() for x in module.teacher.network.parameters())
    return names | {"teacher": _teacher(module, config), "teacher_parameters": size}


def _data(settings: DictConfig) -> str:
    """Return the name of the data set, and its folder, if that adds something to the name."""
    name = HydraConfig.get().runtime.choices.get("data") or "data"
    folder = Path(str(settings.get("path") or settings.get("root") or "")).name
    return name if not folder or folder == "data" or folder in name else f"{name} ({folder})"


def _network(settings: Any) -> str:
    """Return the name of a network: the function that builds it, and a library's name."""
    if not isinstance(settings, DictConfig):
        return type(settings).__name__
    if settings.get("model_name"):  # of timm.create_model
        return str(settings.model_name)
    function = str(settings.get("_target_", "")).rpartition(".")[2]
    backbone = settings.get("backbone")
    return f"{function} {backbone}" if isinstance(backbone, str) else function


def _teacher(module: DistillModule, config: DictConfig) -> str:
    """Return the name of the teacher, with the file or the run of its weights."""
    settings = config.module.teacher
    # The config of a cached teacher contains the config of the teacher.
    settings = settings.get("teacher", settings)
    # A teacher that is loaded by name has a source; the name of others is their file in conf.
    name = settings.get("source") or HydraConfig.get().runtime.choices.get("teacher", "teacher")
    weights = settings.get("weights")
    if not isinstance(weights, str):
        return name
    card = module.teacher.card if module.teacher is not None else None
    # Every run has a file last.ckpt, so the name of the file says nothing.
    if card is not None and Path(weights).suffix == ".ckpt":
        return f"{name} (run {card.source})"
    return f"{name} ({Path(weights).name})"
