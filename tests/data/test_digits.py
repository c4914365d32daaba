"""Tests that the digits are those of scikit-learn, with the same split in every run."""

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from lightning_dist.data.digits import DigitsDataModule
from lightning_dist.data.tensor_images import TensorImages

Pixels = tuple[float, ...]


def whole(dataset: TensorImages, epoch: int = 0) -> tuple[Tensor, Tensor]:
    return dataset.__getitems__([(index, epoch) for index in range(len(dataset))])


def table(images: Tensor, labels: Tensor) -> dict[Pixels, int]:
    """Return the label of each image, since no two of the 1,797 images are equal."""
    pixels = (tuple(image.flatten().tolist()) for image in images)
    return dict(zip(pixels, labels.tolist(), strict=True))


def images_of(dataset: TensorImages) -> set[Pixels]:
    return set(table(*whole(dataset)))


def test_splits_hold_every_image_of_scikit_learn_once_with_its_label() -> None:
    data = DigitsDataModule(val_fraction=0.1)
    splits = [whole(split()) for split in (data.train_dataset, data.val_dataset, data.test_dataset)]
    assert [len(labels) for _, labels in splits] == [1293, 144, 360]
    found = table(*(torch.cat(part) for part in zip(*splits, strict=True)))
    pixels = torch.from_numpy(load_digits().images / 16).float().unsqueeze(1)
    expected = (pixels - torch.tensor(data.mean)) / torch.tensor(data.std)
    assert found == table(expected, torch.from_numpy(load_digits().target))


def test_batches_are_normalised_float32_images_with_one_channel() -> None:
    data = DigitsDataModule(val_fraction=0.0)
    images, labels = whole(data.train_dataset())
    assert images.shape == (1437, data.in_channels, data.image_size, data.image_size)
    assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert images.mean() == pytest.approx(0, abs=2e-4)
    assert images.std() == pytest.approx(1, abs=2e-4)
    assert data.class_names == [str(label) for label in labels.unique().tolist()]
    assert data.num_classes == 10


def test_split_is_stratified_and_the_same_for_every_seed() -> None:
    first, second = DigitsDataModule(seed=0), DigitsDataModule(seed=1)
    for split in ("train_dataset", "val_dataset", "test_dataset"):
        images, labels = whole(getattr(first, split)())
        assert torch.equal(images, whole(getattr(second, split)())[0])
        share = labels.bincount(minlength=10) / len(labels)
        assert share.min() > 0.09
        assert share.max() < 0.11


def test_without_validation_images_the_test_images_validate() -> None:
    data = DigitsDataModule(val_fraction=0.0)
    assert images_of(data.val_dataset()) == images_of(data.test_dataset())
    assert len(data.train_dataset()) == 1437


@pytest.mark.parametrize("size", [10, 25, 300])
def test_smaller_training_set_is_stratified_and_part_of_the_larger(size: int) -> None:
    data = DigitsDataModule(train_size=size)
    counts = whole(data.train_dataset())[1].bincount(minlength=10)
    assert counts.sum() == size
    assert counts.max() - counts.min() <= max(1, 0.01 * size)
    larger = DigitsDataModule(train_size=size + 100)
    assert images_of(data.train_dataset()) < images_of(larger.train_dataset())
    assert images_of(data.test_dataset()) == images_of(larger.test_dataset())


def test_more_training_images_than_there_are_is_an_error() -> None:
    with pytest.raises(ValueError, match="train_size=1400: scikit-learn's digits leave 1293"):
        DigitsDataModule(train_size=1400).setup("fit")


def test_augmentation_shifts_by_up_to_one_pixel_and_leaves_evaluation_alone() -> None:
    plain, shifted = DigitsDataModule(), DigitsDataModule(augment=True)
    black = (0 - plain.mean[0]) / plain.std[0]
    original, _ = whole(plain.train_dataset())
    padded = torch.nn.functional.pad(original, (1, 1, 1, 1), value=black)
    possible = torch.stack([padded[..., y : y + 8, x : x + 8] for y in range(3) for x in range(3)])
    images, _ = whole(shifted.train_dataset(), epoch=1)
    matches = torch.isclose(images, possible).flatten(2).all(2)
    assert matches.any(0).all()
    assert (matches.sum(1) > 90).all()  # The expected number for each of the nine shifts is 144.
    assert not torch.equal(images, whole(shifted.train_dataset(), epoch=2)[0])
    assert images_of(plain.val_dataset()) == images_of(shifted.val_dataset())


@pytest.mark.parametrize("num_workers", [0, 2])
def test_augmented_epoch_is_the_same_in_every_fresh_module(num_workers: int) -> None:
    epochs = []
    for workers in (0, num_workers):
        loader = DigitsDataModule(
            augment=True, seed=3, global_batch_size=256, num_workers=workers
        ).train_dataloader()
        loader.sampler.set_epoch(5)
        epochs.append([torch.cat(part) for part in zip(*loader, strict=True)])
    assert torch.equal(epochs[0][0], epochs[1][0])
    assert torch.equal(epochs[0][1], epochs[1][1])
