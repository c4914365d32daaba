"""A Hydra callback that prints the report of a sweep after its last job."""

from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from lightning_dist.cli.errors import fail
from lightning_dist.cli.report import print_report
from lightning_dist.cli.run.result import read_result
from lightning_dist.report.runs import result_files


class ReportAfterSweep(Callback):
    """Print the report of a sweep after its last job, and exit with status 1 if a job failed.

    Before the first job, refuse a folder that contains runs, because the report would include them.
    """

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        if config.hydra.job.config_name != "train" or config.resume:
            return
        folder = Path(config.hydra.sweep.dir)
        runs = len(_result_files(folder))
        if runs:
            fail(
                f"{folder} contains {runs} run{'s' * (runs > 1)} already: continue with "
                "resume=true, or choose another hydra.sweep.dir"
            )

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        if config.hydra.job.config_name != "train":  # the other verbs write no results
            return
        folder = Path(config.hydra.sweep.dir)
        reasons = []
        try:
            print_report([folder], folder)
        except (ValueError, OSError) as error:  # Hydra 1.3 would log a warning and end with 0.
            reasons.append(f"there is no report: {error}")
        # An unreadable result counts as a failed job.
        results = [
            read_result(path.parent) or {"status": "failed"} for path in _result_files(folder)
        ]
        failed = sum(result["status"] != "completed" for result in results)
        failed -= sum(str(result.get("error")).startswith("Pruned") for result in results)
        if failed:
            why = "" if reasons else ", for the reasons below the table"
            reasons.append(f"{failed} of {len(results)} jobs failed{why}")
        if reasons:
            fail("; ".join(reasons))


def _result_files(folder: Path) -> list[Path]:
    try:
        return result_files(folder)
    except ValueError as error:  # Hydra 1.3 would log a warning and continue.
        fail(str(error))
