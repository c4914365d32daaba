"""Tests that one process at a time writes to a folder."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from lightning_dist.files import locking
from lightning_dist.files.locking import FolderIsInUse, FolderLock, file_lock
from processes import wait_until


def hold_in_a_process(folder: Path) -> int:
    """Start a process that holds the lock of a folder for ever; return its id."""
    process = os.fork()
    if not process:
        with FolderLock(folder):
            time.sleep(1000)
    wait_until(lambda: (folder / ".lock-holder").exists())
    return process


def end(process: int) -> None:
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)


def test_a_second_process_is_refused_and_told_the_holder(tmp_path, monkeypatch):
    monkeypatch.setattr(locking, "PATIENCE_SECONDS", 0.1)
    holder = hold_in_a_process(tmp_path)
    try:
        with pytest.raises(FolderIsInUse, match=rf"{tmp_path} is in use by process {holder} on "):
            FolderLock(tmp_path).__enter__()
    finally:
        end(holder)


def test_a_killed_holder_locks_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(locking, "PATIENCE_SECONDS", 0.1)
    end(hold_in_a_process(tmp_path))
    for _ in range(2):
        with FolderLock(tmp_path):
            assert f"process {os.getpid()} " in (tmp_path / ".lock-holder").read_text()


def test_a_holder_that_is_about_to_end_is_waited_for(tmp_path):
    holder = hold_in_a_process(tmp_path)
    killer = threading.Timer(0.2, os.kill, (holder, signal.SIGKILL))
    killer.start()
    with FolderLock(tmp_path):
        assert f"process {os.getpid()} " in (tmp_path / ".lock-holder").read_text()
    os.waitpid(holder, 0)


@pytest.mark.parametrize("link", [Path.symlink_to, Path.hardlink_to])
@pytest.mark.parametrize("make", [FolderLock, lambda folder: file_lock(folder / ".lock")])
def test_a_lock_that_is_a_link_is_refused_and_its_file_kept(tmp_path, make, link):
    mine, folder = tmp_path / "mine", tmp_path / "folder"
    folder.mkdir()
    mine.write_text("mine")
    link(folder / ".lock", mine)
    with (
        pytest.raises(OSError, match=r"\.lock is a link or no regular file: remove it"),
        make(folder),
    ):
        pass
    assert mine.read_text() == "mine"


def test_the_holder_is_not_written_through_a_link(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / ".lock-holder").symlink_to(tmp_path / "new")
    with FolderLock(folder):
        assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("kind", ["a pipe", "a device", "a long file"])
def test_a_holder_that_never_ends_is_not_read(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(locking, "PATIENCE_SECONDS", 0.1)
    holder = hold_in_a_process(tmp_path)
    named = tmp_path / ".lock-holder"
    named.unlink()
    if kind == "a pipe":
        os.mkfifo(named)
    elif kind == "a device":
        named.symlink_to("/dev/zero")
    else:
        named.write_text("x" * 10_000)
    try:
        with pytest.raises(FolderIsInUse, match="in use by another process: wait"):
            FolderLock(tmp_path).__enter__()
    finally:
        end(holder)
