"""Image classification: accuracy, label smoothing, mixup."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from lightning_dist.checks import check_number
from lightning_dist.module import DistillModule
from lightning_dist.taps import logits_of
from lightning_dist.teacher import TeacherBase


class ClassificationModule(DistillModule):
    """Classify ``(images, labels)`` batches.

    ``val/loss`` and ``test/loss`` are the plain cross-entropy, whatever the training loss.
    ``METRIC`` is ``accuracy`` and, with more than ten classes, ``accuracy_top5``.

    Args:
        student: network with ``num_classes`` outputs.
        teacher: network with the same outputs, or ``None``.
        num_classes: number of classes.
        label_smoothing: of the cross-entropy, from 0 to 1; with ``mixup``, give it to mixup.
        mixup: called with a training batch on its device, such as ``timm.data.Mixup``.
        kwargs: as in :class:`lightning_dist.DistillModule`.

    Raises:
        ValueError: if an option is out of range; in a step, if a label is no class.

    Example:
        >>> module = ClassificationModule(nn.Linear(4, 3), num_classes=3)
        >>> sorted(module.val_metrics)
        ['val/accuracy']
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | TeacherBase | None = None,
        *,
        num_classes: int,
        label_smoothing: float = 0.0,
        mixup: Callable[[Any, Any], tuple[Any, Any]] | None = None,
        **kwargs: Any,
    ) -> None:
        check_number("num_classes", num_classes, int, least=1)
        check_number("label_smoothing", label_smoothing, least=0, most=1)
        accuracy: dict[str, Metric | MetricCollection] = {
            "accuracy": MulticlassAccuracy(num_classes, average="micro")
        }
        if num_classes > 10:
            accuracy["accuracy_top5"] = MulticlassAccuracy(num_classes, average="micro", top_k=5)
        kwargs.setdefault("metrics", MetricCollection(accuracy))
        kwargs.setdefault("task_loss", nn.CrossEntropyLoss(label_smoothing=label_smoothing))
        super().__init__(student, teacher, **kwargs)
        self.eval_loss = nn.CrossEntropyLoss()
        self.mixup = mixup
        self.num_classes = num_classes

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the task loss of a batch, mixed up if so configured."""
        self._check_labels(batch, batch_idx)
        inputs, target = self.mixup(*batch) if self.mixup else batch
        loss = self.task_loss(logits_of(self.student(inputs)), target)
        self.log("train/task", loss.detach())
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Update ``val/*``; Lightning's check before the first epoch finds wrong labels early."""
        self._check_labels(batch, batch_idx)
        super().validation_step(batch, batch_idx)

    def infer(self, network: nn.Module, inputs: Any) -> Tensor:
        """Return the logits ``(N, C)`` of a network, see :func:`lightning_dist.taps.logits_of`."""
        return logits_of(network(inputs))

    def _check_labels(self, batch: Any, batch_idx: int) -> None:
        """Refuse labels that are no classes; on a GPU only once an epoch, since it must wait."""
        _, labels = batch
        if labels.dtype != torch.int64 or not labels.numel():
            return
        if labels.device.type != "cpu" and batch_idx:
            return
        least, most = int(labels.min()), int(labels.max())
        if least < 0 or most >= self.num_classes:
            raise ValueError(
                f"a batch has the label {least if least < 0 else most} and num_classes is "
                f"{self.num_classes}: labels count from 0 to {self.num_classes - 1}; set "
                "num_classes of the module, or relabel"
            )
