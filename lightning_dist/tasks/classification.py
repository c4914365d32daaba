"""ClassificationModule: image classification with accuracy, label smoothing and mixup."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from lightning_dist.checks import UNLABELED, check_labels, check_number
from lightning_dist.losses import AdaptiveTeacherHead
from lightning_dist.module import DistillModule
from lightning_dist.taps import logits_of
from lightning_dist.teacher import TeacherBase
from lightning_dist.terms import Term, needs_target
from lightning_dist.training.labels import (
    mean_over_labels,
    mean_over_mixed_labels,
    mix,
    scale_by_share,
)
from lightning_dist.training.options import ONLY


class ClassificationModule(DistillModule):
    """A DistillModule that classifies ``(images, labels)`` batches.

    A label of -100 marks an image without a label: the task loss is the mean over the other images
    of the batch (of all processes) and the metrics leave it out, but it is distilled like all.

    ``val/loss`` and ``test/loss`` are the plain cross-entropy, for every training loss.
    ``METRIC`` is ``accuracy`` and, with more than ten classes, ``accuracy_top5``.

    Args:
        student: a network with ``num_classes`` outputs.
        teacher: a network with the same outputs, or ``None``.
        num_classes: the number of classes.
        label_smoothing: the label smoothing of the cross-entropy, from 0 to 1; with ``mixup``, set
            the label smoothing of mixup instead.
        adaptive_head: the paths of two parts of the teacher: its head, and the part whose output
            the head takes, such as ``("fc", "global_pool")``. The student is then compared with a
            copy of the head that is trained too, see
            :class:`lightning_dist.losses.AdaptiveTeacherHead`.
        mixup: a function that mixes a training batch on its device, such as ``timm.data.Mixup``.
        kwargs: the other arguments of :class:`lightning_dist.DistillModule`.

    Raises:
        ValueError: if an option is out of range, or, in a step, if a label is not a class.

    Example:
        >>> module = ClassificationModule(nn.Linear(4, 3), num_classes=3)
        >>> sorted(module.val_metrics)
        ['val/accuracy']
    """

    task = "classification"
    num_classes: int

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | TeacherBase | None = None,
        *,
        num_classes: int,
        label_smoothing: float = 0.0,
        adaptive_head: Sequence[str] | None = None,
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
        if adaptive_head is not None and (
            isinstance(adaptive_head, str) or len(adaptive_head) != 2
        ):
            raise ValueError(
                f"adaptive_head is {adaptive_head!r}: give the paths of the teacher's head and of "
                "the part whose output the head takes, such as [fc, global_pool]"
            )
        self.adaptive_head = adaptive_head

    def configure_terms(self) -> Mapping[str, Term]:
        """Return the term of the logits, with a trained copy of the head if one is to adapt.

        Raises:
            ValueError: if ``adaptive_head`` does not fit the loss or the teacher.
        """
        loss = self.logits_loss()
        if self.adaptive_head is None or self.teacher is None:
            return super().configure_terms()
        if loss is None or needs_target(loss):
            name = "none" if loss is None else type(loss).__name__
            raise ValueError(
                f"adaptive_head needs a loss of logits without labels, and this one is {name}: "
                "choose DISTLoss (distill=dist_plus), or leave adaptive_head out"
            )
        path, part = self.adaptive_head
        if self.teacher.class_map_of(path) is not None:
            raise ValueError(
                f"adaptive_head={path}: the head has the teacher's classes, and class_map selects "
                "the student's: leave adaptive_head out, or give a teacher with the same classes"
            )
        loss = AdaptiveTeacherHead(_part(self.teacher.network, path), loss)
        _part(self.teacher.network, part)
        labels = self.labels_for(loss)
        return {ONLY: Term(loss, self.distill_weight, teacher=part, from_batch=labels)}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the task loss of a batch, which ``mixup`` has mixed if it is set."""
        inputs, target = self.split_batch(batch)
        self._check_labels(target, batch_idx)
        loss = self._mixed_loss(inputs, target) if self.mixup else self._loss(inputs, target)
        self.log("train/task", loss.detach())
        return loss

    def _loss(self, inputs: Any, target: Tensor) -> Tensor:
        logits = self._logits(self.student, inputs)
        if target.is_floating_point():  # The labels are probabilities.
            return self.task_loss(logits, target)
        return mean_over_labels(self.task_loss, logits, target)

    def _mixed_loss(self, inputs: Any, target: Tensor) -> Tensor:
        assert self.mixup is not None
        if not (target == UNLABELED).any():
            count = torch.tensor(len(target), device=target.device)
            inputs, target = self.mixup(inputs, target)
            loss = self.task_loss(self._logits(self.student, inputs), target)
            return scale_by_share(loss, count)
        inputs, target, shares = mix(self.mixup, inputs, target, self.num_classes)
        logits = self._logits(self.student, inputs)
        return mean_over_mixed_labels(self.task_loss, logits, target, shares)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Update ``val/*``; Lightning's sanity check before training finds wrong labels early."""
        self._check_labels(self.split_batch(batch)[1], batch_idx)
        super().validation_step(batch, batch_idx)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Update ``test/*``, after a check of the labels."""
        self._check_labels(self.split_batch(batch)[1], batch_idx)
        super().test_step(batch, batch_idx)

    def infer(self, network: nn.Module, inputs: Any) -> Tensor:
        """Return the logits ``(N, C)`` of a network; see :func:`lightning_dist.taps.logits_of`."""
        return self._logits(network, inputs)

    def _logits(self, network: nn.Module, inputs: Any) -> Tensor:
        """Return the logits ``(N, C)`` of a network, and refuse another number of classes."""
        logits = logits_of(network(inputs))
        if logits.dim() != 2 or logits.shape[1] != self.num_classes:
            raise ValueError(
                f"{type(network).__name__} returns logits of shape {tuple(logits.shape)} and "
                f"num_classes is {self.num_classes}: give a network that returns "
                f"(N, {self.num_classes})"
            )
        return logits

    def count_labels(self, target: Any, samples: int) -> int:
        """Return the number of samples that have a label."""
        return samples if target.is_floating_point() else int((target != UNLABELED).sum())

    def labeled(self, output: Any, target: Any) -> tuple[Any, Any]:
        """Return the logits and labels of the samples that have a label."""
        if target.is_floating_point():
            return output, target
        rows = target != UNLABELED
        return (output, target) if rows.all() else (output[rows], target[rows])

    def labels_for(self, loss: Any) -> Callable[[Any, Tensor], dict[str, Any]] | None:
        """Return the function that gives a term the labels, if its loss needs them.

        Args:
            loss: the loss of the term.

        Raises:
            ValueError: if ``mixup`` mixes the images, so that they have no single label.
        """
        if self.mixup and needs_target(loss):
            raise ValueError(
                f"{type(loss).__name__} needs one label for each image, but mixup mixes images: "
                "set mixup=None, or choose a loss without labels, such as KDLoss"
            )
        return super().labels_for(loss)

    def _check_labels(self, labels: Tensor, batch_idx: int) -> None:
        """Refuse labels that are not classes; on a GPU once per epoch, because a check is slow."""
        if labels.is_floating_point():  # The labels are probabilities.
            return
        if labels.dim() != 1 or labels.dtype not in (torch.int64, torch.uint8):
            raise ValueError(
                f"the labels are {labels.dtype} of shape {tuple(labels.shape)}: give int64 (N,), "
                "or probabilities (N, C)"
            )
        if labels.device.type == "cpu" or not batch_idx:
            check_labels(labels, self.num_classes, "a batch", ignored=UNLABELED)


def _part(teacher: nn.Module, path: str) -> nn.Module:
    """Return a part of the teacher, or name the parts that there are."""
    try:
        return teacher.get_submodule(path)
    except AttributeError as error:
        names = ", ".join(name for name, _ in teacher.named_children())
        raise ValueError(
            f"adaptive_head: {type(teacher).__name__} has no part {path!r}, but {names}"
        ) from error
