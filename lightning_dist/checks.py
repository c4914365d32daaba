"""Checks of arguments that users give, with errors that say what to give instead."""

import math
import numbers
from typing import Any


def check_number(
    name: str, value: Any, kind: type = float, *, least: float = -math.inf, most: float = math.inf
) -> None:
    """Refuse what is no number of a kind, or out of its range.

    Args:
        name: of the argument, for the message.
        value: what was given.
        kind: ``int``, or ``float`` for any real number.
        least: the least allowed.
        most: the most allowed.

    Raises:
        ValueError: saying what to give.

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
    """Refuse what is neither true nor false: any other word would count as true.

    Raises:
        ValueError: saying what to give.

    Example:
        >>> check_flag("resume", "maybe")
        Traceback (most recent call last):
        ValueError: resume is 'maybe': give true or false
    """
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}: give true or false")


def check_logits_options(
    tau: float,
    activation: str = "softmax",
    *,
    beta: float = 1.0,
    gamma: float = 1.0,
    eps: float = 1e-8,
) -> None:
    """Refuse options with which no loss of logits is defined.

    Raises:
        ValueError: saying what to give.
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
