"""A script that runs scripts of this folder and commands, one after the other, in one process.

Most of them take less time than starting Python and importing torch. test_distributed.py calls this
script with a list in JSON: a command is a list of words, and a script is a dict of its name and
options.
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
