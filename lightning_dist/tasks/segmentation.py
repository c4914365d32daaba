"""SegmentationModule: cross-entropy and DIST on a main and an auxiliary head, and mIoU."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from lightning_dist.checks import check_flag, check_labels
from lightning_dist.module import DistillModule
from lightning_dist.taps import find_submodule, logits_of, tensors_in
from lightning_dist.teacher import TeacherBase
from lightning_dist.terms import Term, Weight, needs_target
from lightning_dist.training.labels import scale_by_share

SLIDE_OVERLAP = 1 / 3


class SegmentationModule(DistillModule):
    """A DistillModule that labels every pixel of ``(images, masks)`` batches.

    Images are ``(N, 3, H, W)``, and masks are int64 ``(N, H, W)``. A network returns logits
    ``(N, C, h, w)`` or, as torchvision's do, a mapping with ``out`` and optionally ``aux``. For the
    task loss, the logits are resized to the mask. Distillation compares the outputs of the
    sub-modules ``head`` and ``aux_head`` at the network's own resolution, before any resizing. The
    auxiliary heads are compared by a second term if student and teacher both have one.

    The task loss is the mean over the pixels of the batch that are not ignored (of all processes),
    and the metrics leave out the ignored pixels. A mask that is ignored everywhere marks an image
    without a label, which is only distilled.

    ``METRIC`` is ``miou``, the mean intersection over union of the classes that occur in the whole
    set, and ``pixel_accuracy``; ``val/loss`` is the cross-entropy of the main output.

    Args:
        student: a network with ``num_classes`` channels.
        teacher: a network with the same channels and output resolution, or ``None``.
        num_classes: the number of classes.
        ignore_index: the label of pixels that the task loss and the metrics ignore.
        distill_ignored: distil the pixels with the label ``ignore_index``, too. With ``False``,
            ``distill_loss`` must take a ``mask``, as the losses of logits do. Losses that need
            labels leave these pixels out in any case.
        aux_weight: the weight of the auxiliary head, in the task loss and in the distillation.
        head: the dotted path, in student and teacher, of the sub-module that returns the main
            logits; ``""`` is the network itself. It is ``classifier`` in torchvision and
            ``lightning_dist.models.segmentation``, and ``segmentation_head`` in
            segmentation_models_pytorch.
        aux_head: the dotted path of the sub-module that returns the auxiliary logits.
        teacher_head: the dotted path of the teacher's main head, if it differs from ``head``.
        align_corners: the option ``align_corners`` of :func:`torch.nn.functional.interpolate`, with
            which logits are resized.
        window: the height and width in pixels of the window that slides over the image in
            evaluation, with an overlap of a third; ``None`` evaluates whole images.
        kwargs: the other arguments of :class:`lightning_dist.DistillModule`.

    Reference:
        Huang et al., Knowledge Distillation from A Stronger Teacher, NeurIPS 2022, section 4.3.
    """

    task = "segmentation"
    num_classes: int

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | TeacherBase | None = None,
        *,
        num_classes: int,
        ignore_index: int = 255,
        distill_ignored: bool = True,
        aux_weight: float = 0.4,
        head: str = "classifier",
        aux_head: str = "aux_classifier",
        teacher_head: str | None = None,
        align_corners: bool = True,
        window: tuple[int, int] | None = None,
        **kwargs: Any,
    ) -> None:
        check_flag("distill_ignored", distill_ignored)
        if teacher is not None:
            find_submodule(student, head, "the student", "head")
        options: dict[str, Any] = {"ignore_index": ignore_index, "validate_args": False}
        kwargs.setdefault(
            "metrics",
            MetricCollection(
                {
                    "miou": MulticlassJaccardIndex(num_classes, **options),
                    "pixel_accuracy": MulticlassAccuracy(num_classes, average="micro", **options),
                }
            ),
        )
        kwargs.setdefault("task_loss", PixelLoss(aux_weight, ignore_index, align_corners))
        super().__init__(student, teacher, **kwargs)
        self.eval_loss = PixelLoss(0.0, ignore_index, align_corners)
        self.num_classes, self.ignore_index = num_classes, ignore_index
        self.aux_weight = aux_weight
        self.distill_ignored = distill_ignored
        self.head, self.aux_head = head, aux_head
        self.teacher_head = head if teacher_head is None else teacher_head
        self.align_corners = align_corners
        self.window = window

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the task loss of a batch, after a check of the masks."""
        inputs, masks = self.split_batch(batch)
        self._check_masks(masks, batch_idx)
        output = self.student(inputs)
        loss, count = self.task_loss(output, masks), (masks != self.ignore_index).sum()
        if not isinstance(self.task_loss, PixelLoss):  # It may be NaN if there is no label.
            loss = loss if count else 0 * sum(x.sum() for x in tensors_in(output))
        loss = scale_by_share(loss, count)
        self.log("train/task", loss.detach())
        return loss

    def on_fit_start(self) -> None:
        """Refuse images without a label if ``distill_ignored`` leaves out their pixels.

        Raises:
            MisconfigurationException: if the data module has such images.
        """
        super().on_fit_start()
        data = getattr(self.trainer, "datamodule", None)
        for name in ("labels", "unlabeled"):
            value = getattr(data, name, None)
            if self.teacher is not None and not self.distill_ignored and value is not None:
                raise MisconfigurationException(
                    f"{name}={value} gives images whose pixels are all ignored, and "
                    "distill_ignored=False does not distil such pixels, so these images would "
                    f"teach nothing: set distill_ignored=True, or leave out {name}"
                )

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Update ``val/*``; Lightning's sanity check before training finds wrong masks early."""
        self._check_masks(self.split_batch(batch)[1], batch_idx)
        super().validation_step(batch, batch_idx)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Update ``test/*``, after a check of the masks."""
        self._check_masks(self.split_batch(batch)[1], batch_idx)
        super().test_step(batch, batch_idx)

    def _check_masks(self, masks: Tensor, batch_idx: int) -> None:
        """Refuse labels that are not classes; on a GPU once per epoch, because a check is slow."""
        if masks.dim() != 3 or masks.dtype not in (torch.int64, torch.uint8):
            raise ValueError(
                f"the masks are {masks.dtype} of shape {tuple(masks.shape)}: give int64 (N, H, W)"
            )
        if masks.device.type == "cpu" or not batch_idx:
            check_labels(masks, self.num_classes, "a mask", ignored=self.ignore_index)

    def infer(self, network: nn.Module, inputs: Tensor) -> Tensor:
        """Return logits ``(N, C, H, W)`` of whole images, or joined from sliding windows."""
        if self.window is None:
            logits, _ = main_and_aux(network(inputs))
            return resize(logits, inputs.shape[2:], self.align_corners)
        height, width = inputs.shape[2:]
        tall, wide = min(self.window[0], height), min(self.window[1], width)
        total: Tensor | None = None
        counts = inputs.new_zeros(1, 1, height, width)
        for top in _starts(height, tall):
            for left in _starts(width, wide):
                place = (..., slice(top, top + tall), slice(left, left + wide))
                logits, _ = main_and_aux(network(inputs[place]))
                logits = resize(logits, (tall, wide), self.align_corners)
                if total is None:
                    total = logits.new_zeros(len(inputs), logits.shape[1], height, width)
                total[place] += logits
                counts[place] += 1
        assert total is not None
        return total / counts

    def _labelled_pixels(self, batch: Any, logits: Tensor) -> dict[str, Tensor]:
        """Return the mask of the labelled pixels at the resolution of the logits."""
        _, target = self.split_batch(batch)
        labelled = (target != self.ignore_index).unsqueeze(1)
        # The nearest pixel decides. F.interpolate takes no bool.
        resized = F.interpolate(labelled.byte(), logits.shape[2:], mode="nearest")
        return {"mask": resized.squeeze(1).bool()}

    def labels_for(self, loss: Any) -> Callable[[Any, Tensor], dict[str, Any]] | None:
        """Return the function that gives a term the labels, if its loss needs them.

        They have the resolution of the logits. The ignored pixels are masked.

        Args:
            loss: the loss of the term.
        """
        if not needs_target(loss):
            return None

        def labels(batch: Any, logits: Tensor) -> dict[str, Any]:
            target = self.split_batch(batch)[1].unsqueeze(1)
            # float64 holds every label exactly, and F.interpolate takes no int64.
            resized = F.interpolate(target.double(), logits.shape[2:], mode="nearest")
            return {"target": resized.squeeze(1).long(), **self._labelled_pixels(batch, logits)}

        return labels

    def count_labels(self, target: Any, samples: int) -> int:
        """Return the number of pixels that the cross-entropy does not ignore."""
        return int((target != self.ignore_index).sum())

    def configure_terms(self) -> dict[str, Term]:
        """Return the term ``main``, and ``aux`` if both networks have an auxiliary head."""
        assert self.teacher is not None
        loss = self.logits_loss()
        if loss is None:
            return {}
        mask = None if self.distill_ignored else self._labelled_pixels
        further: dict[str, Any] = {"classes": True, "from_batch": self.labels_for(loss) or mask}
        terms = {"main": Term(loss, self.distill_weight, self.head, self.teacher_head, **further)}
        if self.aux_weight and all(
            _has(network, self.aux_head) for network in (self.student, self.teacher.network)
        ):
            weight = _times(self.distill_weight, self.aux_weight)
            terms["aux"] = Term(loss, weight, self.aux_head, self.aux_head, **further)
        return terms


class PixelLoss(nn.Module):
    """A cross-entropy of the main and the auxiliary output, at the resolution of the mask.

    Args:
        aux_weight: the weight of the auxiliary output; 0 leaves it out.
        ignore_index: the label of pixels to ignore. If all pixels have this label, the loss is 0.
        align_corners: the option ``align_corners`` of the interpolation that resizes the logits.

    Shape:
        The output is logits ``(N, C, h, w)`` or a mapping with ``out`` and optionally ``aux``. The
        target is int64 ``(N, H, W)``. The loss is a scalar, the mean over the pixels that are not
        ignored.
    """

    def __init__(self, aux_weight: float, ignore_index: int, align_corners: bool) -> None:
        super().__init__()
        self.aux_weight = aux_weight
        self.ignore_index = ignore_index
        self.align_corners = align_corners

    def forward(self, output: Any, target: Tensor) -> Tensor:
        main, aux = main_and_aux(output)
        loss = self._cross_entropy(main, target)
        if aux is not None and self.aux_weight:
            loss = loss + self.aux_weight * self._cross_entropy(aux, target)
        return loss

    def _cross_entropy(self, logits: Tensor, target: Tensor) -> Tensor:
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logits = resize(logits, target.shape[1:], self.align_corners)
        total = F.cross_entropy(logits, target, ignore_index=self.ignore_index, reduction="sum")
        return total / (target != self.ignore_index).sum().clamp(min=1)


def main_and_aux(output: Any) -> tuple[Tensor, Tensor | None]:
    """Return the main logits and, if there are any, the auxiliary logits in a network's output.

    Args:
        output: logits ``(N, C, h, w)``, or a container in which
            :func:`lightning_dist.taps.logits_of` finds the logits, such as a mapping with ``out``.

    Raises:
        ValueError: if the output contains no logits ``(N, C, h, w)``.
    """
    main = logits_of(output)
    if main.dim() != 4:
        raise ValueError(
            f"the network returned logits {tuple(main.shape)}: segmentation needs (N, C, h, w)"
        )
    return main, output.get("aux") if isinstance(output, Mapping) else None


def resize(logits: Tensor, size: Any, align_corners: bool) -> Tensor:
    """Resize logits to a size by bilinear interpolation, if their size differs."""
    if logits.shape[2:] == tuple(size):
        return logits
    return F.interpolate(logits, tuple(size), mode="bilinear", align_corners=align_corners)


def _starts(length: int, window: int) -> list[int]:
    """Return the first pixel of each window; the last window ends at the end of the image."""
    step = max(int(window * (1 - SLIDE_OVERLAP)), 1)
    return [*range(0, length - window, step), length - window]


def _has(network: nn.Module, path: str) -> bool:
    try:
        return isinstance(network.get_submodule(path), nn.Module)
    except AttributeError:
        return False


def _times(weight: Weight, factor: float) -> Weight:
    if callable(weight):
        return functools.partial(_scaled, weight, factor)
    return weight * factor


def _scaled(weight: Any, factor: float, trainer: Trainer) -> float:
    return factor * weight(trainer)
