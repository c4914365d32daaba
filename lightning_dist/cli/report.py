"""``lightning-dist report``: print a table of finished runs, and write plots and a page."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import rich

from lightning_dist.report import write_report


def main() -> None:
    """Parse ``sys.argv``, the verb first, and report on the folders that it names.

    Raises:
        SystemExit: with status 2, if it cannot be parsed.
        ValueError: if a folder holds no run or a broken one, or the runs share no metric.
    """
    parser = argparse.ArgumentParser(
        prog="lightning-dist report",
        description="Table, CSV, plot and HTML page of the runs in folders.",
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="runs, at any depth")
    parser.add_argument("--metric", help="what to compare by, such as test/accuracy")
    parser.add_argument("--out", type=Path, metavar="DIR", help="for the files: not the first DIR")
    options = parser.parse_args(sys.argv[2:])
    print_report(options.folders, options.out or options.folders[0], options.metric)


def print_report(folders: Sequence[Path], out: Path, metric: str | None = None) -> None:
    """Print the table of runs, write the other files of the report, and name them.

    Args:
        folders: with runs, at any depth.
        out: folder for the files.
        metric: to compare by; without one, the metric that the runs monitor.

    Raises:
        ValueError: if a folder holds no run or a broken one, or the runs share no metric.
    """
    rich.print(write_report(folders, out, metric))
    print(f"saved {out / 'report.csv'} and {out / 'report.png'}")
    print(f"open {out / 'report.html'} in a browser for curves, plots and commands")
