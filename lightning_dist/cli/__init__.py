"""The command ``lightning-dist VERB``: one line for a user's error, a traceback for a bug."""

import difflib
import errno
import functools
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from lightning_dist import __version__
from lightning_dist.cli.renamed_keys import with_new_name

VERBS = {
    "train": "train a student, distilled or not; -m sweeps",
    "eval": "test the student of a checkpoint",
    "predict": "label the images of a folder with the student of a checkpoint",
    "export": "write the student of a checkpoint as safetensors, timm folder, torch.export or ONNX",
    "report": "table, plots and page of the runs in one or more folders",
}
_USAGE = """usage: lightning-dist VERB [key=value ...]

{verbs}

lightning-dist VERB --help shows the options of a verb, lightning-dist --version the version."""


def main() -> None:
    """Run the verb that the command line names; exit with status 1 or 2 after an error."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        verbs = "\n".join(f"  {verb:<8} {what}" for verb, what in VERBS.items())
        print(_USAGE.format(verbs=verbs))
        sys.exit(0 if arguments else 2)
    if arguments[0] == "--version":
        print(f"lightning-dist {__version__}")
        sys.exit()
    verb = arguments[0]
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1) or list(VERBS)
        fail(f"there is no verb {verb!r}: use {' or '.join(near)}", status=2)

    environment = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let Hydra raise instead of printing several lines
    try:
        with one_line_errors(traceback=environment == "1"):
            importlib.import_module(f"lightning_dist.cli.{verb}").main()
    finally:
        del os.environ["HYDRA_FULL_ERROR"]
        if environment is not None:
            os.environ["HYDRA_FULL_ERROR"] = environment


def hydra_app(verb: str, job: Callable[[Any], Any]) -> None:
    """Run a verb's job as a Hydra app over ``sys.argv``.

    Hydra must not see the verb; processes that subprocess DDP starts from the command line must. So
    it is out of ``sys.argv`` while Hydra reads that, and back while the job runs.

    Args:
        verb: of the command line, and the name of its config.
        job: takes the composed config.
    """
    import hydra

    @functools.wraps(job)
    def run(config: Any) -> Any:
        sys.argv.insert(1, verb)
        try:
            with one_line_errors():
                return job(config)
        finally:
            del sys.argv[1]

    del sys.argv[1]
    hydra.main(version_base="1.3", config_path="pkg://lightning_dist.conf", config_name=verb)(run)()


@contextmanager
def one_line_errors(traceback: bool | None = None) -> Iterator[None]:
    """Exit with one line on an error of the user's.

    Hydra prints a line of its own about an error that leaves a job, so jobs use this too, and take
    over what :func:`main` found about ``traceback``.
    """
    global _traceback
    if traceback is not None:
        _traceback = traceback
    try:
        yield
    except Exception as error:
        if _traceback or not is_users(error):
            raise
        fail(with_new_name(str(error).partition("Config search path")[0]))


_traceback = False


def user_environment() -> dict[str, str]:
    """The environment for another run of the command, without what :func:`main` has put there."""
    return os.environ | {"HYDRA_FULL_ERROR": "1" if _traceback else "0"}


def is_users(error: Exception) -> bool:
    """Whether the error speaks of what the user gave, so that its message is all they need."""
    from hydra.errors import HydraException
    from lightning.pytorch.utilities.exceptions import MisconfigurationException
    from omegaconf.errors import OmegaConfBaseException

    known = (HydraException, OmegaConfBaseException, MisconfigurationException)
    if isinstance(error, (*known, FileNotFoundError, UserError)):
        return True
    if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
        return True
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    raiser = traceback.tb_frame.f_globals.get("__name__", "") if traceback else ""
    if raiser.partition(".")[0] in ("hydra", "omegaconf", "antlr4"):  # they read the command line
        return True
    kinds = (ValueError, OSError, FloatingPointError, ImportError)
    return isinstance(error, kinds) and raiser.startswith("lightning_dist.")


# No room, no permission, a file in the place of a folder: wherever they come up.
_DISK_ERRORS = (
    errno.EACCES,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EISDIR,
    errno.ENOSPC,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
)


class UserError(Exception):
    """An error in what the user asked for; its message is shown as one line."""


def fail(message: str, status: int = 1) -> NoReturn:
    """Print an error on one line and exit."""
    print(f"lightning-dist: error: {with_extra(' '.join(message.split()))}", file=sys.stderr)
    sys.exit(status)


# Each extra of this package: what errors name where it is missing, and the module that it brings.
_EXTRAS = {
    "deepspeed": ("DeepSpeed", "deepspeed"),
    "joblib": ("hydra/launcher/joblib", "hydra_plugins.hydra_joblib_launcher"),
    "mlflow": ("MLFlowLogger", "mlflow"),
    "optuna": ("optuna", "optuna"),
    "ray": ("hydra/launcher/ray", "hydra_plugins.hydra_ray_launcher"),
    "submitit": ("hydra/launcher/submitit", "hydra_plugins.hydra_submitit_launcher"),
    "tensorboard": ("TensorBoardLogger", "tensorboard"),
    "wandb": ("WandbLogger", "wandb"),
}


def with_extra(message: str) -> str:
    """An error, and how to install the optional package that it is about, if it is about one."""
    for extra, (named, module) in _EXTRAS.items():
        if named in message and importlib.util.find_spec(module) is None:
            return f"{message} (to install what it needs: pip install 'lightning-dist[{extra}]')"
    return message
