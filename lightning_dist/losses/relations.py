"""Losses that compare relations between the samples of a batch, as pure functions of features.

Under DDP, each process compares the samples of its own batch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_dist.checks import check_number
from lightning_dist.losses.inputs import features_of, without_autocast


def sp_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the similarity-preserving loss, which compares the similarity of each pair of samples.

    The similarity of two samples is the product of their features. The rows of the N x N matrix of
    similarities are divided by their norm. With one sample, the loss is 0.

    Args:
        student: features of shape ``(N, ...)``, at least two dimensions.
        teacher: features of as many samples, of any shape; no gradient flows to them.

    Returns:
        The mean of the squared differences of the N x N similarities, a scalar in float32 (float64
        for float64 features).

    Raises:
        ValueError: if the inputs are not floating-point features of as many samples.

    Reference:
        Tung and Mori, Similarity-Preserving Knowledge Distillation, ICCV 2019.
    """
    x, y = features_of(student, teacher)
    with without_autocast(x):
        x, y = (F.normalize(z.flatten(1) @ z.flatten(1).T) for z in (x, y))
    return F.mse_loss(x, y)


def rkd_loss(
    student: Tensor, teacher: Tensor, *, distance: float = 25.0, angle: float = 50.0
) -> Tensor:
    """Return the loss of relational knowledge distillation, which compares distances and angles.

    The distances of all pairs of samples are divided by their mean. The angles are cosines: for
    each sample, between the directions to each pair of other samples. Both are compared by the
    smooth L1 loss. The angles need memory for N**3 numbers and N**2 differences of features: use
    embeddings, or a small batch. Samples with equal features have distance and cosine 0 and get no
    gradient; with one sample, the loss is 0.

    Args:
        student: features of shape ``(N, ...)``, at least two dimensions.
        teacher: features of as many samples, of any shape; no gradient flows to them.
        distance: the weight of the distances.
        angle: the weight of the angles; 0 leaves them out.

    Returns:
        The weighted sum of both losses, each a mean over all N**2 pairs or N**3 triples, a scalar
        in float32 (float64 for float64 features).

    Raises:
        ValueError: if the inputs are not floating-point features of as many samples.

    Reference:
        Park et al., Relational Knowledge Distillation, CVPR 2019.
    """
    for name, weight in (("distance", distance), ("angle", angle)):
        check_number(name, weight)
    relations = [_relations(z.flatten(1), bool(angle)) for z in features_of(student, teacher)]
    (of_student, cosines), (of_teacher, teachers_cosines) = relations
    loss = distance * F.smooth_l1_loss(of_student, of_teacher)
    if cosines is not None and teachers_cosines is not None:
        loss = loss + angle * F.smooth_l1_loss(cosines, teachers_cosines)
    return loss


def cka_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return 1 - the linear centred kernel alignment of the features of a batch.

    The alignment does not depend on rotations and scales of the features, so the two networks may
    have any widths. It is the cosine of the angle between the centred N x N similarities. If the
    features of a network are constant over the batch up to rounding, as with one sample, the loss
    is 1 and has no gradient.

    Args:
        student: features of shape ``(N, ...)``, at least two dimensions.
        teacher: features of as many samples, of any shape; no gradient flows to them.

    Returns:
        A scalar from 0 to 1 in float32 (float64 for float64 features).

    Raises:
        ValueError: if the inputs are not floating-point features of as many samples.

    Reference:
        Kornblith et al., Similarity of Neural Network Representations Revisited, ICML 2019.
    """
    aligned = []
    for z in features_of(student, teacher):
        z = z.flatten(1)
        centred = z - z.mean(0)
        constant = centred.norm() <= 8 * torch.finfo(z.dtype).eps * z.norm()
        centred = centred.masked_fill(constant, 0)
        with without_autocast(z):
            aligned.append(F.normalize((centred @ centred.T).flatten(), dim=0))
    return 1 - (aligned[0] * aligned[1]).sum()


def _relations(z: Tensor, with_angles: bool) -> tuple[Tensor, Tensor | None]:
    """Return the distances ``(N, N)``, divided by their mean, and the cosines ``(N, N, N)``."""
    differences = z.unsqueeze(0) - z.unsqueeze(1)
    square = differences.square().sum(2)
    same = square <= torch.finfo(z.dtype).eps ** 2 * z.square().sum(1).max()
    # The gradient of sqrt at 0 is infinite.
    distances = square.masked_fill(same, 1).sqrt().masked_fill(same, 0)
    mean = distances.sum() / (~same).sum().clamp(min=1)
    distances_by_mean = distances / mean.masked_fill(mean == 0, 1)
    if not with_angles:
        return distances_by_mean, None
    length = distances.masked_fill(same, 1).unsqueeze(2)
    directions = (differences / length).masked_fill(same.unsqueeze(2), 0)
    with without_autocast(z):
        return distances_by_mean, directions @ directions.transpose(1, 2)
