"""Reports on finished runs: read their folders, group them over seeds, show table, CSV and plot."""

import csv
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PathLike = str | os.PathLike[str]
Folders = PathLike | Sequence[PathLike]
RESULT_FILE = "result.json"


@dataclass(frozen=True)
class Run:
    """What a run folder's result.json says; ``overrides`` maps each key to its last value."""

    folder: Path
    status: str
    overrides: dict[str, str]
    command: str
    metric: str | None
    metrics: dict[str, float]
    checkpoint: str | None
    seconds: float
    error: str | None

    @property
    def completed(self) -> bool:
        return self.status == "completed"


@dataclass(frozen=True)
class Summary:
    """A metric of several runs; ``std`` is the sample standard deviation, None for one run."""

    numbers: list[float]
    mean: float
    std: float | None


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but the seed; a value is None where no run overrides the key."""

    values: dict[str, str | None]
    runs: list[Run]

    def summary(self, metric: str) -> Summary | None:
        """The metric over the completed runs that logged it, None if there are none."""
        numbers = [x.metrics[metric] for x in self.runs if x.completed and metric in x.metrics]
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
    for top in _as_paths(folders):
        inside = [path.parent for path in top.rglob(RESULT_FILE)]
        if not inside:
            gone = "" if top.is_dir() else " (no such folder)"
            why = f"a run folder contains the {RESULT_FILE} that `lightning-dist train` writes"
            raise ValueError(f"no runs found under {top}{gone}: {why}")
        for folder in sorted(inside, key=lambda folder: _natural(folder.relative_to(top))):
            found.setdefault(folder.resolve(), folder)  # folders may overlap: each run once
    return [_read_run(folder) for folder in found.values()]


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Group runs, failed ones too, by the overridden keys that vary, except the seed."""
    keys = [key for key in _names(run.overrides for run in runs) if key != "seed"]
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
    logged = _names(run.metrics for run in runs if run.completed)
    choose = f"choose with metric=, out of {', '.join(logged) or 'none'}"
    if metric is None and len(named) > 1:
        who = ", ".join(f"{folder} optimises {name}" for name, folder in named.items())
        raise ValueError(f"runs disagree on the metric: {who}; {choose}")
    metric = metric or next(iter(named), None)
    if metric is None or (logged and metric not in logged):
        raise ValueError(f"no completed run has the metric {metric}; {choose}")
    return metric


def report_table(runs: Sequence[Run], metric: str | None = None) -> Table:
    """The console table: a row a group, ``mean ± std`` of each metric, the optimised one first."""
    groups, metric = group_runs(runs), optimized_metric(runs, metric)
    # Of the same split, so that the table fits a terminal; the CSV has every metric.
    split = metric.rpartition("/")[0]
    metrics = _names([{metric: 0}, *(run.metrics for run in runs if run.completed)])
    of_teacher = metric.replace(split, "teacher", 1)
    metrics = [name for name in metrics if name.rpartition("/")[0] == split or name == of_teacher]
    failed = [run for run in runs if not run.completed]
    reasons = [_plain(f"failed: {x.folder}: {x.error or 'no reason given'}") for x in failed]
    # Text, not str: rich would read [brackets] in a value as markup.
    caption, width = Text("\n".join(reasons)), 79 if failed else 0  # it wraps at the table's width
    table = Table(caption=caption, caption_justify="left", min_width=width)
    for name in [*groups[0].values, "runs", *metrics]:
        table.add_column(Text(_plain(name)), overflow="fold")
    for group in groups:
        count, lost = (sum(run.completed is x for run in group.runs) for x in (True, False))
        numbers = [_format(group.summary(name), count) for name in metrics]
        cells = [*_labels(group), f"{count} + {lost} failed" if lost else str(count), *numbers]
        table.add_row(*map(Text, cells))
    return table


def write_csv(runs: Sequence[Run], path: PathLike) -> None:
    """Write one row a run: folder, status, seconds, error, all overrides, all metrics, command."""
    keys, metrics = _names(run.overrides for run in runs), _names(run.metrics for run in runs)
    # Rows are lists: an override may be called like a column, and a dict would lose one of them.
    with open(path, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.writer(file)
        writer.writerow(["folder", "status", "seconds", "error", *keys, *metrics, "command"])
        for run in runs:
            row = [run.folder, run.status, run.seconds, run.error, *map(run.overrides.get, keys)]
            writer.writerow([*row, *map(run.metrics.get, metrics), run.command])


def plot_runs(runs: Sequence[Run], metric: str | None = None) -> "Figure":
    """A figure of the optimised metric: a row a group, mean ± std, below it a dot for each run."""
    # Not at the top: slow to import. Not pyplot: it keeps global state and may open windows.
    from matplotlib.figure import Figure

    groups, metric = group_runs(runs), optimized_metric(runs, metric)
    height = min(1.1 + 0.42 * len(groups), 200.0)  # inches; the canvas ends at 65536 pixels
    figure = Figure(figsize=(6.4, height), dpi=150)
    axes = figure.add_axes((0.0, 0.5 / height, 1.0, 1.0 - 0.9 / height))
    for y, group in enumerate(groups):
        if summary := group.summary(metric):
            axes.errorbar(summary.mean, y, xerr=summary.std, fmt="D", capsize=4, color="tab:blue")
            dots = [y + 0.22] * len(summary.numbers)
            axes.plot(summary.numbers, dots, "o", ms=4, color="gray", alpha=0.6, mew=0)
        else:
            axes.text(0.02, y, "no result", transform=axes.get_yaxis_transform(), va="center")
    # Names come from users: they may be long, and matplotlib would read $…$ as mathematics.
    short = partial(re.sub, "(?<=^.{39}).+(?=.{40}$)", "…")
    labels = [short(" · ".join(_labels(group)) or "all runs") for group in groups]
    keys = short(" · ".join(map(_plain, groups[0].values)))
    axes.set_yticks(range(len(groups)), labels, parse_math=False)
    axes.set_title(short(_plain(metric)), parse_math=False)
    axes.set_title(keys, loc="left", ha="right", size="medium", weight="bold", parse_math=False)
    axes.set(ylim=(len(groups) - 0.4, -0.6), xlabel="mean ± standard deviation; a dot is one run")
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def write_report(folders: Folders, out: PathLike | None = None, metric: str | None = None) -> Table:
    """Read all runs under the folders, write report.csv and report.png, return the table.

    Args:
        folders: a folder, or several whose runs are merged; the files go to the first.
        out: another folder for the files.
        metric: metric to compare by, by default the one that all runs optimise.
    """
    runs = read_runs(folders)
    table, figure = report_table(runs, metric), plot_runs(runs, metric)
    target = _as_paths(folders)[0] if out is None else Path(out)
    target.mkdir(parents=True, exist_ok=True)
    write_csv(runs, target / "report.csv")
    figure.savefig(target / "report.png", bbox_inches="tight")
    return table


def _as_paths(folders: Folders) -> list[Path]:
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
        # By name: a field that a later version adds does no harm.
        return Run(folder, **{field.name: content[field.name] for field in fields(Run)[1:]})
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
    return key.lstrip("+"), value


def _natural(path: Path) -> list[list[str | int]]:
    # Splitting alternates text and digits, so that text is only ever compared with text.
    pieces = [enumerate(re.split("([0-9]+)", part)) for part in path.parts]
    return [[int(x) if i % 2 else x for i, x in part] for part in pieces]


def _names(mappings: Iterable[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for mapping in mappings for name in mapping))


def _plain(text: str) -> str:
    """Text on one line: control characters, which a terminal would obey, as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _labels(group: Group) -> list[str]:
    return ["(default)" if x is None else _plain(x) or "''" for x in group.values.values()]


def _format(summary: Summary | None, runs: int) -> str:
    if summary is None:
        return "-"
    text = f"{summary.mean:.4g}" + ("" if summary.std is None else f" ± {summary.std:.4g}")
    return text if len(summary.numbers) == runs else f"{text} (of {len(summary.numbers)})"
