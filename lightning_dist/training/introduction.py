"""`measure_teacher`: measure a teacher on some validation samples, before training."""

import time
from collections.abc import Iterable, Sized
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import move_data_to_device, rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils.data import DataLoader, IterableDataset, Subset

from lightning_dist.files.card import Card
from lightning_dist.teacher import is_sharded
from lightning_dist.training.evaluation import EvaluationMetrics, evaluates_labels

SAMPLES = 256
SECONDS = 5.0
_BATCH = 16
_NOT_MEASURED = "how good the teacher is on the validation set: not measured"


def log_measured_teacher(trainer: Any, module: Any) -> None:
    """Log how good a module's teacher is, and warn if it is far below the value in its card.

    Only the first process measures. Nothing is measured in a ``fast_dev_run`` or a barebones run,
    if the data has no labels, or if the teacher is sharded, because one process cannot call such a
    network alone.

    Args:
        trainer: the Trainer, whose validation loaders exist.
        module: the :class:`lightning_dist.DistillModule`, with its teacher on its device.
    """
    teacher = module.teacher
    quick = trainer.fast_dev_run or trainer.barebones or not evaluates_labels(trainer)
    if teacher is None or quick or not trainer.is_global_zero or is_sharded(teacher.network):
        return
    line, is_bad = measure_teacher(trainer, module, teacher.card)
    (rank_zero_warn if is_bad else rank_zero_info)(line)


def measure_teacher(trainer: Trainer, module: Any, card: Card | None) -> tuple[str, bool]:
    """Measure a teacher on some validation samples, evenly spaced over the whole set.

    The samples are not loaded by the Trainer's loaders, and no random generator changes its state.

    Args:
        trainer: the Trainer, whose validation loaders exist.
        module: the :class:`lightning_dist.DistillModule` with the teacher on its device.
        card: the card of the teacher.

    Returns:
        A line of text, and whether the teacher is far below the value in its card.
    """
    loader = trainer.val_dataloaders
    loader = loader[0] if isinstance(loader, (list, tuple)) and loader else loader
    dataset: Any = getattr(loader, "dataset", None)
    if dataset is None or isinstance(dataset, IterableDataset) or not isinstance(dataset, Sized):
        return f"{_NOT_MEASURED} (no validation data, or data without an order)", False
    try:
        with isolate_rng(), torch.no_grad():
            values, count = _measure(trainer, module, loader, len(dataset))
    except Exception as error:  # An error in this measurement must not end a run.
        return f"{_NOT_MEASURED} ({type(error).__name__}: {error})", False
    name = card.metric if card is not None else None
    plain = name and name.replace("/ema_", "/", 1)
    if card is None or card.value is None or plain not in values:
        shown = [f"{name} {value:.4g}" for name, value in values.items()]
        return f"teacher on {count} validation samples: {', '.join(shown[:2])}", False
    assert plain is not None
    line = (
        f"teacher on {count} validation samples: {plain} {values[plain]:.4g}; in its own run "
        f"{card.value:.4g}"
    )
    return line, "loss" not in plain and _is_far_below(values[plain], card.value, count)


def _is_far_below(value: float, own: float, count: int) -> bool:
    """Return whether a value is lower than random differences and other samples can explain."""
    chance = 2 * (max(own * (1 - own), 0.0) / count) ** 0.5
    return value < own - max(0.05, 0.2 * own, chance)


def _measure(trainer: Trainer, module: Any, loader: Any, size: int) -> tuple[dict[str, float], int]:
    """Return the teacher's metrics, and the number of samples measured in the time limit."""
    network = module.teacher_network()
    before = next((p.device for p in network.parameters()), module.device)
    network.to(module.device)
    metrics = EvaluationMetrics(module.val_metrics, "val/").to(module.device)
    for metric in (*metrics.collection.values(), metrics.mean_loss):
        metric.distributed_available_fn = lambda: False  # Only the first process measures.
    begin, count = time.monotonic(), 0
    for batch in _batches(loader, size):
        batch = move_data_to_device(batch, module.device)
        with trainer.precision_plugin.forward_context():
            batch = module.split_batch(batch)
            count += module.update_metrics(batch, network, metrics)
        if time.monotonic() - begin > SECONDS:
            break
    network.to(before)
    if not count:
        raise ValueError("no sample has a label")
    values = dict(metrics.collection.compute())
    if metrics.mean_loss.update_called:  # A detector has no loss in eval mode.
        values["val/loss"] = metrics.mean_loss.compute()
    found = {name: float(x) for name, x in values.items() if x.numel() == 1}
    return {name: value for name, value in found.items() if value >= 0}, count


def _batches(loader: DataLoader, size: int) -> Iterable[Any]:
    """Return batches of evenly spaced samples; batches of different images have one image each."""
    chosen = np.linspace(0, size - 1, min(SAMPLES, size)).round().astype(int).tolist()
    return DataLoader(
        Subset(loader.dataset, chosen),
        batch_size=min(_BATCH, loader.batch_size or 1),
        collate_fn=loader.collate_fn,
        generator=torch.Generator().manual_seed(0),
    )
