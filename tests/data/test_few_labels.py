"""Tests of the option ``labels``, which keeps the labels of some training images only."""

import pytest
import torch
from PIL import Image
from torch import Tensor

from lightning_dist.data.digits import DigitsDataModule
from lightning_dist.data.image_folder import ImageFolderDataModule
from lightning_dist.data.scenes import SceneDetectionDataModule, ScenesDataModule


def epoch_of(**settings) -> tuple[Tensor, Tensor]:
    data = DigitsDataModule(augment=True, **settings)
    data.setup("fit")
    batches = list(data.train_dataloader())
    return torch.cat([images for images, _ in batches]), torch.cat([x for _, x in batches])


def test_the_chosen_images_keep_their_label_and_all_images_stay_as_they_are():
    images, labels = epoch_of()
    some, few = epoch_of(labels=100)
    assert torch.equal(some, images)
    kept = few != -100
    assert torch.equal(few[kept], labels[kept])
    assert set(few[~kept].tolist()) == {-100}
    counts = labels.bincount() / len(labels) * 100
    assert (few[kept].bincount() - counts).abs().max() <= 1
    assert int(kept.sum()) == 100


def test_the_seed_alone_chooses_and_a_smaller_number_is_a_part_of_a_larger_one():
    def chosen(labels: float, seed: int = 3) -> Tensor:
        data = DigitsDataModule(labels=labels, seed=seed)
        data.setup("fit")
        return torch.cat([x for _, x in data.train_dataloader()]) != -100

    assert torch.equal(chosen(100), chosen(100))
    assert bool((chosen(100) | ~chosen(50)).all())
    assert int(chosen(0.1).sum()) == 129
    one, other = (
        DigitsDataModule(labels=100, seed=seed, train_size=1000)._dataset("train").labels
        for seed in (0, 1)
    )
    assert not torch.equal(one, other)


def test_a_folder_of_images_can_have_few_labels(tmp_path):
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for index in range(4):
                Image.new("RGB", (8, 8)).save(tmp_path / split / name / f"{index}.png")
    data = ImageFolderDataModule(root=tmp_path, image_size=8, labels=0.5, num_workers=0)
    data.setup("fit")
    (batch,) = data.train_dataloader()
    assert sorted(batch[1].tolist()) == [-100] * 4 + [0, 0, 1, 1]
    (batch,) = data.val_dataloader()
    assert sorted(batch[1].tolist()) == [0] * 4 + [1] * 4


def test_a_cached_teacher_is_not_asked_again_for_other_labels():
    assert DigitsDataModule(labels=9).sample_settings() == DigitsDataModule().sample_settings()


@pytest.mark.parametrize("labels", [0, -1, 2.5, True, 1300, 0.0001])
def test_numbers_of_labels_that_cannot_be_are_refused(labels):
    with pytest.raises(ValueError, match="labels"):
        DigitsDataModule(labels=labels).setup("fit")


@pytest.mark.parametrize("kind", [ScenesDataModule, SceneDetectionDataModule])
def test_masks_and_boxes_of_some_images_are_kept(kind):
    sizes = {"train_size": 8, "val_size": 2, "test_size": 2, "scene_size": 16}

    def epoch(**settings):
        data = kind(**sizes, **settings)
        data.setup("fit")
        batches = list(data.train_dataloader())
        return [sample for batch in batches for sample in zip(*batch, strict=True)]

    def has_label(target) -> bool:
        return (
            target is not None if kind is SceneDetectionDataModule else bool((target < 255).any())
        )

    whole, few, fewer = epoch(), epoch(labels=4), epoch(labels=0.25)
    for (image, target), (same, kept) in zip(whole, few, strict=True):
        assert torch.equal(image, same)
        if has_label(kept):
            torch.testing.assert_close(kept, target, rtol=0, atol=0)
    assert sum(has_label(target) for _, target in few) == 4
    assert sum(has_label(target) for _, target in fewer) == 2
    assert all(has_label(b) for (_, a), (_, b) in zip(fewer, few, strict=True) if has_label(a))
    assert sum(has_label(target) for _, target in epoch(labels=4, unlabeled_share=0.5)) == 4
