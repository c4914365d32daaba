"""Functions that remove initial weights from a config, to load them later or not at all."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch import Tensor, nn
from torchvision.models import WeightsEnum

# For each package, the arguments of its networks that load weights, and the values that do not.
_ARGUMENTS: dict[str, dict[str, Any]] = {
    "lightning_dist": {"backbone_weights": None},
    "segmentation_models_pytorch": {"encoder_weights": None},
    "timm": {"pretrained": False},
}


def without_weights_of_student(student: Any) -> tuple[Any, str | None]:
    """Return the config of a student without its key ``weights``, and the file that it names.

    Args:
        student: the config of a student as plain data. A network of torchvision may have the name
            of torchvision's weights under the same key, such as ``DEFAULT``, which stays.
    """
    if not isinstance(student, Mapping) or "weights" not in student:
        return student, None
    weights = student["weights"]
    if str(student.get("_target_", "")).startswith("torchvision.") and (
        weights is None or re.fullmatch(r"(\w+_Weights\.)?[A-Z0-9_]+", str(weights))
    ):
        return student, None
    rest = {key: value for key, value in student.items() if key != "weights"}
    if str(student.get("_target_", "")).startswith("torchvision."):
        rest["weights"] = None
    return (rest, None) if weights is None else (without_initial_weights(rest), str(weights))


def without_initial_weights(config: Any) -> Any:
    """Return a copy of a config in which no network loads initial weights.

    Networks of torchvision are not changed, because weights that are given for the backbone also
    choose its kind of batch norm: see :func:`without_torchvision_weights`.

    Args:
        config: the config of a module as plain data.
    """
    if isinstance(config, Mapping):
        package = str(config.get("_target_", "")).partition(".")[0]
        changed = {k: v for k, v in _ARGUMENTS.get(package, {}).items() if k in config}
        return {k: without_initial_weights(v) for k, v in (dict(config) | changed).items()}
    if isinstance(config, (list, tuple)):
        return [without_initial_weights(item) for item in config]
    return config


@contextmanager
def without_torchvision_weights() -> Iterator[None]:
    """Let torchvision build its networks as if it loaded pretrained weights, without loading them.

    The checkpoint contains the weights. The layers depend on whether there are weights: for its
    detectors, torchvision freezes the batch norms.
    """
    nothing: dict[str, Tensor] = {}
    load = nn.Module.load_state_dict

    def load_unless_nothing(self: nn.Module, state: Any, *args: Any, **kwargs: Any) -> Any:
        return None if state is nothing else load(self, state, *args, **kwargs)

    with (
        mock.patch.object(WeightsEnum, "get_state_dict", return_value=nothing),
        mock.patch.object(nn.Module, "load_state_dict", load_unless_nothing),
    ):
        yield
