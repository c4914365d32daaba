"""Tests that the benchmarks can be imported, and that one runs. No test reads their numbers."""

import functools
import importlib
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "name", ["detection", "import_time", "loss", "scale", "segmentation", "step", "sweep"]
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


def test_the_benchmark_of_scale_prints_both_sizes_and_the_exponent(monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT)
    scale = importlib.import_module("benchmarks.scale")
    growth = importlib.import_module("benchmarks.growth")
    left = []

    def squared(size, folder):
        (folder / "data").write_bytes(b"data")
        left.append(folder)
        return growth.Cost(seconds=size**2, size=5.0)

    monkeypatch.setattr(scale, "ROWS", [growth.Row("squares", "things", (10, 100), squared)])
    monkeypatch.setattr(sys, "argv", ["scale"])
    scale.main()
    line = next(x for x in capsys.readouterr().out.splitlines() if "squares" in x)
    for cell in ("10 / 100 things", "100 / 1e+04", "5 / 5", "2.00", "0.00"):
        assert cell in line
    assert len(left) == 2
    assert not any(folder.exists() for folder in left)
