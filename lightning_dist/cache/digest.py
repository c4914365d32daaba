"""A hash of weights and settings that is equal in every process."""

import functools
import hashlib
import re
import types
from collections.abc import Iterable, Mapping, Set
from enum import Enum
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_PLAIN = (bool, int, float, complex, str, bytes, PurePath, Enum, torch.dtype, torch.device)


def digest(value: Any) -> str:
    """Return a hash of a value; every process returns the same hash for it.

    Args:
        value: a number, tensor, container, network or another object. The hash of a network depends
            on its weights, buffers and attributes and on the names of its classes. The hash of
            another object depends on the name of its class and on the state that pickle would
            store. The hash of a function depends on its name, its defaults and the values of the
            variables in its closure. Mode, device, hooks, compilation and code do not change it.

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
    """Add a value to the hash; `above` contains the ids of the objects that contain the value."""
    if isinstance(value, nn.Module):
        # Take the network out of the wrapper that torch.compile returns (torch 2.6), because the
        # wrapper's attributes differ in each process.
        value = getattr(value, "_orig_mod", value)
    if value is None or isinstance(value, _PLAIN):
        _put(state, type(value).__name__, repr(value))
    elif isinstance(value, Tensor):
        rows = value.detach().cpu().contiguous().reshape(-1)
        _put(state, "tensor", str(value.dtype), str(tuple(value.shape)))
        state.update(rows.view(torch.uint8).numpy().data)
    elif isinstance(value, np.ndarray) and not value.dtype.hasobject:
        _put(state, "array", str(value.dtype), str(value.shape))
        state.update(np.ascontiguousarray(value).tobytes())
    elif id(value) in above:
        _put(state, "circle", str(above.index(id(value))))
    else:
        _feed_parts(state, value, (*above, id(value)))


def _feed_parts(state: Any, value: Any, above: tuple[int, ...]) -> None:
    """Add a value that may contain other values to the hash; `above` ends with the value's id."""
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
        _put(state, "class", _name(value))
    elif isinstance(value, types.FunctionType):
        _put(state, "function", _name(value))
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        _feed(state, [value.__defaults__, value.__kwdefaults__, *cells], above)
    elif isinstance(value, types.MethodType):
        _put(state, "method", value.__name__)
        _feed(state, value.__self__, above)
    else:
        _put(state, "object", _name(type(value)))
        _feed_items(state, _attributes(value), above)


def _feed_items(state: Any, items: Iterable[tuple[Any, Any]], above: tuple[int, ...]) -> None:
    for name, item in sorted(items, key=lambda pair: _repr(pair[0])):
        _put(state, _repr(name))
        _feed(state, item, above)


def _attributes(value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, nn.Module):
        return [item for item in vars(value).items() if item[0] not in _bookkeeping()]
    own = getattr(type(value), "__getstate__", None)
    if own is not None and own is not getattr(object, "__getstate__", None):
        found = value.__getstate__()
        return list(found.items()) if isinstance(found, Mapping) else [("state", found)]
    if hasattr(value, "__dict__") and vars(value):
        return list(vars(value).items())
    return [("repr", _repr(value))]


@functools.cache
def _bookkeeping() -> set[str]:
    """Return the names of the attributes that torch adds to each module: hooks, mode and so on."""
    module = nn.Module()
    module.compile(backend="eager")
    torch.compile(module, backend="eager")  # torch 2.14 adds attributes to the original module.
    return {*vars(module)} - {"_parameters", "_buffers", "_modules"}


def _name(thing: Any) -> str:
    return f"{thing.__module__}.{thing.__qualname__}"


def _repr(value: Any) -> str:
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


def _put(state: Any, *parts: str) -> None:
    """Add strings and their lengths to the hash, so that ["ab", "c"] differs from ["a", "bc"]."""
    for part in parts:
        encoded = part.encode()
        state.update(f"{len(encoded)}:".encode())
        state.update(encoded)
