"""Resume an interrupted run, so that its result is the same as without the interruption."""

from lightning_dist.resume.csv_logger import ResumableCSVLogger
from lightning_dist.resume.exact_resume import ExactResume
from lightning_dist.resume.signals import SIGNALS, Interrupted

__all__ = ["SIGNALS", "ExactResume", "Interrupted", "ResumableCSVLogger"]
