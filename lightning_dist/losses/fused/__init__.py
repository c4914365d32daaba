"""The losses on a GPU, by Triton kernels that read the logits twice and write the gradient once."""

import functools
import importlib.util
import os

import torch
from torch import Tensor

_DTYPES = {torch.float16, torch.bfloat16, torch.float32}
# Volta is the first architecture that Triton supports.
_LEAST_CAPABILITY = (7, 0)


def runs_kernels(student: Tensor, teacher: Tensor) -> bool:
    """Return whether the kernels compute a loss of two tensors of logits.

    They need an NVIDIA GPU and Triton, which PyTorch's CUDA wheels for Linux contain. With the
    environment variable ``TRITON_INTERPRET=1``, Triton's interpreter runs them on a CPU, slowly.
    Logits in float64 are computed without kernels, like those on all other devices.

    Args:
        student: logits of the student.
        teacher: logits of the teacher, on the same device.
    """
    if not {student.dtype, teacher.dtype} <= _DTYPES or not student.numel():
        return False
    if student.device.type == "cuda":
        return _has_kernels(student.device)
    return student.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"


@torch.compiler.assume_constant_result  # torch.compile calls this function and does not trace it.
def _has_kernels(device: torch.device) -> bool:
    return _has_triton() and torch.cuda.get_device_capability(device) >= _LEAST_CAPABILITY


@functools.cache
def _has_triton() -> bool:
    return torch.version.hip is None and importlib.util.find_spec("triton") is not None
