"""Write the HTML page of a report: one file with sortable tables, plots, and each run's command."""

import base64
import hashlib
import math
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_dist.files.text import printable
from lightning_dist.report.curves import Curve, read_curves
from lightning_dist.report.plots import (
    group_colors,
    plot_curves,
    plot_runs,
    plot_sizes,
    plot_teachers,
    to_svg,
)
from lightning_dist.report.runs import (
    TUNED,
    Group,
    PathLike,
    Run,
    all_keys,
    group_runs,
    names_of,
    notes_on,
    optimized_metric,
    table_metrics,
    tuned_column,
)
from lightning_dist.report.significance import Comparison, compare_groups, numbers_by_seed

if TYPE_CHECKING:
    from jinja2 import Template
    from matplotlib.figure import Figure


# A page with more plots or more pairs of settings would take minutes to write and to read.
_MOST_CURVES, _MOST_TESTED = 40, 100


class Cell(NamedTuple):
    """A cell of a table: its text, its sort key (None means the text), and its CSS class."""

    text: str
    key: str | None = None
    kind: str = ""


class Row(NamedTuple):
    """A row of a table; `group` is the index of its group, or None for a pair of groups."""

    cells: list[Cell]
    group: int | None = None


def write_page(runs: Sequence[Run], path: PathLike, metric: str | None = None) -> None:
    """Write a page that a browser can open without a server or a network.

    Args:
        runs: the runs, as :func:`read_runs` returns them; their folders contain the curves.
        path: the path of the HTML file.
        metric: the metric to compare by; by default the one that all runs optimise.

    Raises:
        ValueError: if `metric` is None and the runs do not all optimise one metric, or if only
            other metrics were logged.
    """
    from markupsafe import Markup

    groups, metric = group_runs(runs), optimized_metric(runs, metric)
    files = resources.files("lightning_dist.report") / "templates"
    script = (files / "page.js").read_text(encoding="utf-8")
    alone = [group for group in groups if len(numbers_by_seed(group, metric)) < 2]
    several = [group for group in groups if group not in alone]
    tested = compare_groups(several, metric) if len(several) <= _MOST_TESTED else []
    curves, without_curves = _curves(runs, metric)
    page = _template().render(
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        style=Markup((files / "page.css").read_text(encoding="utf-8")),
        metric=metric,
        runs=runs,
        failed=[run for run in runs if not run.completed],
        unknown=[run for run in runs if run.completed and run.student_parameters is None],
        groups=groups,
        colors=group_colors(groups),
        alone=alone,
        untested=len(several) if len(several) > _MOST_TESTED else 0,
        tested=tested,
        without_curves=without_curves,
        names=names_of(runs),
        notes=notes_on(runs),
        group_table=_group_table(groups, runs, metric),
        test_table=_test_table(tested),
        run_table=_run_table(groups, runs, metric),
        plots=_plots(groups, runs, metric, curves),
    )
    Path(path).write_text(page, encoding="utf-8")


def _template() -> "Template":
    """Load the page's template, which escapes HTML and control characters in all text."""
    # Imported here, because it is slow to import.
    from jinja2 import Environment, PackageLoader, StrictUndefined

    def printable_text(value: Any) -> Any:
        return printable(value) if type(value) is str else value

    environment = Environment(
        loader=PackageLoader("lightning_dist.report"),
        autoescape=True,  # A Markup object is HTML already, so it is not escaped.
        undefined=StrictUndefined,
        finalize=printable_text,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html")


def _curves(runs: Sequence[Run], metric: str) -> tuple[dict[str, dict[Path, Curve]], list[str]]:
    """Return the curves of each metric by run folder, and an error for each run without curves."""
    found: dict[Path, dict[str, Curve]] = {}
    reasons = []
    for run in runs:
        try:
            found[run.folder] = read_curves(run.folder)
        except ValueError as error:
            reasons.append(str(error))
    # A test metric is logged once and has no curve: plot the same metric of the validation set.
    first = [metric.replace("test/", "val/", 1), "val/loss"]
    logged = sorted(all_keys(found.values()))
    chosen = [name for name in dict.fromkeys(first) if name in logged]
    chosen += [name for name in logged if name.startswith("train/") and name not in chosen]
    if len(chosen) > _MOST_CURVES:
        reasons.append(f"{len(chosen) - _MOST_CURVES} further metrics, which are too many to plot")
    curves = {
        name: {folder: curves[name] for folder, curves in found.items() if name in curves}
        for name in chosen[:_MOST_CURVES]
    }
    return curves, reasons


def _plots(
    groups: Sequence[Group],
    runs: Sequence[Run],
    metric: str,
    curves: Mapping[str, Mapping[Path, Curve]],
) -> dict[str, list[tuple[str, str]]]:
    """Return the title and the SVG of each figure in each section; skip figures without data."""
    from markupsafe import Markup

    figures: dict[str, list[tuple[str, Figure | None]]] = {
        "groups": [(metric, plot_runs(runs, metric))],
        "curves": [(name, plot_curves(groups, x)) for name, x in curves.items()],
        "sizes": [(f"{metric} against the student's size", plot_sizes(groups, metric))],
        "teachers": [(f"{metric} against the teacher", plot_teachers(groups, metric))],
    }
    return {
        section: [(name, Markup(to_svg(x, groups))) for name, x in several if x is not None]
        for section, several in figures.items()
    }


def _group_table(
    groups: Sequence[Group], runs: Sequence[Run], metric: str
) -> tuple[list[str], list[Row]]:
    metrics, tuned = table_metrics(runs, metric), tuned_column(groups)
    rows = []
    for number, group in enumerate(groups):
        summaries = map(group.summary, metrics)
        cells = [
            Cell(x.text(len(group.completed)), _sort_key(x.mean), "number") if x else _EMPTY
            for x in summaries
        ]
        count = Cell(group.count, str(len(group.completed)), "number")
        labels = [*group.labels, *(group.tuned for _ in tuned)]
        rows.append(Row([*map(Cell, labels), count, *cells], number))
    return [*groups[0].values, *tuned, "runs", *metrics], rows


def _test_table(tested: Sequence[Comparison]) -> tuple[list[str], list[Row]]:
    rows = []
    for pair in tested:
        p = Cell(f"not testable: {pair.reason}", "") if pair.reason else _number_cell(pair.p, ".3g")
        difference = _number_cell(pair.difference, "+.4g")
        cells = [Cell(pair.setting.name), Cell(pair.baseline.name), _number_cell(pair.seeds, "d")]
        rows.append(Row([*cells, difference, p, _number_cell(pair.corrected, ".3g")]))
    names = ["setting", "compared with", "common seeds", "mean difference", "p", "p (Holm)"]
    return names, rows


def _run_table(
    groups: Sequence[Group], runs: Sequence[Run], metric: str
) -> tuple[list[str], list[Row]]:
    metrics = table_metrics(runs, metric)
    keys = [*groups[0].values, *(["seed"] if any("seed" in run.overrides for run in runs) else [])]
    rows = []
    for number, group in enumerate(groups):
        for run in group.runs:
            values = [run.tuned if key == TUNED else run.overrides.get(key) for key in keys]
            status = (
                Cell(run.status) if run.completed else Cell(f"failed: {run.reason}", kind="bad")
            )
            numbers = [_number_cell(run.metrics.get(name), ".4g") for name in metrics]
            rows.append(
                Row(
                    [
                        Cell(str(run.folder), kind="path"),
                        status,
                        *(Cell("(default)" if x is None else x or "''") for x in values),
                        *numbers,
                        _number_cell(run.student_parameters, ",d"),
                        Cell(run.teacher) if run.teacher else _EMPTY,
                        _number_cell(run.seconds, ".1f"),
                        Cell(run.command, kind="command"),
                    ],
                    number,
                )
            )
    others = ["student's parameters", "teacher", "seconds", "command"]
    return ["folder", "status", *keys, *metrics, *others], rows


_EMPTY = Cell("-", "", "number")


def _number_cell(value: float | None, form: str) -> Cell:
    return _EMPTY if value is None else Cell(format(value, form), _sort_key(value), "number")


def _sort_key(value: float) -> str:
    """Return a number as text for JavaScript; nan becomes "", which the page sorts last."""
    if math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    return "" if math.isnan(value) else repr(value)
