"""Tests of the synchronised loss over many ranks, which are threads of this process."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from lightning_dist.functional import dist_loss


class Ranks:
    """The functions of torch.distributed that the loss calls, for ranks that are threads.

    Attributes:
        received: the number of elements that each all-reduce of the first rank returns.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.received: list[int] = []
        self._barrier = threading.Barrier(count, timeout=60)
        self._parts: dict[int, torch.Tensor] = {}
        self._rank = threading.local()

    def all_reduce(self, tensor: torch.Tensor) -> None:
        self._parts[self._rank.value] = tensor.clone()
        self._barrier.wait()
        total = torch.stack([self._parts[rank] for rank in range(self.count)]).sum(0)
        self._barrier.wait()
        tensor.copy_(total)
        if self._rank.value == 0:
            self.received.append(tensor.numel())

    def run(self, call, monkeypatch: pytest.MonkeyPatch) -> list:
        """Return what a function of the rank returns, for each rank."""

        def on_rank(rank: int):
            self._rank.value = rank
            return call(rank)

        with monkeypatch.context() as patch, ThreadPoolExecutor(self.count) as pool:
            patch.setattr(torch.distributed, "is_initialized", lambda: True)
            patch.setattr(torch.distributed, "get_world_size", lambda: self.count)
            patch.setattr(torch.distributed, "all_reduce", self.all_reduce)
            return list(pool.map(on_rank, range(self.count)))


def value_and_gradient(student, teacher, **options):
    student = student.clone().requires_grad_()
    loss = dist_loss(student, teacher, **options)
    return loss.item(), torch.autograd.grad(loss, student)[0]


@pytest.mark.parametrize("activation", ["softmax", "identity"])
def test_forty_uneven_ranks_give_the_loss_of_one_process(monkeypatch, activation):
    sizes = [0, 1, 7, 2] * 10
    student, teacher = (3 * torch.randn(2, sum(sizes), 30).double() + 50).unbind()
    parts = list(zip(student.split(sizes), teacher.split(sizes), strict=True))

    def on_rank(rank):
        return value_and_gradient(*parts[rank], sync=True, activation=activation)

    losses, gradients = zip(*Ranks(40).run(on_rank, monkeypatch), strict=True)
    alone, gradient = value_and_gradient(student, teacher, activation=activation)
    assert len(set(losses)) == 1
    assert losses[0] == pytest.approx(alone, rel=5e-16, abs=0)
    # DDP divides the sum of the ranks' gradients by their number.
    torch.testing.assert_close(torch.cat(gradients) / 40, gradient, rtol=1e-10, atol=1e-16)


def test_what_a_rank_receives_does_not_grow_with_the_ranks(monkeypatch):
    student, teacher = torch.randn(2, 4, 100).unbind()
    received = []
    for count in (2, 20):
        ranks = Ranks(count)
        ranks.run(lambda _: dist_loss(student, teacher, sync=True), monkeypatch)
        received.append(ranks.received)
    assert received == [[2 * 100 + 2, 3 * 100]] * 2
