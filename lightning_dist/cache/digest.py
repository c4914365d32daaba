"""A digest of values, networks and objects: of their weights, their settings and their code."""

import functools
import hashlib
import inspect
import re
import sys
import sysconfig
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from enum import Enum
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_PLAIN = (bool, int, float, complex, str, bytes, PurePath, Enum, torch.dtype, torch.device)
_FOREIGN = ("abc", "builtins", "collections", "torch", "typing")  # a release stands for their code
_VALUES = (*_PLAIN, Tensor, np.ndarray, dict, set, frozenset, list, tuple, nn.Module)
_INSTALLED = [Path(sysconfig.get_path(x)).resolve() for x in ("stdlib", "purelib", "platlib")]
_BOOKKEEPING = vars(nn.Module()).keys() - {"_parameters", "_buffers", "_modules"}


def digest(value: Any) -> str:
    """What is the same in every process, and differs where anything in the value does.

    Args:
        value: anything: numbers, tensors, containers, networks, objects with attributes. Of a
            network, weights, buffers, attributes and the code of its classes count; of an object
            what a pickle would hold, and the code of its class. Mode and device do not count. With
            code of the user's go the functions, classes and values that it names in its modules.

    Returns:
        32 hexadecimal digits.

    Example:
        >>> digest(nn.ReLU()) == digest(nn.ReLU().eval()), digest(nn.ReLU()) == digest(nn.GELU())
        (True, False)
    """
    state = _State()
    _feed(state, value, ())
    return state.hash.hexdigest()[:32]


class _State:
    """The hash, and the code whose globals it holds already: a network has many of a class."""

    def __init__(self) -> None:
        self.hash = hashlib.sha256()
        self.update = self.hash.update
        self.followed: dict[int, Any] = {}  # holds what it knows, lest another gets its id


def _feed(state: _State, value: Any, above: tuple[int, ...]) -> None:
    """Update the hash by a value; `above` are the ids of what it is part of."""
    if value is None or isinstance(value, _PLAIN):
        _put(state, type(value).__name__, repr(value))
        return
    if isinstance(value, Tensor):
        rows = value.detach().cpu().contiguous().reshape(-1)
        _put(state, "tensor", str(value.dtype), str(tuple(value.shape)))
        state.update(rows.view(torch.uint8).numpy().data)
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
        _follow(state, value, above)
    elif isinstance(value, types.FunctionType):
        # The source alone does not tell two lambdas of one line apart.
        _put(state, "function", *_code(value))
        for code in _with_inner(value.__code__):
            _put(state, code.co_code.hex(), _repr(code.co_names))
            _feed(state, [x for x in code.co_consts if not isinstance(x, types.CodeType)], above)
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        _feed(state, [value.__defaults__, value.__kwdefaults__, *cells], above)
        _follow(state, value, above)
    elif isinstance(value, types.MethodType):
        _put(state, "method", value.__name__)
        _feed(state, value.__self__, above)
    else:
        kind: Any = type(value)
        _put(state, "object", *_code(kind))
        _follow(state, kind, above)
        _feed_items(state, _attributes(value), above)


def _feed_items(state: _State, items: Iterable[tuple[Any, Any]], above: tuple[int, ...]) -> None:
    for name, item in sorted(items, key=lambda pair: _repr(pair[0])):
        _put(state, _repr(name))
        _feed(state, item, above)


def _follow(state: _State, thing: Any, above: tuple[int, ...]) -> None:
    """Feed what a function, or the methods of a class, of the user's read from their modules."""
    if id(thing) in state.followed:
        return
    state.followed[id(thing)] = thing
    for function in _functions(thing):
        names = _names(function.__code__)
        _feed(state, [function.__defaults__, function.__kwdefaults__], above)
        for name in names:
            if name in function.__globals__:
                _feed_global(state, name, function.__globals__[name], names, above)


def _feed_global(
    state: _State, name: str, value: Any, names: Sequence[str], above: tuple[int, ...]
) -> None:
    """Feed what a name of a module stands for; of a module the attributes among the names."""
    if isinstance(value, types.ModuleType):
        if _is_users(value.__name__) and id(value) not in above:
            for each in [each for each in names if each in vars(value)]:
                _feed_global(state, each, vars(value)[each], names, (*above, id(value)))
        return
    kind = value if isinstance(value, type) else type(value)
    if isinstance(value, _VALUES) or _is_users(kind.__module__) or any(_functions(value)):
        _put(state, "global", name)
        _feed(state, value, above)


def _functions(thing: Any) -> Iterator[types.FunctionType]:
    """The functions of the user's in a class with its bases, or behind a decorated function."""
    if isinstance(thing, type):
        for member in [x for base in thing.__mro__ for x in vars(base).values()]:
            if not isinstance(member, type):
                yield from _functions(member)
    elif isinstance(thing, property):
        for accessor in (thing.fget, thing.fset):
            yield from _functions(accessor)
    elif isinstance(thing, (staticmethod, classmethod)):
        yield from _functions(thing.__func__)
    else:
        if isinstance(thing, types.FunctionType) and _is_users(thing.__globals__.get("__name__")):
            yield thing
        if callable(thing) and not isinstance(thing, nn.Module):
            yield from _functions(getattr(thing, "__wrapped__", None))


@functools.cache
def _is_users(module: str | None) -> bool:
    """Whether a module is neither installed nor this package, whose release stands for it."""
    if module is None or module.partition(".")[0] in (*_FOREIGN, "lightning_dist"):
        return False
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None:  # built in; a notebook has no file either
        return module == "__main__"
    path = Path(file).resolve()
    installed = any(path.is_relative_to(folder) for folder in _INSTALLED)
    return not installed and not {"site-packages", "dist-packages"} & {*path.parts}


@functools.cache
def _names(code: types.CodeType) -> Sequence[str]:
    """The names of globals and attributes in it."""
    return tuple(dict.fromkeys(name for each in _with_inner(code) for name in each.co_names))


def _with_inner(code: types.CodeType) -> Iterator[types.CodeType]:
    """The code, and that of the functions and comprehensions within."""
    yield code
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            yield from _with_inner(const)


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


def _put(state: _State, *parts: str) -> None:
    """Each part with its length, so that no two sequences of parts look alike."""
    for part in parts:
        encoded = part.encode()
        state.update(f"{len(encoded)}:".encode())
        state.update(encoded)
