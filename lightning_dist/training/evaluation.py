"""Validation and test over several processes: count no sample twice, average losses correctly."""

from collections.abc import Mapping, Sized
from typing import Any, cast

from torch import Tensor, nn
from torch.utils.data import DistributedSampler
from torchmetrics import MeanMetric, Metric, MetricCollection

Metrics = Metric | MetricCollection | Mapping[str, Metric] | None


class EvaluationMetrics(nn.Module):
    """The metrics of one network in one split, and the mean of its loss.

    The mean is torchmetrics': ``self.log`` averages over the samples of a rank and then over the
    ranks, which is wrong where ranks have unlike numbers of samples.

    Args:
        metrics: what to compute; a copy is kept, so that networks and splits share no state.
        prefix: first part of the names under which the metrics are logged, such as ``"val/"``.
    """

    def __init__(self, metrics: Metrics, prefix: str) -> None:
        super().__init__()
        if not isinstance(metrics, MetricCollection):
            metrics = MetricCollection(
                dict(metrics) if isinstance(metrics, Mapping) else metrics or {}
            )
        self.collection = metrics.clone(prefix=prefix)
        self.mean_loss = MeanMetric()
        self.prefix = prefix


def without_repeats(batch: Any, batch_idx: int, loaders: Any) -> Any:
    """Return the samples of a batch that are no copies.

    A DistributedSampler gives every rank as many samples, and repeats some for that, which would
    count twice. They are the last samples of the last ranks.

    Args:
        batch: ``(inputs, target)``, of tensors or lists, or mappings of them.
        batch_idx: number of the batch on this rank.
        loaders: the Trainer's loader, or a list with it.

    Returns:
        The batch, perhaps with fewer samples or none.
    """
    loader = loaders[0] if isinstance(loaders, (list, tuple)) else loaders
    sampler, size = getattr(loader, "sampler", None), getattr(loader, "batch_size", None)
    if not isinstance(sampler, DistributedSampler) or sampler.drop_last or size is None:
        return batch
    own = len(range(sampler.rank, len(cast(Sized, sampler.dataset)), sampler.num_replicas))
    inputs, target = batch
    given, count = count_samples(inputs), max(own - batch_idx * size, 0)
    if count >= given:
        return batch
    return _first(inputs, count, given), _first(target, count, given)


def count_samples(inputs: Any) -> int:
    """Return how many samples the inputs of a batch hold.

    Args:
        inputs: a batched tensor, a mapping or tuple of such, or a list with one item a sample.

    Example:
        >>> import torch
        >>> count_samples({"pixels": torch.zeros(8, 3, 4, 4), "mask": torch.zeros(8, 4)})
        8
    """
    if isinstance(inputs, (Mapping, tuple)) and len(inputs):
        first = next(iter(inputs.values() if isinstance(inputs, Mapping) else inputs))
        return count_samples(first) if isinstance(first, (Tensor, Mapping, tuple)) else len(inputs)
    return len(inputs)


def _first(samples: Any, count: int, given: int) -> Any:
    """Return the first samples of a batch of some, in any nesting of mappings and tuples.

    A list of as many items as the batch has samples has one for each; but for a list of tensors of
    that length, which torch's ``default_collate`` makes of a tuple in each sample.
    """
    if isinstance(samples, Mapping):
        return {key: _first(value, count, given) for key, value in samples.items()}
    if isinstance(samples, Tensor):
        return samples[:count]
    if isinstance(samples, (list, tuple)):
        batched = all(isinstance(x, Tensor) and x.dim() and len(x) == given for x in samples)
        if isinstance(samples, list) and not batched:
            return samples[:count]
        parts = [_first(x, count, given) for x in samples]
        return samples._make(parts) if hasattr(samples, "_make") else type(samples)(parts)
    return samples
