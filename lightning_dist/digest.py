"""A digest of values, networks and objects: of their weights, their settings and their code."""

import functools
import hashlib
import inspect
import re
import types
from collections.abc import Iterable, Mapping, Sequence, Set
from enum import Enum
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_PLAIN = (bool, int, float, complex, str, bytes, PurePath, Enum, torch.dtype, torch.device)
_FOREIGN = ("abc", "builtins", "collections", "torch", "typing")  # a release stands for their code
_BOOKKEEPING = vars(nn.Module()).keys() - {"_parameters", "_buffers", "_modules"}


def digest(value: Any) -> str:
    """What is the same in every process, and differs where anything in the value does.

    Args:
        value: anything: numbers, tensors, containers, networks, objects with attributes. Of a
            network, weights, buffers, attributes and the code of its classes count; of an object
            what a pickle would hold, and the code of its class. Mode and device do not count.

    Returns:
        32 hexadecimal digits.

    Example:
        >>> digest(nn.ReLU()) == digest(nn.ReLU().eval()), digest(nn.ReLU()) == digest(nn.GELU())
        (True, False)
    """
    state = hashlib.sha256()
    _feed(state, value, ())
    return state.hexdigest()[:32]


def _feed(state: Any, value: Any, above: tuple[int, ...]) -> None:
    """Update the hash by a value; `above` are the ids of what it is part of."""
    if value is None or isinstance(value, _PLAIN):
        _put(state, type(value).__name__, repr(value))
        return
    if isinstance(value, Tensor):
        rows = value.detach().cpu().contiguous().reshape(-1)
        _put(state, "tensor", str(value.dtype), str(tuple(value.shape)))
        state.update(rows.view(torch.uint8).numpy())
        return
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        _put(state, "array", str(value.dtype), str(value.shape))
        state.update(np.ascontiguousarray(value).tobytes())
        return
    if id(value) in above:
        _put(state, "circle", str(above.index(id(value))))
        return
    above = (*above, id(value))
    if isinstance(value, Mapping):
        _put(state, "mapping", str(len(value)))
        _feed_items(state, value.items(), above)
    elif isinstance(value, Set):
        _put(state, "set", *sorted(map(_repr, value)))
    elif isinstance(value, (list, tuple)):
        _put(state, type(value).__name__, str(len(value)))
        for item in value:
            _feed(state, item, above)
    elif isinstance(value, type):
        _put(state, "class", *_code(value))
    elif isinstance(value, types.FunctionType):
        # The source alone does not tell two lambdas of one line apart.
        code = value.__code__
        _put(state, "function", *_code(value), code.co_code.hex(), _repr(code.co_consts))
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        _feed(state, [value.__defaults__, value.__kwdefaults__, *cells], above)
    elif isinstance(value, types.MethodType):
        _put(state, "method", value.__name__)
        _feed(state, value.__self__, above)
    else:
        kind: Any = type(value)
        _put(state, "object", *_code(kind))
        _feed_items(state, _attributes(value), above)


def _feed_items(state: Any, items: Iterable[tuple[Any, Any]], above: tuple[int, ...]) -> None:
    for name, item in sorted(items, key=lambda pair: _repr(pair[0])):
        _put(state, _repr(name))
        _feed(state, item, above)


def _attributes(value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, nn.Module):
        return [item for item in vars(value).items() if item[0] not in _BOOKKEEPING]
    own = getattr(type(value), "__getstate__", None)
    if own is not None and own is not getattr(object, "__getstate__", None):
        found = value.__getstate__()
        return list(found.items()) if isinstance(found, Mapping) else [("state", found)]
    if hasattr(value, "__dict__") and vars(value):
        return list(vars(value).items())
    return [("repr", _repr(value))]


@functools.cache
def _code(thing: Any) -> Sequence[str]:
    """Names and, where it can be read, the source of a class with its bases, or of a function."""
    bases = thing.__mro__ if isinstance(thing, type) else (thing,)
    parts = []
    for base in bases:
        parts.append(f"{base.__module__}.{base.__qualname__}")
        if base.__module__.partition(".")[0] in _FOREIGN:
            continue
        try:
            parts.append(inspect.getsource(base))
        except (OSError, TypeError):  # compiled, or typed into a shell
            parts.append("")
    return tuple(parts)


def _repr(value: Any) -> str:
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


def _put(state: Any, *parts: str) -> None:
    """Each part with its length, so that no two sequences of parts look alike."""
    for part in parts:
        encoded = part.encode()
        state.update(f"{len(encoded)}:".encode())
        state.update(encoded)
