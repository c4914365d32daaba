"""Functions for the tests of the teacher cache: data, a trained teacher, and a cache's files."""

import multiprocessing
from pathlib import Path

import numpy as np
import torch
from torch import nn

from lightning_dist import Teacher
from lightning_dist.data.digits import DigitsDataModule
from lightning_dist.models.small import SmallCNN

TRAINED = "pkg://lightning_dist/assets/digits_teacher.safetensors"
SIZE = 150
SAMPLES = 16  # The number of images with which each run calls the teacher before it trains.


def digits(**settings) -> DigitsDataModule:
    """Return a data module of digits with random shifts."""
    return DigitsDataModule(augment=True, train_size=SIZE, **settings)


def teacher(**settings) -> Teacher:
    """Return a teacher that was trained on digits."""
    return Teacher(SmallCNN([32, 64, 128]), TRAINED, **settings)


def files(folder: Path) -> list[Path]:
    """Return the files of the complete views of all caches in a folder."""
    return sorted(folder.glob("*/view-*.npy"))


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    """Return True if the weights of two networks are bitwise equal."""
    ours, theirs = one.state_dict(), other.state_dict()
    return all(bool((value == theirs[name]).all()) for name, value in ours.items())


def assert_rows_are_the_teachers_outputs(folder: Path, data: DigitsDataModule) -> None:
    """Compare every row of every view with the teacher's output for the sample in that view."""
    images = data.train_dataset().with_seed(0)
    network = teacher()
    for path in files(folder):
        view = int(path.stem.removeprefix("view-"))
        inputs, _ = images.__getitems__([(index, view) for index in range(len(images))])
        rows = np.load(path, allow_pickle=False)["(output)"]
        assert rows.dtype == np.float16
        np.testing.assert_allclose(rows, network(inputs).numpy(), rtol=2**-10, atol=2**-10)


def fork(train, *args, **kwargs) -> multiprocessing.Process:
    """Start a forked process that trains, and return it."""

    def work() -> None:
        torch.set_num_threads(1)  # OpenMP's threads do not survive a fork.
        train(*args, **kwargs)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process
