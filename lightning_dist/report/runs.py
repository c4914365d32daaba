"""Finished runs: read their folders, group them over seeds."""

import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

PathLike = str | os.PathLike[str]
Folders = PathLike | Sequence[PathLike]
RESULT_FILE = "result.json"
_NO_SETTING = ("seed", "print_config", "own_process")  # they make no group of runs
_LATER_FIELDS = {"student_parameters": int, "teacher": str, "teacher_parameters": int}


@dataclass(frozen=True)
class Run:
    """What a run folder's result.json says; ``overrides`` maps each key to its last value.

    The parameters are None in results of earlier versions; ``teacher`` also without a teacher.
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

    @property
    def completed(self) -> bool:
        return self.status == "completed"

    @property
    def reason(self) -> str:
        """Why it failed."""
        return self.error or "no reason given"


@dataclass(frozen=True)
class Summary:
    """A metric of several runs; ``std`` is the sample standard deviation, None for one run."""

    numbers: list[float]
    mean: float
    std: float | None

    def text(self, runs: int) -> str:
        """``mean ± std``, and of how many where not all the runs have the metric."""
        text = f"{self.mean:.4g}" + ("" if self.std is None else f" ± {self.std:.4g}")
        return text if len(self.numbers) == runs else f"{text} (of {len(self.numbers)})"


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but the seed; a value is None where no run overrides the key."""

    values: dict[str, str | None]
    runs: list[Run]

    @property
    def completed(self) -> list[Run]:
        return [run for run in self.runs if run.completed]

    @property
    def labels(self) -> list[str]:
        """The values, each on one line."""
        return ["(default)" if x is None else plain(x) or "''" for x in self.values.values()]

    @property
    def name(self) -> str:
        """Keys and values on one line."""
        pairs = zip(map(plain, self.values), self.labels, strict=True)
        return ", ".join("=".join(pair) for pair in pairs) or "all runs"

    @property
    def count(self) -> str:
        """How many runs have completed, and how many failed."""
        lost = len(self.runs) - len(self.completed)
        return f"{len(self.completed)} + {lost} failed" if lost else str(len(self.completed))

    def summary(self, metric: str) -> Summary | None:
        """The metric over the completed runs that logged it, None if there are none."""
        return summarize([x.metrics[metric] for x in self.completed if metric in x.metrics])


def summarize(numbers: list[float]) -> Summary | None:
    """Mean and sample standard deviation, None of no numbers."""
    if not numbers:
        return None
    with np.errstate(invalid="ignore"):  # a diverged run makes them nan, which says it all
        std = float(np.std(numbers, ddof=1)) if len(numbers) > 1 else None
        return Summary(numbers, float(np.mean(numbers)), std)


def read_runs(folders: Folders) -> list[Run]:
    """Read each run at any depth under one or several folders, in natural order (10 follows 9).

    Raises:
        ValueError: if a folder holds no run, or a result.json is broken or incomplete.
    """
    found: dict[Path, Path] = {}
    for top in as_paths(folders):
        inside = [path.parent for path in top.rglob(RESULT_FILE)]
        if not inside:
            gone = "" if top.is_dir() else " (no such folder)"
            why = f"a run folder contains the {RESULT_FILE} that `lightning-dist train` writes"
            raise ValueError(f"no runs found under {top}{gone}: {why}")
        for folder in sorted(inside, key=lambda folder: _natural(folder.relative_to(top))):
            found.setdefault(folder.resolve(), folder)  # folders may overlap: each run once
    return [_read_run(folder) for folder in found.values()]


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Group runs, failed ones too, by the overridden settings that vary; the seed is none."""
    keys = [key for key in names(run.overrides for run in runs) if key not in _NO_SETTING]
    keys = [key for key in keys if len({run.overrides.get(key) for run in runs}) > 1]
    groups: dict[tuple[str | None, ...], list[Run]] = {}
    for run in runs:
        groups.setdefault(tuple(run.overrides.get(key) for key in keys), []).append(run)
    return [Group(dict(zip(keys, group, strict=True)), groups[group]) for group in groups]


def optimized_metric(runs: Sequence[Run], metric: str | None = None) -> str:
    """The metric that runs are compared by: the given one, or the one that all runs name.

    Raises:
        ValueError: if runs disagree, none names one, or no completed run logged it.
    """
    named = {run.metric: run.folder for run in runs if run.metric}
    logged = names(run.metrics for run in runs if run.completed)
    choose = f"choose with metric= or --metric, out of {', '.join(logged) or 'none'}"
    if metric is None and len(named) > 1:
        who = ", ".join(f"{folder} optimises {name}" for name, folder in named.items())
        raise ValueError(f"runs disagree on the metric: {who}; {choose}")
    metric = metric or next(iter(named), None)
    if metric is None or (logged and metric not in logged):
        raise ValueError(f"no completed run has the metric {metric}; {choose}")
    return metric


def shown_metrics(runs: Sequence[Run], metric: str) -> list[str]:
    """The metrics of a table: those of the same split, the given one first, and the teacher's own.

    So it fits a screen; the CSV has every metric.
    """
    split = metric.rpartition("/")[0]
    metrics = names([{metric: 0}, *(run.metrics for run in runs if run.completed)])
    own = of_teacher(metric)
    return [name for name in metrics if name.rpartition("/")[0] == split or name == own]


def of_teacher(metric: str) -> str:
    """The name under which a run reports the metric of the teacher itself."""
    return f"teacher/{metric.rpartition('/')[2]}"


def as_paths(folders: Folders) -> list[Path]:
    several = [folders] if isinstance(folders, str | os.PathLike) else folders
    if not several:
        raise ValueError("no folder given: name one that holds runs")
    return [Path(folder) for folder in several]


def _read_run(folder: Path) -> Run:
    path = folder / RESULT_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["status"] not in ("completed", "failed"):
            raise ValueError(f"status is {content['status']!r}")
        content["overrides"] = dict(map(_parse_override, content["overrides"]))
        content["metrics"] = {name: float(x) for name, x in content["metrics"].items()}
        content["seconds"] = float(content["seconds"])
        for name, kind in _LATER_FIELDS.items():
            if not isinstance(content.get(name), kind | None):
                raise ValueError(f"{name} is {content[name]!r}")
        # By name: a field that a later version adds does no harm, nor one that an earlier lacks.
        wanted = [x for x in fields(Run)[1:] if x.default is MISSING or x.name in content]
        return Run(folder, **{field.name: content[field.name] for field in wanted})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is broken or incomplete: {error!r}") from error


def _parse_override(text: str) -> tuple[str, str]:
    """Key and value of a Hydra override, without the signs and quotes that guard them."""
    key, equals, value = text.partition("=")
    if key.startswith("~"):
        return key[1:], "(removed)"
    if not equals:
        raise ValueError(f"{text!r} is no override like key=value")
    if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
        value = value[1:-1].replace("\\" + value[0], value[0])
    elif value.lower() in ("true", "false", "null"):  # a sweep writes True where a user does true
        value = value.lower()
    return key.lstrip("+"), value


def _natural(path: Path) -> list[list[str | int]]:
    # Splitting alternates text and digits, so that text is only ever compared with text.
    pieces = [enumerate(re.split("([0-9]+)", part)) for part in path.parts]
    return [[int(x) if i % 2 else x for i, x in part] for part in pieces]


def names(mappings: Iterable[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for mapping in mappings for name in mapping))


def plain(text: str) -> str:
    """Text on one line: control characters, which a terminal would obey, as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
