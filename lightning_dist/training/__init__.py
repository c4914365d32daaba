"""Parts of training: averaged weights, optimizer and schedule, metrics, where the loss goes."""

from lightning_dist.training.averaging import StudentEMA
from lightning_dist.training.optimization import warmup_multistep

__all__ = ["StudentEMA", "warmup_multistep"]
