"""Tests of the reading of a view: row by row, in the process that loads a batch, and exactly."""

import os

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from caching import SIZE, digits, files, same_weights, teacher
from lightning_dist import CachedTeacher, DistillationCallback, Term
from lightning_dist.cache.files import PAGE, ViewFiles
from lightning_dist.cache.reading import RowFile
from lightning_dist.cache.rows import row_in_file
from lightning_dist.models.small import SmallCNN
from lightning_dist.tasks.classification import ClassificationModule


class Steps(L.Callback):
    """A callback that says whether a batch is in progress, from its hooks to its update."""

    running = False

    def on_train_batch_start(self, *args):
        self.running = True

    def on_train_batch_end(self, *args):
        self.running = False


@pytest.fixture
def reads(monkeypatch):
    """Return a callback, and a list of the reads of this process: bytes, and if within a batch."""
    steps, found, own = Steps(), [], os.pread

    def pread(file, size, offset):
        found.append((size, steps.running))
        return own(file, size, offset)

    monkeypatch.setattr(os, "pread", pread)
    return steps, found


@pytest.mark.parametrize(
    ("workers", "options"),
    [(0, {}), (1, {}), (0, {"overfit_batches": 2})],
    ids=["main process", "worker", "another sampler"],
)
def test_a_complete_view_is_read_with_the_images_and_only_the_rows(
    train, tmp_path, reads, workers, options
):
    steps, found = reads
    train(CachedTeacher(teacher(), tmp_path, views=2), epochs=2, callbacks=[steps])
    itemsize = np.load(files(tmp_path)[0], mmap_mode="r").dtype.itemsize
    assert any(running for _, running in found)  # These views were not complete before.
    found.clear()
    kept = CachedTeacher(teacher(), tmp_path, views=2)
    train(kept, digits(num_workers=workers), epochs=2, callbacks=[steps], **options)
    rows = 0 if workers else 2 * (128 if options else SIZE)
    assert found == [(itemsize, False)] * rows


@pytest.mark.parametrize("precision", ["bf16-true", "64-true", "bf16-mixed"])
def test_the_outputs_are_those_of_the_file_whatever_the_precision(train, tmp_path, precision):
    given = []

    def keep(student, teacher):
        given.append(teacher.clone())
        return F.mse_loss(student.float(), teacher)

    for _ in range(2):  # The second run gets them from its loader.
        kept = CachedTeacher(teacher(), tmp_path, views=1)
        callback = DistillationCallback(kept, student="student", terms={"kept": Term(keep)})
        module = ClassificationModule(SmallCNN([4, 8]), num_classes=10)
        train(None, digits(), module, epochs=1, callbacks=[callback], precision=precision)
    (path,) = files(tmp_path)
    stored = np.load(path, allow_pickle=False)["(output)"].astype(np.float32)
    found = torch.cat(given)
    assert found.dtype == torch.float32
    expected = sorted(map(tuple, stored.tolist()))
    for run in found.split(SIZE):
        assert sorted(map(tuple, run.tolist())) == expected


def test_a_file_without_padding_is_read_too(train, tmp_path):
    """Files of earlier versions have a short header and packed rows."""

    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.head = nn.Linear(64, 1000)

        def forward(self, images):
            return self.head(images.flatten(1))

    def run():
        torch.manual_seed(0)
        term = Term(lambda student, teacher: student.square().mean() * teacher.mean(), 1.0)
        kept = CachedTeacher(Wide(), tmp_path, views=1)
        callback = DistillationCallback(kept, student="student", terms={"mean": term})
        module = ClassificationModule(SmallCNN([4, 8]), num_classes=10)
        return train(None, digits(), module, epochs=1, callbacks=[callback])

    first = run()
    (path,) = files(tmp_path)
    padded = np.load(path, allow_pickle=False)
    packed = np.empty(len(padded), [(name, padded.dtype[name]) for name in padded.dtype.names])
    packed[:] = padded
    assert packed.dtype.itemsize < padded.dtype.itemsize
    np.save(path, packed)
    assert same_weights(first, run())


@pytest.mark.parametrize(
    ("classes", "stored", "itemsize"),
    [(1000, "float16", 2048), (1000, "float32", 4096), (100, "float16", 208), (10, "float32", 48)],
)
def test_a_row_that_almost_fills_a_page_lies_in_one(tmp_path, classes, stored, itemsize):
    computed = np.dtype([("(images)", np.float64), ("(output)", np.float32, (classes,))])
    row = row_in_file(computed, np.dtype(stored))
    assert row.itemsize == itemsize
    written = ViewFiles(tmp_path, 8)
    written.claim(0, 1.0)
    written.begin(0, row)
    written.write(0, 0, np.ones(8, row), process=0)
    written.commit(0)
    opened = RowFile(written.path(0), 8, row.names)
    assert opened.read(np.array([5, 0]))["(output)"].tolist() == [[1.0] * classes] * 2
    if itemsize > 1000:
        start = written.path(0).stat().st_size - 8 * itemsize
        assert start % PAGE == 0
        assert PAGE % itemsize == 0
