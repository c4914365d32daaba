"""Functions for the tests of the teacher cache: data, a trained teacher, and a cache's files."""

from pathlib import Path

from torch import nn

from lightning_dist import Teacher
from lightning_dist.data.digits import DigitsDataModule
from lightning_dist.models.small import SmallCNN

TRAINED = "pkg://lightning_dist/assets/digits_teacher.safetensors"
SIZE = 150


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
