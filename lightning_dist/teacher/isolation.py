"""Functions that keep a teacher's calls from changing the student's inputs and random numbers."""

import copy
import types
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightning_dist.taps import attributes_of

# Objects of these classes are never copied: they hold no data of a batch, or exist only once.
_SHARED = (nn.Module, torch.Generator, type, types.FunctionType, types.MethodType, weakref.ref)
_ATOMS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
_DEPTH = 6  # The depth of objects within objects; PyTorch Geometric's heterogeneous graphs need 4.


def own_inputs(inputs: Any, clone: bool) -> tuple[Any, list[Tensor]]:
    """Return copies of inputs, so that a call may change containers without changing the originals.

    Containers and other objects are copied, and so are the objects in their attributes. So the call
    can assign an entry or an attribute, as graph networks do (``batch.x = self.layer(batch.x)``).

    Args:
        inputs: nested containers, tensors and objects of any class. An object that cannot be
            copied, such as an iterator, is kept.
        clone: copy the tensors too; otherwise the copies contain the same tensors.

    Returns:
        The inputs, and a list of all tensors in them.
    """
    found: list[Tensor] = []
    copies: dict[int, Any] = {}

    def own(leaf: Any, depth: int = 0) -> Any:
        if isinstance(leaf, Tensor):
            found.append(leaf.clone() if clone else leaf)
            return found[-1]
        if isinstance(leaf, (_ATOMS, _SHARED)) or depth > _DEPTH:
            return leaf
        if id(leaf) not in copies:
            try:
                copies[id(leaf)] = copy.copy(leaf)
            except Exception:  # Each class may raise errors of its own.
                return leaf
            own_parts(copies[id(leaf)], leaf, depth + 1)
        return copies[id(leaf)]

    def own_parts(copied: Any, original: Any, depth: int) -> None:
        before = _parts(original)
        for key, value in _parts(copied).items():
            if value is before.get(key):
                _put(copied, key, tree_map(lambda leaf: own(leaf, depth), value))
            elif depth <= _DEPTH:  # the object's own __copy__ has copied this part already
                own_parts(value, before.get(key), depth + 1)

    return tree_map(own, inputs), found


def differ(copies: Sequence[Tensor], originals: Sequence[Tensor]) -> bool:
    """Return whether the values of tensors differ from those of their copies.

    The values are compared, because a write through ``x.data`` or ``x.numpy()`` does not change the
    version counter. Tensors of other classes and layouts are not compared.
    """
    return any(
        type(copied) is Tensor
        and copied.layout == torch.strided
        and copied.device.type != "meta"
        and not torch.equal(copied, original)
        for copied, original in zip(copies, originals, strict=True)
    )


@contextmanager
def own_numbers(generators: Sequence[torch.Generator], seed: int | None) -> Iterator[None]:
    """Restore random generators when the context ends.

    This does not wait for a GPU, because the state of a GPU's generator is on the CPU.

    Args:
        generators: the generators, see :func:`generators_of`.
        seed: the seed of the generators within the context; ``None`` continues with their states.
    """
    states = [generator.get_state() for generator in generators]
    try:
        if seed is not None:
            for generator in generators:
                generator.manual_seed(seed)
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def generators_of(devices: Iterable[torch.device]) -> list[torch.Generator]:
    """Return torch's global generators of the CPU and of some devices."""
    generators = [torch.default_generator]
    for device in sorted({str(device) for device in devices}):
        kind, index = torch.device(device).type, torch.device(device).index
        if kind == "mps":
            generators.append(torch.mps._get_default_mps_generator())
        elif kind not in ("cpu", "meta"):
            module = torch.get_device_module(kind)
            generators.append(
                module.default_generators[module.current_device() if index is None else index]
            )
    return generators


def _parts(x: Any) -> dict[Any, Any]:
    """Return the items of a dict or list, or the attributes of an object."""
    if isinstance(x, dict):
        return dict(x)
    if isinstance(x, list):
        return dict(enumerate(x))
    return attributes_of(x)


def _put(x: Any, key: Any, value: Any) -> None:
    """Replace a part of an object without its own methods, which may refuse or convert the part."""
    if isinstance(x, dict):
        dict.__setitem__(x, key, value)
    elif isinstance(x, list):
        list.__setitem__(x, key, value)
    elif key in getattr(x, "__dict__", {}):
        x.__dict__[key] = value
    else:
        object.__setattr__(x, key, value)
