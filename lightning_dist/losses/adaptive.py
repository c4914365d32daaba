"""AdaptiveTeacherHead: a copy of the teacher's head that is trained together with the student."""

import copy
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_dist.checks import check_number
from lightning_dist.losses.modules import DISTLoss


class AdaptiveTeacherHead(nn.Module):
    """A loss of the student's logits and those of a copy of the teacher's head, which adapts.

    The copy is trained by the distillation loss, towards the student, and by its own task loss, so
    that it stays a good classifier that the student can follow. The teacher itself stays as it is,
    and only the copy is trained: it belongs to the term, not to the student. This is this project's
    reading of the teacher acclimation of DIST+, whose equations were not at hand.

    A term compares the student's logits with what the teacher gives to its head:
    ``Term(AdaptiveTeacherHead(teacher.fc), student="", teacher="pooling", from_batch=...)``.

    Args:
        head: the teacher's head, which maps features to logits of the student's classes.
        loss: the loss of the student's logits and the teacher's; it must give the first of them a
            gradient, and the second none, as all losses of this package do.
        task_weight: the weight of the cross-entropy of the copy.
        ignore_index: the label of samples without a label.

    Shape:
        A call gets the student's logits ``(N, C)``, the features that the head takes, and the
        labels, int64 ``(N,)``. Its value is ``loss`` alone; the other losses only give gradients.

    Raises:
        ValueError: if ``task_weight`` or ``ignore_index`` is no number.

    Reference:
        Huang et al., DIST+: Knowledge Distillation From a Stronger Adaptive Teacher, TPAMI 2025.
    """

    compares_classes = False  # the teacher's part returns features
    needs_target = True

    def __init__(
        self,
        head: nn.Module,
        loss: nn.Module | Callable[[Tensor, Tensor], Tensor] | None = None,
        task_weight: float = 1.0,
        ignore_index: int = -100,
    ) -> None:
        super().__init__()
        check_number("task_weight", task_weight)
        check_number("ignore_index", ignore_index, int)
        self.head = copy.deepcopy(head).requires_grad_(True).train()
        self.loss = DISTLoss() if loss is None else loss
        self.task_weight = task_weight
        self.ignore_index = ignore_index

    def forward(self, student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        """Return the loss of a batch.

        Args:
            student: the student's logits.
            teacher: the features that the teacher gives to its head.
            target: the labels.

        Returns:
            The value of ``loss``, a scalar.
        """
        logits = self.head(teacher.detach().clone())
        own = self.loss(logits, student.detach())
        labels = target.masked_fill(target == self.ignore_index, -100)
        if (labels != -100).any():  # the mean over no label would be NaN
            own = own + self.task_weight * F.cross_entropy(logits.float(), labels)
        return self.loss(student, logits.detach()) + (own - own.detach())
