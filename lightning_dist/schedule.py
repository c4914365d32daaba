"""A learning-rate schedule: a warm-up counted in updates, then drops counted in epochs."""

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
    """Return a scheduler with a linear warm-up and drops; step it at every optimizer update.

    Args:
        optimizer: the optimizer whose learning rates change.
        milestones: numbers of epochs after which the learning rate drops.
        updates_per_epoch: number of optimizer updates in an epoch.
        gamma: factor by which the learning rate is multiplied at each drop.
        warmup_updates: length of the warm-up, in optimizer updates.
        warmup_factor: factor of the learning rate at the first update of the warm-up.

    Returns:
        The scheduler.
    """
    drops = [epoch * updates_per_epoch for epoch in milestones]
    return ChainedScheduler(
        [
            LinearLR(optimizer, warmup_factor, total_iters=warmup_updates),
            MultiStepLR(optimizer, drops, gamma),
        ]
    )
