"""Runs that are interrupted and resumed with the same result, bit by bit."""

from lightning_dist.resume.csv_logger import ResumableCSVLogger
from lightning_dist.resume.exact_resume import SIGNALS, ExactResume, Interrupted

__all__ = ["SIGNALS", "ExactResume", "Interrupted", "ResumableCSVLogger"]
