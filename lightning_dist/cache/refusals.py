"""Functions that refuse modules, data and images that a cached teacher does not support."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_dist.data.views import KeyedBatch
from lightning_dist.taps import counts
from lightning_dist.teacher.base import Inputs, Tap

if TYPE_CHECKING:  # Imported where it is used, because it imports scikit-learn and torchvision.
    from lightning_dist.data.base import ImageDataModule


def refuse_other_inputs(pl_module: LightningModule, inputs: Inputs) -> None:
    """Refuse a module that needs the teacher's output for other inputs than the loaded images.

    Args:
        pl_module: the module that is trained.
        inputs: the callback's dict from parts of the student to the parts of the teacher that get
            the same inputs, or its function of the batch.

    Raises:
        MisconfigurationException: if parts of the teacher get inputs from the student, as in
            detection, or from a function; if the module uses Mixup; or if it shards the teacher.
    """
    if inputs != {"": ""}:
        raise MisconfigurationException(
            "the teacher gets other inputs than the student's images "
            f"(inputs is {inputs}), as in detection, but a CachedTeacher has outputs for whole "
            "images only: use the teacher without a cache (distill.cache=off)"
        )
    if getattr(pl_module, "mixup", None) is not None:
        raise MisconfigurationException(
            "mixup mixes the images of a batch, but a CachedTeacher has no outputs for mixed "
            "images: set module.mixup=null, or use the teacher without a cache (distill.cache=off)"
        )
    if getattr(pl_module, "shard_teacher", False):
        raise MisconfigurationException(
            "a CachedTeacher cannot be sharded, and it is on the device only while a view is "
            "computed: leave out shard_teacher, or the cache (distill.cache=off)"
        )


def refuse_functions(taps: Sequence[Tap]) -> None:
    """Refuse terms that take a function of the teacher's output.

    Args:
        taps: for each term, the path of the teacher's part and the entry of its output.

    Raises:
        MisconfigurationException: if an entry is a function.
    """
    if any(callable(entry) for _, entry in taps):
        raise MisconfigurationException(
            "a term's output is a function, but a CachedTeacher stores entries of the teacher's "
            "output: name an entry or a path, or use the teacher without a cache "
            "(distill.cache=off)"
        )


def image_data_module(trainer: Trainer) -> "ImageDataModule":
    """Return the Trainer's data module, or refuse one without indices of its samples.

    Args:
        trainer: the Trainer, during ``fit``.

    Returns:
        The data module.

    Raises:
        MisconfigurationException: if the Trainer has no data module, or one that is not an
            ImageDataModule.
    """
    from lightning_dist.data.base import ImageDataModule

    data = getattr(trainer, "datamodule", None)
    if not isinstance(data, ImageDataModule):
        raise MisconfigurationException(
            f"a CachedTeacher needs the indices of the samples in a batch, but the Trainer has "
            f"{f'a {type(data).__name__}' if data is not None else 'no data module'}: call "
            "fit(datamodule=...) with a subclass of lightning_dist.data.base.ImageDataModule that "
            "defines train_dataset, val_dataset and test_dataset, or use the teacher without a "
            "cache (distill.cache=off)"
        )
    return data


def refuse_other_images(
    batch: KeyedBatch,
    version: int,
    student: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """Refuse a call of the student with other images than those of the batch.

    The first three arguments are bound (functools.partial); the result is called before each call
    of the student.

    Args:
        batch: the training batch, whose images the teacher got.
        version: the version number of the images' tensor before the step. A write to the tensor
            increases the number.
        student: the student.
        args: the positional arguments of the call.
        kwargs: the keyword arguments of the call.

    Raises:
        MisconfigurationException: if the student is called with another tensor, or the tensor was
            changed.
    """
    if not counts():
        return
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    if len(tensors) != 1 or tensors[0] is not batch.inputs or tensors[0]._version != version:
        raise MisconfigurationException(
            f"the student, a {type(student).__name__}, is called with other or changed images, but "
            "a CachedTeacher has outputs only for the images of the batch: call the student with "
            "them, without Mixup, CutMix or normalisation in training_step, or use the teacher "
            "without a cache (distill.cache=off)"
        )
