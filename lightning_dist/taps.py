"""Taps: finding sub-modules by path, recording their outputs, choosing the tensor in an output."""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


@dataclass
class Recorded:
    """An output, and how often each of its tensors had been written to when it was returned."""

    output: Any
    versions: dict[int, int]  # by the tensor's id: the output keeps it alive


def recorded(output: Any) -> Recorded:
    """What :func:`record` keeps of an output."""
    plain = not isinstance(output, Tensor) and hasattr(output, "__dict__")
    leaves = [*tree_leaves(output), *(tree_leaves(vars(output)) if plain else ())]
    return Recorded(output, {id(x): _version(x) for x in leaves if isinstance(x, Tensor)})


def _version(tensor: Tensor) -> int:
    # Neither an inference tensor nor a compiler's has a version.
    unknown = torch.compiler.is_compiling() or tensor.is_inference()
    return 0 if unknown else tensor._version


def record(module: nn.Module, outputs: list[Any]) -> Callable[[], None]:
    """Append each output of a module to a list; returns the function that ends it."""

    def keep(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        outputs.append(recorded(output))

    return module.register_forward_hook(keep).remove


def select(output: Any, entry: str | int | None) -> Tensor:
    """The tensor that a term compares, of an output or of what was recorded of it."""
    if isinstance(output, Recorded):
        chosen = select(output.output, entry)
        if output.versions.get(id(chosen), _version(chosen)) != _version(chosen):
            raise ValueError(
                "the output was changed in place after its part returned it: write it out of place "
                "(z = z / t for z /= t, ReLU(inplace=False)), or tap the part that changes it"
            )
        return chosen
    if isinstance(output, Tensor):
        return output
    if entry is None and isinstance(output, (tuple, list)) and output:
        entry = 0
    elif entry is None:
        entry = "logits"
    if isinstance(entry, str) and hasattr(output, entry):
        chosen = getattr(output, entry)
    else:
        try:
            chosen = output[entry]
        except (KeyError, IndexError, TypeError):
            has = f" with {sorted(map(str, output))}" if isinstance(output, Mapping) else ""
            raise ValueError(
                f"the output is a {type(output).__name__}{has} and has no entry {entry!r}: set the "
                "term's output"
            ) from None
    if not isinstance(chosen, Tensor):
        raise ValueError(f"entry {entry!r} of the output is a {type(chosen).__name__}, no tensor")
    return chosen


def find(root: nn.Module, path: str, where: str, what: str) -> nn.Module:
    """The sub-module at a dotted path, or an error that names ``where`` and ``what`` to set."""
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
    """Raise where a parameter or buffer of the teacher is one of the module's, or a view of it."""

    def storage(tensor: Tensor) -> int:
        plain = type(tensor) in (Tensor, nn.Parameter)
        return (tensor.untyped_storage().data_ptr() if plain else 0) or id(tensor)

    theirs = {storage(t): n for n, t in [*teacher.named_parameters(), *teacher.named_buffers()]}
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.numel() and storage(tensor) in theirs:
            raise MisconfigurationException(
                f"the teacher shares its {theirs[storage(tensor)]!r} with {name!r} of "
                f"{type(module).__name__}: the teacher must be a network of its own, outside the "
                "LightningModule (copy.deepcopy it, and do not assign it as a sub-module)"
            )
