"""`hydra_app`: run a verb of the command line, such as `train`, as a Hydra app."""

import functools
import logging
import os
import sys
from collections.abc import Callable
from typing import Any

from lightning_dist.cli.errors import FULL_ERROR, UserError, one_line_errors


def hydra_app(verb: str, job: Callable[[Any], Any]) -> None:
    """Compose the config of a verb from ``sys.argv``, and run one job or a sweep of jobs with it.

    ``sys.argv`` and the environment are changed for Hydra 1.3, and changed back while a job runs.
    The verb is removed from ``sys.argv``, because Hydra would parse it as an override; a job needs
    the verb there, because subprocess DDP starts its processes from ``sys.argv``. The variable
    ``HYDRA_FULL_ERROR`` is set to 1, so that Hydra raises an error instead of printing several
    lines; a job needs the value that the user has set.

    Args:
        verb: the first argument of the command line, and the name of the verb's config.
        job: a function that is called with the composed config.

    Raises:
        Exception: if Hydra cannot compose the config.
        UserError: if an option makes Hydra unpickle a config.
        SystemExit: with status 1, if the job raised an error that the user can fix.
    """
    import hydra  # Imported here, because it is slow and completion and help do not need it.

    # On a full disk, logging would print a traceback for each line that it cannot write.
    logging.raiseExceptions = False
    users = os.environ.get(FULL_ERROR)

    @functools.wraps(job)
    def run(config: Any) -> Any:
        sys.argv.insert(1, verb)
        _set_full_error(users)
        try:
            # Catch errors inside the job: if one leaves the job, Hydra 1.3 prints a further line.
            with one_line_errors():
                return job(config)
        finally:
            del sys.argv[1]
            _set_full_error("1")

    del sys.argv[1]
    _set_full_error("1")
    try:
        _refuse_pickled_config()
        hydra.main(version_base="1.3", config_path="pkg://lightning_dist.conf", config_name=verb)(
            run
        )()
    except OSError as error:
        if error.filename is None and error.errno is not None:  # such as that of a full disk
            place = "the files of Hydra in hydra.run.dir or hydra.sweep.dir"
            raise OSError(error.errno, error.strerror, place) from error
        raise
    finally:
        _set_full_error(users)


def _refuse_pickled_config() -> None:
    """Refuse Hydra's option --experimental-rerun, also abbreviated.

    Raises:
        UserError: if the command line has it.
    """
    from hydra._internal.utils import get_args

    file = getattr(get_args(), "experimental_rerun", None)
    if file is not None:
        raise UserError(
            f"--experimental-rerun would unpickle {file}, which can run code: give the overrides "
            "of that run, which are in the file overrides.yaml beside it"
        )


def _set_full_error(value: str | None) -> None:
    os.environ.pop(FULL_ERROR, None)
    if value is not None:
        os.environ[FULL_ERROR] = value
