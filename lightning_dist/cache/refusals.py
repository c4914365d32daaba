"""Refusals of a cached teacher: modules, data and images that it has no answers for."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_dist.data.views import KeyedBatch

if TYPE_CHECKING:  # imported where it is needed: it brings scikit-learn and torchvision along
    from lightning_dist.data.base import ImageDataModule


def refuse_other_inputs(pl_module: LightningModule, inputs: Mapping[str, str]) -> None:
    """Refuse a module that has the teacher called with other than the data module's images.

    Args:
        pl_module: the module that is trained.
        inputs: the callback's.

    Raises:
        MisconfigurationException: with detection's inputs, Mixup or a sharded teacher.
    """
    if dict(inputs) != {"": ""}:
        raise MisconfigurationException(
            f"the teacher is to be called with what the student computes within ({dict(inputs)}), "
            "as in detection, and a CachedTeacher knows whole images only: give the teacher itself "
            "(distill.cache=off)"
        )
    if getattr(pl_module, "mixup", None) is not None:
        raise MisconfigurationException(
            "mixup mixes the images of a batch, to which a CachedTeacher has no answers: set "
            "module.mixup=null, or give the teacher itself (distill.cache=off)"
        )
    if getattr(pl_module, "shard_teacher", False):
        raise MisconfigurationException(
            "shard_teacher has no use for a CachedTeacher, which is on the device only while a "
            "view is computed: leave out shard_teacher, or the cache (distill.cache=off)"
        )


def image_data_module(trainer: Trainer) -> "ImageDataModule":
    """Return the Trainer's data module, or refuse one that does not know its samples.

    Raises:
        MisconfigurationException: if it is no ImageDataModule, or there is none.
    """
    from lightning_dist.data.base import ImageDataModule

    data = getattr(trainer, "datamodule", None)
    if not isinstance(data, ImageDataModule):
        raise MisconfigurationException(
            f"a CachedTeacher needs to know which samples a batch holds, and the Trainer has "
            f"{f'a {type(data).__name__}' if data is not None else 'no data module'}: give "
            "fit(datamodule=...) a subclass of lightning_dist.data.base.ImageDataModule, which "
            "needs train_dataset, val_dataset and test_dataset, or give the teacher itself "
            "(distill.cache=off)"
        )
    return data


def refuse_other_images(
    batch: KeyedBatch,
    version: int,
    student: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """Refuse a call of the student with other than the batch's images.

    With the first two arguments bound it is a forward pre-hook of the student.

    Args:
        batch: the batch, of which the teacher got the images.
        version: of the images' tensor before the step, by which a write to it is noticed.
        student: the student.
        args: what it is called with.
        kwargs: the same.

    Raises:
        MisconfigurationException: if that is not the batch's tensor, as it was.
    """
    if not torch.is_grad_enabled():  # such a call does not count
        return
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    if len(tensors) != 1 or tensors[0] is not batch.inputs or tensors[0]._version != version:
        raise MisconfigurationException(
            f"the student, a {type(student).__name__}, is called with other than the batch's "
            "images, to which a CachedTeacher has the answers: hand them over as they are, without "
            "Mixup, CutMix or normalisation in training_step, or give the teacher itself "
            "(distill.cache=off)"
        )
