"""DetectionModule: torchvision's detectors, with DIST on their class logits and COCO's mAP."""

import copy
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_dist.checks import check_labels
from lightning_dist.losses import FeatureMimic, StandardisedLogits
from lightning_dist.losses.modules import ProbabilityLoss
from lightning_dist.module import DistillModule
from lightning_dist.taps import find_submodule
from lightning_dist.tasks.average_precision import NAMES, BoxAveragePrecision
from lightning_dist.tasks.detection_heads import (
    OneStageClassifier,
    Relabelled,
    TeacherDetector,
    TwoStageClassifier,
)
from lightning_dist.tasks.detection_labels import losses_over_labels, no_objects
from lightning_dist.teacher import InputBridge, TeacherBase, as_teacher
from lightning_dist.terms import Term, needs_target
from lightning_dist.training.cards import refuse_other_number
from lightning_dist.training.evaluation import EvaluationMetrics
from lightning_dist.training.labels import scale_by_share

_MAPS = "head.classification_head.cls_logits"
Batch = tuple[Sequence[Tensor], Sequence[dict[str, Tensor] | None]]


class DetectionModule(DistillModule):
    """A DistillModule that trains torchvision's detectors on ``(images, targets)`` batches.

    ``images`` is a list of tensors ``(3, H, W)`` in 0..1. ``targets`` is a list of mappings with
    ``boxes``, float ``(K, 4)`` as x1, y1, x2, y2 in pixels, and ``labels``, int64 ``(K,)``, counted
    from 0. The detector normalises and resizes the images. Its teacher gets exactly the images that
    the student's backbone gets.

    A target of ``None`` marks an image without a label; an image without boxes is background. The
    task loss is the mean over the images with a label (of all processes) and the metrics leave out
    the others, but these are distilled like all.

    A two-stage student learns from the teacher's class logits for the boxes that the student
    sampled; the teacher computes them from its own feature maps. A one-stage student learns from
    the teacher's class maps, and the losses of all levels are summed. ``METRIC`` is ``map``,
    ``map_50``, ``map_75``, ``map_small``, ``map_medium`` and ``map_large``, COCO's mean average
    precision. A size that does not occur is not logged. There is no validation loss, because
    detectors return no loss in eval mode.

    Args:
        student: a torchvision detector: Faster R-CNN or another one with ``roi_heads``, or
            RetinaNet, FCOS or another one with ``head.classification_head``.
        teacher: a detector of the same kind, or ``None``. A one-stage teacher must have the same
            levels as the student, and the same number of anchors at each place.
        class_map: for each class of the student, the index of the teacher's class. It includes the
            background if the networks have a background class. By default the classes are the same.
        label_offset: the number that is added to the labels for the student. By default 1 for a
            two-stage student, whose class 0 is the background, and 0 for a one-stage student.
        mimic: the names of pyramid levels whose maps the student also learns to reproduce, through
            a projection that is not a part of the student. They are keys of the backbones' outputs.
        mimic_weight: the weight of each of these terms.
        frozen: the dotted paths of the student's sub-modules that are not trained, such as the
            stem.
        norm_eval: keep the student's batch norms in eval mode, so that their statistics stay
            constant.
        kwargs: the other arguments of :class:`lightning_dist.DistillModule`. By default,
            ``distill_loss`` is DIST and ``distill_weight`` is 1. A ``DISTLoss`` or ``KDLoss`` with
            the activation ``None`` uses softmax for a two-stage and sigmoid for a one-stage
            student. A one-stage student refuses ``KDLoss`` with softmax, because it decides each
            class by itself.

    Raises:
        MisconfigurationException: if the student has no sub-module at a required path; the message
            lists similar paths.
        ValueError: if student and teacher are detectors of different kinds.

    Reference:
        Huang et al., Knowledge Distillation from A Stronger Teacher, NeurIPS 2022, section 4.2.
    """

    task = "detection"

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | TeacherBase | None = None,
        *,
        class_map: Sequence[int] | None = None,
        label_offset: int | None = None,
        mimic: Sequence[str] = (),
        mimic_weight: float = 1.0,
        frozen: Sequence[str] = (),
        norm_eval: bool = False,
        **kwargs: Any,
    ) -> None:
        two_stage = hasattr(student, "roi_heads")
        needed = "roi_heads.box_predictor" if two_stage else _MAPS
        find_submodule(student, needed, "the student", "a detector's head")
        detector = None
        if teacher is not None:
            teacher = as_teacher(teacher)
            if not isinstance(teacher.network, (OneStageClassifier, TwoStageClassifier)):
                detector = teacher.network
            teacher = _adapt(teacher, student, class_map)
        kwargs.setdefault("metrics", BoxAveragePrecision())
        kwargs.setdefault("distill_weight", 1.0)
        super().__init__(student, teacher, **kwargs)
        self.two_stage = two_stage
        # In __dict__, it is not a part of the module.
        self.__dict__["_detector_of_teacher"] = detector
        self.teacher_inputs = {"backbone": ""}
        if two_stage:
            self.teacher_inputs["roi_heads.box_roi_pool"] = "roi"
        self.label_offset = int(two_stage) if label_offset is None else label_offset
        classes = count_classes(student)
        self.num_classes = None if classes is None else classes - self.label_offset
        self.mimic = list(mimic)
        self.mimic_weight = mimic_weight
        self.norm_eval = norm_eval
        for path in frozen:
            find_submodule(student, path, "the student", "frozen").requires_grad_(False)

    def setup(self, stage: str) -> None:
        """Refuse a data module with another number of classes than the student.

        Raises:
            MisconfigurationException: if the numbers are known and differ.
        """
        own = getattr(getattr(self.trainer, "datamodule", None), "num_classes", None)
        advice = (
            f"not counting a background, build it for {own} classes, and map a teacher's classes "
            "by name: class_map=match_classes(data.class_names, weights.meta['categories'])"
        )
        refuse_other_number(self.num_classes, own, "the student", advice)

    def split_batch(self, batch: Any) -> tuple[Any, Any]:
        """Return the images and the targets of a batch, whose labels are checked.

        Args:
            batch: a pair, or a mapping with the keys of ``batch_keys``.

        Raises:
            TypeError: if the batch is neither; the message describes it.
            ValueError: if a label is not a class of the student.
        """
        images, targets = super().split_batch(batch)
        labels = [target["labels"].flatten() for target in targets if target is not None]
        if labels and self.num_classes is not None:
            check_labels(torch.cat(labels), self.num_classes, "a target")
        return images, targets

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the sum of the detector's losses, and log each loss as ``train/NAME``."""
        images, targets = self.split_batch(batch)
        shifted = [t and {**t, "labels": t["labels"] + self.label_offset} for t in targets]
        losses = losses_over_labels(self.student, images, shifted)
        loss = torch.stack(list(losses.values())).sum()
        count = torch.tensor(sum(t is not None for t in targets), device=loss.device)
        loss = scale_by_share(loss, count)
        self.log("train/task", loss.detach())
        self.log_dict({f"train/{name}": value.detach() for name, value in losses.items()})
        return loss

    def on_train_start(self) -> None:
        """Put the batch norms in eval mode, also in a run that resumes within an epoch."""
        super().on_train_start()
        self.on_train_epoch_start()

    def on_train_epoch_start(self) -> None:
        """Put the batch norms in eval mode, if ``norm_eval`` is set."""
        if self.norm_eval:
            for module in self.student.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()

    def infer(self, network: nn.Module, inputs: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """Return a dict of ``boxes``, ``labels`` (from 0 on) and ``scores`` for each image."""
        found = network(list(inputs))
        return [{**one, "labels": one["labels"] - self.label_offset} for one in found]

    def update_metrics(self, batch: Batch, network: nn.Module, metrics: EvaluationMetrics) -> int:
        """Update the metrics of one network, and return the number of images with a label.

        An image without a label counts as an image without objects, in which none was found. It
        changes no metric, and all ranks keep the same number of images.
        """
        images, targets = batch
        found = self.infer(network, images) if len(images) else []
        nothing = no_objects(self.device)
        found += [nothing] * (len(targets) - len(found))
        found = [nothing if t is None else one for one, t in zip(found, targets, strict=True)]
        metrics.collection.update(found, [nothing if t is None else t for t in targets])
        return sum(t is not None for t in targets[: len(images)])

    def _log_metrics_of_batch(self, metrics: EvaluationMetrics) -> None:
        """Log nothing: the metrics are computed and logged at the end of an epoch."""

    def teacher_network(self) -> nn.Module:
        """Return the teacher's detector, which gets the same images as in the distillation.

        Raises:
            MisconfigurationException: if the teacher computes class logits, but no boxes.
        """
        teacher: nn.Module | None = self.__dict__["_detector_of_teacher"]
        if teacher is None:
            raise MisconfigurationException(
                "the teacher has no boxes, because it is only the part of a detector that is "
                "distilled: it cannot be tested (test_teacher=false)"
            )
        assert self.teacher is not None
        return TeacherDetector(
            teacher,
            self.student.get_submodule("transform"),
            inputs=getattr(self.teacher, "inputs", None),
            class_map=self.teacher.network.class_map,  # type: ignore[arg-type]
        )

    def relabel(self, network: nn.Module, class_map: Sequence[int]) -> nn.Module:
        """Return a detector whose labels are converted to the classes of other data.

        Args:
            network: a detector with the student's classes.
            class_map: for each class of the data, without a background, the detector's class.
        """
        offset = self.label_offset
        return Relabelled(network, [*range(offset), *(offset + index for index in class_map)])

    def _without_repeats(self, batch: Batch, batch_idx: int, loaders: Any) -> Batch:
        """Return the batch without repeated images, but with an empty target for each of them.

        torchmetrics' MeanAveragePrecision gathers image by image: all ranks need as many targets.
        """
        images, targets = super()._without_repeats(batch, batch_idx, loaders)
        blank = len(batch[1]) - len(targets)
        return images, [*targets, *(no_objects(self.device) for _ in range(blank))]

    def on_validation_epoch_end(self) -> None:
        """Compute and log ``val/*``."""
        self._log_metrics("val/")

    def on_test_epoch_end(self) -> None:
        """Compute and log ``test/*``."""
        self._log_metrics("test/")

    def _log_metrics(self, split: str) -> None:
        for prefix, metrics in self.metrics.items():
            if prefix.startswith(split):
                collection = cast(EvaluationMetrics, metrics).collection
                values = collection.compute()
                collection.reset()
                for name in NAMES:
                    value = values[f"{prefix}{name}"]
                    # The metric is -1 if the set has no such boxes.
                    if name == "map" or value >= 0:
                        self.log(f"{prefix}{name}", value.clamp(min=0), prog_bar=name == "map")

    def labels_for(self, loss: Any) -> Callable[[Any, Tensor], dict[str, Any]] | None:
        """Return ``None``, because the rows of a detector's logits have no labels in the batch.

        Args:
            loss: the loss of a term.

        Raises:
            ValueError: if the loss needs labels.
        """
        if needs_target(loss):
            raise ValueError(
                f"{type(loss).__name__} needs a label for each row of the logits, which a "
                "detector's batch does not have: choose a loss without labels, such as KDLoss"
            )
        return None

    def configure_terms(self) -> dict[str, Term]:
        """Return the term ``class`` on the class logits, and one term per level of ``mimic``."""
        assert self.teacher is not None
        loss = self.logits_loss()
        terms = {}
        if loss is not None:
            self.labels_for(loss)
            if not self.two_stage:
                loss = _with_sigmoid(loss, type(self.student).__name__)
            parts = ("roi_heads.box_predictor", "roi") if self.two_stage else (_MAPS, "logits")
            terms["class"] = Term(loss, self.distill_weight, *parts, classes=True)
        for level in self.mimic:
            width, teachers_width = (
                int(network.get_submodule("backbone").out_channels)  # type: ignore[arg-type]
                for network in (self.student, self.teacher.network)
            )
            mimic = FeatureMimic(width, teachers_width)
            terms[f"mimic_{level}"] = Term(
                mimic, self.mimic_weight, "backbone", "backbone", output=level
            )
        return terms


def _with_sigmoid(loss: Callable[..., Tensor], student: str) -> Callable[..., Tensor]:
    """Return a loss for one-vs-all logits, whose activation is sigmoid if none was chosen.

    Raises:
        ValueError: if the loss would apply a softmax.
    """
    inner: Any = loss.loss if isinstance(loss, StandardisedLogits) else loss
    if not getattr(inner, "activation_is_chosen", True):
        loss = copy.deepcopy(loss)
        inner = loss.loss if isinstance(loss, StandardisedLogits) else loss
        inner.activation = "sigmoid"
    if isinstance(inner, ProbabilityLoss) and inner.activation == "softmax":
        name = type(inner).__name__
        raise ValueError(
            f"{name} would apply a softmax over the logits of all anchors and classes of a place, "
            f"but the {student} decides each class by itself: use {name}(activation='sigmoid')"
        )
    return loss


def count_classes(detector: nn.Module) -> int | None:
    """Return the number of a detector's classes, with the background if it has that class.

    Args:
        detector: a detector as in torchvision. For another kind of detector, such as one with a
            cascade of heads, the result is ``None`` if the number is unknown.
    """
    for path, name in (
        ("roi_heads.box_predictor.cls_score", "out_features"),
        ("head.classification_head", "num_classes"),
    ):
        try:
            return int(getattr(detector.get_submodule(path), name))
        except (AttributeError, TypeError):
            continue
    return None


def _adapt(
    teacher: nn.Module | TeacherBase, student: nn.Module, class_map: Sequence[int] | None
) -> TeacherBase:
    """Return a teacher whose network is the part of a detector that the student learns from."""
    teacher = as_teacher(teacher)
    detector = teacher.network
    if getattr(teacher, "class_map", None) is not None:
        raise ValueError(
            "the teacher's class_map is for networks that return logits, but a detector returns "
            "boxes: give it as DetectionModule's class_map"
        )
    two_stage = hasattr(student, "roi_heads")
    kind, part = (TwoStageClassifier, "roi_heads") if two_stage else (OneStageClassifier, "head")
    if isinstance(detector, (OneStageClassifier, TwoStageClassifier)):
        if not isinstance(detector, kind):
            raise ValueError(
                f"the student, a {type(student).__name__}, needs a {kind.__name__}, but the "
                f"teacher is a {type(detector).__name__}"
            )
        return teacher
    if not hasattr(detector, part):
        raise ValueError(
            f"the student is a {type(student).__name__} and the teacher a "
            f"{type(detector).__name__} without {part!r}: give a detector of the same kind"
        )
    inputs = None
    of_teacher, of_student = (
        getattr(network, "transform", None) for network in (detector, student)
    )
    if getattr(teacher, "inputs", None) is None and of_teacher and of_student:
        inputs = InputBridge(
            *(of_teacher.image_mean, of_teacher.image_std),
            *(of_student.image_mean, of_student.image_std),
        )
    return teacher.with_network(kind(detector, class_map), inputs)
