"""``lightning-dist report``: table, plots and page of finished runs, also after a sweep."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import rich
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from lightning_dist.cli import fail
from lightning_dist.report import write_report


def main() -> None:
    """Parse ``sys.argv``, the verb first, and print the table."""
    parser = argparse.ArgumentParser(
        prog="lightning-dist report",
        description="Table, CSV, plot and HTML page of the runs in folders.",
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="runs, at any depth")
    parser.add_argument("--metric", help="what to compare by, such as test/accuracy")
    options = parser.parse_args(sys.argv[2:])
    _print(options.folders, options.metric)


class ReportAfterSweep(Callback):
    """Print the report of a multirun when its last job has ended; exit with 1 if one failed."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        if config.hydra.job.config_name != "train":  # the other verbs leave no results
            return
        folder = Path(config.hydra.sweep.dir)
        _print([folder], None)
        runs = [json.loads(path.read_text()) for path in folder.rglob("result.json")]
        pruned = sum((run["error"] or "").startswith("Pruned") for run in runs)
        failed = sum(run["status"] == "failed" for run in runs) - pruned
        if failed:
            fail(f"{failed} of {len(runs)} jobs failed, for the reasons below the table")


def _print(folders: list[Path], metric: str | None) -> None:
    rich.print(write_report(folders, metric=metric))
    print(f"saved {folders[0] / 'report.csv'} and {folders[0] / 'report.png'}")
    print(f"open {folders[0] / 'report.html'} in a browser for curves, plots and commands")
