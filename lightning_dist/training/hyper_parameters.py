"""The hyper-parameters that ``save_hyperparameters`` may save into a checkpoint."""

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.utils._pytree import tree_leaves

from lightning_dist.teacher import TeacherBase


def without_objects(hyper_parameters: Any) -> Any:
    """Return hyper-parameters without networks, losses and functions.

    They would put the teacher into every checkpoint. ``load_from_checkpoint`` gets them as
    arguments.

    Args:
        hyper_parameters: what ``save_hyperparameters`` has collected: a mapping, a Namespace, or
            any other object, which is returned as it is.
    """
    if isinstance(hyper_parameters, Namespace):
        hyper_parameters = vars(hyper_parameters)
    if not isinstance(hyper_parameters, Mapping):
        return hyper_parameters
    return {name: x for name, x in hyper_parameters.items() if not _holds_objects(x)}


def _holds_objects(value: Any) -> bool:
    """Return whether a value is or contains a network, a teacher or a function."""
    return any(
        callable(leaf) or isinstance(leaf, (nn.Module, TeacherBase)) for leaf in tree_leaves(value)
    )
