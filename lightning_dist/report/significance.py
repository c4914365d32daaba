"""Compare two settings by a paired t-test over the seeds that both have."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from lightning_dist.report.runs import Group


@dataclass(frozen=True)
class Comparison:
    """The comparison of two settings over the seeds that both have.

    Args:
        setting: the group that comes later in the report.
        baseline: the group that comes earlier in the report.
        seeds: the number of seeds with a result in both groups.
        difference: the mean of ``setting - baseline`` over these seeds, or None if there is no such
            seed or a run diverged.
        p: the two-sided p-value of the paired t-test, or None if it cannot be computed.
        reason: the reason why ``p`` cannot be computed.
        corrected: the p-value with Holm's correction for all pairs that were tested together, or
            None if ``p`` is None.
    """

    setting: Group
    baseline: Group
    seeds: int
    difference: float | None
    p: float | None
    reason: str | None = None
    corrected: float | None = None


def compare_groups(groups: Sequence[Group], metric: str) -> list[Comparison]:
    """Compare every pair of groups by a t-test on their runs, paired by seed.

    If several runs of a group have the same seed, for example because a sweep was run twice, their
    mean is used.

    Args:
        groups: the groups, as :func:`group_runs` returns them.
        metric: the metric to compare by.

    Returns:
        A comparison for each pair of groups. Their p-values are corrected for their number.
    """
    numbers = [numbers_by_seed(group, metric) for group in groups]
    pairs = combinations(zip(groups, numbers, strict=True), 2)
    found = [_compare(setting, base, x, y) for (base, y), (setting, x) in pairs]
    tested = [i for i, one in enumerate(found) if one.p is not None]
    for i, p in zip(tested, holm([found[i].p for i in tested]), strict=True):  # type: ignore[misc]
        found[i] = replace(found[i], corrected=p)
    return found


def holm(values: Sequence[float]) -> list[float]:
    """Return p-values with Holm's correction, in the order of the given ones.

    If all pairs whose corrected value is below a level are called different, the probability that
    one or more of these statements are wrong is at most this level. This holds even if the tests
    depend on each other.

    Args:
        values: the p-values of tests that are made together.

    Example:
        >>> holm([0.04, 0.01, 0.03])
        [0.06, 0.03, 0.06]

    Reference:
        Holm, A Simple Sequentially Rejective Multiple Test Procedure, 1979.
    """
    corrected, largest = [0.0] * len(values), 0.0
    for rank, i in enumerate(sorted(range(len(values)), key=lambda i: values[i])):
        largest = max(largest, min(1.0, (len(values) - rank) * values[i]))
        corrected[i] = largest
    return corrected


def numbers_by_seed(group: Group, metric: str) -> dict[str, float]:
    """Return a dict from each seed to the mean of a metric over the completed runs with that seed.

    Args:
        group: the group; its runs without an override of the seed share the seed "(default)".
        metric: the metric.
    """
    found: dict[str, list[float]] = {}
    for run in group.completed:
        if metric in run.metrics:
            found.setdefault(run.overrides.get("seed", "(default)"), []).append(run.metrics[metric])
    return {seed: statistics.fmean(values) for seed, values in found.items()}


def _compare(setting: Group, base: Group, x: dict[str, float], y: dict[str, float]) -> Comparison:
    from scipy.stats import ttest_rel  # slow to import

    seeds = sorted(x.keys() & y.keys())
    first, second = (np.array([numbers[seed] for seed in seeds]) for numbers in (x, y))
    if not np.isfinite([first, second]).all():
        return Comparison(setting, base, len(seeds), None, None, "a run diverged")
    differences = first - second
    mean = float(differences.mean()) if seeds else None
    if len(seeds) < 2:
        return Comparison(setting, base, len(seeds), mean, None, "fewer than 2 common seeds")
    # The test divides by the standard deviation of the differences, which is 0 here, up to
    # rounding.
    if np.ptp(differences) <= 1e-12 * np.abs([first, second]).max():
        return Comparison(setting, base, len(seeds), mean, None, "the differences are identical")
    return Comparison(setting, base, len(seeds), mean, float(ttest_rel(first, second).pvalue))
