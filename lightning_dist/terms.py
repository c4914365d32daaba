"""Terms of a distillation loss: what is compared with what, by which loss, at which weight."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from lightning_dist.checks import check_number
from lightning_dist.losses import DISTLoss
from lightning_dist.taps import select

Weight = float | Callable[[Trainer], float]


class WeightSchedule:
    """A weight that moves linearly between points, and stays at the last one.

    Args:
        points: weight at an epoch or step, from 0 on: ``{0: 0.0, 5: 2.0}`` warms up over five
            epochs; ``{0: 2.0, 80: 2.0, 100: 0.0}`` fades out in the last twenty of a hundred.
        unit: ``"epoch"`` (changes at each epoch's start) or ``"step"`` (optimizer steps).

    Raises:
        ValueError: if there is no point, or one lies before 0.

    Example:
        >>> WeightSchedule({0: 0.0, 10: 2.0}).at(5)
        1.0
    """

    def __init__(
        self, points: Mapping[int, float], unit: Literal["epoch", "step"] = "epoch"
    ) -> None:
        if not points or min(points) < 0:
            raise ValueError(f"points is {dict(points)}: give at least one point, none before 0")
        if unit not in ("epoch", "step"):
            raise ValueError(f"unit is {unit!r}: use 'epoch' or 'step'")
        self.points = sorted((int(when), float(weight)) for when, weight in points.items())
        self.unit = unit

    def at(self, when: float) -> float:
        """The weight at an epoch or step."""
        earlier = [point for point in self.points if point[0] <= when]
        later = [point for point in self.points if point[0] > when]
        if not earlier or not later:
            return (earlier[-1] if earlier else later[0])[1]
        (start, first), (end, last) = earlier[-1], later[0]
        return first + (last - first) * (when - start) / (end - start)

    def __call__(self, trainer: Trainer) -> float:
        """The weight now."""
        return self.at(trainer.current_epoch if self.unit == "epoch" else trainer.global_step)

    def __repr__(self) -> str:
        return f"WeightSchedule({dict(self.points)}, unit={self.unit!r})"


@dataclass
class Term:
    """One distillation loss between a part of the student and a part of the teacher.

    A part that is called several times in one call of its network (a head shared by the levels of a
    pyramid) gives as many pairs, whose losses are summed. Calls of the student without a gradient,
    as under ``torch.no_grad()``, do not count.

    Args:
        loss: takes the student's and the teacher's output, returns a scalar. If it is a module with
            parameters (a projection), they train along and stay out of the student's state_dict.
        weight: factor in the total loss, or a function of the Trainer such as
            :class:`WeightSchedule`.
        student: dotted path inside the student; ``""`` is the student's own output.
        teacher: dotted path inside the teacher; ``""`` is the teacher's own output.
        output: entry to take from an output that is not a tensor: a key, an attribute or an index.
            By default ``logits`` where there is one, or the first item of a tuple or list.
    """

    loss: nn.Module | Callable[[Tensor, Tensor], Tensor]
    weight: Weight = 1.0
    student: str = ""
    teacher: str = ""
    output: str | int | None = None

    def check(self, name: str) -> None:
        """Refuse a loss or a weight of the wrong kind.

        Raises:
            TypeError: if the loss is no function.
            ValueError: if the weight is no finite number.
        """
        if not callable(self.loss) or isinstance(self.loss, type):
            raise TypeError(f"the loss of term {name!r} is {self.loss!r}: give a function")
        if not callable(self.weight):
            check_number(f"the weight of term {name!r}", self.weight)

    def parameters(self) -> list[nn.Parameter]:
        """The loss's own parameters."""
        return list(self.loss.parameters()) if isinstance(self.loss, nn.Module) else []

    def current_weight(self, trainer: Trainer) -> float:
        """The weight in this step.

        Raises:
            ValueError: if a function gave no number.
        """
        weight = self.weight(trainer) if callable(self.weight) else self.weight
        if not isinstance(weight, (Real, Tensor)):
            raise ValueError(
                f"the weight gave {weight!r} at step {trainer.global_step}: a function of the "
                "Trainer must return a number"
            )
        return weight

    def value(self, student: list[Any], teacher: list[Any], trainer: Trainer) -> Tensor:
        """The loss, summed over the calls of the parts.

        Args:
            student: what each call of the student's part returned.
            teacher: the same of the teacher's.
            trainer: says which batch this is.

        Raises:
            ValueError: if the outputs do not pair, or the loss is not defined for them.
        """
        if len(student) != len(teacher):
            raise ValueError(
                f"the student's part was called {len(student)} times and the teacher's "
                f"{self.teacher!r} {len(teacher)} times: choose parts that correspond"
            )
        pairs = [
            (select(ours, self.output), select(theirs, self.output))
            for ours, theirs in zip(student, teacher, strict=True)
        ]
        # A call under no_grad, for pseudo-labels say, teaches nothing.
        pairs = [(ours, theirs) for ours, theirs in pairs if ours.requires_grad]
        if not pairs:
            raise ValueError(
                "no call of the student's part has a gradient, so the term would teach nothing: "
                "call it outside of torch.no_grad(), with use_reentrant=False where it is "
                "checkpointed, and with parameters that require a gradient"
            )
        self._refuse_single_rows([ours for ours, _ in pairs], trainer)
        values = [self.loss(ours, theirs) for ours, theirs in pairs]
        for value in values:
            if not isinstance(value, Tensor) or value.dim():
                got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"the loss returns {got}: it must return a tensor of shape ()")
        return torch.stack(values).sum()

    def zero(self, like: Any) -> Tensor:
        """A 0 that keeps the loss's own parameters in the graph, where DDP looks for them."""
        zero = torch.zeros((), device=select(like, self.output).device)
        return torch.stack([zero, *(0 * p.sum() for p in self.parameters())]).sum()

    def is_finite(self, outputs: list[Any]) -> bool:
        """Whether what the term compares of some outputs is finite."""
        return all(bool(select(x, self.output).isfinite().all()) for x in outputs)

    def _refuse_single_rows(self, logits: list[Tensor], trainer: Trainer) -> None:
        """In a run's first batch: the last one of an epoch may well be of one sample."""
        loss = getattr(self.loss, "_orig_mod", self.loss)  # of a compiled one
        if not isinstance(loss, DISTLoss) or not loss.gamma:
            return
        if loss.sync and trainer.world_size > 1:  # the other processes' rows count too
            return
        if trainer.fit_loop.total_batch_idx or trainer.is_last_batch:
            return
        if all(x.dim() > 1 and x.numel() == x.shape[1] for x in logits):
            raise ValueError(
                "the batch has one sample, which no intra-class relation can be of: use larger "
                "batches, sync=True over several processes, or gamma=0"
            )


class TermParameters(nn.ModuleDict):
    """Losses with parameters: seen by optimizers and DDP, absent from the module's state_dict."""

    name = "_distillation"

    def __init__(self, losses: Mapping[str, nn.Module]) -> None:
        super().__init__(losses)
        self.register_load_state_dict_post_hook(_forget_missing_keys)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return kwargs.get("destination", {})


def _forget_missing_keys(module: nn.Module, incompatible: Any) -> None:
    keys = incompatible.missing_keys
    keys[:] = [key for key in keys if f"{TermParameters.name}." not in key]
