"""Parts of training: the sum of the terms, where it goes, weights, optimizers, metrics."""

from lightning_dist.training.averaging import StudentEMA
from lightning_dist.training.optimization import warmup_multistep
from lightning_dist.training.weight_schedule import WeightSchedule

__all__ = ["StudentEMA", "WeightSchedule", "warmup_multistep"]
