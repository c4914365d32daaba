"""Functions that find a sub-module by its path, record its outputs and find logits in them."""

import copy
import difflib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

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

    @classmethod
    def of(cls, output: Any) -> "Snapshot":
        """Return a snapshot of an output that a module has just returned."""
        plain = not isinstance(output, Tensor) and hasattr(output, "__dict__")
        leaves = [*tree_leaves(output), *(tree_leaves(vars(output)) if plain else ())]
        return cls(output, {id(x): version_of(x) for x in leaves if isinstance(x, Tensor)})


def record_outputs(module: nn.Module, outputs: list[Any]) -> Callable[[], None]:
    """Append a snapshot of each output of a module to a list.

    Args:
        module: the module whose outputs are recorded.
        outputs: the list to append to.

    Returns:
        A function that ends the recording.
    """

    def keep(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        outputs.append(Snapshot.of(output))

    return module.register_forward_hook(keep).remove


@dataclass
class Recording:
    """The outputs of sub-modules of a network during one step.

    Attributes:
        root: the network.
        outputs: a dict from each path to snapshots of the sub-module's outputs, one for each call
            while gradients were enabled, in the order of the calls.
        without_grad: the paths of sub-modules that were also called without a gradient, as under
            ``torch.no_grad()``; such a call cannot train anything.
    """

    root: nn.Module
    outputs: dict[str, list[Any]]
    without_grad: set[str] = field(default_factory=set)

    def is_frozen(self, path: str) -> bool:
        """Return True if no parameter of a sub-module has ``requires_grad=True``.

        For a sub-module without parameters, the parameters of the whole network are checked.
        """
        part = self.root.get_submodule(path)
        parameters = list(part.parameters()) or list(self.root.parameters())
        return not any(parameter.requires_grad for parameter in parameters)


@contextmanager
def recording(root: nn.Module, paths: Sequence[str]) -> Iterator[Recording]:
    """Record the outputs of sub-modules while the context lasts.

    The hooks are removed at the end of the context, so that later copies and pickles of the module
    do not contain them.

    Args:
        root: the network.
        paths: the dotted paths of the sub-modules; ``""`` is the network itself.

    Returns:
        A context manager that returns the :class:`Recording`.
    """
    found = Recording(root, {path: [] for path in paths})

    def keep(path: str, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if torch.is_grad_enabled():
            found.outputs[path].append(Snapshot.of(output))
        else:
            found.without_grad.add(path)

    with ExitStack() as hooks:
        for path in found.outputs:
            hook = functools.partial(keep, path)
            hooks.callback(root.get_submodule(path).register_forward_hook(hook).remove)
        yield found


def logits_of(output: Any, entry: str | int | None = None) -> Tensor:
    """Return the logits in the output of a network or of one of its parts.

    Losses, the teacher's ``class_map``, ensembles, evaluation and export all use this function.

    Args:
        output: a tensor, or any container of tensors, or a :class:`Snapshot` of one.
        entry: the key, attribute or index to take. By default ``logits``, then ``out``, as a key or
            an attribute, then the first item of a tuple or list.

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
        chosen = logits_of(output.output, entry)
        if output.versions.get(id(chosen), version_of(chosen)) != version_of(chosen):
            raise ValueError(
                "the output was changed in place after the sub-module returned it: use an "
                "operation that is not in place (z = z / t instead of z /= t, "
                "ReLU(inplace=False)), or let the Term name the sub-module that makes the change"
            )
        return chosen
    if isinstance(output, Tensor):
        return output
    found = _default_entry(output) if entry is None else entry
    try:
        chosen = output[found] if _is_item(output, found) else getattr(output, str(found))
    except (AttributeError, KeyError, IndexError, TypeError):
        has = f" with {sorted(map(str, output))}" if isinstance(output, Mapping) else ""
        wanted = "none of 'logits' and 'out'" if entry is None else f"no entry {entry!r}"
        raise ValueError(
            f"the output is a {type(output).__name__}{has} and has {wanted}: let the "
            "network return a tensor, or something with 'logits' or 'out'; in a Term, the option "
            "'output' can also name the entry"
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
    if hasattr(output, "_fields"):  # a named tuple
        return output._replace(**{entry if isinstance(entry, str) else output._fields[0]: logits})
    if isinstance(output, (tuple, list)):
        return type(output)([logits, *output[1:]])
    changed = copy.copy(output)
    if _is_item(changed, entry):
        changed[entry] = logits
    else:
        setattr(changed, str(entry), logits)
    return changed


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
    try:
        return root.get_submodule(path)
    except AttributeError:
        names = [name for name, _ in root.named_modules() if name]
        near = difflib.get_close_matches(path, names, n=5, cutoff=0.3) or names[:5]
        raise MisconfigurationException(
            f"{where} ({type(root).__name__}) has no sub-module {path!r}: set {what} to one of its "
            f"sub-modules, such as {', '.join(map(repr, near))}"
        ) from None


def refuse_shared_tensors(teacher: nn.Module, module: LightningModule) -> None:
    """Refuse a teacher that shares the memory of a parameter or buffer with the module.

    Args:
        teacher: the teacher's network.
        module: the module that is trained.

    Raises:
        MisconfigurationException: if two tensors share memory; the message names both.
    """

    def storage(tensor: Tensor) -> int:
        plain = type(tensor) in (Tensor, nn.Parameter)
        return (tensor.untyped_storage().data_ptr() if plain else 0) or id(tensor)

    frozen = {storage(t): n for n, t in [*teacher.named_parameters(), *teacher.named_buffers()]}
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.numel() and storage(tensor) in frozen:
            raise MisconfigurationException(
                f"the teacher shares its {frozen[storage(tensor)]!r} with {name!r} of "
                f"{type(module).__name__}: the teacher must be a network of its own, outside the "
                "LightningModule (copy.deepcopy it, and do not assign it as a sub-module)"
            )


def _default_entry(output: Any) -> str | int:
    """Return the usual entry of the logits, which the output possibly does not have."""
    for name in _LOGITS:
        if hasattr(output, name) or (isinstance(output, Mapping) and name in output):
            return name
    return 0 if isinstance(output, (tuple, list)) else _LOGITS[0]


def _is_item(output: Any, entry: str | int) -> bool:
    return not (isinstance(entry, str) and hasattr(output, entry))


def version_of(tensor: Tensor) -> int:
    """Return how often a tensor has been written to in place, or 0 if that is unknown.

    Inference tensors and the tensors that torch.compile traces have no version counter.
    """
    unknown = torch.compiler.is_compiling() or tensor.is_inference()
    return 0 if unknown else tensor._version


def copy_tensors(inputs: Any) -> Any:
    """Return the inputs with cloned tensors, in new containers and shallow copies of objects.

    Args:
        inputs: nested containers, mappings of any class, and objects with tensors as attributes.
    """
    return tree_map(_copied, inputs)


def tensors_in(inputs: Any) -> list[Tensor]:
    """Return all tensors in nested containers and in the attributes of objects."""
    leaves = [x for leaf in tree_leaves(inputs) for x in (leaf, *_parts(leaf).values())]
    return [x for x in leaves if isinstance(x, Tensor)]


def _copied(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.clone()
    tensors = {name: x for name, x in _parts(leaf).items() if isinstance(x, Tensor)}
    if not tensors or isinstance(leaf, nn.Module):
        return leaf
    changed = copy.copy(leaf)
    for name, tensor in tensors.items():
        if isinstance(leaf, Mapping):
            changed[name] = tensor.clone()
        else:
            setattr(changed, name, tensor.clone())
    return changed


def _parts(leaf: Any) -> dict[Any, Any]:
    """Return the items of a mapping of a class unknown to torch, or the attributes of an object."""
    if isinstance(leaf, Tensor):
        return {}
    return dict(leaf) if isinstance(leaf, Mapping) else dict(getattr(leaf, "__dict__", {}))
