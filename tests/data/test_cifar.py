"""Tests that CIFAR is read from its original files and augmented as torchvision does it."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision import transforms
from torchvision.datasets import CIFAR10, CIFAR100

from formats import FINE_LABELS, write_cifar
from lightning_dist.data.cifar import CIFAR10DataModule, CIFAR100DataModule

both = pytest.mark.parametrize("module", [CIFAR10DataModule, CIFAR100DataModule])


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_cifar(tmp_path, CIFAR10, monkeypatch)
    write_cifar(tmp_path, CIFAR100, monkeypatch)
    return tmp_path


def by_torchvision(data: CIFAR10DataModule, train: bool) -> tuple[Tensor, Tensor]:
    """Return all images, normalised by torchvision's own transforms, and their labels."""
    normalise = transforms.Normalize(data.mean, data.std)
    to_tensor = transforms.Compose([transforms.ToTensor(), normalise])
    samples = list(data.source(data.root, train=train, transform=to_tensor))
    return torch.stack([image for image, _ in samples]), torch.tensor([y for _, y in samples])


@both
def test_evaluation_images_are_those_of_torchvision(
    module: type[CIFAR10DataModule], root: Path
) -> None:
    data = module(root=root)
    expected, labels = by_torchvision(data, train=False)
    for loader in (data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()):
        found = [torch.cat(part) for part in zip(*loader, strict=True)]
        assert torch.equal(found[0], expected)
        assert torch.equal(found[1], labels)


@both
def test_training_images_are_crops_of_the_padded_image_or_its_mirror_image(
    module: type[CIFAR10DataModule], root: Path
) -> None:
    data = module(root=root)
    raw, labels = by_torchvision(data, train=True)
    dataset = data.train_dataset()
    assert torch.equal(dataset.labels, labels)
    black = transforms.functional.normalize(torch.zeros(3, 40, 40), data.mean, data.std)
    black[:, 4:36, 4:36] = raw[7]
    crops = black.unfold(1, 32, 1).unfold(2, 32, 1).permute(1, 2, 0, 3, 4).flatten(0, 1)
    possible = torch.cat([crops, crops.flip(-1)])
    places = set()
    for epoch in range(60):
        same = (possible == dataset[7, epoch][0]).flatten(1).all(1)
        assert same.sum() == 1
        places.add(int(same.nonzero()))
    sides, rows, columns = zip(
        *(np.unravel_index(place, (2, 9, 9)) for place in places), strict=True
    )
    assert set(sides) == {0, 1}
    assert set(rows) == set(columns) == set(range(9))


def test_published_normalisation_and_class_names(root: Path) -> None:
    hundred, ten = CIFAR100DataModule(root=root), CIFAR10DataModule(root=root)
    assert hundred.mean == (0.5071, 0.4867, 0.4408)
    assert hundred.std == (0.2675, 0.2565, 0.2761)
    assert (hundred.num_classes, hundred.image_size, hundred.in_channels) == (100, 32, 3)
    assert hundred.class_names == FINE_LABELS
    assert (ten.num_classes, ten.class_names) == (10, FINE_LABELS[:10])


def test_held_out_images_are_training_images_that_are_not_trained_on(root: Path) -> None:
    data = CIFAR10DataModule(root=root, val_fraction=0.2)
    train, val = data.train_dataset(), data.val_dataset()
    assert (len(train), len(val)) == (80, 20)
    assert val.labels.bincount().tolist() == [2] * 10
    together = torch.cat([train.images, val.images]).flatten(1)
    official, _ = by_torchvision(data, train=True)
    assert len(together.unique(dim=0)) == len(official) == 100
    other_seed = CIFAR10DataModule(root=root, val_fraction=0.2, seed=1)
    assert torch.equal(other_seed.val_dataset().images, val.images)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_epoch_is_the_same_in_every_fresh_module(num_workers: int, root: Path) -> None:
    epochs = []
    for workers in (0, num_workers):
        loader = CIFAR10DataModule(root=root, num_workers=workers, seed=2).train_dataloader()
        loader.sampler.set_epoch(4)
        epochs.append(torch.cat([images for images, _ in loader]))
    assert torch.equal(*epochs)


def test_missing_files_are_an_error_that_says_where_and_what_to_set(tmp_path: Path) -> None:
    data = CIFAR100DataModule(root=tmp_path)
    data.prepare_data()
    with pytest.raises(FileNotFoundError, match=r"cifar-100-python: .* set root, or download=true"):
        data.setup("fit")


def test_damaged_file_is_an_error_and_never_unpickled(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / CIFAR10.base_folder / "data_batch_3").write_bytes(b"")
    monkeypatch.setattr(pickle, "load", pytest.fail)
    with pytest.raises(FileNotFoundError, match=r"cifar-10-batches-py: .* damaged"):
        CIFAR10DataModule(root=root).setup("fit")


def test_download_is_done_once_by_prepare_data_and_only_on_demand(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(CIFAR10, "download", lambda dataset: calls.append(dataset.root))
    for download in (False, True):
        data = CIFAR10DataModule(root=root, download=download)
        data.prepare_data()
        data.setup()
    assert calls == [root]
