"""Compare the import time with that of Lightning and timm: ``python -m benchmarks.import_time``.

``import lightning_dist`` and ``import lightning, timm`` take turns, each in a new interpreter. The
interpreter measures the time of the import, so the start of the interpreter is not included. The
first round only fills the file cache. The table has the CPU time too, because it hardly depends on
other processes.
"""

import statistics
import subprocess
import sys

from rich.progress import track
from rich.table import Table

from benchmarks.common import bar, show

ROUNDS = 7
STATEMENTS = {"ours": "import lightning_dist", "parts": "import lightning, timm"}
PROGRAM = """
import time
wall, cpu = time.perf_counter(), time.process_time()
{statement}
print(time.perf_counter() - wall, time.process_time() - cpu)
"""


def seconds(statement: str) -> tuple[float, float]:
    """Return the wall time and CPU time of a statement in a new interpreter, in seconds."""
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(statement=statement)],
        check=True,
        capture_output=True,
        text=True,
    )
    wall, cpu = result.stdout.split()[-2:]
    return float(wall), float(cpu)


def main() -> None:
    """Time both imports and print the table."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in STATEMENTS}
    names = list(STATEMENTS)
    for index in track(range(ROUNDS + 1), "measuring", transient=True):
        names.reverse()
        for name in names:
            duration = seconds(STATEMENTS[name])
            if index:
                times[name].append(duration)
    medians = {
        name: [statistics.median(column) for column in zip(*values, strict=True)]
        for name, values in times.items()
    }
    table = Table(title=f"Import time, median of {ROUNDS} new interpreters each")
    table.add_column("statement")
    for title in ("wall, s", "CPU, s", "wall ratio", "CPU ratio"):
        table.add_column(title, justify="right")
    for name, statement in STATEMENTS.items():
        shares = [a / b for a, b in zip(medians[name], medians["parts"], strict=True)]
        table.add_row(
            statement,
            *(f"{value:.2f}" for value in medians[name]),
            *(f"{share:.3f}" for share in shares),
        )
    wall = medians["ours"][0] / medians["parts"][0]
    show(table, f"wall time divided by Lightning's and timm's: {bar(wall, '<= 1.1', wall <= 1.1)}")


if __name__ == "__main__":
    main()
