"""`channel_errors`: an error for images whose number of channels a network does not accept."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import nn

from lightning_dist.cli.errors import UserError
from lightning_dist.files.text import error_line


@contextmanager
def channel_errors(module: LightningModule, channels: int | None) -> Iterator[None]:
    """Convert an error that a network raises because its images have another number of channels.

    The numbers are compared only after an error, because a network of an unknown kind may use its
    first convolution for something else than images.

    Args:
        module: the module with the student, and perhaps a teacher.
        channels: the number of channels of the images, or ``None`` if it is unknown.

    Raises:
        UserError: if the block raises an error of torch, and the first convolution of the student
            or of the teacher takes another number of channels.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        networks: dict[str, Any] = {"student": getattr(module, "student", None)}
        teacher = getattr(module, "teacher", None)
        # A teacher with a conversion of its inputs gets other images.
        if getattr(teacher, "inputs", None) is None:
            networks["teacher"] = getattr(teacher, "network", None)
        for name, network in networks.items():
            takes = _channels(network)
            if channels is not None and takes not in (None, channels):
                raise UserError(
                    f"the images have {channels} channels and the {name}, a "
                    f"{type(network).__name__}, takes {takes}: choose a data set and a {name} with "
                    f"the same number; experiment= may have chosen either ({error_line(error)})"
                ) from error
        raise


def _channels(network: Any) -> int | None:
    """Return the number of channels that the first convolution of a network takes, if any."""
    if not isinstance(network, nn.Module):
        return None
    first = next((x for x in network.modules() if isinstance(x, nn.Conv2d)), None)
    return None if first is None else first.in_channels
