"""A script that holds three loaders with workers, one batch taken of each, when it exits.

It prints the numbers of the workers, and waits for a line. Then it takes the other batches and
prints how many there are, unless they never come: the argument "stuck".
"""

import multiprocessing
import signal
import sys
import time

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_dist.data.base import ImageDataModule


class Samples(Dataset):
    """Eight images, of which the last four never come if the data set is stuck."""

    def __init__(self, stuck: bool) -> None:
        self.stuck = stuck

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        while self.stuck and index >= 4:
            time.sleep(1)
        return torch.zeros(1, 4, 4), 0


class Data(ImageDataModule):
    """A data module whose loaders have one worker each, and batches of two images."""

    num_classes, class_names, location = 2, None, "nowhere"
    mean, std, image_size, in_channels = (0.5,), (0.5,), 4, 1

    def __init__(self, stuck: bool) -> None:
        super().__init__(global_batch_size=2, num_workers=1)
        self.stuck = stuck

    def train_dataset(self) -> Dataset:
        return Samples(stuck=False)

    def val_dataset(self) -> Dataset:
        return Samples(self.stuck)


if __name__ == "__main__":
    stuck = sys.argv[1] == "stuck"
    data = Data(stuck)
    view = data.view_dataloader(0, [[0, 1], [2, 3], [4, 5], [6, 7]])
    loaders = data.train_dataloader(), data.val_dataloader(), view
    held = [iter(loader) for loader in loaders]
    for batches in held:
        next(batches)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print(*(process.pid for process in multiprocessing.active_children()), flush=True)
    sys.stdin.readline()
    if not stuck:
        print(*(len(list(batches)) for batches in held), flush=True)
