"""Plot the results of runs by setting, by student size, by teacher, and by optimizer step."""

import html
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_dist.files.text import printable
from lightning_dist.report.curves import Curve
from lightning_dist.report.runs import (
    Group,
    Run,
    Summary,
    group_runs,
    optimized_metric,
    summarize,
    teacher_metric,
)

if TYPE_CHECKING:
    # Matplotlib is slow to import, so functions import it when they run. This file never imports
    # pyplot, which keeps global state and may open windows.
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_POINTS = 150  # The most points that are plotted of one curve.
# Shorten a name in its middle: users choose the names. A name may also contain $, which starts a
# formula in matplotlib, so every text below is drawn with parse_math=False.
_shorten = partial(re.sub, "(?<=^.{39}).+(?=.{40}$)", "…")


def plot_runs(runs: Sequence[Run], metric: str | None = None) -> "Figure":
    """Plot a metric with one row per group: the mean ± std, and below it one dot per run.

    Args:
        runs: the runs, as :func:`read_runs` returns them.
        metric: the metric; by default the one that all runs optimise.
    """
    groups, metric = group_runs(runs), optimized_metric(runs, metric)
    figure, axes = _figure_of_rows(len(groups), 0.42)
    for y, (group, color) in enumerate(zip(groups, group_colors(groups), strict=True)):
        if summary := group.summary(metric):
            _mark_group(_draw_mean(axes, summary, y, color), y)
            dots = [y + 0.22] * len(summary.numbers)
            line = axes.plot(summary.numbers, dots, "o", ms=4, color="gray", alpha=0.6, mew=0)
            _mark_group(line, y)
        else:
            axes.text(0.02, y, "no result", transform=axes.get_yaxis_transform(), va="center")
    labels = [_shorten(" · ".join(group.labels) or "all runs") for group in groups]
    keys = _shorten(" · ".join(map(printable, groups[0].values)))
    axes.set_yticks(range(len(groups)), labels, parse_math=False)
    axes.set_title(_shorten(printable(metric)), parse_math=False)
    axes.set_title(keys, loc="left", ha="right", size="medium", weight="bold", parse_math=False)
    axes.set(ylim=(len(groups) - 0.4, -0.6), xlabel="mean ± standard deviation; a dot is one run")
    return figure


def plot_teachers(groups: Sequence[Group], metric: str) -> "Figure | None":
    """Plot the mean of a metric for each teacher and group; a dashed line is the teacher's own.

    Args:
        groups: the groups, as :func:`group_runs` returns them.
        metric: the metric.

    Returns:
        The figure, or None if no run has both the metric and the student's size.
    """
    teachers: dict[str, dict[int, list[Run]]] = {}
    for number, run in _with_result(groups, metric):
        name = "no teacher"
        if run.teacher_parameters is not None:
            name = printable(f"{run.teacher} ({run.teacher_parameters:,} parameters)")
        teachers.setdefault(name, {}).setdefault(number, []).append(run)
    if not teachers:
        return None
    colors = group_colors(groups)
    rows = sum(map(len, teachers.values())) + len(teachers)
    figure, axes = _figure_of_rows(rows, 0.2)
    ticks, y = [], 0
    for of_groups in teachers.values():
        top = y
        for number, runs in of_groups.items():
            summary = summarize([run.metrics[metric] for run in runs])
            assert summary is not None
            _mark_group(_draw_mean(axes, summary, y, colors[number]), number)
            y += 1
        ticks.append((top + y - 1) / 2)
        own = teacher_metric(metric)
        everyone = [run for runs in of_groups.values() for run in runs]
        if own_result := summarize([x.metrics[own] for x in everyone if own in x.metrics]):
            axes.plot([own_result.mean] * 2, [top - 0.4, y - 0.6], "--", color="gray")
        y += 1
        axes.axhline(y - 1, color="gray", lw=0.5, alpha=0.5)
    axes.set_yticks(ticks, [_shorten(name) for name in teachers], parse_math=False)
    axes.set_ylim(rows - 0.9, -0.9)
    axes.set_xlabel(f"{_shorten(printable(metric))}; dashed: the teacher's own", parse_math=False)
    return figure


def plot_sizes(groups: Sequence[Group], metric: str) -> "Figure | None":
    """Plot a metric of each group over the number of student parameters.

    Args:
        groups: the groups, as :func:`group_runs` returns them.
        metric: the metric.

    Returns:
        The figure, or None if no run has both the metric and the student's size.
    """
    from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

    sizes: dict[tuple[int, int], list[float]] = {}
    for number, run in _with_result(groups, metric):
        assert run.student_parameters is not None
        sizes.setdefault((number, run.student_parameters), []).append(run.metrics[metric])
    if not sizes:
        return None
    colors = group_colors(groups)
    figure, axes = _empty_figure()
    for (number, size), numbers in sizes.items():
        summary = summarize(numbers)
        assert summary is not None
        style: dict[str, Any] = {"color": colors[number], "capsize": 4, "alpha": 0.8}
        bar = axes.errorbar(size, summary.mean, yerr=summary.std, fmt="D", **style)
        _mark_group(bar.get_children(), number)
    smallest, largest = min(size for _, size in sizes), max(size for _, size in sizes)
    if largest >= 10 * smallest > 0:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlabel("parameters of the student")
    axes.set_ylabel(_shorten(printable(metric)), parse_math=False)
    return figure


def plot_curves(groups: Sequence[Group], curves: Mapping[Path, Curve]) -> "Figure":
    """Plot a metric over the optimizer steps, with a line for each run that has a curve.

    Args:
        groups: the groups, as :func:`group_runs` returns them.
        curves: a dict from the folder of each run to its curve.
    """
    colors = group_colors(groups)
    figure, axes = _empty_figure()
    for number, group in enumerate(groups):
        for curve in [curves[run.folder] for run in group.runs if run.folder in curves]:
            count = len(curve.steps)
            # A long run logs more points than the plot has pixels: leave some out, to keep the page
            # small.
            at = np.unique(np.linspace(0, count - 1, min(count, _MOST_POINTS)).round().astype(int))
            steps, values = np.array(curve.steps)[at], np.array(curve.values)[at]
            marker = "o" if count == 1 else ""
            style: dict[str, Any] = {"color": colors[number], "lw": 1.2, "ms": 4, "alpha": 0.8}
            _mark_group(axes.plot(steps, values, marker=marker, **style), number)
    axes.set_xlabel("optimizer step")
    return figure


def group_colors(groups: Sequence[Group]) -> list[str]:
    """Return for each group a colour "#rrggbb" that is visible on white and on black."""
    import matplotlib
    from matplotlib.colors import to_hex

    count = len(groups)
    if count <= 10:
        return [to_hex(matplotlib.colormaps["tab10"](i)) for i in range(count)]
    return [to_hex(matplotlib.colormaps["turbo"](0.05 + 0.9 * i / count)) for i in range(count)]


def to_svg(figure: "Figure", groups: Sequence[Group]) -> str:
    """Convert a figure to an SVG element for an HTML page.

    Args:
        figure: the figure.
        groups: the groups in it; their lines and marks get the attribute ``data-group`` (the
            group's position in this list) and a title.
    """
    import matplotlib

    def tag(match: re.Match[str]) -> str:
        number = match[1].removeprefix(_GROUP)
        if number == match[1]:  # Remove the id from matplotlib, which is not unique in the page.
            return "<g>"
        name = html.escape(groups[int(number)].name)
        return f'<g data-group="{number}"><title>{name}</title>'

    file = io.StringIO()
    # Write letters as text, not as curves, and make the ids equal in every call (hashsalt).
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "lightning-dist"}):
        nothing = dict.fromkeys(["Creator", "Date", "Format", "Type"])
        options: dict[str, Any] = {"metadata": nothing, "transparent": True}
        figure.savefig(file, format="svg", bbox_inches="tight", **options)
    text = file.getvalue()
    return re.sub('<g id="([^"]*)">', tag, text[text.index("<svg") :])


_GROUP = "group-"


def _mark_group(artists: Iterable[Any], number: int) -> None:
    for artist in artists:
        artist.set_gid(f"{_GROUP}{number}")


def _with_result(groups: Sequence[Group], metric: str) -> list[tuple[int, Run]]:
    """Return the runs with the metric and the student's size, each with the number of its group."""
    runs = [(number, run) for number, group in enumerate(groups) for run in group.completed]
    return [x for x in runs if metric in x[1].metrics and x[1].student_parameters is not None]


def _draw_mean(axes: "Axes", summary: Summary, y: float, color: str) -> Iterable[Any]:
    bar = axes.errorbar(summary.mean, y, xerr=summary.std, fmt="D", capsize=4, color=color)
    return bar.get_children()


def _figure_of_rows(count: int, inches: float) -> tuple["Figure", "Axes"]:
    """Return a figure and axes for a number of rows; `inches` is the height of a row."""
    from matplotlib.figure import Figure

    # Matplotlib refuses an image with a side above 65536 pixels; 200 inches are 30000 pixels.
    height = min(1.1 + inches * count, 200.0)
    figure = Figure(figsize=(6.4, height), dpi=150)
    axes = figure.add_axes((0.0, 0.5 / height, 1.0, 1.0 - 0.9 / height))
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _empty_figure() -> tuple["Figure", "Axes"]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6))
    axes = figure.add_subplot()
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes
