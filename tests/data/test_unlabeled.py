"""Tests of images without labels beside a training set, and of their share in a batch."""

from collections import Counter

import pytest
import torch
from PIL import Image

from lightning_dist.data.base import ImageDataModule
from lightning_dist.data.digits import DigitsDataModule
from lightning_dist.data.image_folder import ImageFolderDataModule
from lightning_dist.data.unlabeled import SharedBatches

LABELED = torch.arange(30) < 10


def batches(epoch: int = 0, skip: int = 0, **options) -> list[list[int]]:
    """Return the indices of the batches of 8 in an epoch; of 30 samples, 10 have a label."""
    sampler = SharedBatches(LABELED, LABELED, 0.5, 8, seed=3, **options)
    sampler.set_epoch(epoch)
    sampler.skip = skip
    indices = [index for index, of_epoch in sampler if of_epoch == epoch]
    assert len(indices) == len(sampler) - skip
    return [indices[start : start + 8] for start in range(0, len(indices), 8)]


def test_an_epoch_has_each_label_once_and_its_share_of_the_others_in_each_batch():
    found = batches()
    assert [sum(index >= 10 for index in batch) for batch in found] == [4, 4, 4]
    assert sorted(i for batch in found for i in batch if i < 10) == list(range(10))


def test_the_images_without_a_label_take_turns_over_the_epochs():
    used = Counter(i for epoch in range(5) for batch in batches(epoch) for i in batch if i >= 10)
    # 5 epochs of 12 samples without a label are 3 passes over all 20 of them.
    assert set(used.values()) == {3}
    assert batches(1) != batches(0)


def test_the_processes_share_an_epoch():
    parts = [batches(rank=rank, num_replicas=2) for rank in (0, 1)]
    assert [len(batch) for batch in parts[0]] == [len(batch) for batch in parts[1]]
    found = Counter(i for part in parts for batch in part for i in batch)
    assert [found[i] for i in range(10)] == [1] * 10
    assert sorted(i for i in found if i >= 10) == sorted({i for i in found if i >= 10})
    assert max(found.values()) == 1


def test_an_epoch_goes_on_at_any_batch():
    assert batches(epoch=2, skip=8) == batches(epoch=2)[1:]


def test_a_share_of_zero_leaves_out_all_images_without_a_label():
    sampler = SharedBatches(LABELED, LABELED, 0, 8, seed=3)
    found = [index for index, _ in sampler]
    assert len(sampler) == len(found) == 10
    assert sorted(found) == list(range(10))


@pytest.mark.parametrize("share", [0.001, 1.0, 1.5])
def test_a_share_that_leaves_no_image_of_one_kind_is_refused(share):
    data = DigitsDataModule(labels=100, unlabeled_share=share)
    with pytest.raises(ValueError, match="unlabeled_share"):
        data.train_dataloader()


def test_a_share_needs_images_without_a_label():
    with pytest.raises(ValueError, match="the training set has 0 of them"):
        DigitsDataModule(unlabeled_share=0.5).train_dataloader()


@pytest.fixture
def images(tmp_path):
    def save(path, value: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (10, 12), (value, 0, 0)).save(path)

    for label, name in enumerate(("cat", "dog")):
        for index in range(3):
            save(tmp_path / "train" / name / f"{index}.png", label)
            save(tmp_path / "val" / name / f"{index}.png", label)
    for index in range(8):
        save(tmp_path / "more" / f"part{index % 2}" / "deep" / f"{index}.png", 100)
    return tmp_path


def folder(images, **settings) -> ImageFolderDataModule:
    data = ImageFolderDataModule(
        root=images, image_size=8, mean=(0,) * 3, std=(1 / 255,) * 3, num_workers=0, **settings
    )
    data.setup("fit")
    return data


def test_images_of_another_folder_come_without_a_label(images):
    data = folder(images, unlabeled=images / "more")
    (batch,) = data.train_dataloader()
    found = list(
        zip(batch[0][:, 0].mean((1, 2)).round().int().tolist(), batch[1].tolist(), strict=True)
    )
    assert Counter(found) == {(0, 0): 3, (1, 1): 3, (100, -100): 8}
    assert data.num_classes == 2
    shared = folder(
        images,
        unlabeled=[str(images / "more")],
        unlabeled_share=0.75,
        global_batch_size=8,
        labels=2,
    )
    assert [sorted(labels.tolist()) for _, labels in shared.train_dataloader()] == [
        [-100] * 6 + [0, 1]
    ]


def test_folders_without_images_and_data_without_files_are_refused(images):
    (images / "empty").mkdir()
    for name in ("empty", "missing"):
        with pytest.raises(FileNotFoundError, match=f"unlabeled=.*{name}"):
            folder(images, unlabeled=[images / "more", images / name])

    class Own(ImageDataModule):
        location = "here"

        def train_dataset(self):
            return [(torch.zeros(1), 0)]

        val_dataset = train_dataset

    with pytest.raises(ValueError, match="needs the method unlabeled_transform, which a Own"):
        Own(unlabeled=images / "more").setup("fit")


def test_a_validation_image_among_the_unlabelled_ones_is_named(images, caplog):
    folder(images, unlabeled=images / "val")
    assert "the student then trains on what it is evaluated on" in caplog.text
    assert str(images / "val" / "cat" / "0.png") in caplog.text
