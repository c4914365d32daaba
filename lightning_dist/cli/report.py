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
from lightning_dist.report.runs import RESULT_FILE


def main() -> None:
    """Parse ``sys.argv``, the verb first, and print the table."""
    parser = argparse.ArgumentParser(
        prog="lightning-dist report",
        description="Table, CSV, plot and HTML page of the runs in folders.",
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="runs, at any depth")
    parser.add_argument("--metric", help="what to compare by, such as test/accuracy")
    parser.add_argument("--out", type=Path, metavar="DIR", help="for the files: not the first DIR")
    options = parser.parse_args(sys.argv[2:])
    _print(options.folders, options.metric, options.out or options.folders[0])


class ReportAfterSweep(Callback):
    """Print the report of a multirun when its last job has ended; exit with 1 if one failed.

    Refuse, before the first job, a folder whose runs would be taken for this sweep's.
    """

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        if config.hydra.job.config_name != "train" or config.resume:
            return
        folder = Path(config.hydra.sweep.dir)
        runs = len(list(folder.rglob(RESULT_FILE)))
        if runs:
            fail(
                f"{folder} holds {runs} run{'s' * (runs > 1)} already: resume=true goes on with "
                "them, or choose another hydra.sweep.dir"
            )

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        if config.hydra.job.config_name != "train":  # the other verbs leave no results
            return
        folder = Path(config.hydra.sweep.dir)
        reasons = []
        try:
            _print([folder], None, folder)
        except (ValueError, OSError) as error:  # of which Hydra would make a warning
            reasons.append(f"there is no report: {error}")
        results = list(map(_read, folder.rglob(RESULT_FILE)))
        failed = sum(result["status"] != "completed" for result in results)
        failed -= sum(str(result.get("error")).startswith("Pruned") for result in results)
        if failed:
            why = "" if reasons else ", for the reasons below the table"
            reasons.append(f"{failed} of {len(results)} jobs failed{why}")
        if reasons:
            fail("; ".join(reasons))


def _read(path: Path) -> dict[str, Any]:
    """A result; one that cannot be read is of a job that failed."""
    try:
        return {"status": "failed", **json.loads(path.read_text())}
    except (ValueError, TypeError):
        return {"status": "failed"}


def _print(folders: list[Path], metric: str | None, out: Path) -> None:
    rich.print(write_report(folders, out, metric))
    print(f"saved {out / 'report.csv'} and {out / 'report.png'}")
    print(f"open {out / 'report.html'} in a browser for curves, plots and commands")
