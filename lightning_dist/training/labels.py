"""Losses of batches in which some samples have no label, in one process and in several."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_dist.checks import UNLABELED

_LINEAR = ("CrossEntropyLoss", "SoftTargetCrossEntropy")  # These losses are from torch and timm.


def ignores_unlabeled(loss: Any, target: Any) -> bool:
    """Return whether a loss is torch's cross-entropy, which ignores the label ``UNLABELED``.

    Args:
        loss: the loss.
        target: the target of a batch; a cross-entropy of probabilities ignores nothing.
    """
    is_cross_entropy = isinstance(loss, nn.CrossEntropyLoss) and loss.ignore_index == UNLABELED
    return is_cross_entropy and isinstance(target, Tensor) and not target.is_floating_point()


def mean_over_labels(
    loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor, target: Tensor
) -> Tensor:
    """Return a loss that is the mean over the samples with a label, over all processes.

    DDP takes the mean of the processes' gradients. If their numbers of labels differ, each loss is
    scaled, so that this is the gradient of the mean over all labels.

    Args:
        loss: a loss of logits and classes that is a mean over samples.
        logits: shape (N, C).
        target: the classes, int64 of shape (N,); ``UNLABELED`` marks samples without a label.

    Returns:
        The mean, a scalar; 0, with a gradient of 0, if no sample has a label.

    Example:
        >>> logits = torch.zeros(3, 4, requires_grad=True)
        >>> target = torch.tensor([UNLABELED, 2, UNLABELED])
        >>> mean_over_labels(nn.CrossEntropyLoss(), logits, target).item() == torch.log(
        ...     torch.tensor(4.0)).item()
        True
        >>> mean_over_labels(nn.CrossEntropyLoss(), logits[:1], target[:1]).item()
        0.0
    """
    labeled = target != UNLABELED
    count = labeled.sum()
    # Unlike the other branches, this one does not wait for a GPU.
    if ignores_unlabeled(loss, target):
        value = loss(logits, target)  # NaN without labels, but with a gradient of 0
        value = torch.where(count > 0, value, torch.zeros_like(value))
    elif labeled.all():
        value = loss(logits, target)
    else:
        value = loss(logits[labeled], target[labeled]) if labeled.any() else logits.sum() * 0
    return scale_by_share(value, count)


def mean_over_mixed_labels(
    loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor, target: Tensor, shares: Tensor
) -> Tensor:
    """Return a loss of mixed samples that counts each sample by its labelled share.

    Args:
        loss: a cross-entropy of logits and probabilities that is a mean over samples.
        logits: shape (N, C).
        target: probabilities of shape (N, C), whose rows sum up to ``shares``.
        shares: the labelled share of each sample in 0..1, shape (N,).

    Raises:
        ValueError: if the loss is no cross-entropy, which is linear in the target.
    """
    if type(loss).__name__ not in _LINEAR:
        raise ValueError(
            f"task_loss is {type(loss).__name__}, and mixup has mixed images without a label into "
            f"the batch: use one of {', '.join(_LINEAR)}, or leave out mixup"
        )
    total = shares.sum()
    value = loss(logits, target) * (len(target) / total.clamp(min=torch.finfo(total.dtype).tiny))
    return scale_by_share(torch.where(total > 0, value, logits.sum() * 0), total)


def mix(mixup: Any, inputs: Tensor, target: Tensor, num_classes: int) -> tuple[Tensor, Tensor, Any]:
    """Mix a batch in which some samples have no label.

    Args:
        mixup: ``timm.data.Mixup``, torchvision's ``MixUp`` or ``CutMix``, or a function like them
            with an attribute ``num_classes``.
        inputs: the images.
        target: the classes, int64 of shape (N,), of which ``UNLABELED`` is no class.
        num_classes: the number of classes.

    Returns:
        The mixed images; the mixed probabilities (N, C), whose rows sum up to the labelled share of
        the sample; and these shares (N,).

    Raises:
        ValueError: if ``mixup`` has no such attribute.
    """
    if not hasattr(mixup, "num_classes"):
        raise ValueError(
            f"mixup is a {type(mixup).__name__}, which cannot mix images without a label: use "
            "timm.data.Mixup, or MixUp or CutMix of torchvision.transforms.v2"
        )
    # One more class, for what has no label. Smoothing is applied to the other classes only.
    smoothing = getattr(mixup, "label_smoothing", 0.0)
    before = {"num_classes": mixup.num_classes}
    if smoothing:
        before["label_smoothing"] = smoothing
    try:
        for name, value in {**before, "num_classes": num_classes + 1}.items():
            setattr(mixup, name, 0.0 if name == "label_smoothing" else value)
        inputs, mixed = mixup(inputs, torch.where(target == UNLABELED, num_classes, target))
    finally:
        for name, value in before.items():
            setattr(mixup, name, value)
    hard, shares = mixed[:, :-1], 1 - mixed[:, -1]
    return inputs, hard * (1 - smoothing) + shares[:, None] * smoothing / num_classes, shares


def scale_by_share(loss: Tensor, count: Tensor) -> Tensor:
    """Multiply a loss by the count of this process, divided by the mean count of all processes.

    Every process must call it, because the counts are exchanged.

    Args:
        loss: a scalar, the mean over the labels of this process.
        count: the number of these labels, a scalar.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return loss
    total = count.double()
    dist.all_reduce(total)
    return loss * (count * dist.get_world_size() / total.clamp(min=1)).to(loss.dtype)
