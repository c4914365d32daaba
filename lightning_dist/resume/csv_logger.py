"""``ResumableCSVLogger``: a CSVLogger that appends after a resume instead of deleting its file."""

import csv
import os
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only

from lightning_dist.files.writing import naming


class ResumableCSVLogger(CSVLogger):
    """A CSVLogger that keeps the rows before the checkpoint from which a run resumes.

    :class:`lightning_dist.resume.ExactResume` calls :meth:`rewind`. Without that callback, this
    logger renames the file of an earlier run to ``metrics.before.csv``; Lightning's logger would
    delete the file. This logger only appends rows to its file, or replaces the file with a complete
    one, so that an interruption cannot damage it.

    Args:
        args: the positional arguments of :class:`lightning.pytorch.loggers.CSVLogger`.
        kwargs: the keyword arguments of that class.
    """

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """Return the object that writes the file."""
        if self._experiment is None:
            os.makedirs(self.log_dir, exist_ok=True)
            self._experiment = _ResumableWriter(self.log_dir)
        return self._experiment

    @rank_zero_only
    def rewind(self, step: int) -> None:
        """Delete the rows of a step and of all later steps from the file.

        Args:
            step: a number of optimizer updates; 0 deletes all rows.
        """
        self.experiment.rewind(step)


class _ResumableWriter(ExperimentWriter):
    """Lightning's writer of a CSV file, changed so that it never deletes an existing file.

    It overrides two private methods of Lightning's writer, as they are in Lightning 2.6.6.
    """

    rewound = False

    def rewind(self, step: int) -> None:
        """Delete the rows of a step and of all later steps from the file."""
        self.rewound = True
        self.metrics_keys = []
        path = Path(self.metrics_file_path)
        if not path.exists():
            return
        if not path.is_file():
            raise OSError(f"{path} is no regular file: remove it")
        try:
            with open(path, newline="") as file:
                reader = csv.DictReader(file)
                kept = [row for row in reader if (row.get("step") or "").isdecimal()]
                kept = [row for row in kept if int(row["step"]) < step]
                keys = list(reader.fieldnames or ())
        except (ValueError, csv.Error) as error:
            raise ValueError(f"{path} is damaged ({error}): remove it") from error
        # Keep only the columns that still have a value. The other columns are added again when
        # their metrics are logged.
        self.metrics_keys = [key for key in keys if any(row.get(key) for row in kept)]
        if kept:
            self._replace(kept)
        else:
            path.unlink()

    def log_hparams(self, params: dict[str, Any]) -> None:
        """Write the settings to a file of their own, and name it if that fails."""
        with naming(Path(self.log_dir) / self.NAME_HPARAMS_FILE):
            super().log_hparams(params)

    def save(self) -> None:
        """Append the new rows to the file; before its first rows, rename an earlier run's file."""
        path = Path(self.metrics_file_path)
        try:
            if self.metrics and not self.rewound and path.exists():
                path.replace(path.with_suffix(".before.csv"))
            self.rewound |= bool(self.metrics)
            super().save()
        except OSError as error:
            raise OSError(error.errno, f"cannot write {path}: {error.strerror}") from error

    def _check_log_dir_exists(self) -> None:
        """Do nothing; Lightning's method would delete the file."""

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        """Add columns to the file; unlike Lightning's method, never leave an incomplete file."""
        with open(self.metrics_file_path, newline="") as file:
            self._replace(list(csv.DictReader(file)))

    def _replace(self, rows: list[dict[str, str]]) -> None:
        """Write the rows to a temporary file and rename it."""
        partial = f"{self.metrics_file_path}.partial"
        Path(partial).unlink(missing_ok=True)  # A link there could lead to a file elsewhere.
        with open(partial, "w", newline="") as file:
            writer = csv.DictWriter(file, self.metrics_keys, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
        os.replace(partial, self.metrics_file_path)
