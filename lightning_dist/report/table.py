"""Make the console's table, one row per group of runs, and the CSV file, one row per run."""

import csv
from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from lightning_dist.files.text import csv_cell, printable
from lightning_dist.report.runs import (
    PathLike,
    Run,
    all_keys,
    group_runs,
    notes_on,
    optimized_metric,
    table_metrics,
    tuned_column,
)


def report_table(runs: Sequence[Run], metric: str | None = None) -> Table:
    """Make a table with one row per group, that is per set of runs that differ only in the seed.

    Its columns are the settings that vary, the tuned values, the number of runs, and the
    ``mean ± std`` of the metric to compare by, of the other metrics of its split, and of the
    teacher's own result.

    Args:
        runs: the runs, as :func:`read_runs` returns them.
        metric: the metric to compare by; by default the one that all runs optimise.

    Returns:
        The table, for ``rich.print``; its caption lists the failed runs.

    Raises:
        ValueError: if `metric` is None and the runs do not all optimise one metric, or if the
            completed runs have logged only other metrics.
    """
    groups, metric = group_runs(runs), optimized_metric(runs, metric)
    metrics = table_metrics(runs, metric)
    notes = [printable(f"failed: {x.folder}: {x.reason}") for x in runs if not x.completed]
    notes += notes_on(runs)
    # rich parses [brackets] in a str as markup, but not in a Text. It wraps a caption to the width
    # of the table, so a table with notes gets a minimum width.
    caption, width = Text("\n".join(notes)), 79 if notes else 0
    table = Table(caption=caption, caption_justify="left", min_width=width)
    tuned = tuned_column(groups)
    for name in [*groups[0].values, *tuned, "runs", *metrics]:
        table.add_column(Text(printable(name)), overflow="fold")
    for group in groups:
        summaries = map(group.summary, metrics)
        numbers = [x.text(len(group.completed)) if x else "-" for x in summaries]
        table.add_row(
            *map(Text, [*group.labels, *(group.tuned for _ in tuned), group.count, *numbers])
        )
    return table


def write_csv(runs: Sequence[Run], path: PathLike) -> None:
    """Write a CSV file with one row per run: folder, status, overrides, metrics, and more.

    Text that a spreadsheet would evaluate as a formula, such as ``=1+1``, gets a quote in front.

    Args:
        runs: the runs, as :func:`read_runs` returns them.
        path: the path of the file.
    """
    keys, metrics = all_keys(run.overrides for run in runs), all_keys(run.metrics for run in runs)
    tuned = tuned_column(group_runs(runs))
    # Rows are lists and not dicts, because an override may have the same name as a column.
    with open(path, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.writer(file)
        header = ["folder", "status", "seconds", "error", *keys, *metrics, *tuned, "command"]
        writer.writerow(map(csv_cell, header))
        for run in runs:
            row = [run.folder, run.status, run.seconds, run.error, *map(run.overrides.get, keys)]
            row += [*map(run.metrics.get, metrics), *(run.tuned for _ in tuned), run.command]
            writer.writerow(map(csv_cell, row))
