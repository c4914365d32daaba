"""Refuse worker processes for whose batches the shared memory of the machine is too small."""

import shutil
from pathlib import Path
from typing import Any, cast

from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

_ADVICE = (
    "set data.num_workers=0, reduce the batch size, or start the container with more shared memory "
    "(docker run --shm-size=8g)"
)
_SHARED_MEMORY = Path("/dev/shm")


def refuse_small_shared_memory(loader: DataLoader, sample: Any, processes: int) -> None:
    """Raise an error if the batches that the workers keep ready do not fit in shared memory.

    This estimate finds before training what would end the training later. Containers of Docker have
    64 MB by default.

    Args:
        loader: a loader of a data module.
        sample: a sample of its data set, from which the size of a batch is estimated.
        processes: the number of processes on this machine that have such a loader.

    Raises:
        ValueError: if there is too little free space.
    """
    free = free_bytes()
    if free is None or not loader.num_workers:
        return
    tensors = [leaf for leaf in tree_leaves(sample) if isinstance(leaf, Tensor)]
    size = loader.batch_size or max(map(len, cast(Any, loader.batch_sampler)), default=0)
    batch = size * sum(x.numel() * x.element_size() for x in tensors)
    ready = loader.num_workers * (loader.prefetch_factor or 2) + 1
    if processes * ready * batch > free:
        raise ValueError(
            f"num_workers={loader.num_workers} keeps {processes * ready} batches of about "
            f"{batch / 1e6:,.1f} MB in shared memory, and {_SHARED_MEMORY} has "
            f"{free / 1e6:,.1f} MB left: {_ADVICE}"
        )


def free_bytes() -> int | None:
    """Return the free shared memory in bytes, or None where it is no folder."""
    return shutil.disk_usage(_SHARED_MEMORY).free if _SHARED_MEMORY.is_dir() else None


def with_advice(message: str) -> str:
    """Add what the user can do to an error of torch about the shared memory.

    Args:
        message: the message of any error. Those of torch contain the name of its file.
    """
    return f"{message}: {_ADVICE}" if "</torch_" in message else message
