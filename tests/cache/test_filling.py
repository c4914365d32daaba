"""Tests of the filling of a view: it is stopped by a signal, and continued by the next run."""

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from caching import (
    SIZE,
    assert_rows_are_the_teachers_outputs,
    digits,
    files,
    fork,
    teacher,
)
from lightning_dist import CachedTeacher
from lightning_dist.cache.files import Claim, ViewFiles
from lightning_dist.cache.filling import blocks_of
from lightning_dist.resume import ExactResume

BLOCK = 20  # More than the samples with which a run calls the teacher before it trains.


def wait_until(condition, process) -> None:
    """Wait until a condition is true, while a process runs."""
    deadline = time.monotonic() + 120
    while not condition():
        assert process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def left_over(folder: Path) -> list[Path]:
    """Return the files of views that are not complete."""
    return [*folder.glob("*/*.part"), *folder.glob("*/*.blocks-*")]


def test_a_run_continues_the_view_of_a_run_that_was_killed(train, counted, tmp_path, monkeypatch):
    data = digits(global_batch_size=BLOCK)
    monkeypatch.setenv("SLOWLY", "0.05")
    victim = fork(train, counted.teacher(), data, epochs=1)
    wait_until(lambda: sum(counted.batches()) >= 0.8 * SIZE, victim)
    victim.kill()
    victim.join()
    assert not files(tmp_path / "cache")
    assert left_over(tmp_path / "cache")
    monkeypatch.setenv("SLOWLY", "0")
    train(counted.teacher(), data, epochs=1)
    # Only the block that was being computed is computed again.
    assert SIZE <= sum(counted.batches()) <= SIZE + BLOCK
    (view,) = files(tmp_path / "cache")
    assert not left_over(tmp_path / "cache")
    train(CachedTeacher(counted.teacher().teacher, tmp_path / "whole", views=2), data, epochs=1)
    (whole,) = files(tmp_path / "whole")
    assert view.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("handler", ["Lightning", "ExactResume"])
def test_a_signal_ends_the_filling_after_a_block(train, counted, tmp_path, monkeypatch, handler):
    options = {} if handler == "Lightning" else {"callbacks": [ExactResume()]}
    data = digits(global_batch_size=BLOCK)
    monkeypatch.setenv("SLOWLY", "0.3")
    run = fork(train, counted.teacher(), data, epochs=1, **options)
    wait_until(lambda: sum(counted.batches()) >= 2 * BLOCK, run)
    done = sum(counted.batches())
    os.kill(run.pid, signal.SIGTERM)
    run.join(timeout=60)
    assert run.exitcode == (0 if handler == "Lightning" else 143)
    assert sum(counted.batches()) <= done + 2 * BLOCK
    monkeypatch.setenv("SLOWLY", "0")
    train(counted.teacher(), data, epochs=1)
    assert sum(counted.batches()) == SIZE  # No block is computed twice.
    assert_rows_are_the_teachers_outputs(tmp_path / "cache", digits())


def test_a_signal_ends_a_run_that_waits_for_the_view_of_another(train, tmp_path):
    train(CachedTeacher(teacher(), tmp_path / "cache", views=1), epochs=1)
    (view,) = files(tmp_path / "cache")
    view.unlink()
    log = tmp_path / "waits"

    class Waiting(CachedTeacher):
        def _claim(self, view):
            log.touch()
            return super()._claim(view)

    with FileLock(view.with_suffix(".lock")):
        waiting = Waiting(teacher(), tmp_path / "cache", views=1)
        run = fork(train, waiting, epochs=1, callbacks=[ExactResume()])
        wait_until(log.exists, run)
        os.kill(run.pid, signal.SIGTERM)
        run.join(timeout=60)
        assert run.exitcode == 143
    assert not view.exists()


ROW = np.dtype([("(images)", np.float64), ("(output)", np.float16, (3,))])


@pytest.fixture
def partly(tmp_path):
    """Return files with 10 rows, of which two processes have written 2 to 4 and 6 to 8."""
    found = ViewFiles(tmp_path, 10)
    assert found.claim(0, 1.0) is Claim.WRITE
    assert found.begin(0, ROW) == [(0, 10)]
    found.write(0, 2, np.ones(2, ROW), process=0)
    found.write(0, 6, np.ones(2, ROW), process=1)
    return found


def test_blocks_that_are_listed_are_kept(partly):
    assert partly.begin(0, ROW) == [(0, 2), (4, 6), (8, 10)]
    for start in (0, 4, 8):
        partly.write(0, start, np.ones(2, ROW), process=0)
    assert partly.begin(0, ROW) == []
    partly.commit(0)
    assert (np.load(partly.path(0), allow_pickle=False) == np.ones(10, ROW)).all()
    assert not list(partly.folder.glob("*blocks*"))


def lose_a_block(files: ViewFiles) -> None:
    """Write zeros where rows 6 and 7 were, as after a power failure."""
    path = files.path(0).with_suffix(".part")
    content = path.read_bytes()
    end = len(content) - 2 * ROW.itemsize
    path.write_bytes(content[: end - 2 * ROW.itemsize] + bytes(2 * ROW.itemsize) + content[end:])


def tear_a_line(files: ViewFiles) -> None:
    path = files.path(0).with_suffix(".blocks-1")
    path.write_text(path.read_text()[:-4])


@pytest.mark.parametrize("damage", [lose_a_block, tear_a_line])
def test_a_block_that_was_not_written_completely_is_computed_again(partly, damage):
    damage(partly)
    assert partly.begin(0, ROW) == [(0, 2), (4, 10)]
    partly.write(0, 6, np.ones(2, ROW), process=1)
    assert partly.begin(0, ROW) == [(0, 2), (4, 6), (8, 10)]


@pytest.mark.parametrize(
    "text", ["", "6 8", "\0\xff", "8 6 00000000\n", "6 99 00000000\n", "-2 0 0"]
)
def test_a_list_with_other_text_lists_nothing(partly, text):
    partly.path(0).with_suffix(".blocks-1").write_text(text)
    assert partly.begin(0, ROW) == [(0, 2), (4, 10)]


def test_rows_of_another_kind_are_not_continued(partly):
    other = np.dtype([("(images)", np.float64), ("(output)", np.float16, (5,))])
    assert partly.begin(0, other) == [(0, 10)]
    assert partly.begin(0, ROW) == [(0, 10)]


@pytest.mark.parametrize("size", [1, 3, 4, 100])
def test_blocks_cover_the_missing_rows_once_and_keep_to_their_grid(size):
    missing = [(0, 2), (5, 17), (19, 20)]
    blocks = blocks_of(missing, size)
    covered = [row for block in blocks for row in block]
    assert covered == [row for start, end in missing for row in range(start, end)]
    grid = {tuple(range(start, start + size)) for start in range(0, 20, size)}
    assert all(any(set(block) <= set(cell) for cell in grid) for block in blocks)
