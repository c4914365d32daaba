"""Rows of ``benchmarks.scale``: the global relation over many ranks, and the mAP of many images."""

import time
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from benchmarks.growth import Cost, Row, forked
from lightning_dist.functional import dist_loss
from lightning_dist.tasks.average_precision import BoxAveragePrecision


def global_relation(ranks: int, _: Path) -> Cost:
    """Compute DIST over pretended ranks: the seconds of this rank, and the bytes it receives."""
    student, teacher = torch.randn(2, 32, 21841).unbind()
    received = []

    def all_reduce(tensor: Tensor) -> None:
        # In a ring, each rank receives the parts of all others, and then their sums.
        received.append(2 * (ranks - 1) / ranks * tensor.numel() * tensor.element_size())

    with (
        mock.patch("torch.distributed.is_initialized", return_value=True),
        mock.patch("torch.distributed.get_world_size", return_value=ranks),
        mock.patch("torch.distributed.all_reduce", all_reduce),
    ):
        dist_loss(student, teacher, sync=True)
        received.clear()
        start = time.process_time()
        dist_loss(student, teacher, sync=True)
        return Cost(time.process_time() - start, sum(received))


def average_precision(images: int, _: Path) -> Cost:
    """Compute the mAP of images with 80 classes, 7 boxes and 100 found boxes each."""
    metric = BoxAveragePrecision()
    for _image in range(images):
        found, target = (
            {"boxes": _boxes(count), "labels": torch.randint(80, (count,))} for count in (100, 7)
        )
        metric.update([found | {"scores": torch.rand(100)}], [target])
    return forked(metric.compute, "VmHWM")


def _boxes(count: int) -> Tensor:
    corners = 400 * torch.rand(count, 2)
    return torch.cat([corners, corners + 5 + 200 * torch.rand(count, 2)], dim=1)


ROWS = [
    Row("global relation", "ranks", (51, 510), global_relation, "received"),
    Row("compute the mAP", "images", (500, 5_000), average_precision, "peak"),
]
