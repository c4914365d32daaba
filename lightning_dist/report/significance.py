"""Whether two settings differ by more than the seeds do."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from lightning_dist.report.runs import Group


@dataclass(frozen=True)
class Comparison:
    """Two settings over the seeds that both have.

    Args:
        setting: one of them.
        baseline: the other, which comes before it in the report.
        seeds: how many seeds have a result in both.
        difference: mean of ``setting - baseline`` over these seeds, None without any.
        p: two-sided p-value of the paired t-test, None where it cannot be computed.
        reason: why it cannot.
    """

    setting: Group
    baseline: Group
    seeds: int
    difference: float | None
    p: float | None
    reason: str | None = None


def compare_groups(groups: Sequence[Group], metric: str) -> list[Comparison]:
    """Compare each two groups by a t-test on their runs, paired by seed.

    Runs of one group with the same seed, as in a sweep that was run twice, count as their mean.

    Args:
        groups: the settings, as :func:`group_runs` returns them.
        metric: what they are compared by.
    """
    numbers = [numbers_by_seed(group, metric) for group in groups]
    pairs = combinations(zip(groups, numbers, strict=True), 2)
    return [_compare(setting, base, x, y) for (base, y), (setting, x) in pairs]


def numbers_by_seed(group: Group, metric: str) -> dict[str, float]:
    """The metric for each seed of the completed runs; a seed that is left alone is one too."""
    found: dict[str, list[float]] = {}
    for run in group.completed:
        if metric in run.metrics:
            found.setdefault(run.overrides.get("seed", "(default)"), []).append(run.metrics[metric])
    return {seed: statistics.fmean(values) for seed, values in found.items()}


def _compare(setting: Group, base: Group, x: dict[str, float], y: dict[str, float]) -> Comparison:
    from scipy.stats import ttest_rel  # not at the top: slow to import

    seeds = sorted(x.keys() & y.keys())
    first, second = (np.array([numbers[seed] for seed in seeds]) for numbers in (x, y))
    if not np.isfinite([first, second]).all():
        return Comparison(setting, base, len(seeds), None, None, "a run diverged")
    differences = first - second
    mean = float(differences.mean()) if seeds else None
    if len(seeds) < 2:
        return Comparison(setting, base, len(seeds), mean, None, "fewer than 2 common seeds")
    # Equal but for rounding: the test would divide by their variance.
    if np.ptp(differences) <= 1e-12 * np.abs([first, second]).max():
        return Comparison(setting, base, len(seeds), mean, None, "the differences are identical")
    return Comparison(setting, base, len(seeds), mean, float(ttest_rel(first, second).pvalue))
