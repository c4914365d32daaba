"""Teachers: frozen networks, what they see of the student's inputs, and where they come from.

``lightning_dist.teacher.loading`` is imported by name: it brings timm and torchvision along.
"""

from lightning_dist.teacher.base import TeacherBase
from lightning_dist.teacher.bridge import InputBridge, match_classes
from lightning_dist.teacher.ensemble import EnsembleTeacher
from lightning_dist.teacher.sharding import shard_teacher
from lightning_dist.teacher.teacher import Teacher, as_teacher

__all__ = [
    "EnsembleTeacher",
    "InputBridge",
    "Teacher",
    "TeacherBase",
    "as_teacher",
    "match_classes",
    "shard_teacher",
]
