"""The parameters of the terms: they train with the module, but are not saved as a part of it."""

from collections.abc import Iterable, Mapping
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_dist.terms import Term


class TermParameters(nn.ModuleDict):
    """A container of the losses with parameters that stays out of the module's state_dict.

    Optimizers and DDP find the parameters, because the container is a sub-module.

    Args:
        losses: a dict from the names of the terms to their losses.
    """

    name = "_distillation"

    def __init__(self, losses: Mapping[str, nn.Module]) -> None:
        super().__init__(losses)
        self.register_load_state_dict_post_hook(_forget_missing_keys)

    @classmethod
    def join(cls, terms: Mapping[str, Term], pl_module: LightningModule) -> bool:
        """Register the terms' parameters on a module.

        Args:
            terms: a dict from names to terms.
            pl_module: the module.

        Returns:
            ``True`` if any term has parameters.
        """
        losses = {name: x.loss for name, x in terms.items() if isinstance(x.loss, nn.Module)}
        parts = cls({name: loss for name, loss in losses.items() if terms[name].parameters()})
        if len(parts):
            pl_module.add_module(cls.name, parts)
        return bool(len(parts))

    @classmethod
    def leave(cls, pl_module: LightningModule) -> None:
        """Remove the terms' parameters from a module, if it has any."""
        pl_module._modules.pop(cls.name, None)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return kwargs.get("destination", {})


def states_of(terms: Mapping[str, Term]) -> dict[str, dict[str, Tensor]]:
    """Return a dict from the names of terms to the state_dicts of their losses, if not empty."""
    modules = {name: x.loss for name, x in terms.items() if isinstance(x.loss, nn.Module)}
    states = {name: loss.state_dict() for name, loss in modules.items()}
    return {name: state for name, state in states.items() if state}


def load_states(terms: Mapping[str, Term], saved: Mapping[str, Any], strict: bool) -> None:
    """Load the state_dicts of the terms' losses.

    Args:
        terms: a dict from names to terms.
        saved: the dict that :func:`states_of` returned in the run that wrote the checkpoint.
        strict: refuse states that do not fit; otherwise they are left out.

    Raises:
        MisconfigurationException: if ``strict`` is true and a state does not fit the loss of its
            term; the message names the term.
    """
    own = states_of(terms)
    for name in sorted({*saved, *own}):
        shapes = [{k: x.shape for k, x in all.get(name, {}).items()} for all in (saved, own)]
        loss = terms[name].loss if name in terms else None
        if shapes[0] == shapes[1] and isinstance(loss, nn.Module):
            loss.load_state_dict(saved[name])
        elif strict:
            raise MisconfigurationException(
                f"the checkpoint does not fit the loss of term {name!r}: the "
                f"checkpoint has {sorted(shapes[0]) or 'no parameters'}, but the loss has "
                f"{sorted(shapes[1]) or 'none'}, or the shapes differ. Resume with the terms of "
                "the run that wrote the checkpoint"
            )


def refuse_untrained(terms: Mapping[str, Term], optimizers: Iterable[Optimizer]) -> None:
    """Refuse terms with parameters that are in no optimizer.

    Args:
        terms: a dict from names to terms.
        optimizers: all optimizers of the Trainer.

    Raises:
        MisconfigurationException: if a parameter of a term is in no optimizer; the message names
            the term.
    """
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    trained = {id(parameter) for group in groups for parameter in group["params"]}
    for name, term in terms.items():
        if any(p.requires_grad and id(p) not in trained for p in term.parameters()):
            raise MisconfigurationException(
                f"the loss of term {name!r} has parameters that are in no optimizer: build the "
                "optimizer from self.parameters() in configure_optimizers"
            )


def _forget_missing_keys(module: nn.Module, incompatible: Any) -> None:
    keys = incompatible.missing_keys
    keys[:] = [key for key in keys if f"{TermParameters.name}." not in key]
