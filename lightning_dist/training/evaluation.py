"""Validation and test over several processes, with no sample counted twice and exact means."""

from collections.abc import Mapping, Sized
from typing import Any, cast

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DistributedSampler
from torchmetrics import MeanMetric, Metric, MetricCollection

Metrics = Metric | MetricCollection | Mapping[str, Metric] | None


class EvaluationMetrics(nn.Module):
    """The metrics of one network in one split, and the mean of its loss.

    The mean is a torchmetrics ``MeanMetric``, because ``self.log`` averages over the samples of a
    rank and then over the ranks. That is wrong if the ranks have different numbers of samples.

    Args:
        metrics: the metrics to compute; they are copied, so that networks and splits share no
            state.
        prefix: the first part of the names of the logged metrics, such as ``"val/"``.
        of_teacher: the metrics of the outputs of network and teacher, such as those of
            :func:`lightning_dist.metrics.teacher_metrics`; they are copied too.
    """

    def __init__(
        self, metrics: Metrics, prefix: str, of_teacher: MetricCollection | None = None
    ) -> None:
        super().__init__()
        if not isinstance(metrics, MetricCollection):
            metrics = MetricCollection(
                dict(metrics) if isinstance(metrics, Mapping) else metrics or {}
            )
        self.collection = metrics.clone(prefix=prefix)
        self.mean_loss = MeanMetric()
        self.prefix = prefix
        self.of_teacher = None if of_teacher is None else of_teacher.clone(prefix=prefix)

    def log(self, module: LightningModule) -> None:
        """Log the metrics and the mean loss as ``PREFIXNAME`` and ``PREFIXloss``.

        If the data has no labels, only the metrics of network and teacher are logged.

        Args:
            module: the module in whose validation or test step this is called.
        """
        on_bar = self.prefix.startswith("val")
        if evaluates_labels(module.trainer):
            module.log(f"{self.prefix}loss", self.mean_loss)
            module.log_dict(self.collection, prog_bar=on_bar)
        if self.of_teacher is not None:
            module.log_dict(self.of_teacher, prog_bar=on_bar)


def evaluates_labels(trainer: Any) -> bool:
    """Return whether the validation and test images have labels, as the data module says.

    Args:
        trainer: the Trainer. Without a data module, there are labels.
    """
    return getattr(getattr(trainer, "datamodule", None), "evaluates_labels", True)


def refuse_without_labels(trainer: Trainer, has_teacher: bool, compares_teacher: bool) -> None:
    """Refuse data without labels if there is nothing to learn from, or nothing to measure.

    Args:
        trainer: the Trainer.
        has_teacher: whether the student is distilled.
        compares_teacher: whether validation and test compare the student with the teacher.

    Raises:
        MisconfigurationException: if a student without a teacher would be trained on images without
            labels, or if validation or test would have no metric.
    """
    data: Any = getattr(trainer, "datamodule", None)
    where = getattr(data, "location", type(data).__name__)
    if trainer.training and not has_teacher and not getattr(data, "trains_labels", True):
        raise MisconfigurationException(
            f"the images of {where} have no labels, so a student without a teacher has nothing to "
            "learn from: give a teacher (on the command line teacher=... and another distill than "
            "none), or labelled data"
        )
    if not (compares_teacher or evaluates_labels(trainer)):
        raise MisconfigurationException(
            f"the images of {where} have no labels, and there is no teacher to compare the student "
            "with: give the data module val_root, a folder VAL_ROOT/CLASS/FILE of labelled images "
            "(lightning-dist eval: +data.val_root=DIR)"
        )


def without_repeats(batch: Any, batch_idx: int, loaders: Any) -> Any:
    """Return a batch without the samples that a DistributedSampler has repeated.

    A DistributedSampler repeats some samples, so that every rank has the same number. The repeated
    samples are the last ones of the last ranks, and would count twice.

    Args:
        batch: a pair ``(inputs, target)`` of tensors, lists, or mappings of them.
        batch_idx: the index of the batch on this rank.
        loaders: the Trainer's loader, or a list that contains it.

    Returns:
        The batch without the repeated samples; it may be empty.
    """
    loader = loaders[0] if isinstance(loaders, (list, tuple)) else loaders
    sampler, size = getattr(loader, "sampler", None), getattr(loader, "batch_size", None)
    if not isinstance(sampler, DistributedSampler) or sampler.drop_last or size is None:
        return batch
    own = len(range(sampler.rank, len(cast(Sized, sampler.dataset)), sampler.num_replicas))
    inputs, target = batch
    given, count = count_samples(inputs, target), max(own - batch_idx * size, 0)
    if count >= given:
        return batch
    # Without any batched tensor outside of lists, a list has one item per sample.
    batched = given if _sizes(inputs) or _sizes(target) else None
    return _first(inputs, count, batched), _first(target, count, batched)


def count_samples(inputs: Any, target: Any) -> int:
    """Return the number of samples in a batch.

    Args:
        inputs: a batched tensor, a mapping or tuple that contains one, or a list.
        target: the same. If neither contains a batched tensor outside of lists, the number is the
            length of the first list in the inputs, which should have one item per sample.

    Example:
        >>> import torch
        >>> count_samples({"path": ["a.png"] * 8, "pixels": torch.zeros(8, 3, 4, 4)}, None)
        8
    """
    sizes = [*_sizes(inputs), *_sizes(target)]
    if sizes:
        return sizes[0]
    leaves = inputs.values() if isinstance(inputs, Mapping) else [inputs]
    return next((len(x) for x in leaves if isinstance(x, Sized)), 0)


def _sizes(samples: Any) -> list[int]:
    """Return the first dimension of each tensor in nested mappings and tuples."""
    if isinstance(samples, Tensor):
        return [len(samples)] if samples.dim() else []
    if isinstance(samples, Mapping):
        return [size for value in samples.values() for size in _sizes(value)]
    if isinstance(samples, tuple):
        return [size for value in samples for size in _sizes(value)]
    return []


def _first(samples: Any, count: int, given: int | None) -> Any:
    """Return the first ``count`` of ``given`` samples, in any nesting of mappings and tuples.

    A list has one item per sample, unless all its items are tensors of ``given`` samples: torch's
    ``default_collate`` returns such a list if each sample contains a tuple.
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
