"""The callback and the synchronised loss in two CPU processes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parent / "distributed" / "train.py"
pytestmark = pytest.mark.slow


def train(folder: Path, *options: str) -> list[dict]:
    """Run the script; what each rank saved."""
    folder.mkdir()
    run = subprocess.run(
        [sys.executable, SCRIPT, "--out", folder, *options],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    if "--strategy=ddp_find_unused_parameters_true" not in options:  # torch names what it was told
        assert "unused parameters" not in run.stderr
    return [torch.load(file, weights_only=True) for file in sorted(folder.iterdir())]


@pytest.fixture(scope="module")
def joined(tmp_path_factory):
    """One process on the joined batches."""
    folder = tmp_path_factory.mktemp("joined")
    return {
        uneven: train(folder / str(uneven), "--devices=1", *["--uneven"] * uneven)[0]
        for uneven in (False, True)
    }


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("uneven", [False, True], ids=["even", "uneven"])
def test_sync_trains_the_student_of_one_process_with_the_joined_batches(
    tmp_path, joined, strategy, uneven
):
    options = ["--sync", f"--strategy={strategy}", *["--uneven"] * uneven]
    ranks = train(tmp_path / "ranks", *options)
    assert len(ranks) == 2
    assert ranks[0]["distill"] == ranks[1]["distill"]
    assert ranks[0]["distill"] == pytest.approx(joined[uneven]["distill"], rel=1e-10)
    for rank in ranks:
        assert rank["teacher_unchanged"]
        torch.testing.assert_close(
            rank["weights"], joined[uneven]["weights"], rtol=1e-10, atol=1e-12
        )


@pytest.mark.parametrize("strategy", ["ddp", "ddp_find_unused_parameters_true"])
def test_without_sync_each_rank_correlates_over_its_own_batch(tmp_path, joined, strategy):
    ranks = train(tmp_path / "ranks", f"--strategy={strategy}")
    assert ranks[0]["distill"] != ranks[1]["distill"]
    assert ranks[0]["distill"] != pytest.approx(joined[False]["distill"], rel=1e-3)
    assert all(rank["teacher_unchanged"] for rank in ranks)
    torch.testing.assert_close(ranks[0]["weights"], ranks[1]["weights"], rtol=0, atol=0)


def test_spawned_processes(tmp_path):
    """ddp_spawn trains in children only: the teacher that comes back is this process's own."""
    ranks = train(tmp_path / "ranks", "--strategy=ddp_spawn")
    assert len(ranks) == 1
    assert ranks[0]["teacher_unchanged"]


def test_every_rank_averages_the_student_of_the_joined_batches(tmp_path):
    (joined,) = train(tmp_path / "joined", "--ema", "--devices=1", "--sync")
    ranks = train(tmp_path / "ranks", "--ema", "--strategy=ddp", "--sync")
    assert len(ranks) == 2
    for rank in ranks:
        torch.testing.assert_close(rank["weights"], joined["weights"], rtol=1e-10, atol=1e-12)
    weights = joined["weights"]
    assert not torch.equal(weights["student_ema.module.0.weight"], weights["student.0.weight"])


def test_an_averaged_student_trains_in_spawned_processes(tmp_path):
    (main,) = train(tmp_path / "ranks", "--ema", "--strategy=ddp_spawn")
    weights = main["weights"]
    assert not torch.equal(weights["student_ema.module.0.weight"], weights["student.0.weight"])
