"""The distillation losses as modules and as functions, and the operator that computes DIST."""

from lightning_dist.losses.adaptive import AdaptiveTeacherHead
from lightning_dist.losses.feature_modules import (
    ATLoss,
    CKALoss,
    CWDLoss,
    DISTFeatureLoss,
    FeatureMimic,
    RKDLoss,
    SPLoss,
)
from lightning_dist.losses.modules import (
    DISTLoss,
    DKDLoss,
    JeffreysLoss,
    JSDLoss,
    KDLoss,
    ReverseKDLoss,
    StandardisedLogits,
)
from lightning_dist.losses.peers import from_torchdistill

__all__ = [
    "ATLoss",
    "AdaptiveTeacherHead",
    "CKALoss",
    "CWDLoss",
    "DISTFeatureLoss",
    "DISTLoss",
    "DKDLoss",
    "FeatureMimic",
    "JSDLoss",
    "JeffreysLoss",
    "KDLoss",
    "RKDLoss",
    "ReverseKDLoss",
    "SPLoss",
    "StandardisedLogits",
    "from_torchdistill",
]
