"""Read the learning curves of a run from the file of Lightning's CSV logger."""

import csv
import io
import math
from dataclasses import dataclass, field
from pathlib import Path

from lightning_dist.files.text import read_bounded
from lightning_dist.report.runs import LARGEST

# Limits of a file of the logger, far above those of a long run.
_MOST_BYTES, _MOST_COLUMNS = 16 * 2**20, 1000

LOG_FILE = "logs/metrics.csv"  # This is the path that conf/logger/csv.yaml sets.


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
    curves: dict[str, Curve] = {}
    try:
        text = read_bounded(path, _MOST_BYTES).decode("utf-8", "replace")
        rows = csv.reader(io.StringIO(text, newline=""))
        names = next(rows, [])
        if len(names) > _MOST_COLUMNS:
            raise ValueError(f"it has more than {_MOST_COLUMNS} columns")
        at = names.index("step") if "step" in names else len(names)
        found = [
            None if name in ("step", "epoch") else curves.setdefault(name, Curve())
            for name in names
        ]
        for row in rows:
            step = _parse_number(row[at]) if at < len(row) else None
            # A row has only some of the metrics, and the last row of a killed run may be cut off.
            for curve, text in zip(found, row, strict=False) if step is not None else ():
                value = _parse_number(text) if text and curve is not None else None
                if value is not None and curve is not None and step is not None:
                    curve.steps.append(step)
                    curve.values.append(value)
    except FileNotFoundError:
        raise ValueError(f"{folder} has no {LOG_FILE}, which logger=csv writes") from None
    except (OSError, ValueError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    curves = {name: curve for name, curve in curves.items() if curve.steps}
    if not curves:
        raise ValueError(f"{path} has no row with a step and a metric")
    return curves


def _parse_number(text: str | None) -> float | None:
    """Return the number in a field, nan if it cannot be plotted, or None if there is no number."""
    try:
        number = float(text or "")
    except ValueError:
        return None
    return number if abs(number) <= LARGEST else math.nan
