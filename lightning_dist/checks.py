"""Functions that check arguments and raise errors with advice."""

import math
import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

UNLABELED = -100  # It marks samples without a label; torch's cross-entropy ignores it.
IGNORED = 255  # the label of the pixels of a mask that the loss and the metrics ignore


def check_number(
    name: str, value: Any, kind: type = float, *, least: float = -math.inf, most: float = math.inf
) -> None:
    """Raise an error if a value is not a finite number of the given kind and range.

    Args:
        name: the name of the argument, for the message.
        value: the value of the argument.
        kind: ``int``, or ``float`` for any real number.
        least: the smallest value allowed.
        most: the largest value allowed.

    Raises:
        ValueError: if the value is no such number; the message describes the allowed values.

    Example:
        >>> check_number("decay", 0.999, least=0, most=1)
        >>> check_number("num_workers", -1, int, least=0)
        Traceback (most recent call last):
        ValueError: num_workers is -1: give a whole number of at least 0
    """
    kinds = numbers.Integral if kind is int else numbers.Real
    is_number = isinstance(value, kinds) and not isinstance(value, bool)
    if is_number and math.isfinite(value) and least <= value <= most:
        return
    bounds = [f"at least {least}"] if least > -math.inf else []
    bounds += [f"at most {most}"] if most < math.inf else []
    within = f" of {' and '.join(bounds)}" if bounds else ""
    what = "a whole number" if kind is int else "a number"
    raise ValueError(f"{name} is {value!r}: give {what}{within}")


def check_flag(name: str, value: Any) -> None:
    """Raise an error if a value is neither True nor False.

    Without this check, a wrong value such as the string ``"false"`` would be treated as true.

    Args:
        name: the name of the argument, for the message.
        value: the value of the argument.

    Raises:
        ValueError: if the value is neither True nor False.

    Example:
        >>> check_flag("resume", "maybe")
        Traceback (most recent call last):
        ValueError: resume is 'maybe': give true or false
    """
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}: give true or false")


def check_labels(
    labels: Tensor, num_classes: int, where: str, *, ignored: int | None = None
) -> None:
    """Raise an error if labels are not classes.

    Without this check, a label of -1 trains a detector's last class or its background, and other
    wrong labels cause an error of a CUDA kernel that does not name them.

    Args:
        labels: the labels, integers of any shape.
        num_classes: the number of classes, which have the labels 0 to ``num_classes`` - 1.
        where: the place of the labels, for the message.
        ignored: a further label that is allowed, such as 255 in masks.

    Raises:
        ValueError: if a label is not allowed; the message contains the smallest or the largest one.

    Example:
        >>> check_labels(torch.tensor([0, 3]), 4, "a batch")
        >>> check_labels(torch.tensor([0, 3]), 3, "a batch")
        Traceback (most recent call last):
        ValueError: a batch has the label 3 and num_classes is 3: labels count from 0 to 2; ...
    """
    if ignored is not None:
        labels = labels[labels != ignored]
    if not labels.numel():
        return
    least, most = (int(x) for x in torch.aminmax(labels))
    if least < 0 or most >= num_classes:
        wrong = least if least < 0 else most
        mark = f" (not -1 but {UNLABELED} is the label of samples without one)" * (wrong == -1)
        raise ValueError(
            f"{where} has the label {wrong}{mark} and num_classes is {num_classes}: labels count "
            f"from 0 to {num_classes - 1}; set num_classes, or relabel"
        )


def check_logits_options(
    tau: float,
    activation: str = "softmax",
    *,
    beta: float = 1.0,
    gamma: float = 1.0,
    eps: float = 1e-8,
) -> None:
    """Raise an error if an option of a loss of logits is out of its range.

    Args:
        tau: the temperature; must be above 0 and finite.
        activation: the activation; must be ``"softmax"``, ``"sigmoid"`` or ``"identity"``.
        beta: the weight of the inter-class term; must be finite.
        gamma: the weight of the intra-class term; must be finite.
        eps: a number that is added to denominators; must be above 0 and finite.

    Raises:
        ValueError: if an option is out of its range; the message describes the allowed values.
    """
    if not tau > 0:
        raise ValueError(f"tau is {tau}: the temperature must be above 0")
    if tau == math.inf:
        raise ValueError("tau is inf: the temperature must be finite")
    for name, value in (("beta", beta), ("gamma", gamma)):
        if not -math.inf < value < math.inf:
            raise ValueError(f"{name} is {value}: give a finite weight")
    if not 0 < eps < math.inf:
        raise ValueError(f"eps is {eps}: give a small number above 0")
    if activation not in ("softmax", "sigmoid", "identity"):
        raise ValueError(f"activation is {activation!r}: use 'softmax', 'sigmoid' or 'identity'")


def class_axis(shape: Sequence[int], class_dim: int | None) -> int:
    """Return the index of the dimension of the classes in logits.

    Args:
        shape: the shape of the logits, with at least two dimensions.
        class_dim: the dimension of the classes, counted from the end if negative. ``None`` is
            dimension 1, except that logits with three dimensions need a number.

    Returns:
        The index, counted from 0.

    Raises:
        ValueError: if there is no such dimension, or if it is ambiguous; the message names the
            settings to choose from.

    Example:
        >>> class_axis((8, 512, 32000), -1)
        2
        >>> class_axis((8, 19, 64, 64), None)
        1
    """
    if class_dim is None:
        if len(shape) == 3:
            raise ValueError(
                f"logits of shape {tuple(shape)} have their classes in dimension 1 or in the last "
                "one: set class_dim=1 for (N, C, L), or class_dim=-1 for (B, T, V)"
            )
        return 1
    if not -len(shape) <= class_dim < len(shape):
        raise ValueError(
            f"class_dim is {class_dim}, and logits of shape {tuple(shape)} have {len(shape)} "
            "dimensions: give one of them"
        )
    return class_dim % len(shape)
