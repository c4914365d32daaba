"""The distillation losses as modules and as functions, and the operator that computes DIST."""

from lightning_dist.losses.modules import DISTLoss, FeatureMimic, KDLoss

__all__ = ["DISTLoss", "FeatureMimic", "KDLoss"]
