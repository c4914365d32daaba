"""Report on finished runs with a table, a CSV file, a plot, and a single-file HTML page."""

from pathlib import Path

from rich.table import Table

from lightning_dist.files.writing import naming, replaced_together
from lightning_dist.report.curves import Curve, read_curves
from lightning_dist.report.page import write_page
from lightning_dist.report.plots import plot_runs
from lightning_dist.report.runs import (
    Folders,
    Group,
    PathLike,
    Run,
    Summary,
    as_paths,
    group_runs,
    optimized_metric,
    read_runs,
)
from lightning_dist.report.significance import Comparison, compare_groups, holm
from lightning_dist.report.table import report_table, write_csv

__all__ = [
    "Comparison",
    "Curve",
    "Group",
    "Run",
    "Summary",
    "compare_groups",
    "group_runs",
    "holm",
    "optimized_metric",
    "plot_runs",
    "read_curves",
    "read_runs",
    "report_table",
    "write_csv",
    "write_page",
    "write_report",
]


def write_report(folders: Folders, out: PathLike | None = None, metric: str | None = None) -> Table:
    """Read all runs in some folders, and write report.csv, report.png and report.html.

    Args:
        folders: a folder or several folders, whose runs are merged.
        out: the folder for the files; by default the first of `folders`.
        metric: the metric to compare by; by default the one that all runs optimise.

    Returns:
        The table of results, for ``rich.print``.

    Raises:
        ValueError: if a folder contains no run or a broken result.json; if `metric` is None and the
            runs do not all optimise one metric; if only other metrics were logged; or if one of the
            three files exists as a link.
        OSError: if a file cannot be written; the three files of an earlier report are then intact.
    """
    runs = read_runs(folders)
    table, figure = report_table(runs, metric), plot_runs(runs, metric)
    target = as_paths(folders)[0] if out is None else Path(out)
    target.mkdir(parents=True, exist_ok=True)
    csv, png, page = (target / f"report.{suffix}" for suffix in ("csv", "png", "html"))
    for path in (csv, png, page):
        # In a folder from elsewhere, a link would let the report replace a file outside.
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise ValueError(
                f"{path} is a link or no regular file: remove it, or choose another folder for the "
                "report with --out"
            )
    # New files replace the old ones, because an old one may be a hard link to a file outside.
    with naming(target), replaced_together([csv, png, page]) as parts:
        write_csv(runs, parts[0])
        figure.savefig(parts[1], bbox_inches="tight")
        write_page(runs, parts[2], metric)
    return table
