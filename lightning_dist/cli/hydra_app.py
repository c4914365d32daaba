"""`hydra_app`: run the job of a verb as a Hydra app."""

import functools
import os
import sys
from collections.abc import Callable
from typing import Any

from lightning_dist.cli.errors import FULL_ERROR, one_line_errors


def hydra_app(verb: str, job: Callable[[Any], Any]) -> None:
    """Compose the config of a verb from ``sys.argv`` and run a job with it, or a sweep of jobs.

    Hydra 1.3 needs two things otherwise than the job does. It would take the verb for an override,
    while the processes that subprocess DDP starts from ``sys.argv`` need it. And with
    ``HYDRA_FULL_ERROR=1`` it raises an error, where it would print several lines, while the job
    must see what the user has set. Both are as Hydra needs them except while a job runs.

    Args:
        verb: the first argument of the command line, and the name of the verb's config.
        job: takes the composed config.

    Raises:
        Exception: whatever Hydra raises on composing.
        SystemExit: with status 1, after an error of the user's in the job.
    """
    import hydra  # not at the top: completion and help do without

    users = os.environ.get(FULL_ERROR)

    @functools.wraps(job)
    def run(config: Any) -> Any:
        sys.argv.insert(1, verb)
        _set_full_error(users)
        try:
            # Here and not around Hydra: it prints a line of its own on an error that leaves a job.
            with one_line_errors():
                return job(config)
        finally:
            del sys.argv[1]
            _set_full_error("1")

    del sys.argv[1]
    _set_full_error("1")
    try:
        hydra.main(version_base="1.3", config_path="pkg://lightning_dist.conf", config_name=verb)(
            run
        )()
    finally:
        _set_full_error(users)


def _set_full_error(value: str | None) -> None:
    os.environ.pop(FULL_ERROR, None)
    if value is not None:
        os.environ[FULL_ERROR] = value
