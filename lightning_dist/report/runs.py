"""Read the folders of finished runs, and group runs that differ in nothing but the seed."""

import json
import logging
import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lightning_dist.files.text import printable, read_bounded

log = logging.getLogger(__name__)

PathLike = str | os.PathLike[str]
Folders = PathLike | Sequence[PathLike]
RESULT_FILE = "result.json"
TUNED = "tuned values"  # the name of their column
# Runs that differ only in these overrides are in the same group.
_NOT_SETTINGS = ("seed", "print_config", "own_process")
# The types of the fields that can be None, also where they are missing in an earlier version.
_OPTIONAL_FIELDS: dict[str, type] = {
    **{"metric": str, "checkpoint": str, "error": str, "teacher": str},
    **{"student": str, "data": str, "tuned": str},
    **{"student_parameters": int, "teacher_parameters": int, "test_set": str},
}
# Limits of a result.json, and the columns of a table, far above those of a run.
LARGEST = 1e100  # matplotlib can plot numbers up to this one together with others.
_MOST_OVERRIDES, _MOST_METRICS, _MOST_COLUMNS = 1000, 10_000, 50
_MOST_SHOWN = 1000  # characters of a value or of all values of a group


@dataclass(frozen=True)
class Run:
    """The data of a run from its result.json.

    ``overrides`` maps each key to its last value, and ``metrics`` maps names to values. ``seconds``
    is the duration of the run, and ``error`` is the message of a failed run. The fields after it
    are None if an earlier version wrote the file; a run without a teacher has no teacher fields.
    """

    folder: Path
    status: str
    overrides: dict[str, str]
    command: str
    metric: str | None
    metrics: dict[str, float]
    checkpoint: str | None
    seconds: float
    error: str | None
    student_parameters: int | None = None
    teacher: str | None = None
    teacher_parameters: int | None = None
    test_set: str | None = None  # "validation" if the test used the validation set
    student: str | None = None
    data: str | None = None
    tuned: str | None = None  # the values of its tuned settings, such as "lr 0.1, tau 4"

    @property
    def completed(self) -> bool:
        """True if the run ended without an error."""
        return self.status == "completed"

    @property
    def reason(self) -> str:
        """The error message of a failed run."""
        return self.error or "no reason given"


@dataclass(frozen=True)
class Summary:
    """The mean of a metric over runs, and its sample standard deviation (None for one run)."""

    numbers: list[float]
    mean: float
    std: float | None

    def text(self, runs: int) -> str:
        """Return ``mean ± std``; add the number of values if it is less than the number `runs`."""
        text = f"{self.mean:.4g}" + ("" if self.std is None else f" ± {self.std:.4g}")
        return text if len(self.numbers) == runs else f"{text} (of {len(self.numbers)})"


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but the seed.

    ``values`` maps each setting that varies between groups to its value; None means that the runs
    have the default. It has the key TUNED only if nothing else distinguishes two groups.
    """

    values: dict[str, str | None]
    runs: list[Run]

    @property
    def completed(self) -> list[Run]:
        """The runs that ended without an error."""
        return [run for run in self.runs if run.completed]

    @property
    def tuned(self) -> str:
        """The values of the runs' tuned settings as text without control characters, or "-"."""
        return printable(self.runs[0].tuned or "-", _MOST_SHOWN)

    @cached_property
    def labels(self) -> list[str]:
        """The values as text without control characters, for a table or a plot."""
        values = self.values.values()
        return ["(default)" if x is None else printable(x, _MOST_SHOWN) or "''" for x in values]

    @cached_property
    def name(self) -> str:
        """The keys and values as one line of text; the page has it for each pair of groups."""
        pairs = zip(self.values, self.labels, strict=True)
        return printable(", ".join("=".join(x) for x in pairs), _MOST_SHOWN) or "all runs"

    @property
    def count(self) -> str:
        """The numbers of completed runs and of failed runs, as text."""
        lost = len(self.runs) - len(self.completed)
        return f"{len(self.completed)} + {lost} failed" if lost else str(len(self.completed))

    def summary(self, metric: str) -> Summary | None:
        """Summarise a metric over the completed runs that have it; return None if no run has it."""
        return summarize([x.metrics[metric] for x in self.completed if metric in x.metrics])


def summarize(numbers: list[float]) -> Summary | None:
    """Return the mean and sample standard deviation of numbers, or None if the list is empty."""
    if not numbers:
        return None
    with np.errstate(invalid="ignore"):  # If a run diverged, both results are nan.
        std = float(np.std(numbers, ddof=1)) if len(numbers) > 1 else None
        return Summary(numbers, float(np.mean(numbers)), std)


def read_runs(folders: Folders) -> list[Run]:
    """Read all runs in one or several folders, at any depth.

    Args:
        folders: a folder or several folders; a run that is inside two of them is read once.

    Returns:
        The runs, folder by folder, in the natural order of their paths (10 comes after 9). A run
        whose result.json is broken or incomplete is left out, and a warning names the file.

    Raises:
        ValueError: if a folder contains no run, or no result.json can be read.
    """
    found: dict[Path, Path] = {}
    for top in as_paths(folders):
        inside = [path.parent for path in result_files(top)]
        if not inside:
            gone = "" if top.is_dir() else " (no such folder)"
            why = f"a run folder contains the {RESULT_FILE} that `lightning-dist train` writes"
            raise ValueError(f"no runs found under {top}{gone}: {why}")
        for folder in sorted(inside, key=lambda folder: _natural_order(folder.relative_to(top))):
            found.setdefault(folder.resolve(), folder)  # The folders may overlap.
    runs, broken = [], []
    for folder in found.values():
        try:
            runs.append(_read_run(folder))
        except ValueError as error:
            broken.append(str(error))
    if not runs:
        raise ValueError("; ".join(broken))
    for reason in broken:
        log.warning("%s: this run is left out of the report", printable(reason, 1000))
    return runs


def result_files(top: Path) -> list[Path]:
    """Return the paths of the results in a folder, at any depth, without following links.

    Raises:
        ValueError: if folders in it are nested too deeply for the system.
    """
    try:
        return list(top.rglob(RESULT_FILE))
    except (RecursionError, OSError) as error:
        reason = type(error).__name__ if isinstance(error, RecursionError) else error.strerror
        raise ValueError(f"{top} cannot be searched for runs: {reason}") from error


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Make one group of all runs, also failed ones, whose overrides differ only in the seed.

    If more settings vary than fit in a table, the groups show the first of them.
    """
    keys = _varying(runs)
    groups: dict[tuple[str | None, ...], list[Run]] = {}
    for run in runs:
        groups.setdefault((*map(run.overrides.get, keys), run.tuned), []).append(run)
    shown = keys[:_MOST_COLUMNS]
    if len({group[:-1] for group in groups}) < len(groups):  # the values were tuned again
        return [
            Group(dict(zip([*shown, TUNED], [*x[: len(shown)], x[-1]], strict=True)), groups[x])
            for x in groups
        ]
    return [Group(dict(zip(shown, x, strict=False)), groups[x]) for x in groups]


def _varying(runs: Sequence[Run]) -> list[str]:
    """Return the settings in which runs differ."""
    keys = [key for key in all_keys(run.overrides for run in runs) if key not in _NOT_SETTINGS]
    return [key for key in keys if len({run.overrides.get(key) for run in runs}) > 1]


def tuned_column(groups: Sequence[Group]) -> list[str]:
    """Return [TUNED] if a table of groups needs this further column, otherwise an empty list."""
    shown = TUNED in groups[0].values or all(x.runs[0].tuned is None for x in groups)
    return [] if shown else [TUNED]


def optimized_metric(runs: Sequence[Run], metric: str | None = None) -> str:
    """Return the metric to compare runs by, and check that a completed run has it.

    Args:
        runs: the runs, as :func:`read_runs` returns them.
        metric: the metric; by default the one that all runs optimise.

    Raises:
        ValueError: if `metric` is None and the runs do not all optimise one metric, or if the
            completed runs have logged only other metrics.
    """
    named = {run.metric: run.folder for run in runs if run.metric}
    logged = all_keys(run.metrics for run in runs if run.completed)
    choose = f"choose with metric= or --metric, out of {', '.join(logged) or 'none'}"
    if metric is None and len(named) > 1:
        who = ", ".join(f"{folder} optimises {name}" for name, folder in named.items())
        raise ValueError(f"runs disagree on the metric: {who}; {choose}")
    metric = metric or next(iter(named), None)
    if metric is None or (logged and metric not in logged):
        raise ValueError(f"no completed run has the metric {metric}; {choose}")
    return metric


def notes_on(runs: Sequence[Run]) -> list[str]:
    """Return a sentence for each thing that a reader of a table of the runs has to know."""
    notes = []
    if count := sum(run.test_set == "validation" for run in runs):
        which = "all runs" if count == len(runs) else f"{count} of {len(runs)} runs"
        notes.append(f"test/ of {which} is on the validation set: their data has no other test set")
    if (number := len(_varying(runs))) > _MOST_COLUMNS:
        notes.append(
            f"the runs differ in {number} settings: the first {_MOST_COLUMNS} are shown, and "
            "report.csv has all"
        )
    return notes


def names_of(runs: Sequence[Run]) -> str | None:
    """Return a line that names the data, the students and the teachers of runs, or None."""
    lines = []
    for kind in ("data", "student", "teacher"):
        names = list(dict.fromkeys(x for run in runs if (x := getattr(run, kind))))
        if names:
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            lines.append(f"{kind} {', '.join(names[:4])}{more}")
    return printable("; ".join(lines), 500) or None


def table_metrics(runs: Sequence[Run], metric: str) -> list[str]:
    """Return the metrics for a table that fits on a screen; the CSV file has all metrics.

    Args:
        runs: the runs, as :func:`read_runs` returns them.
        metric: the metric that the runs are compared by, such as "test/accuracy".

    Returns:
        The given metric, then the other metrics of the same split ("test/...") and the teacher's
        own result ("teacher/accuracy").
    """
    split = metric.rpartition("/")[0]
    metrics = all_keys([{metric: 0}, *(run.metrics for run in runs if run.completed)])
    own = teacher_metric(metric)
    found = [name for name in metrics if name.rpartition("/")[0] == split or name == own]
    return found[:_MOST_COLUMNS]


def teacher_metric(metric: str) -> str:
    """Return the name under which a run stores the teacher's own result for a metric."""
    return f"teacher/{metric.rpartition('/')[2]}"


def as_paths(folders: Folders) -> list[Path]:
    """Return one or several folders as a list of paths.

    Raises:
        ValueError: if the list is empty.
    """
    several = [folders] if isinstance(folders, str | os.PathLike) else folders
    if not several:
        raise ValueError("no folder given: give a folder that contains runs")
    return [Path(folder) for folder in several]


def _read_run(folder: Path) -> Run:
    path = folder / RESULT_FILE
    try:
        content = json.loads(read_bounded(path).decode("utf-8"))
        if content["status"] not in ("completed", "failed"):
            raise ValueError(f"status is {content['status']!r}")
        most = {"overrides": _MOST_OVERRIDES, "metrics": _MOST_METRICS}
        for name, number in most.items():
            if len(content[name]) > number:
                raise ValueError(f"it has more than {number} {name}")
        content["overrides"] = dict(map(_parse_override, content["overrides"]))
        content["metrics"] = {name: _number(x) for name, x in content["metrics"].items()}
        content["seconds"] = float(content["seconds"])
        if not isinstance(content["command"], str):
            raise ValueError(f"command is {content['command']!r}")
        for name, kind in _OPTIONAL_FIELDS.items():
            value = content.get(name)
            whole = type(value) is not int or 0 <= value < 2**63
            if not isinstance(value, kind | None) or not whole:
                raise ValueError(f"{name} is {value!r}")
        # Pick the fields by name: a later version may have more fields, an earlier one has fewer.
        wanted = [x for x in fields(Run)[1:] if x.default is MISSING or x.name in content]
        return Run(folder, **{field.name: content[field.name] for field in wanted})
    # The values can be of any type and size, and nested to any depth.
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        ArithmeticError,
        RecursionError,
    ) as error:
        reason = printable(repr(error), 300)
        raise ValueError(f"{path} is broken or incomplete: {reason}") from error


def _number(value: Any) -> float:
    """Return a metric; a number that is too large for matplotlib becomes infinite."""
    number = float(value)
    return math.copysign(math.inf, number) if abs(number) > LARGEST else number


def _parse_override(text: str) -> tuple[str, str]:
    """Return the key and the value of a Hydra override, without `+` signs and quotes."""
    key, equals, value = text.partition("=")
    if key.startswith("~"):
        return key[1:], "(removed)"
    if not equals:
        raise ValueError(f"{text!r} is no override like key=value")
    if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
        value = value[1:-1].replace("\\" + value[0], value[0])
    # A Hydra sweep writes "True" where the user wrote "true".
    elif value.lower() in ("true", "false", "null"):
        value = value.lower()
    return key.lstrip("+"), value


def _natural_order(path: Path) -> list[list[str | int]]:
    # The split alternates text and digits, so text is compared with text, and numbers with numbers.
    pieces = [enumerate(re.split("([0-9]+)", part)) for part in path.parts]
    return [[int(x) if i % 2 else x for i, x in part] for part in pieces]


def all_keys(mappings: Iterable[dict[str, Any]]) -> list[str]:
    """Return the keys of all mappings without duplicates, in the order of first appearance."""
    return list(dict.fromkeys(name for mapping in mappings for name in mapping))
