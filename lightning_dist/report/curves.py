"""Read the learning curves of a run from the file of Lightning's CSV logger."""

import csv
import math
from dataclasses import dataclass, field
from pathlib import Path

LOG_FILE = "logs/metrics.csv"  # the path that conf/logger/csv.yaml sets


@dataclass
class Curve:
    """The values of a metric, and the number of optimizer steps before each value."""

    steps: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)


def read_curves(folder: Path) -> dict[str, Curve]:
    """Read the metrics that a run logged during training, each with its steps.

    Args:
        folder: the folder of the run.

    Returns:
        A dict from the names of the metrics to their curves.

    Raises:
        ValueError: if the folder has no file of the CSV logger, or if no row of the file has both a
            step and a metric.
    """
    path = folder / LOG_FILE
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is no regular file")
    try:
        with open(path, newline="", encoding="utf-8", errors="replace") as file:
            rows = list(csv.DictReader(file))
    except FileNotFoundError:
        raise ValueError(f"{folder} has no {LOG_FILE}, which logger=csv writes") from None
    except (OSError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    curves: dict[str, Curve] = {}
    for row in rows:
        step = _parse_number(row.get("step"))
        for name in row.keys() - {"step", "epoch", None}:
            value = _parse_number(row[name])
            # A row has only some of the metrics, and the last row of a killed run may be cut off.
            if value is not None and step is not None:
                curve = curves.setdefault(name, Curve())
                curve.steps.append(step)
                curve.values.append(value)
    if not curves:
        raise ValueError(f"{path} has no row with a step and a metric")
    return curves


def _parse_number(text: str | None) -> float | None:
    """Return the number in a field, nan if it is not finite, or None if there is no number."""
    try:
        number = float(text or "")
    except ValueError:
        return None
    return number if math.isfinite(number) else math.nan
