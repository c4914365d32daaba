"""Parts of training: the sum of the terms, weight schedules, optimizers, averages and metrics."""

from lightning_dist.training.averaging import StudentEMA
from lightning_dist.training.optimization import warmup_multistep
from lightning_dist.training.weight_schedule import WeightSchedule

__all__ = ["StudentEMA", "WeightSchedule", "warmup_multistep"]
