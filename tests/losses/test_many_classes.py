"""Tests of the loss with very many classes."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_dist.functional import dist_loss


class Softmaxes(TorchDispatchMode):
    """A mode that stores the number of rows of each softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._softmax.default:
            self.rows.append(args[0].shape[0])
        return func(*args, **(kwargs or {}))


def test_a_block_has_sixteen_rows_however_many_classes_there_are():
    student, teacher = torch.randn(2, 32, 20_000).unbind()
    with Softmaxes() as softmaxes:
        dist_loss(student, teacher)
    assert softmaxes.rows == [16] * 4
