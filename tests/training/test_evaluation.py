"""Tests that count the samples of a batch, and leave out what a DistributedSampler repeats."""

from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, default_collate

from lightning_dist import DistillModule
from lightning_dist.training.evaluation import count_samples, without_repeats

Pair = namedtuple("Pair", ["left", "right"])
IMAGES, LABELS, WEIGHTS = torch.arange(12.0).view(4, 3), torch.arange(4), torch.ones(4, 2)


def collated(n):
    samples = [(IMAGES[i], (i, float(i))) for i in range(n)]
    return tuple(default_collate(samples))


# Functions that return a batch of the first n samples.
BATCHES = {
    "tensors": lambda n: (IMAGES[:n], LABELS[:n]),
    "mappings": lambda n: ({"x": IMAGES[:n]}, {"a": LABELS[:n], "b": WEIGHTS[:n]}),
    "tuples": lambda n: ((IMAGES[:n], IMAGES[:n]), (LABELS[:n], WEIGHTS[:n])),
    "named tuples": lambda n: (Pair(IMAGES[:n], IMAGES[:n]), Pair(LABELS[:n], WEIGHTS[:n])),
    "collated tuples": collated,
    "collated pairs of images": lambda n: ([IMAGES[:n], IMAGES[:n]], LABELS[:n]),
    "lists of images with as many channels": lambda n: (
        [torch.full((4, 2, 2), float(i)) for i in range(n)],
        [{"x": torch.ones(i, 4)} for i in range(n)],
    ),
    "lists of samples": lambda n: ([*IMAGES[:n]], [{"x": torch.ones(i, 4)} for i in range(n)]),
}


@pytest.mark.parametrize("first", BATCHES.values(), ids=BATCHES)
def test_the_copies_of_a_distributed_sampler_are_left_out(first):
    """Rank 1 of two gets six of 13 images, and a repeated one that its second batch leaves out."""
    sampler = DistributedSampler(range(13), num_replicas=2, rank=1, shuffle=False)
    loader, batch = SimpleNamespace(sampler=sampler, batch_size=4), first(4)
    assert count_samples(*batch) == 4
    assert without_repeats(batch, 0, loader) is batch
    torch.testing.assert_close(without_repeats(batch, 1, loader), first(2))


def test_names_beside_the_images_are_not_counted():
    assert count_samples({"path": [*"abcd"], "x": IMAGES, "size": torch.tensor(3)}, None) == 4
    assert count_samples(([*"abcd"], IMAGES), None) == 4
    assert count_samples([], torch.zeros(0)) == 0


@pytest.mark.parametrize("kind", [dict, tuple])
def test_a_target_of_several_tensors_is_weighted_by_its_samples(make_trainer, kind):
    """The mean loss weights a batch by its 5 or 2 samples, not by the two entries of its target."""
    inputs, labels, weights = torch.randn(7, 6), torch.randint(0, 4, (7,)), torch.rand(7)

    def collate(indices):
        values = labels[indices], weights[indices]
        return inputs[indices], dict(zip("ab", values, strict=True)) if kind is dict else values

    def loss(output, target):
        label, weight = target.values() if kind is dict else target
        return (weight * F.cross_entropy(output, label, reduction="none")).mean()

    module = DistillModule(nn.Linear(6, 4), task_loss=loss)
    loader = DataLoader(range(7), batch_size=5, collate_fn=collate)
    found = make_trainer().validate(module, loader, verbose=False)[0]["val/loss"]
    target = {"a": labels, "b": weights} if kind is dict else (labels, weights)
    expected = loss(module.student(inputs), target)
    assert found == pytest.approx(expected.item(), rel=1e-5)
