"""Logged curves that continue where a run resumes."""

import csv
import os
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only


class ResumableCSVLogger(CSVLogger):
    """Lightning's CSVLogger, which keeps what was logged up to the checkpoint that a run resumes.

    :class:`lightning_dist.resume.ExactResume` rewinds it; without that, a new run moves the file of
    an old one to ``metrics.before.csv``, where Lightning's logger deletes it. The file is appended
    to, or replaced by a complete one.

    Args:
        args: as of :class:`lightning.pytorch.loggers.CSVLogger`.
        kwargs: the same.
    """

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._experiment is None:
            os.makedirs(self.log_dir, exist_ok=True)
            self._experiment = _Curves(self.log_dir)
        return self._experiment

    @rank_zero_only
    def rewind(self, step: int) -> None:
        """Drop the rows of this step and later ones; 0 starts anew."""
        self.experiment.rewind(step)


class _Curves(ExperimentWriter):
    """Lightning's writer, but for what it does to a file that is there already."""

    rewound = False

    def rewind(self, step: int) -> None:
        self.rewound = True
        self.metrics_keys = []
        path = Path(self.metrics_file_path)
        if not path.exists():
            return
        with open(path, newline="") as file:
            reader = csv.DictReader(file)
            kept = [row for row in reader if (row.get("step") or "").isdigit()]
            kept = [row for row in kept if int(row["step"]) < step]
            keys = list(reader.fieldnames or ())
        # Only columns that have a value: those of dropped rows come back when they are logged.
        self.metrics_keys = [key for key in keys if any(row.get(key) for row in kept)]
        if kept:
            self._replace(kept)
        else:
            path.unlink()

    def save(self) -> None:
        path = Path(self.metrics_file_path)
        try:
            if self.metrics and not self.rewound and path.exists():
                path.replace(path.with_suffix(".before.csv"))
            self.rewound |= bool(self.metrics)
            super().save()
        except OSError as error:
            raise OSError(error.errno, f"cannot write {path}: {error.strerror}") from error

    def _check_log_dir_exists(self) -> None:
        """Lightning's deletes the file."""

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        with open(self.metrics_file_path, newline="") as file:
            self._replace(list(csv.DictReader(file)))

    def _replace(self, rows: list[dict[str, str]]) -> None:
        partial = f"{self.metrics_file_path}.partial"
        with open(partial, "w", newline="") as file:
            writer = csv.DictWriter(file, self.metrics_keys, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
        os.replace(partial, self.metrics_file_path)
