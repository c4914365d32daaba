"""The public pure functions of ``lightning_dist.losses``, re-exported for users."""

from lightning_dist.losses.decoupling import dkd_loss, standardise
from lightning_dist.losses.divergences import jeffreys_loss, jsd_loss, kd_loss, reverse_kd_loss
from lightning_dist.losses.features import at_loss, cwd_loss, dist_feature_loss, mimic_loss
from lightning_dist.losses.functional import (
    dist_loss,
    inter_class_correlation,
    intra_class_correlation,
)
from lightning_dist.losses.relations import cka_loss, rkd_loss, sp_loss

__all__ = [
    "at_loss",
    "cka_loss",
    "cwd_loss",
    "dist_feature_loss",
    "dist_loss",
    "dkd_loss",
    "inter_class_correlation",
    "intra_class_correlation",
    "jeffreys_loss",
    "jsd_loss",
    "kd_loss",
    "mimic_loss",
    "reverse_kd_loss",
    "rkd_loss",
    "sp_loss",
    "standardise",
]
