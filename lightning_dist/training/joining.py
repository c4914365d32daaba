"""Functions that add the distillation loss to the loss that ``training_step`` returns."""

import functools
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

Step = Callable[..., Any]


class WrappedStep:
    """A replacement for a module's ``training_step``, until :meth:`remove` is called.

    The loss is complete when the replaced ``training_step`` returns, so that precision,
    accumulation, clipping and DDP work as without distillation. A step that calls
    ``self.training_step`` for parts of its batch is distilled once, as a whole.

    Args:
        trainer: the Trainer. The replacement is used only while it trains; a ``validation_step``
            that calls ``training_step`` runs the module's own step.
        pl_module: the module.
        run: a function that is called with the module's own step and the arguments of a call, and
            returns the result of the step.
    """

    def __init__(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        run: Callable[[Step, tuple[Any, ...], dict[str, Any]], Any],
    ) -> None:
        step = pl_module.training_step
        self.pl_module = pl_module
        # Keep a training_step that is stored on the instance: torch.compile stores one there.
        self.own = pl_module.__dict__.get("training_step")
        self.running = False

        @functools.wraps(getattr(step, "__func__", step))
        def training_step(module: LightningModule, *args: Any, **kwargs: Any) -> Any:
            if module is not pl_module:  # The module is a copy that was made during fit.
                return type(module).training_step(module, *args, **kwargs)
            if not trainer.training or self.running:
                return step(*args, **kwargs)
            self.running = True
            try:
                return run(step, args, kwargs)
            finally:
                self.running = False

        # Bind it as a method: deepcopy rebinds a method to the copy, and pickle stores only its
        # name. So a copy of the module does not contain the Trainer and the original module.
        training_step.__name__ = "training_step"
        pl_module.__dict__["training_step"] = types.MethodType(training_step, pl_module)

    def remove(self) -> None:
        """Restore the module's own ``training_step``."""
        del self.pl_module.__dict__["training_step"]
        if self.own is not None:
            self.pl_module.__dict__["training_step"] = self.own


def add_to_loss(
    result: Any, distill: Tensor, task_weight: float, pl_module: LightningModule
) -> Tensor | dict[str, Any]:
    """Add the distillation loss to the result of a ``training_step``.

    Args:
        result: a loss of shape (), or a mapping whose entry ``"loss"`` is such a loss.
        distill: the weighted sum of the terms, of shape ().
        task_weight: the factor of the step's own loss.
        pl_module: the module, for the message.

    Returns:
        The result with the loss ``task_weight * loss + distill``.

    Raises:
        MisconfigurationException: if the result has no loss, or one that is not a single number.
    """
    if isinstance(result, Tensor):
        if result.numel() != 1:
            raise MisconfigurationException(
                f"the loss of {type(pl_module).__name__} has the shape {tuple(result.shape)}: to "
                "add the distillation loss once, let it be a single number, such as a mean"
            )
        return task_weight * result + distill
    if not isinstance(result, Mapping) or "loss" not in result:
        raise MisconfigurationException(
            f"training_step of {type(pl_module).__name__} returned {type(result).__name__} "
            "without a loss: return a tensor, a dict with 'loss', or None to skip the batch"
        )
    return {**result, "loss": task_weight * result["loss"] + distill}


def refuse_frozen_step(result: Any, waiting: Sequence[str], place: str) -> None:
    """Refuse a step in which nothing trains because the student is frozen.

    Args:
        result: the result of :func:`add_to_loss`.
        waiting: the names of the terms whose part of the student is frozen.
        place: the dotted path of the student in its module.

    Raises:
        MisconfigurationException: if there is such a term and the loss has no gradient.
    """
    loss = result if isinstance(result, Tensor) else result["loss"]
    if waiting and not loss.requires_grad:
        raise MisconfigurationException(
            f"term {waiting[0]!r}: the student is frozen, and nothing else in the step trains: let "
            f"parameters of {place or 'the module'!r} require a gradient"
        )
