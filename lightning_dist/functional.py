"""The public pure functions of ``lightning_dist.losses``, re-exported for users."""

from lightning_dist.losses.functional import (
    dist_loss,
    inter_class_correlation,
    intra_class_correlation,
    kd_loss,
)

__all__ = ["dist_loss", "inter_class_correlation", "intra_class_correlation", "kd_loss"]
