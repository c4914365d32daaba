"""Run scripts of this folder, and commands, one after the other in one process or launch.

To start Python and to import torch takes longer than most of them; run by test_distributed.py and
test_cli.py with a list in JSON: a command is a list of words, and a script its name and options.
"""

import importlib
import json
import sys

from lightning_dist import cli


def main() -> None:
    for case in json.loads(sys.argv[1]):
        if isinstance(case, dict):
            importlib.import_module(case.pop("script")).main(**case)
        else:
            sys.argv[1:] = case
            cli.main()


if __name__ == "__main__":
    main()
