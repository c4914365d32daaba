"""Learning curves of a run, from the file that Lightning's CSV logger leaves in its folder."""

import csv
import math
from dataclasses import dataclass, field
from pathlib import Path

LOG_FILE = "logs/metrics.csv"  # as conf/logger/csv.yaml names it


@dataclass
class Curve:
    """The values of a metric after so many optimizer steps."""

    steps: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)


def read_curves(folder: Path) -> dict[str, Curve]:
    """Read the metrics that a run logged while it trained, each with its own steps.

    Args:
        folder: the run's folder.

    Raises:
        ValueError: if there is no log of the CSV logger in it, or one without steps.
    """
    path = folder / LOG_FILE
    try:
        with open(path, newline="", encoding="utf-8", errors="replace") as file:
            rows = list(csv.DictReader(file))
    except FileNotFoundError:
        raise ValueError(f"{folder} has no {LOG_FILE}, which logger=csv writes") from None
    except (OSError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    curves: dict[str, Curve] = {}
    for row in rows:
        step = _number(row.get("step"))
        for name in row.keys() - {"step", "epoch", None}:
            value = _number(row[name])
            # Each metric is in some rows only; a killed run may end in the middle of a row.
            if value is not None and step is not None:
                curve = curves.setdefault(name, Curve())
                curve.steps.append(step)
                curve.values.append(value)
    if not curves:
        raise ValueError(f"{path} has no metric beside a step")
    return curves


def _number(text: str | None) -> float | None:
    """The number, nan where it is not finite, None where there is none."""
    try:
        number = float(text or "")
    except ValueError:
        return None
    return number if math.isfinite(number) else math.nan
