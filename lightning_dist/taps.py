"""Functions that find a sub-module by its path, record its outputs and find logits in them."""

import copy
import dataclasses
import difflib
import functools
import inspect
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

# Hugging Face's models call the logits in their output "logits", torchvision's segmentation
# networks call them "out".
_LOGITS = ("logits", "out")


@dataclass
class Snapshot:
    """The output of a module, and the version counters of its tensors when it was returned.

    Attributes:
        output: the output of the module.
        versions: a dict from the id of each tensor in the output to its version counter. The
            output keeps its tensors alive, so that no other tensor gets one of these ids.
    """

    output: Any
    versions: dict[int, int]

    def was_written(self, tensor: Tensor) -> bool:
        """Return whether a tensor was changed in place; if it is unknown, whether any was."""
        if id(tensor) in self.versions:
            return self.versions[id(tensor)] != version_of(tensor)
        return self.versions != Snapshot.of(self.output).versions

    @classmethod
    def of(cls, output: Any) -> "Snapshot":
        """Return a snapshot of an output that a module has just returned."""
        return cls(output, {id(x): version_of(x) for x in tensors_in(output)})


def tensors_in(output: Any, depth: int = 4) -> list[Tensor]:
    """Return the tensors in nested containers, and in the attributes of other objects.

    Args:
        output: the output of a network.
        depth: the largest number of objects within objects to look into.
    """
    if isinstance(output, Tensor):
        return [output]
    found = []
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif depth and not isinstance(leaf, (nn.Module, type)):
            parts = attributes_of(leaf).values()
            found += [x for part in parts for x in tensors_in(part, depth - 1)]
    return found


def attributes_of(x: Any) -> dict[str, Any]:
    """Return a dict from the names of an object's own attributes to their values."""
    slots = [name for cls in type(x).__mro__ for name in _names(getattr(cls, "__slots__", ()))]
    return {name: getattr(x, name) for name in slots if hasattr(x, name)} | getattr(
        x, "__dict__", {}
    )


def _names(slots: str | Iterable[str]) -> list[str]:
    names = [slots] if isinstance(slots, str) else slots
    return [name for name in names if name not in ("__dict__", "__weakref__")]


def tap(
    root: nn.Module,
    path: str,
    *,
    before: Callable[[tuple[Any, ...], dict[str, Any]], None] | None = None,
    after: Callable[[Any], None] | None = None,
) -> Callable[[], None]:
    """Call functions before and after each call of a part of a network.

    The part's ``forward`` is replaced on the instance, so that it does not matter whether the part
    is called as ``part(x)`` or as ``part.forward(x)``. In the first case, forward hooks of the part
    can change the output; ``after`` then gets what they return.

    Args:
        root: the network.
        path: the path of the part, see :func:`find_part`.
        before: a function that gets the positional and the keyword arguments of each call.
        after: a function that gets the output of each call.

    Returns:
        A function that removes the tap. Taps of one part must be removed in reverse order.
    """
    owner, name = find_part(root, path)
    method, kept = getattr(owner, name), owner.__dict__.get(name)
    compiled = owner.__dict__.get("_compiled_call_impl") if name == "forward" else None
    if before is not None and owner._forward_pre_hooks:
        compiled = None  # these hooks, in the compiled code, change what ``before`` must get
    # This list has an item while part(x) runs, and none during part.forward(x).
    through_call: list[bool] = []
    handles = []
    if after is not None and name == "forward" and owner._forward_hooks and compiled is None:
        handles = [
            owner.register_forward_pre_hook(
                lambda part, _: through_call.append(True) if part is owner else None
            ),
            owner.register_forward_hook(
                lambda part, _, output: after(output) if part is owner else None
            ),
        ]

    @functools.wraps(getattr(method, "__func__", method))
    def tapped(part: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if part is not owner:
            return _without_tap(part, name, kept)(*args, **kwargs)
        return _call_between(before, after, through_call, method, args, kwargs)

    def call_compiled(*args: Any, **kwargs: Any) -> Any:
        return _call_between(before, after, [], compiled, args, kwargs, put_back, put)

    def put() -> None:
        # Do not use setattr: a compiled module would set the attribute on the original module. A
        # method, because deepcopy binds methods to the copy: so a copy calls its own layers.
        owner.__dict__[name] = types.MethodType(tapped, owner)

    def put_back() -> None:
        if kept is None:
            del owner.__dict__[name]
        else:  # torch.compile and DDP in Lightning set forward on the instance too
            owner.__dict__[name] = kept

    def remove() -> None:
        for handle in handles:
            handle.remove()
        put_back()
        if compiled is not None:
            owner.__dict__["_compiled_call_impl"] = compiled

    tapped.__dict__["is_tap"] = True
    put()
    if compiled is not None:
        owner.__dict__["_compiled_call_impl"] = call_compiled
    return remove


def _without_tap(part: nn.Module, name: str, kept: Any) -> Callable[..., Any]:
    """Return the method that a copy of a tapped part would have if the part had no tap.

    Args:
        part: the copy.
        name: the name of the method.
        kept: what the part had on the instance, or ``None``.
    """
    if kept is None:
        return inspect.getattr_static(type(part), name).__get__(part, type(part))
    return functools.partial(kept.__func__, part) if isinstance(kept, types.MethodType) else kept


@functools.partial(torch.compiler.disable, recursive=False)
def _call_between(
    before: Callable[[tuple[Any, ...], dict[str, Any]], None] | None,
    after: Callable[[Any], None] | None,
    through_call: list[bool],
    method: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    enter: Callable[[], None] | None = None,
    leave: Callable[[], None] | None = None,
) -> Any:
    """Call a tapped method, with functions before and after it that torch.compile does not trace.

    Within compiled code, a graph ends here, and the method is compiled by itself. The arguments are
    plain data to torch.compile, so that new functions in each step do not cause a recompilation.
    """
    hooked = bool(through_call) and through_call.pop()
    if before is not None:
        _untraced(before, args, kwargs)
    if enter is not None:
        _untraced(enter)
    try:
        output = method(*args, **kwargs)
    finally:
        if leave is not None:
            _untraced(leave)
    if after is not None and not hooked:
        _untraced(after, output)
    return output


@torch.compiler.disable
def _untraced(function: Callable[..., None], *args: Any) -> None:
    try:
        function(*args)
    except StopIteration as error:  # Lightning would end the epoch without a message.
        raise RuntimeError("the teacher raised StopIteration: an iterator in it ended") from error


def is_tapped(module: nn.Module) -> bool:
    """Return whether :func:`tap` has replaced the module's ``forward``."""
    return hasattr(module.__dict__.get("forward"), "is_tap")


def record_outputs(root: nn.Module, path: str, outputs: list[Any]) -> Callable[[], None]:
    """Append a snapshot of each output of a part of a network to a list.

    Args:
        root: the network.
        path: the path of the part, see :func:`find_part`.
        outputs: the list to append to.

    Returns:
        A function that ends the recording.
    """
    return tap(root, path, after=lambda output: outputs.append(Snapshot.of(output)))


def counts() -> bool:
    """Return whether a call of the student at this moment can be distilled.

    A call without a gradient trains nothing. A call within a backward pass only repeats an earlier
    call to compute its activations again (``torch.utils.checkpoint``).
    """
    return torch.is_grad_enabled() and torch._C._current_graph_task_id() == -1


@dataclass
class Recording:
    """The outputs of parts of a network during one step.

    Attributes:
        root: the network.
        outputs: a dict from each path to snapshots of the part's outputs, one for each call while
            gradients were enabled, in the order of the calls.
        without_grad: the paths of parts that were also called without a gradient, as under
            ``torch.no_grad()``; such a call cannot train anything.
    """

    root: nn.Module
    outputs: dict[str, list[Any]]
    without_grad: set[str] = field(default_factory=set)

    def is_frozen(self, path: str) -> bool:
        """Return True if no parameter of a part has ``requires_grad=True``.

        For a part without parameters, the parameters of the whole network are checked.
        """
        part, _ = find_part(self.root, path)
        parameters = list(part.parameters()) or list(self.root.parameters())
        return not any(parameter.requires_grad for parameter in parameters)


@contextmanager
def recording(root: nn.Module, paths: Sequence[str]) -> Iterator[Recording]:
    """Record the outputs of parts of a network while the context lasts.

    The taps are removed at the end of the context, so that later copies and pickles of the module
    do not contain them.

    Args:
        root: the network.
        paths: the paths of the parts, see :func:`find_part`; ``""`` is the network itself.

    Returns:
        A context manager that returns the :class:`Recording`.
    """
    found = Recording(root, {path: [] for path in paths})

    def keep(path: str, output: Any) -> None:
        if counts():
            found.outputs[path].append(Snapshot.of(output))
        elif not torch.is_grad_enabled():
            found.without_grad.add(path)

    with ExitStack() as taps:
        for path in found.outputs:
            taps.callback(tap(root, path, after=functools.partial(keep, path)))
        yield found


# An entry is a key, an attribute or an index; or several of them in a dotted path; or a function of
# the output.
Entry = str | int | Callable[[Any], Tensor]


def logits_of(output: Any, entry: Entry | None = None) -> Tensor:
    """Return the logits in the output of a network or of one of its parts.

    Losses, the teacher's ``class_map``, ensembles, evaluation and export all use this function.

    Args:
        output: a tensor, or any container of tensors, or a :class:`Snapshot` of one.
        entry: the key, attribute or index to take, or a dotted path of them such as ``"aux.0"``. A
            tensor is then returned unchanged. Or a function that returns a tensor for the output.
            By default ``logits``, then ``out``, as a key or an attribute, then the first item of a
            tuple or list.

    Returns:
        The tensor.

    Raises:
        ValueError: if the entry does not exist or is not a tensor, or if the output was changed in
            place after the snapshot was taken.

    Example:
        >>> logits_of({"out": torch.zeros(2, 3), "aux": torch.ones(2, 3)}).sum().item()
        0.0
    """
    if isinstance(output, Snapshot):
        if isinstance(output.output, Iterator):
            raise ValueError(
                f"the output is a {type(output.output).__name__}, which only the step can read: "
                "let the Term name the sub-module that computes its items"
            )
        chosen = logits_of(output.output, entry)
        if output.was_written(chosen):
            raise ValueError(
                "the output was changed in place after the sub-module returned it: use an "
                "operation that is not in place (z = z / t instead of z /= t, "
                "ReLU(inplace=False)), or let the Term name the sub-module that makes the change"
            )
        return chosen
    if callable(entry):
        chosen = entry(output)
        if not isinstance(chosen, Tensor):
            raise ValueError(f"the function 'output' returns a {type(chosen).__name__}, no tensor")
        return chosen
    if isinstance(output, Tensor):
        return output
    found = _default_entry(output) if entry is None else entry
    try:
        chosen = _at(output, found)
    except (AttributeError, KeyError, IndexError, TypeError):
        has = f" with {sorted(map(str, output))}" if isinstance(output, Mapping) else ""
        wanted = "none of 'logits' and 'out'" if entry is None else f"no entry {entry!r}"
        raise ValueError(
            f"the output is a {type(output).__name__}{has} and has {wanted}: let the "
            "network return a tensor, or something with 'logits' or 'out'; in a Term, the option "
            "'output' can also name the entry or a path ('aux.0'), or be a function of the output"
        ) from None
    if not isinstance(chosen, Tensor):
        raise ValueError(f"entry {found!r} of the output is a {type(chosen).__name__}, no tensor")
    return chosen


def with_logits(output: Any, logits: Tensor) -> Any:
    """Return a copy of an output with other logits, in the entry that :func:`logits_of` takes.

    Args:
        output: the output of a network.
        logits: the new logits.

    Returns:
        The copy; ``output`` itself does not change.
    """
    if isinstance(output, Tensor):
        return logits
    entry = _default_entry(output)
    if hasattr(output, "_fields"):  # The output is a named tuple.
        return output._replace(**{entry if isinstance(entry, str) else output._fields[0]: logits})
    if isinstance(output, (tuple, list)):
        return type(output)([logits, *output[1:]])
    changed = copy.copy(output)
    if _is_item(changed, entry):
        changed[entry] = logits
    else:
        try:
            setattr(changed, str(entry), logits)
        except dataclasses.FrozenInstanceError:
            object.__setattr__(changed, str(entry), logits)
    return changed


def find_part(root: nn.Module, path: str) -> tuple[nn.Module, str]:
    """Return the sub-module and the name of its method at a dotted path.

    Args:
        root: the network.
        path: the path of a sub-module, which names its ``forward``, or of a method of one, such as
            ``"encoder.embed"``; ``""`` is the network itself.

    Raises:
        AttributeError: if there is neither a sub-module nor a method at the path.
    """
    if not path:
        return root, "forward"
    try:
        return root.get_submodule(path), "forward"
    except AttributeError:
        owner, _, name = path.rpartition(".")
        module = root.get_submodule(owner)
        if not callable(getattr(module, name, None)):
            raise
        return module, name


def check_part(root: nn.Module, path: str, where: str, what: str) -> None:
    """Refuse a path at which a network has neither a sub-module nor a method.

    Args:
        root: the network.
        path: the path of the part, see :func:`find_part`.
        where: the description of the network in the message, such as ``"the student"``.
        what: the name of the option that contains the path, for the message.

    Raises:
        MisconfigurationException: if there is no such part; the message lists similar paths.
    """
    try:
        find_part(root, path)
    except (AttributeError, RuntimeError):
        find_submodule(root, path, where, what)


def find_submodule(root: nn.Module, path: str, where: str, what: str) -> nn.Module:
    """Return the sub-module at a dotted path.

    Args:
        root: the network.
        path: the dotted path; ``""`` is the network itself.
        where: the description of the network in the message, such as ``"the student"``.
        what: the name of the option that contains the path, for the message.

    Returns:
        The sub-module.

    Raises:
        MisconfigurationException: if it does not exist; the message lists similar paths.
    """
    if not path:
        return root
    try:
        return root.get_submodule(path)
    except RuntimeError as error:  # TorchScript gives no access to its parts.
        raise MisconfigurationException(
            f"{where} ({type(root).__name__}) has no sub-module that can be observed, such as "
            f"{path!r} ({error}): let {what} be '', its whole output"
        ) from error
    except AttributeError:
        names = [name for name, _ in root.named_modules() if name]
        near = difflib.get_close_matches(path, names, n=5, cutoff=0.3) or names[:5]
        raise MisconfigurationException(
            f"{where} ({type(root).__name__}) has no sub-module {path!r}: set {what} to one of its "
            f"sub-modules, such as {', '.join(map(repr, near))}"
        ) from None


def _default_entry(output: Any) -> str | int:
    """Return the usual name of the logits for this kind of output, which may not contain it."""
    for name in _LOGITS:
        if hasattr(output, name) or (isinstance(output, Mapping) and name in output):
            return name
    return 0 if isinstance(output, (tuple, list)) else _LOGITS[0]


def _at(output: Any, entry: str | int) -> Any:
    """Return the value at an entry of an output, or at a dotted path of entries."""
    if isinstance(entry, int) or not _is_item(output, entry):
        return output[entry] if isinstance(entry, int) else getattr(output, entry)
    if isinstance(output, Mapping) and entry in output:
        return output[entry]
    first, _, rest = entry.partition(".")
    if rest:
        return _at(_at(output, first), rest)
    return output[int(entry)] if entry.isdigit() else output[entry]


def _is_item(output: Any, entry: str | int) -> bool:
    return not (isinstance(entry, str) and hasattr(output, entry))


def version_of(tensor: Tensor) -> int:
    """Return how often a tensor has been written to in place, or 0 if that is unknown.

    Inference tensors have no version counter.
    """
    return 0 if tensor.is_inference() else tensor._version
