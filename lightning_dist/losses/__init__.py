"""Distillation losses: as modules, as pure functions, and the streaming operator behind DIST."""

from lightning_dist.losses.modules import DISTLoss, FeatureMimic, KDLoss

__all__ = ["DISTLoss", "FeatureMimic", "KDLoss"]
