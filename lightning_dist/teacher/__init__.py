"""Teachers: frozen networks, the conversion of the student's inputs for them, and their loading.

Import ``lightning_dist.teacher.loading`` by its full name, because it imports timm and torchvision.
"""

from lightning_dist.teacher.base import TeacherBase
from lightning_dist.teacher.bridge import InputBridge, match_classes
from lightning_dist.teacher.ensemble import EnsembleTeacher
from lightning_dist.teacher.sharding import is_sharded, shard_once, shard_teacher
from lightning_dist.teacher.teacher import Teacher, as_teacher, is_other_teacher

__all__ = [
    "EnsembleTeacher",
    "InputBridge",
    "Teacher",
    "TeacherBase",
    "as_teacher",
    "is_other_teacher",
    "is_sharded",
    "match_classes",
    "shard_once",
    "shard_teacher",
]
