"""A learning-rate warm-up counted in updates, followed by drops counted in epochs."""

from collections.abc import Sequence

from torch.optim import Optimizer
from torch.optim.lr_scheduler import ChainedScheduler, LinearLR, MultiStepLR


def warmup_multistep(
    optimizer: Optimizer,
    milestones: Sequence[int],
    updates_per_epoch: int,
    *,
    gamma: float = 0.1,
    warmup_updates: int = 500,
    warmup_factor: float = 0.001,
) -> ChainedScheduler:
    """A linear warm-up counted in updates, and drops counted in epochs, stepped at every update.

    Args:
        optimizer: whose learning rates are scheduled.
        milestones: epochs after which the rate drops.
        updates_per_epoch: optimizer updates in an epoch.
        gamma: factor of a drop.
        warmup_updates: length of the warm-up.
        warmup_factor: where it starts, as part of the learning rate.
    """
    drops = [epoch * updates_per_epoch for epoch in milestones]
    return ChainedScheduler(
        [
            LinearLR(optimizer, warmup_factor, total_iters=warmup_updates),
            MultiStepLR(optimizer, drops, gamma),
        ]
    )
