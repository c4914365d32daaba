"""Tests of the check with samples: it refuses a changed teacher and accepts an unchanged one."""

import collections
import functools
import importlib
import os
import random
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from caching import digits, files, same_weights, teacher
from lightning_dist import CachedTeacher, DistillationCallback, Term
from lightning_dist.cache import files as cache_files
from lightning_dist.cache.files import ViewFiles, read_rows, write_rows
from lightning_dist.models.small import SmallCNN
from lightning_dist.tasks.classification import ClassificationModule
from lightning_dist.teacher import EnsembleTeacher

CHANGED = r"outputs differ from those stored in (.*):.*Delete the folder.*distill.cache=PATH"


class Scaled(SmallCNN):
    """A network that stores the object `hidden` and multiplies its logits by `read(hidden)`."""

    def __init__(self, hidden, read) -> None:
        torch.manual_seed(0)
        super().__init__([4, 8])
        self.hidden, self.read = hidden, read

    def forward(self, images):
        return super().forward(images) * self.read(self.hidden)


def large(factor: float) -> torch.Tensor:
    """Return a tensor that contains the factor, but prints without it, as it is too long."""
    values = torch.ones(3000)
    values[1500] = factor
    return values


class Slotted:
    __slots__ = ("values",)

    def __init__(self, factor: float) -> None:
        self.values = large(factor)


class Session:
    """An object that has loaded a file, but is pickled as its path, as an ONNX session is."""

    def __init__(self, path) -> None:
        self.path = path
        self._factor = float(path.read_text())

    def __getstate__(self):
        return {"path": self.path}


def hooked(factor, register, hook):
    network = SmallCNN([4, 8])
    getattr(network, register)(hook(factor))
    return network


def helper(factor, tmp_path, monkeypatch):
    """Write a Python module with a function, and return a network that calls this function."""
    monkeypatch.syspath_prepend(tmp_path)
    # Write no bytecode: Python would use it for the next file too, which has the same size and may
    # be written in the same second.
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "scaling_helper.py").write_text(f"def gain():\n    return {factor}\n")
    monkeypatch.delitem(sys.modules, "scaling_helper", raising=False)
    importlib.invalidate_caches()
    gain = importlib.import_module("scaling_helper").gain
    return Scaled(None, lambda _: gain())


def session(factor, tmp_path, monkeypatch):
    (tmp_path / "model.onnx").write_text(str(factor))
    return Scaled(Session(tmp_path / "model.onnx"), lambda hidden: hidden._factor)


# Changes of a teacher's outputs that the digest does not notice.
WAYS = {
    "forward hook": lambda factor, *_: hooked(
        factor, "register_forward_hook", lambda f: lambda module, args, output: output * f
    ),
    "forward pre-hook": lambda factor, *_: hooked(
        factor, "register_forward_pre_hook", lambda f: lambda module, args: (args[0] * f,)
    ),
    "partial": lambda factor, *_: Scaled(
        functools.partial(torch.add, large(factor)), lambda hidden: hidden(torch.zeros(3000))[1500]
    ),
    "deque": lambda factor, *_: Scaled(
        collections.deque([large(factor)]), lambda hidden: hidden[0][1500]
    ),
    "set": lambda factor, *_: Scaled({large(factor)}, lambda hidden: next(iter(hidden))[1500]),
    "slots": lambda factor, *_: Scaled(Slotted(factor), lambda hidden: hidden.values[1500]),
    "helper function": helper,
    "file of a session": session,
}


@pytest.mark.parametrize("way", WAYS)
def test_a_teacher_with_changed_outputs_is_refused(train, tmp_path, monkeypatch, way):
    """A change that is not in the digest changes the outputs by one in a thousand."""

    def run(factor):
        torch.manual_seed(0)
        network = WAYS[way](factor, tmp_path, monkeypatch)
        train(CachedTeacher(network, tmp_path / "cache", views=1), epochs=1)

    run(1.0)
    run(1.0)
    (view,) = files(tmp_path / "cache")
    before = view.read_bytes()
    with pytest.raises(MisconfigurationException, match=CHANGED) as caught:
        run(1.001)
    assert str(view.parent) in str(caught.value)
    assert [*files(tmp_path / "cache")] == [view]
    assert view.read_bytes() == before


@pytest.mark.parametrize("part", ["features", "head"])
def test_a_distilled_part_with_changed_outputs_is_refused(train, tmp_path, part):
    def run(factor):
        torch.manual_seed(0)
        network = SmallCNN([4, 8])
        network.get_submodule(part).register_forward_hook(lambda m, args, output: output * factor)
        term = Term(nn.MSELoss(), 1.0, part, part)
        callback = DistillationCallback(
            CachedTeacher(network, tmp_path, views=1), student="student", terms={"part": term}
        )
        module = ClassificationModule(SmallCNN([4, 8]), num_classes=10)
        train(None, module=module, epochs=1, callbacks=[callback])

    run(1.0)
    with pytest.raises(MisconfigurationException, match=rf"\({part} of some samples\)"):
        run(1.001)


def test_outputs_of_another_shape_are_refused(train, tmp_path):
    def run(columns):
        network = Scaled(None, lambda _: 1)
        network.register_forward_hook(lambda module, args, output: output[:, :columns])
        train(CachedTeacher(network, tmp_path, views=1), epochs=1)

    run(10)
    with pytest.raises(MisconfigurationException, match=CHANGED):
        run(9)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_differences_by_rounding_are_accepted(train, tmp_path, dtype):
    """Another memory format and an added 1e-6 change the outputs as another device might do."""
    trained = teacher(dtype=dtype)
    train(CachedTeacher(trained, tmp_path, views=1), epochs=1)
    trained.network.to(memory_format=torch.channels_last)
    trained.network.register_forward_hook(
        lambda module, args, output: output + 1e-6 * torch.ones_like(output)
    )
    train(CachedTeacher(trained, tmp_path, views=1), epochs=1)
    assert len(files(tmp_path)) == 1


def test_a_compiled_teacher_reads_its_own_cache_and_that_of_the_network(train, tmp_path):
    def run(wrap):
        torch.manual_seed(1)
        return train(CachedTeacher(wrap(SmallCNN([4, 8])), tmp_path, views=1), epochs=1)

    compiled = functools.partial(torch.compile, backend="eager")
    first = run(compiled)
    assert same_weights(first, run(compiled))
    assert same_weights(first, run(lambda network: network))
    assert len(files(tmp_path)) == 1


# Ways to draw random numbers from the logits and the network's own generator.
DRAWS = {
    "dropout": lambda logits, own: F.dropout(logits, training=True),
    "a draw that it does not use": lambda logits, own: (torch.rand(1), logits)[1],
    "a generator of its own": lambda logits, own: logits * torch.rand(1, generator=own),
    "NumPy": lambda logits, own: logits * np.random.rand(),
    "Python": lambda logits, own: logits * random.random(),
}


class Drawing(SmallCNN):
    def __init__(self, draw) -> None:
        super().__init__([4, 8])
        self.draw, self.own = draw, torch.Generator()

    def forward(self, images):
        return self.draw(super().forward(images), self.own)


@pytest.mark.parametrize("wrap", [lambda net: net, lambda net: EnsembleTeacher([teacher(), net])])
@pytest.mark.parametrize("draw", DRAWS)
def test_a_teacher_that_draws_random_numbers_is_refused(train, tmp_path, draw, wrap):
    kept = CachedTeacher(wrap(Drawing(DRAWS[draw])), tmp_path, views=1)
    module, data = ClassificationModule(SmallCNN([4, 8]), kept, num_classes=10), digits()
    before = torch.get_rng_state(), np.random.get_state()[1], random.getstate()
    with pytest.raises(MisconfigurationException, match=r"draws random numbers.*distill.cache=off"):
        train(None, data, module, epochs=1)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    assert random.getstate() == before[2]
    assert data.views is None
    assert not any(tmp_path.iterdir())


def test_a_teacher_that_draws_random_numbers_only_later_is_refused(train, tmp_path):
    network = Drawing(lambda logits, own: logits)
    train(CachedTeacher(network, tmp_path, views=1), epochs=1)
    network.register_forward_hook(lambda module, args, output: F.dropout(output, training=True))
    with pytest.raises(MisconfigurationException, match="draws random numbers"):
        train(CachedTeacher(network, tmp_path, views=1), epochs=1)


def test_a_run_completes_the_samples_of_a_run_that_ended_while_writing_them(train, tmp_path):
    train(CachedTeacher(teacher(), tmp_path, views=1), epochs=1)
    (view,) = files(tmp_path)
    folder, samples = view.parent, view.with_name("samples.npy")
    content = samples.read_bytes()
    for path in folder.iterdir():
        path.unlink()
    (folder / "samples.part").write_bytes(content[:100])
    train(CachedTeacher(teacher(), tmp_path, views=1), epochs=1)
    assert samples.read_bytes() == content
    assert not list(folder.glob("*.part"))


@pytest.mark.parametrize("damage", [b"", b"logits", None], ids=["empty", "no array", "truncated"])
def test_damaged_samples_are_refused_by_name(train, tmp_path, damage):
    train(CachedTeacher(teacher(), tmp_path, views=1), epochs=1)
    (samples,) = tmp_path.glob("*/samples.npy")
    samples.write_bytes(samples.read_bytes()[:-9] if damage is None else damage)
    with pytest.raises(ValueError, match=rf"samples.npy is damaged.*delete {samples.parent}, so"):
        train(CachedTeacher(teacher(), tmp_path, views=1), epochs=1)


class Noting(CachedTeacher):
    """A CachedTeacher that writes its error to a file, and waits for the other process's file."""

    def attach(self, trainer, *args):
        try:
            super().attach(trainer, *args)
        except Exception as error:
            (self.root / f"{trainer.global_rank}.txt").write_text(str(error))
            deadline = time.monotonic() + 60
            while len([*self.root.glob("?.txt")]) < 2 and time.monotonic() < deadline:
                time.sleep(0.05)
            raise


def test_all_processes_end_with_the_same_error(train, tmp_path):
    def run(kind, factor, **kwargs):
        network = Scaled(None, functools.partial(lambda hidden, value: factor, value=None))
        train(kind(network, tmp_path, views=1), epochs=1, **kwargs)

    run(CachedTeacher, 1.0)
    with pytest.raises(Exception, match="outputs differ from those stored"):
        run(Noting, 1.5, strategy="ddp_fork", devices=2)
    texts = [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)]
    assert "outputs differ from those stored" in texts[0]
    assert texts[0] == texts[1]


def test_rows_are_not_written_through_a_link(tmp_path):
    mine = tmp_path / "mine"
    mine.write_text("mine")
    (tmp_path / "samples.part").symlink_to(mine)
    write_rows(tmp_path / "samples.npy", np.zeros(2, [("a", "f4")]))
    assert mine.read_text() == "mine"
    assert len(read_rows(tmp_path / "samples.npy", 2, ["a"], delete=tmp_path)) == 2


@pytest.mark.parametrize("kind", ["a pipe", "a device", "a long header"])
def test_rows_that_never_end_are_not_read(tmp_path, kind):
    path = tmp_path / "samples.npy"
    if kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a device":
        path.symlink_to("/dev/zero")
    else:
        path.write_bytes(b"\x93NUMPY\x02\x00" + b"\xff" * 4)
        os.truncate(path, 2**33)
    with pytest.raises(
        ValueError, match=r"samples\.npy is damaged \(it is (no regular|of another)"
    ):
        read_rows(path, 2, ["a"], delete=tmp_path)


ROW = np.dtype([("a", "f4")])


def begun(folder: Path) -> ViewFiles:
    """Begin or continue view 0 of a cache, and write its first two rows."""
    files = ViewFiles(folder, 4)
    files.begin(0, ROW)
    files.write(0, 0, np.ones(2, ROW), process=0)
    return files


@pytest.mark.parametrize("link", [Path.symlink_to, Path.hardlink_to])
@pytest.mark.parametrize("name", ["view-000.part", "view-000.blocks-0"])
def test_a_view_is_not_continued_through_a_link(tmp_path, name, link):
    begun(tmp_path)
    mine = (tmp_path / name).rename(tmp_path / "mine")
    before = mine.read_bytes()
    link(tmp_path / name, mine)
    files = begun(tmp_path)
    files.write(0, 2, np.ones(2, ROW), process=0)
    files.commit(0)
    assert mine.read_bytes() == before
    rows = read_rows(files.path(0), 4, ["a"], delete=tmp_path)
    assert rows["a"].tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("kind", ["a pipe", "a device"])
@pytest.mark.parametrize("name", ["view-000.part", "view-000.blocks-7"])
def test_a_view_that_never_ends_is_begun_anew(tmp_path, name, kind):
    begun(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    if kind == "a pipe":
        os.mkfifo(tmp_path / name)
    else:
        (tmp_path / name).symlink_to("/dev/zero")
    assert ViewFiles(tmp_path, 4).begin(0, ROW)[-1][1] == 4


def test_rows_that_are_listed_many_times_are_read_a_few_times(tmp_path, monkeypatch):
    begun(tmp_path)
    with (tmp_path / "view-000.blocks-1").open("w") as file:
        file.writelines(f"\n0 4 {number:08x}" for number in range(1000))
    read = []

    def wrong(file: object, size: int) -> int:
        read.append(size)
        return -size  # The last range is empty, and fits.

    monkeypatch.setattr(cache_files, "_checksum", wrong)
    assert ViewFiles(tmp_path, 4).begin(0, ROW) == [(0, 4)]
    assert sum(read) <= 4 * 4 * ROW.itemsize
