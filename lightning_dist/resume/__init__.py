"""Resume an interrupted run, so that its result is the same as without the interruption."""

from lightning_dist.resume.csv_logger import ResumableCSVLogger
from lightning_dist.resume.exact_resume import SIGNALS, ExactResume, Interrupted

__all__ = ["SIGNALS", "ExactResume", "Interrupted", "ResumableCSVLogger"]
