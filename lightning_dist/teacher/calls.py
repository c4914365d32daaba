"""Functions for networks of any origin as teachers: freeze them, refuse and explain calls."""

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

# For each operator, the position of its argument for training mode. Graphs of torch.export keep the
# mode that dropout and batch norm had during the export.
_TRAINING_ARGUMENT = {"dropout": 2, "batch_norm": 5}

_WITH_MODES = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._NormBase, nn.RReLU)


def freeze(network: nn.Module) -> None:
    """Put a network in eval mode, and turn off the gradients of its parameters.

    A module of TorchScript or ``torch.export`` is frozen too.

    Raises:
        MisconfigurationException: if it is a graph that ``torch.export`` made of a network in
            training mode, which always drops out or updates its statistics.
    """
    try:
        network.eval()
    except NotImplementedError:  # The network is a graph of torch.export, whose mode cannot change.
        _refuse_training_graph(network)
        for module in network.modules():
            module.training = False
    for parameter in network.parameters():  # Modules of TorchScript have no method requires_grad_.
        parameter.requires_grad_(False)


def _refuse_training_graph(network: nn.Module) -> None:
    for node in getattr(getattr(network, "graph", None), "nodes", ()):
        for name, position in _TRAINING_ARGUMENT.items():
            if name in str(node.target) and [*node.args, *[None] * 9][position] is True:
                raise MisconfigurationException(
                    f"the teacher is a graph that torch.export made in training mode (its "
                    f"{node.target} trains): call eval() of the network before torch.export.export"
                )


def refuse_shared_parts(teacher: nn.Module, module: LightningModule) -> None:
    """Refuse a teacher that shares tensors or layers with the module.

    Layers without tensors are shared by accident, such as one ``Dropout`` for two networks, which
    the frozen teacher would switch off in the student too. Layers of torch that do not depend on
    the mode may be shared.

    Args:
        teacher: the teacher's network.
        module: the module that is trained.

    Raises:
        MisconfigurationException: if there is such a part; the message names it on both sides.
    """

    def storage(tensor: Tensor) -> int:
        plain = type(tensor) in (Tensor, nn.Parameter)
        return (tensor.untyped_storage().data_ptr() if plain else 0) or id(tensor)

    layers = list(teacher.named_modules())
    frozen = {storage(t): n for n, t in [*teacher.named_parameters(), *teacher.named_buffers()]}
    frozen |= {id(layer): name for name, layer in layers if _has_modes(layer)}
    tensors = [*module.named_parameters(), *module.named_buffers()]
    keys = [(name, storage(tensor)) for name, tensor in tensors if tensor.numel()]
    for name, key in [*keys, *((name, id(layer)) for name, layer in module.named_modules())]:
        if key in frozen:
            raise MisconfigurationException(
                f"the teacher shares its {frozen[key]!r} with {name!r} of "
                f"{type(module).__name__}: the teacher must be a network of its own, outside the "
                "LightningModule (copy.deepcopy it, and do not assign it as a sub-module)"
            )


def refuse_unreadable(teacher: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
    """Refuse a call with inputs that teacher and student cannot both read.

    These are iterators, which end at the first reader, and the tensors within ``torch.vmap``.

    Args:
        teacher: the teacher, for the message.
        args: the positional arguments of the call.
        kwargs: the keyword arguments of the call.

    Raises:
        MisconfigurationException: if there is such an input.
    """
    for leaf in tree_leaves((args, kwargs)):
        if isinstance(leaf, Tensor) and torch._C._functorch.is_batchedtensor(leaf):
            raise MisconfigurationException(
                f"the student is called in torch.vmap, where {teacher} gets one sample of many: "
                "let the step call an nn.Identity on the result of vmap, compare that part, and "
                "give DistillationCallback(inputs=FUNCTION), a function of the batch"
            )
        if isinstance(leaf, Iterator):
            raise MisconfigurationException(
                f"the student is called with a {type(leaf).__name__}, which only one of student "
                f"and {teacher} can read: call it with a list, or give "
                "DistillationCallback(inputs=FUNCTION), a function of the batch that returns a list"
            )


def _has_modes(part: nn.Module) -> bool:
    """Return whether a module may compute different outputs in training mode and in eval mode."""
    if isinstance(part, _WITH_MODES):
        return True
    return not type(part).__module__.startswith("torch.nn.modules.")


def explain_refused_call(
    teacher: Any, network: nn.Module, args: Any, kwargs: Mapping[str, Any], error: Exception
) -> None:
    """Raise an error with advice if a network failed because of the arguments of its call.

    Args:
        teacher: the teacher, for the message.
        network: the network that was called.
        args: the positional arguments of the call.
        kwargs: the keyword arguments of the call.
        error: the error that the call raised.

    Raises:
        MisconfigurationException: if the network's ``forward`` does not take the arguments.
    """
    graph = isinstance(network, (torch.jit.ScriptModule, torch.fx.GraphModule))
    takes = "its own inputs"
    if not graph:
        signature = inspect.signature(network.forward)
        takes = ", ".join(map(str, signature.parameters.values()))
        try:
            signature.bind(*args, **kwargs)
            return
        except TypeError:
            pass
    elif isinstance(error, torch.OutOfMemoryError):
        return
    given = [_kind(x) for x in args] + [f"{name}={_kind(x)}" for name, x in kwargs.items()]
    raise MisconfigurationException(
        f"DistillationCallback calls {teacher} as the student is called, with "
        f"({', '.join(given)}), but its {type(network).__name__} takes ({takes}): {error}. Give "
        "DistillationCallback(inputs=FUNCTION), a function of the batch that returns the teacher's "
        "input, or Teacher(network, inputs=FUNCTION), a function that converts the (args, kwargs) "
        "of the call, such as: lambda call: ((call[1]['pixel_values'],), {})"
    ) from error


def _kind(value: Any) -> str:
    """Return the type of an argument, and its shape if it is a tensor."""
    if isinstance(value, Tensor):
        return f"Tensor {tuple(value.shape)}"
    return type(value).__name__
