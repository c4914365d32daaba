"""Tests of fixed views of a training set, and of batches that contain their samples' indices."""

import numpy as np
import pytest
import torch
from lightning.fabric.utilities import move_data_to_device
from torch.utils.data import Dataset, TensorDataset

from lightning_dist.data.digits import DigitsDataModule
from lightning_dist.data.scenes import ScenesDataModule
from lightning_dist.data.views import KeyedBatch, Views, fingerprints


def epoch_of(data: DigitsDataModule, epoch: int) -> dict[int, torch.Tensor]:
    """Return the images of an epoch by the index of their sample, in the order of loading."""
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return {
        int(index): image
        for batch in loader
        for index, image in zip(batch.indices, batch.inputs, strict=True)
    }


def digits(views: int | None, **settings) -> DigitsDataModule:
    data = DigitsDataModule(augment=True, train_size=100, **settings)
    data.views = views
    return data


def same(one: dict, other: dict) -> bool:
    return all(torch.equal(image, other[index]) for index, image in one.items())


def test_views_come_again_in_another_order():
    data = digits(views=3)
    first, next_one, again = (epoch_of(data, epoch) for epoch in (1, 2, 4))
    assert same(first, again)
    assert list(first) != list(again)
    assert not same(first, next_one)


def test_views_are_the_same_whatever_the_seed_and_the_workers():
    one = epoch_of(digits(views=3, seed=1), 5)
    other = epoch_of(digits(views=3, seed=2, num_workers=1), 5)
    assert list(one) != list(other)
    assert same(one, other)


def test_a_batch_unpacks_and_knows_its_samples():
    data = digits(views=2)
    loader = data.train_dataloader()
    loader.sampler.set_epoch(3)
    batch = next(iter(loader))
    images, labels = batch
    assert batch.view == 1
    assert len(batch) == 2
    assert batch[0] is images
    assert torch.equal(labels, data.train_dataset().labels[batch.indices])


def test_a_batch_knows_its_samples_on_another_device_and_in_pinned_memory(monkeypatch):
    batch = next(iter(digits(views=2).train_dataloader()))
    moved = move_data_to_device(batch, torch.device("meta"))
    assert moved.inputs.is_meta
    assert moved.target.is_meta
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)  # needs a GPU
    for other in (moved, batch.pin_memory()):
        assert (other.indices == batch.indices).all()
        assert (other.view, other.fingerprints.shape) == (batch.view, batch.fingerprints.shape)


def test_a_data_set_that_draws_nothing_has_one_view():
    assert Views(DigitsDataModule().train_dataset(), 8).count == 1
    data = ScenesDataModule(train_size=4, global_batch_size=2)
    data.views = 8
    assert data.train_views().count == 1
    assert digits(views=8).train_views().count == 8


class Drawn(Dataset):
    """A data set that draws another image at each read."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.rand(1, 4, 4) + index, index


def test_what_transforms_of_single_samples_draw_is_a_view_too():
    views, again = Views(Drawn(), 3), Views(Drawn(), 3)
    batch = views.__getitems__([(4, 1), (2, 1)])
    assert batch.target.tolist() == batch.indices.tolist() == [4, 2]
    assert torch.equal(batch.inputs, again.__getitems__([(4, 7), (2, 7)]).inputs)
    assert not torch.equal(batch.inputs, views.__getitems__([(4, 2), (2, 2)]).inputs)
    assert torch.equal(batch.inputs[0], views[4, 1][0])
    assert Views(Drawn(), 3, random=False).count == 1


def test_without_views_batches_are_plain_and_drawn_anew():
    data = digits(views=2)
    next(iter(data.train_dataloader()))
    data.views = None
    assert not isinstance(next(iter(data.train_dataloader())), KeyedBatch)


def test_images_of_unlike_sizes_are_refused():
    dataset = TensorDataset(torch.zeros(2, 3), torch.zeros(2))
    dataset.collate = lambda samples: ([x for x, _ in samples], [y for _, y in samples])
    with pytest.raises(TypeError, match=r"list, no tensor.*distill.cache=off"):
        Views(dataset, 2, random=False).__getitems__([0, 1])


@pytest.mark.parametrize("change", ["one pixel", "shift", "flip"])
def test_fingerprints_tell_images_apart(change):
    image = torch.rand(1, 3, 40, 40)
    other = {"one pixel": image.clone(), "shift": image.roll(1, 3), "flip": image.flip(3)}[change]
    if change == "one pixel":
        other[0, 0, 0, 0] += 0.01
    assert not np.isclose(fingerprints(image), fingerprints(other), rtol=1e-6, atol=1e-4)


def test_a_fingerprint_does_not_depend_on_the_batch():
    images = torch.randn(300, 3, 64, 64)
    alone = np.concatenate([fingerprints(image[None]) for image in images])
    np.testing.assert_allclose(fingerprints(images), alone, rtol=1e-12, atol=1e-9)
