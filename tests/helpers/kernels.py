"""The device on which Triton's kernels run in this process, if any."""

import os

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def kernel_device() -> str | None:
    """Return "cuda", or "cpu" if this process has Triton's interpreter, or else None."""
    if torch.cuda.is_available():
        return "cuda"
    return "cpu" if INTERPRETED else None
