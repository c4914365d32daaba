"""Image classification: accuracy, label smoothing, mixup."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from lightning_dist.cached_teacher import CachedTeacher
from lightning_dist.checks import check_number
from lightning_dist.data.views import KeyedBatch
from lightning_dist.module import DistillModule
from lightning_dist.teacher import Teacher


class ClassificationModule(DistillModule):
    """Classify ``(images, labels)`` batches.

    ``val/loss`` and ``test/loss`` are the plain cross-entropy, whatever the training loss.

    Args:
        student: network with ``num_classes`` outputs.
        teacher: network with the same outputs, or ``None``.
        num_classes: number of classes.
        label_smoothing: of the cross-entropy, from 0 to 1; with ``mixup``, give it to mixup.
        mixup: called with a training batch on its device, such as ``timm.data.Mixup``.
        kwargs: as in :class:`lightning_dist.DistillModule`.

    Raises:
        ValueError: if an option is out of range, or there is ``mixup`` and the teacher is cached.

    Example:
        >>> module = ClassificationModule(nn.Linear(4, 3), num_classes=3)
        >>> sorted(module.val_metrics)
        ['val/accuracy']
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | Teacher | None = None,
        *,
        num_classes: int,
        label_smoothing: float = 0.0,
        mixup: Callable[[Any, Any], tuple[Any, Any]] | None = None,
        **kwargs: Any,
    ) -> None:
        check_number("num_classes", num_classes, int, least=1)
        check_number("label_smoothing", label_smoothing, least=0, most=1)
        if mixup is not None and isinstance(teacher, CachedTeacher):
            raise ValueError(
                "mixup mixes the images of a batch, about which a CachedTeacher was never asked: "
                "set module.mixup=null, or give the teacher itself (distill.cache=off)"
            )
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

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Refuse labels that are no classes; on a GPU they would end the process.

        Raises:
            ValueError: naming the label and the classes.
        """
        is_pair = isinstance(batch, (tuple, list, KeyedBatch)) and len(batch) == 2
        labels = batch[1] if is_pair else None
        if (
            isinstance(labels, Tensor)
            and labels.dtype == torch.int64
            and labels.device.type == "cpu"
            and labels.numel()
            and not 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes
        ):
            wrong = int(labels.min()) if labels.min() < 0 else int(labels.max())
            raise ValueError(
                f"a batch has the label {wrong} and num_classes is {self.num_classes}: labels count"
                f" from 0 to {self.num_classes - 1}; set num_classes of the module, or relabel"
            )
        return batch

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The task loss of a batch, mixed up if so configured."""
        return super().training_step(self.mixup(*batch) if self.mixup else batch, batch_idx)
