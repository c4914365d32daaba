"""Tests that the benchmarks can be imported, and that one runs. No test reads their numbers."""

import functools
import importlib
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "name", ["detection", "import_time", "loss", "segmentation", "step", "sweep"]
)
def test_a_benchmark_can_be_imported(monkeypatch, name):
    monkeypatch.syspath_prepend(ROOT)
    assert callable(importlib.import_module(f"benchmarks.{name}").main)


def test_the_benchmark_of_the_loss_runs(monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.setattr(sys, "argv", ["loss", "--quick", "--seconds=0.1"])
    # Compiling C++ code takes a minute and is not what this test is about.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    importlib.import_module("benchmarks.loss").main()
    assert "ours: speed over torchdistill" in capsys.readouterr().out
