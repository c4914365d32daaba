"""Means and deviations of a student and a teacher, and images that the student normalises."""

import torch
from torchvision.transforms import v2

OURS = {"student_mean": (0.5071, 0.4867, 0.4408), "student_std": (0.2675, 0.2565, 0.2761)}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # The teacher's normalisation.


def raw_images(*size: int) -> torch.Tensor:
    return torch.rand(2, 3, *(size or (8, 8)))


def as_student(raw: torch.Tensor) -> torch.Tensor:
    return v2.Normalize(OURS["student_mean"], OURS["student_std"])(raw)
