"""Fixtures for all tests: golden values, independent formulations, a small Trainer."""

import importlib.util
import json
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from hydra._internal.hydra import Hydra
from hypothesis import settings
from lightning_utilities.core import rank_zero
from torch import Tensor

from lightning_dist import cli
from processes import Processes

# These tests need packages that only `make test-foreign` installs.
collect_ignore = [] if importlib.util.find_spec("chemprop") else ["foreign"]

GOLDEN = Path(__file__).parent / "golden"

# Every run tries the same cases. "pytest --hypothesis-profile=default" draws new ones.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the slow tests first, so that no worker waits at the end for a long test of another one.

    The tests of test_distributed.py are the very first, so that one worker runs all of them. If a
    second worker took some of them, it would start the same processes again.
    """
    items.sort(key=lambda item: (item.path.stem != "test_distributed", "slow" not in item.keywords))


@pytest.fixture(scope="session")
def golden() -> Path:
    """Return the folder of the numbers that the authors' code computed."""
    return GOLDEN


@pytest.fixture(scope="session")
def golden_losses(golden: Path) -> dict[str, np.ndarray]:
    with np.load(golden / "dist_loss_float64.npz") as file:
        return dict(file)


@pytest.fixture(scope="session")
def reference_dist_loss() -> Callable[..., Tensor]:
    """Return a function with the paper's formulas, differentiable and in plain PyTorch."""

    def correlation(u: Tensor, v: Tensor, eps: float) -> Tensor:
        u, v = u - u.mean(1, keepdim=True), v - v.mean(1, keepdim=True)
        return (u * v).sum(1) / (u.norm(dim=1) * v.norm(dim=1) + eps)

    def loss(
        student: Tensor,
        teacher: Tensor,
        tau: float = 1.0,
        beta: float = 1.0,
        gamma: float = 1.0,
        activation: str = "softmax",
        eps: float = 1e-8,
    ) -> Tensor:
        rows = [x.movedim(1, -1).flatten(0, -2) / tau for x in (student, teacher)]
        if activation == "softmax":
            rows = [x.softmax(1) for x in rows]
        elif activation == "sigmoid":
            rows = [x.sigmoid() for x in rows]
        inter = 1 - correlation(*rows, eps).mean()
        intra = 1 - correlation(rows[0].T, rows[1].T, eps).mean()
        return tau**2 * (beta * inter + gamma * intra)

    return loss


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., L.Trainer]:
    """Return a function that creates a quiet CPU Trainer that writes files only to tmp_path."""

    def make(**kwargs: object) -> L.Trainer:
        defaults: dict[str, object] = {
            "accelerator": "cpu",
            "max_epochs": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": tmp_path,
        }
        return L.Trainer(**(defaults | kwargs))

    return make


@pytest.fixture
def processes() -> Iterator[Processes]:
    """Return an object that starts processes, which are ended after the test, even if it fails."""
    with Processes() as started:
        yield started


@pytest.fixture(autouse=True, scope="session")
def _compose_once() -> Iterator[None]:
    """Make a command compose its config once instead of twice, which takes a third of a short run.

    Hydra 1.3 composes it first to read `hydra.mode`, which no test sets, and ignores errors then.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Hydra, "get_mode", lambda *_, **__: None)
        yield


@pytest.fixture(autouse=True)
def _lines_of_lightning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give each test the logger of lightning.pytorch, and the lines of the first process.

    For all later tests of the process, a test that imports pytorch_lightning replaces the logger,
    and a benchmark or a Trainer of another rank silences it.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.INFO)
    log = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    monkeypatch.setattr(rank_zero, "log", log)
    monkeypatch.setattr(rank_zero.rank_zero_only, "rank", 0)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def put_run() -> Callable[..., Path]:
    """Return a function that writes a run as the train command does, with overrides and fields."""

    def put(folder: Path, *overrides: str, **fields: object) -> Path:
        content = {
            "status": "completed",
            "overrides": list(overrides),
            "command": f"lightning-dist train {' '.join(overrides)}",
            "metric": "test/accuracy",
            "metrics": {"test/accuracy": 0.9},
            "checkpoint": "checkpoints/last.ckpt",
            "seconds": 12.5,
            "error": None,
        }
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(json.dumps(content | fields), encoding="utf-8")
        return folder

    return put


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that runs the command in tmp_path, as the console script does."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["lightning-dist", *arguments])
        cli.main()

    return run


@pytest.fixture
def refused(command: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return a function that runs a failing command and returns the one line that it prints."""

    def run(*arguments: str) -> str:
        with pytest.raises(SystemExit) as caught:
            command(*arguments)
        assert caught.value.code in (1, 2)
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1
        assert lines[0].startswith("lightning-dist: error: ")
        return lines[0]

    return run
