"""``lightning-dist card``: print what a file says about the network in it."""

import argparse
import json
import sys

from lightning_dist.cli.errors import UserError
from lightning_dist.files.card_files import read_card


def main() -> None:
    """Print the card of the file in ``sys.argv``, whose first argument is the verb.

    Raises:
        SystemExit: with status 2, if ``sys.argv`` cannot be parsed.
        UserError: if the file has no card.
    """
    parser = argparse.ArgumentParser(
        prog="lightning-dist card",
        description="Print the images, classes and weights that a file's network was trained with.",
    )
    parser.add_argument(
        "file", metavar="FILE", help="checkpoint, exported file or folder, folder of predictions"
    )
    path = parser.parse_args(sys.argv[2:]).file
    card = read_card(path)
    if card is None:
        raise UserError(
            f"{path} has no card: it is from another program, or from an earlier version"
        )
    for name, value in card.to_plain().items():
        print(f"{name:<14} {json.dumps(value)}")  # JSON escapes control characters
