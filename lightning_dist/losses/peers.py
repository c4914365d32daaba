"""An adapter that makes a loss of torchdistill a function of two tensors, as a term needs."""

from typing import Any

from torch import Tensor, nn

# For each loss of torchdistill that cannot be a term, the inputs that it needs besides the two
# tensors.
_NEEDS = {
    "AuxSSKDLoss": "a self-supervision head on the teacher, and images in four rotations",
    "CRDLoss": "the index of each sample, for its memory of the training set",
    "DISTPlusLoss": "logits and features; use DISTLoss and DISTFeatureLoss as two terms",
    "FSPLoss": "two feature maps of each network",
    "HierarchicalContextLoss": "the list of maps of ReviewKD's fusion modules in the student",
    "PADL2Loss": "a head in the student that predicts variances",
    "SRDLoss": "features and logits of each network",
    "SSKDLoss": "self-supervision heads on both networks, and images in four rotations",
    "VIDLoss": "a regressor in the student that predicts means and variances",
}


class FromTorchdistill(nn.Module):
    """A loss of torchdistill as a function of the student's and the teacher's tensor.

    torchdistill's losses read their tensors from dictionaries by the path of a module. This module
    gives the same tensor for every path, so that the paths in the loss do not matter. A loss that
    reads several paths of one network needs several tensors, and is refused at its first call.

    Args:
        loss: the loss.
        needs_target: the loss also needs the labels, which a term gives by ``from_batch``.
    """

    def __init__(self, loss: nn.Module, needs_target: bool) -> None:
        super().__init__()
        self.loss = loss
        self.needs_target = needs_target

    def forward(self, student: Tensor, teacher: Tensor, target: Tensor | None = None) -> Tensor:
        """Return the loss of the tensors of a batch.

        Args:
            student: the student's tensor.
            teacher: the teacher's tensor; no gradient flows to it.
            target: the labels, if the loss needs them.

        Returns:
            The loss, a scalar.

        Raises:
            ValueError: if the loss reads several tensors of one network, or returns no scalar.
        """
        name = type(self.loss).__name__
        if self.needs_target and target is None:
            raise ValueError(
                f"{name} needs the labels: give them by the term's from_batch, as target"
            )
        of_student, of_teacher = _AnyPath(student, name), _AnyPath(teacher.detach(), name)
        # Give a copy: some losses write to the teacher's tensor, which other terms may compare too.
        of_teacher.tensor = of_teacher.tensor.clone()
        value = self.loss(of_student, of_teacher, target)
        if not of_student.read:
            raise ValueError(f"{name} reads nothing of the student, so it cannot train it")
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise ValueError(f"{name} returns no scalar: choose its reduction 'mean'")
        return value.reshape(())


class _AnyPath(dict):
    """A dictionary that returns its tensor for the first path that is read, and refuses others."""

    def __init__(self, tensor: Tensor, loss: str) -> None:
        super().__init__()
        self.tensor = tensor
        self.loss = loss
        self.read: set[tuple[str, str]] = set()

    def __getitem__(self, path: str) -> Any:
        return _AnyInput(self, path)


class _AnyInput(dict):
    def __init__(self, owner: _AnyPath, path: str) -> None:
        super().__init__()
        self.owner = owner
        self.path = path

    def __getitem__(self, io: str) -> Tensor:
        read = self.owner.read
        read.add((self.path, io))
        if len(read) > 1:
            raise ValueError(
                f"{self.owner.loss} reads several tensors of one network "
                f"({', '.join(f'{path}.{io}' for path, io in sorted(read))}), and a term has one: "
                "use a term for each pair of tensors, or torchdistill itself"
            )
        return self.owner.tensor


def from_torchdistill(loss: nn.Module, *, needs_target: bool | None = None) -> FromTorchdistill:
    """Return a mid-level loss of torchdistill as a loss for a term.

    Args:
        loss: an instance of a class of ``torchdistill.losses.mid_level`` (``pip install
            torchdistill``), which compares one tensor of the student with one of the teacher. The
            module paths that its constructor needs may be any text, one for each network.
        needs_target: the loss also needs the labels. A term gives them by ``from_batch``, as
            ``target``; :class:`lightning_dist.tasks.classification.ClassificationModule` does so by
            itself. By default True for the losses that contain a cross-entropy of weight ``alpha``.

    Returns:
        A module that is called with the student's and the teacher's tensor.

    Raises:
        TypeError: if the loss is no module.
        ValueError: if the loss needs more than the two tensors; the message says what.

    Example:
        >>> import torch
        >>> from torchdistill.losses.mid_level import SPKDLoss
        >>> loss = from_torchdistill(SPKDLoss("any", "any", reduction="batchmean"))
        >>> loss(torch.eye(3), torch.eye(3)).item()
        0.0
    """
    if not isinstance(loss, nn.Module):
        raise TypeError(f"the loss is {loss!r}: give an instance of a loss of torchdistill")
    name = type(loss).__name__
    if type(loss).__module__.startswith("torchdistill.") and name in _NEEDS:
        raise ValueError(f"{name} compares more than two tensors: it needs {_NEEDS[name]}")
    if needs_target is None:
        needs_target = hasattr(loss, "cross_entropy_loss") and bool(getattr(loss, "alpha", None))
    return FromTorchdistill(loss, needs_target)
