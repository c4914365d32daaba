"""Tests that no two runs write to one folder."""

import os

import pytest
from hydra import compose, initialize_config_module

from lightning_dist.files import locking
from lightning_dist.files.locking import FolderLock

QUICK = ["trainer=cpu", "experiment=digits", "+trainer.fast_dev_run=true"]
QUICK += ["print_config=false", "callbacks.progress=null"]
JOB = ["hydra.sweep.dir=.", "hydra.sweep.subdir=folder", "resume=true"]


def test_runs_and_sweeps_of_the_same_second_have_folders_of_their_own():
    with initialize_config_module("lightning_dist.conf", version_base="1.3"):
        first, second = (compose("train", return_hydra_config=True).hydra for _ in range(2))
    assert first.run.dir != second.run.dir
    assert first.sweep.dir != second.sweep.dir


@pytest.mark.parametrize(
    "options",
    [
        ["hydra.run.dir=folder"],
        ["-m", "hydra.sweep.dir=folder"],
        ["-m", *JOB],
        ["-m", *JOB, "own_process=true"],
    ],
    ids=str,
)
def test_a_folder_in_which_another_process_trains_is_refused(
    refused, tmp_path, monkeypatch, options
):
    monkeypatch.setattr(locking, "PATIENCE_SECONDS", 0.1)
    with FolderLock(tmp_path / "folder"):
        (tmp_path / "folder" / "result.json").write_text("of the other process")
        line = refused("train", *options, *QUICK)
        assert f"folder is in use by process {os.getpid()} on " in line
        assert (tmp_path / "folder" / "result.json").read_text() == "of the other process"
        kept = {".lock", ".lock-holder", "result.json"}  # Hydra has written its own files in jobs.
        assert "-m" in options or {x.name for x in (tmp_path / "folder").iterdir()} == kept


@pytest.mark.parametrize(
    ("folder", "reason"),
    [("/dev/null", "File exists"), ("n" * 300, "File name too long")],
    ids=["a device", "a long name"],
)
def test_a_folder_that_cannot_be_one_is_refused_in_one_line(refused, folder, reason):
    assert reason in refused("train", *QUICK, f"hydra.run.dir={folder}")
