"""WeightSchedule: a loss weight that moves linearly between points."""

from collections.abc import Mapping
from typing import Literal

from lightning.pytorch import Trainer


class WeightSchedule:
    """A loss weight that moves linearly between points and then stays at the last weight.

    Args:
        points: a dict from epochs or steps, counted from 0, to weights. ``{0: 0.0, 5: 2.0}`` warms
            up over five epochs; ``{0: 2.0, 80: 2.0, 100: 0.0}`` fades out in the last twenty of a
            hundred epochs.
        unit: the unit of the points, ``"epoch"`` (the weight changes at the start of each epoch) or
            ``"step"`` (the weight changes at each optimizer step).

    Raises:
        ValueError: if there is no point, a point is before 0, or ``unit`` is unknown.

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
        """Return the weight at an epoch or step."""
        earlier = [point for point in self.points if point[0] <= when]
        later = [point for point in self.points if point[0] > when]
        if not earlier or not later:
            return (earlier[-1] if earlier else later[0])[1]
        (start, first), (end, last) = earlier[-1], later[0]
        return first + (last - first) * (when - start) / (end - start)

    def __call__(self, trainer: Trainer) -> float:
        """Return the weight at the current epoch or step of the Trainer."""
        return self.at(trainer.current_epoch if self.unit == "epoch" else trainer.global_step)

    def __repr__(self) -> str:
        return f"WeightSchedule({dict(self.points)}, unit={self.unit!r})"
