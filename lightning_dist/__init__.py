"""Knowledge distillation from stronger teachers (DIST) for PyTorch Lightning."""

from lightning_dist.cached_teacher import CachedTeacher
from lightning_dist.callback import DistillationCallback
from lightning_dist.losses import DISTLoss, KDLoss
from lightning_dist.module import DistillModule
from lightning_dist.schedule import WeightSchedule
from lightning_dist.teacher import Teacher
from lightning_dist.terms import Term

__version__ = "0.1.0"

__all__ = [
    "CachedTeacher",
    "DISTLoss",
    "DistillModule",
    "DistillationCallback",
    "KDLoss",
    "Teacher",
    "Term",
    "WeightSchedule",
]
