"""Runs the tests of the Triton kernels in Triton's interpreter, if there is no GPU.

The interpreter must be chosen before Triton is imported, so the tests need their own process.
"""

import sys
from pathlib import Path

import pytest
import torch

from processes import Processes


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, test_kernels.py runs on it")
@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
def test_the_kernels_compute_the_losses_in_tritons_interpreter(processes: Processes) -> None:
    tests = Path(__file__).with_name("test_kernels.py")
    arguments = ["-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", tests]
    done = processes.run(*arguments, env={"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout[-5000:]
    assert " passed" in done.stdout
