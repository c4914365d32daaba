"""The console's table of groups, and the CSV file of runs."""

import csv
from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from lightning_dist.report.runs import (
    PathLike,
    Run,
    group_runs,
    names,
    optimized_metric,
    plain,
    shown_metrics,
)


def report_table(runs: Sequence[Run], metric: str | None = None) -> Table:
    """The console table: a row a group, ``mean ± std`` of each metric, the optimised one first."""
    groups, metric = group_runs(runs), optimized_metric(runs, metric)
    metrics = shown_metrics(runs, metric)
    reasons = [plain(f"failed: {x.folder}: {x.reason}") for x in runs if not x.completed]
    # Text, not str: rich would read [brackets] in a value as markup.
    caption, width = Text("\n".join(reasons)), 79 if reasons else 0  # wraps at the table's width
    table = Table(caption=caption, caption_justify="left", min_width=width)
    for name in [*groups[0].values, "runs", *metrics]:
        table.add_column(Text(plain(name)), overflow="fold")
    for group in groups:
        summaries = map(group.summary, metrics)
        numbers = [x.text(len(group.completed)) if x else "-" for x in summaries]
        table.add_row(*map(Text, [*group.labels, group.count, *numbers]))
    return table


def write_csv(runs: Sequence[Run], path: PathLike) -> None:
    """Write one row a run: folder, status, seconds, error, all overrides, all metrics, command."""
    keys, metrics = names(run.overrides for run in runs), names(run.metrics for run in runs)
    # Rows are lists: an override may be called like a column, and a dict would lose one of them.
    with open(path, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.writer(file)
        writer.writerow(["folder", "status", "seconds", "error", *keys, *metrics, "command"])
        for run in runs:
            row = [run.folder, run.status, run.seconds, run.error, *map(run.overrides.get, keys)]
            writer.writerow([*row, *map(run.metrics.get, metrics), run.command])
