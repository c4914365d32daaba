"""Helpers for the benchmarks: interleaved timing, peak memory, the authors' DIST loss, tables."""

import importlib
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

# Without this level, torch's profiler prints a line at each start.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

Times = Mapping[str, list[float]]


def interleave(
    contestants: Mapping[str, Callable[[], Any]],
    seconds: float,
    *,
    least: int = 3,
    most: int = 40,
    slice_seconds: float = 0.02,
) -> dict[str, list[float]]:
    """Time several functions in rounds, so that other processes slow all of them equally.

    A round calls all contestants one after the other, starting with another one in each round. Fast
    calls are repeated until they take `slice_seconds`.

    Args:
        contestants: a dict from names to functions; call each function once before, so that it is
            compiled.
        seconds: the duration after which no further round starts, in seconds.
        least: the smallest number of rounds, even if they take longer.
        most: the largest number of rounds.
        slice_seconds: the shortest duration to time, in seconds.

    Returns:
        A dict from names to the seconds per call, one value per round.
    """
    repeats = {
        name: max(1, round(slice_seconds / _seconds(call, 1))) for name, call in contestants.items()
    }
    times: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    end = time.perf_counter() + seconds
    for index in range(most):
        if index >= least and time.perf_counter() > end:
            break
        names.append(names.pop(0))
        for name in names:
            times[name].append(_seconds(contestants[name], repeats[name]))
    return times


def ratios(times: Times, slower: str, *faster: str) -> list[float]:
    """Return the ratio of one contestant's time to the sum of some others' times, per round.

    Args:
        times: the seconds of each contestant, one value per round.
        slower: the name of the contestant in the numerator.
        *faster: the names of the contestants in the denominator.
    """
    rounds = zip(times[slower], *(times[name] for name in faster), strict=True)
    return [first / sum(rest) for first, *rest in rounds]


def peak_bytes(call: Callable[[], object]) -> int:
    """Return the peak of the memory that a call allocates, in bytes.

    It measures GPU memory if this process uses a GPU, and otherwise CPU memory.
    """
    if torch.cuda.is_initialized():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = profiler.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    held = peak = 0
    for _, change in sorted(changes, key=lambda change: change[0]):
        held += change
        peak = max(peak, held)
    return peak


def plain_dist(student: Tensor, teacher: Tensor, tau: float = 1.0, eps: float = 1e-8) -> Tensor:
    """Compute DIST as the authors do, by Pearson correlations of the rows, then of the columns.

    Args:
        student: the student's logits, shape (N, C, ...).
        teacher: the teacher's logits, with the same shape.
        tau: the temperature.
        eps: a small number that is added to the denominators.
    """
    y_s, y_t = rows(student / tau).softmax(1), rows(teacher / tau).softmax(1)
    relations = _correlation(y_s, y_t, eps) + _correlation(y_s.T, y_t.T, eps)
    return tau**2 * (2 - relations)


def rows(logits: Tensor) -> Tensor:
    """Reshape logits (N, C, ...) to a matrix with a row per pixel, for other libraries."""
    return logits.movedim(1, -1).reshape(-1, logits.shape[1])


def peer(module: str) -> Any:
    """Import a package for comparison; if it is missing, print how to install it, and exit."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        print(f"this benchmark needs {module} ({error}): pip install 'lightning-dist[test]'")
        sys.exit(0)


def torchdistill_loss() -> Callable[[Tensor, Tensor], Tensor]:
    """Return torchdistill's DISTLoss as a function of two tensors of logits."""
    module = peer("torchdistill.losses.mid_level").DISTLoss("logits", "output", "logits", "output")

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        return module({"logits": {"output": rows(student)}}, {"logits": {"output": rows(teacher)}})

    return loss


def show(table: Table, *lines: str) -> None:
    """Print a table, and lines below it; use at least 130 columns, even in a narrower terminal."""
    console = Console()
    console.width = max(console.width, 130)
    console.print(table)
    for line in lines:
        console.print(line, highlight=False)


def bar(value: float, limit: str, met: bool) -> str:
    """Format a measured number and its bar, the limit that it must meet.

    Args:
        value: the measured number.
        limit: the bar as text, such as "<= 1.3".
        met: whether the number meets the bar.
    """
    return f"{value:.3g} (bar {limit}: {'met' if met else '[bold red]missed[/]'})"


def _correlation(a: Tensor, b: Tensor, eps: float) -> Tensor:
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    return ((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + eps)).mean()


def _seconds(call: Callable[[], Any], repeats: int) -> float:
    _wait_for_gpu()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    _wait_for_gpu()
    return (time.perf_counter() - start) / repeats


def _wait_for_gpu() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
