"""Tests that the benchmarks can be imported, and that one runs. No test reads their numbers."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "name", ["detection", "import_time", "loss", "segmentation", "step", "sweep"]
)
def test_a_benchmark_can_be_imported(monkeypatch, name):
    monkeypatch.syspath_prepend(ROOT)
    assert callable(importlib.import_module(f"benchmarks.{name}").main)


@pytest.mark.slow
def test_the_benchmark_of_the_loss_runs():
    command = [sys.executable, "-m", "benchmarks.loss", "--quick"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "ours: speed over torchdistill" in ran.stdout
