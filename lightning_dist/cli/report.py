"""``lightning-dist report``: print a table of finished runs, and write plots and an HTML page."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import rich

from lightning_dist.report import write_report


def main() -> None:
    """Write the report on the folders in ``sys.argv``, whose first argument is the verb.

    Raises:
        SystemExit: with status 2, if ``sys.argv`` cannot be parsed.
        ValueError: if a folder contains no run or a broken one, or the runs share no metric.
    """
    parser = argparse.ArgumentParser(
        prog="lightning-dist report",
        description="Write a table, a CSV file, plots and an HTML page of the runs in folders.",
    )
    parser.add_argument(
        "folders", nargs="+", type=Path, metavar="DIR", help="folder with runs, at any depth"
    )
    parser.add_argument("--metric", help="metric to compare by, such as test/accuracy")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the files (first DIR)")
    options = parser.parse_args(sys.argv[2:])
    print_report(options.folders, options.out or options.folders[0], options.metric)


def print_report(folders: Sequence[Path], out: Path, metric: str | None = None) -> None:
    """Print the table of runs, write the files of the report, and print their paths.

    Args:
        folders: the folders with runs, at any depth.
        out: the folder for the files.
        metric: the metric to compare by; by default the one that the runs monitor.

    Raises:
        ValueError: if a folder contains no run or a broken one, or the runs share no metric.
    """
    rich.print(write_report(folders, out, metric))
    print(f"saved {out / 'report.csv'} and {out / 'report.png'}")
    print(f"open {out / 'report.html'} in a browser for curves, plots and commands")
