"""Functions that shard a student and a teacher over the processes of a device mesh (FSDP2)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from lightning_dist.teacher.base import TeacherBase


def shard_once(network: nn.Module, mesh: DeviceMesh) -> None:
    """Divide a network among the processes of a mesh as one unit, unless it is divided already.

    Args:
        network: the network.
        mesh: the one-dimensional mesh of the processes that train on different batches.
    """
    if not isinstance(network, FSDPModule):
        fully_shard(network, mesh=mesh)


def shard_teacher(teacher: TeacherBase, mesh: DeviceMesh) -> None:
    """Divide a teacher's network among the processes of a mesh, except during its calls.

    This frees memory between the calls. The members of an ensemble are sharded one by one. A second
    call changes nothing.

    Args:
        teacher: the teacher.
        mesh: the one-dimensional mesh of the processes that train on different batches.
    """
    ensemble = isinstance(teacher.network, nn.ModuleList)
    for network in teacher.network.children() if ensemble else [teacher.network]:
        shard_once(network, mesh)


def shard_with_trainer(
    trainer: Trainer | None, meshes: Any, student: nn.Module, teacher: TeacherBase | None
) -> None:
    """Shard the networks of a module, each as one unit, if its Trainer uses FSDP2.

    Args:
        trainer: the Trainer, if there is one.
        meshes: the module's ``device_mesh``, whose dimension ``data_parallel`` is used.
        student: the student.
        teacher: the teacher, or ``None`` if it must stay whole.

    Raises:
        MisconfigurationException: if there is a teacher to shard, but the strategy is not
            ModelParallelStrategy.
    """
    strategy = getattr(trainer, "strategy", None)
    if isinstance(strategy, ModelParallelStrategy):
        mesh = meshes["data_parallel"]
        shard_once(student, mesh)
        if teacher is not None:
            shard_teacher(teacher, mesh)
    elif teacher is not None and strategy is not None:
        raise MisconfigurationException(
            "shard_teacher needs ModelParallelStrategy (trainer=fsdp2), but the strategy "
            f"is {type(strategy).__name__}: leave shard_teacher out"
        )


def is_sharded(network: nn.Module) -> bool:
    """Return whether a network, or a member of an ensemble, is sharded."""
    return bool(_shards(network))


@contextmanager
def gathered(network: nn.Module) -> Iterator[None]:
    """Make a sharded network whole while the context lasts; do nothing to any other network.

    FSDP2's own hooks do this for a call of the whole network. They do not run if a distillation
    term needs only a call of one part.

    Args:
        network: the network, or the ``ModuleList`` of an ensemble.
    """
    shards = _shards(network)
    for shard in shards:
        shard.unshard()
    try:
        yield
    finally:
        for shard in shards:
            shard.reshard()


def _shards(network: nn.Module) -> list[FSDPModule]:
    return [m for m in (network, *network.children()) if isinstance(m, FSDPModule)]
