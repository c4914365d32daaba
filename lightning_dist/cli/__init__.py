"""The command ``lightning-dist VERB``. It imports only the verb that is called, to start fast."""

import difflib
import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from lightning_dist import __version__
from lightning_dist.cli.errors import fail, one_line_errors

VERBS = {
    "train": "train a student, distilled or not; -m sweeps",
    "eval": "test the student of a checkpoint",
    "predict": "label the images of a folder with the student of a checkpoint",
    "export": "write the student of a checkpoint as safetensors, timm folder, torch.export or ONNX",
    "card": "print the images, classes and weights that the network of a file expects",
    "report": "write a table, plots and a page of the runs in one or more folders",
    "completion": "print a bash, zsh or fish script that completes verbs, groups and keys on TAB",
}
_USAGE = """usage: lightning-dist VERB [key=value ...]

{verbs}

lightning-dist VERB --help lists the options of a verb; --version prints the version."""


def main() -> None:
    """Run the verb that the command line names.

    Raises:
        SystemExit: after an error, with status 1 or 2, and after ``--help`` and ``--version``,
            with status 0.
    """
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        width = max(map(len, VERBS))
        verbs = "\n".join(f"  {verb:<{width}} {purpose}" for verb, purpose in VERBS.items())
        print(_USAGE.format(verbs=verbs))
        sys.exit(0 if arguments else 2)
    if arguments[0] == "--version":
        print(f"lightning-dist {__version__}")
        sys.exit(0)
    verb = arguments[0]
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1) or list(VERBS)
        fail(f"there is no verb {verb!r}: use {' or '.join(near)}", status=2)
    with one_line_errors(), _safe_path():
        importlib.import_module(f"lightning_dist.cli.{verb}").main()


@contextmanager
def _safe_path() -> Iterator[None]:
    """Let the processes that the block starts import no module from the working folder.

    Python does that with ``-c`` and ``-m``, by which workers of launchers, of ``ddp_spawn`` and of
    data loaders are started. With ``python -m lightning_dist`` they do what this process does.
    Python 3.10 ignores the variable.
    """
    name = "PYTHONSAFEPATH"
    if name in os.environ or {"", os.path.realpath(os.curdir)} & set(sys.path):
        yield
        return
    os.environ[name] = "1"
    try:
        yield
    finally:
        os.environ.pop(name, None)
