"""Checks and conversions of the tensors that a loss compares."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_dist.checks import class_axis
from lightning_dist.losses.streaming import compute_dtype


def without_inference(x: Tensor) -> Tensor:
    """Return a tensor that autograd can save: a copy if `x` was created in inference mode.

    Args:
        x: a tensor of any shape and dtype.

    Returns:
        The tensor, or a copy that the student's backward pass may use.
    """
    # If gradients are off, no copy is needed. Inside torch.inference_mode() gradients are off, and
    # a copy would also be an inference tensor.
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not x.is_inference():
        return x
    return x.clone()


def mask_for(logits: Tensor, mask: Tensor | None, axis: int) -> Tensor | None:
    """Return a mask with a dimension of size 1 for the classes; refuse one of the wrong shape."""
    if mask is None:
        return None
    rows = (*logits.shape[:axis], *logits.shape[axis + 1 :])
    if mask.dtype != torch.bool or mask.shape != rows:
        raise ValueError(
            f"mask is {mask.dtype} of shape {tuple(mask.shape)}: give torch.bool {rows}"
        )
    return mask.unsqueeze(axis)


def refuse_one_class(classes: int, advice: str) -> None:
    if classes == 1:
        raise ValueError(
            "the logits have one class, and a softmax over one class is always 1: for a binary "
            f"output use {advice}"
        )


def check_logits(student: Tensor, teacher: Tensor, class_dim: int | None) -> int:
    """Return the dimension of the classes of two tensors of logits.

    Raises:
        ValueError: if the two tensors cannot be compared; the message says why.
    """
    for name, value in (("student", student), ("teacher", teacher)):
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} is a {type(value).__name__}: give a tensor of logits")
        if not value.is_floating_point():
            raise ValueError(
                f"{name} has dtype {value.dtype}: give floating-point logits, not labels"
            )
        if value.dim() < 2 or value.shape[class_axis(value.shape, class_dim)] == 0:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}: give logits (N, C) or (N, C, *spatial)"
            )
    axis = class_axis(student.shape, class_dim)
    shapes = f"student {tuple(student.shape)}, teacher {tuple(teacher.shape)}"
    if student.dim() == teacher.dim() and student.shape[axis] != teacher.shape[axis]:
        raise ValueError(
            f"student has {student.shape[axis]} classes and teacher {teacher.shape[axis]} "
            f"({shapes}): "
            "give both a head of the same classes, or set class_map of the teacher"
        )
    if student.shape != teacher.shape:
        raise ValueError(f"logits differ in shape ({shapes}): give logits of the same shape")
    if student.device != teacher.device:
        raise ValueError(f"student is on {student.device} and teacher on {teacher.device}")
    return axis


def features_of(
    student: Tensor, teacher: Tensor, dimensions: tuple[int, ...] = ()
) -> tuple[Tensor, Tensor]:
    """Return both features in the dtype of the computation; no gradient flows to the teacher's.

    Args:
        student: features of shape ``(N, ...)``, any floating dtype.
        teacher: features of as many samples.
        dimensions: the numbers of dimensions that are allowed; by default any.

    Raises:
        ValueError: if the two cannot be compared; the message says why.
    """
    for name, value in (("student", student), ("teacher", teacher)):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            got = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{name} is {got}: give a floating-point tensor of features")
        if value.dim() < 2 or (dimensions and value.dim() not in dimensions):
            form = "(N, C, H, W) or (N, C, D, H, W)" if dimensions else "(N, ...)"
            raise ValueError(
                f"{name} has the shape {tuple(value.shape)}: give features {form}, for example by "
                "the term's output, a function that returns such a tensor"
            )
    shapes = f"student {tuple(student.shape)}, teacher {tuple(teacher.shape)}"
    if len(student) != len(teacher) or (dimensions and student.dim() != teacher.dim()):
        raise ValueError(
            f"the features differ in samples or dimensions ({shapes}): compare matching parts"
        )
    if not len(student):
        raise ValueError(f"the features have no samples ({shapes})")
    if student.device != teacher.device:
        raise ValueError(f"student is on {student.device} and teacher on {teacher.device}")
    dtype = compute_dtype(student, teacher)
    return student.to(dtype), without_inference(teacher.detach()).to(dtype)


def without_autocast(x: Tensor) -> torch.autocast:
    """Return a context in which a product of matrices keeps the dtype of its factors.

    Args:
        x: a tensor on the device of the computation.
    """
    return torch.autocast(x.device.type, enabled=False)


def as_rows_and_classes(tensors: Sequence[Tensor | None], axis: int) -> list[Tensor | None]:
    """Return logits and mask as ``(R, C)`` or ``(N, C, S)``, if possible as views of the tensors.

    Args:
        tensors: the logits, and last the mask, which has one class and can be None.
        axis: the dimension of the classes.
    """
    if tensors[0] is not None and tensors[0].dim() == 2 and axis == 1:
        return list(tensors)
    *logits, mask = [None if x is None else x.movedim(axis, -1) for x in tensors]
    # With this memory format (language models, channels_last), the rows already are a matrix.
    if all(x is not None and _is_matrix(x) for x in logits):
        return [None if x is None else x.flatten(0, -2) for x in (*logits, mask)]
    moved = [None if x is None else x.movedim(-1, 1) for x in (*logits, mask)]
    return [x.flatten(2) if x is not None and x.dim() > 2 else x for x in moved]


def _is_matrix(x: Tensor) -> bool:
    """Return whether all dimensions but the last can be flattened without a copy."""
    rows = range(x.dim() - 2)
    return x.stride(-1) == 1 and all(x.stride(i) == x.stride(i + 1) * x.shape[i + 1] for i in rows)
