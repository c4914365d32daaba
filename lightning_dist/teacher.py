"""The teacher: a frozen network that no module tree, optimizer or checkpoint ever holds."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lightning_dist.weights import load_weights


class Teacher:
    """A frozen network in eval mode.

    It is no ``nn.Module`` on purpose: as an attribute of a LightningModule it is not registered,
    so it is not trained, saved, averaged, broadcast by DDP or switched by ``module.train()``.

    Args:
        network: the trained network. It is frozen in place.
        weights: file to load into it, see :func:`lightning_dist.weights.load_weights`.
        dtype: dtype of its weights and inputs, such as ``torch.bfloat16`` or ``"bfloat16"``. By
            default its own; then autocast, where the Trainer uses it, applies to it too.

    Raises:
        TypeError: if ``network`` is not a module.

    Example:
        >>> teacher = Teacher(nn.Linear(4, 3))
        >>> teacher(torch.ones(2, 4)).requires_grad
        False
    """

    def __init__(
        self,
        network: nn.Module,
        weights: str | Path | None = None,
        dtype: torch.dtype | str | None = None,
    ) -> None:
        if not isinstance(network, nn.Module):
            raise TypeError(f"the teacher is a {type(network).__name__}: give a torch.nn.Module")
        if weights is not None:
            load_weights(network, weights)
        if isinstance(dtype, str):
            dtype = getattr(torch, dtype)
        self.network = network
        self.dtype = dtype
        if dtype is not None:
            network.to(dtype)
        self.freeze()

    def freeze(self) -> None:
        """Put every part of the network in eval mode, without gradients."""
        self.network.eval().requires_grad_(False)

    def to(self, device: torch.device | str) -> "Teacher":
        """Move the network."""
        self.network.to(device)
        return self

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the network, its floating-point inputs cast to its dtype.

        Args:
            args: what the student's call was given, in any nesting of containers.
            kwargs: the same.

        Returns:
            What the network returns.
        """
        if self.network.training:
            self.freeze()
        parameter = next((p for p in self.network.parameters() if p.is_floating_point()), None)
        if parameter is not None:
            args, kwargs = tree_map_only(
                Tensor,
                lambda x: x.to(parameter.dtype) if x.is_floating_point() else x,
                (args, kwargs),
            )
        if self.dtype is None or parameter is None:
            return self.network(*args, **kwargs)
        with torch.autocast(parameter.device.type, enabled=False):
            return self.network(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Teacher":
        return self  # an averaged copy of the module needs no second teacher

    def __repr__(self) -> str:
        return f"Teacher({type(self.network).__name__})"
