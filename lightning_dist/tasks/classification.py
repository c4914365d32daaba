"""Image classification: accuracy, label smoothing, mixup."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from lightning_dist.cached_teacher import CachedTeacher
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
        ValueError: if there is ``mixup`` and the teacher is cached.

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

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The task loss of a batch, mixed up if so configured."""
        return super().training_step(self.mixup(*batch) if self.mixup else batch, batch_idx)
