"""Test whether two settings differ by more than runs with different seeds do."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from lightning_dist.report.runs import Group


@dataclass(frozen=True)
class Comparison:
    """The comparison of two settings over the seeds that both have.

    Args:
        setting: the group that comes later in the report.
        baseline: the group that comes earlier in the report.
        seeds: number of seeds with a result in both groups.
        difference: mean of ``setting - baseline`` over these seeds, None if there are none.
        p: two-sided p-value of the paired t-test, None if it cannot be computed.
        reason: the reason why it cannot be computed.
    """

    setting: Group
    baseline: Group
    seeds: int
    difference: float | None
    p: float | None
    reason: str | None = None


def compare_groups(groups: Sequence[Group], metric: str) -> list[Comparison]:
    """Compare every pair of groups by a t-test on their runs, paired by seed.

    Runs of a group with the same seed, as in a sweep that was run twice, count as one: their mean.

    Args:
        groups: the groups, as :func:`group_runs` returns them.
        metric: the metric to compare by.

    Returns:
        A comparison for each pair of groups.
    """
    numbers = [numbers_by_seed(group, metric) for group in groups]
    pairs = combinations(zip(groups, numbers, strict=True), 2)
    return [_compare(setting, base, x, y) for (base, y), (setting, x) in pairs]


def numbers_by_seed(group: Group, metric: str) -> dict[str, float]:
    """Return a group's metric by seed, the mean where completed runs share a seed.

    Args:
        group: the runs; those without an override of the seed share the seed "(default)".
        metric: the metric.
    """
    found: dict[str, list[float]] = {}
    for run in group.completed:
        if metric in run.metrics:
            found.setdefault(run.overrides.get("seed", "(default)"), []).append(run.metrics[metric])
    return {seed: statistics.fmean(values) for seed, values in found.items()}


def _compare(setting: Group, base: Group, x: dict[str, float], y: dict[str, float]) -> Comparison:
    from scipy.stats import ttest_rel  # imported late: slow to import

    seeds = sorted(x.keys() & y.keys())
    first, second = (np.array([numbers[seed] for seed in seeds]) for numbers in (x, y))
    if not np.isfinite([first, second]).all():
        return Comparison(setting, base, len(seeds), None, None, "a run diverged")
    differences = first - second
    mean = float(differences.mean()) if seeds else None
    if len(seeds) < 2:
        return Comparison(setting, base, len(seeds), mean, None, "fewer than 2 common seeds")
    # Differences that are equal up to rounding have variance 0, by which the test divides.
    if np.ptp(differences) <= 1e-12 * np.abs([first, second]).max():
        return Comparison(setting, base, len(seeds), mean, None, "the differences are identical")
    return Comparison(setting, base, len(seeds), mean, float(ttest_rel(first, second).pvalue))
