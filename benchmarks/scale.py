"""Measure how costs grow with sizes: ``python -m benchmarks.scale``.

Each row measures one thing at two sizes, a factor of 10 apart, and prints the seconds, the bytes
and their exponents: 0 is a cost that does not grow with the size, 1 one that grows as the size
does. The data are generated in a temporary folder, which is deleted. ``python -m benchmarks.scale
WORD`` measures only the rows with this word in their name.

The seconds are CPU time on one thread, which hardly depends on other processes.
"""

import argparse
import logging
import tempfile
import warnings
from pathlib import Path

import torch
from rich.table import Table

from benchmarks import scale_cache, scale_data, scale_ranks, scale_step
from benchmarks.common import show
from benchmarks.growth import Cost, Row, exponent

# To add rows, write a module with a list of them, and add it here.
ROWS = [*scale_data.ROWS, *scale_cache.ROWS, *scale_step.ROWS, *scale_ranks.ROWS]


def measure(row: Row) -> list[Cost]:
    """Return the costs of a row at both sizes; each gets a folder of its own."""
    costs = []
    for size in row.sizes:
        with tempfile.TemporaryDirectory() as folder:
            costs.append(row.measure(size, Path(folder)))
    return costs


def add(table: Table, row: Row, costs: list[Cost]) -> None:
    """Add a measured row to the table."""
    small, large = costs
    powers = (
        exponent(row.sizes, small.seconds, large.seconds),
        exponent(row.sizes, small.size, large.size),
    )
    table.add_row(
        row.item,
        " / ".join(f"{size:,}" for size in row.sizes) + f" {row.counts}",
        _pair(small.seconds, large.seconds, "{:.3g}"),
        _pair(small.size, large.size, "{:,.0f}"),
        row.of_bytes,
        *("" if power is None else f"{power:.2f}" for power in powers),
    )


def _pair(small: float | None, large: float | None, form: str) -> str:
    if small is None or large is None:
        return ""
    return f"{form.format(small)} / {form.format(large)}"


def main() -> None:
    """Measure the rows and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("word", nargs="?", default="", help="a word in the names of the rows")
    word = parser.parse_args().word
    # At a lower level, each fit logs its devices.
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    table = Table(title="How costs grow")
    for title in ("item", "sizes", "seconds", "bytes", "", "exponent", "of bytes"):
        table.add_column(title, justify="left" if title in ("item", "") else "right")
    for row in ROWS:
        if word in row.item:
            add(table, row, measure(row))
    show(table, f"CPU time, one thread, torch {torch.__version__}")


if __name__ == "__main__":
    main()
