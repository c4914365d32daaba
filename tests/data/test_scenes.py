"""Tests that scenes are composed of real digits, repeatable, and have correct masks and boxes."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from lightning_dist.data.scenes import ScenesDataModule


@pytest.fixture(scope="module")
def data() -> ScenesDataModule:
    return ScenesDataModule(train_size=12, val_size=4, test_size=4, global_batch_size=4)


def test_a_scene_is_a_function_of_seed_split_and_index(data: ScenesDataModule):
    again = ScenesDataModule(train_size=500, seed=7)
    for one, other in zip(data.scene("train", 3), again.scene("train", 3), strict=True):
        assert torch.equal(one, other)
    for other in (
        data.scene("train", 4),
        data.scene("val", 3),
        ScenesDataModule(scene_seed=1).scene("train", 3),
    ):
        assert not torch.equal(data.scene("train", 3).image, other.image)


@pytest.mark.parametrize("index", range(12))
def test_mask_boxes_and_labels_agree(data: ScenesDataModule, index: int):
    image, mask, boxes, labels = data.scene("train", index)
    assert (image.dtype, tuple(image.shape)) == (torch.uint8, (3, 64, 64))
    assert (mask.dtype, tuple(mask.shape)) == (torch.int64, (64, 64))
    assert boxes.shape == (len(labels), 4)
    assert 1 <= len(labels) <= 5
    assert set(mask.unique().tolist()) - {0} == set(labels.tolist())
    covered = torch.zeros(64, 64, dtype=torch.bool)
    for (x1, y1, x2, y2), label in zip(boxes.int().tolist(), labels, strict=True):
        inside = mask[y1:y2, x1:x2] == label
        assert inside[0].any()
        assert inside[-1].any()
        assert inside[:, 0].any()
        assert inside[:, -1].any()
        covered[y1:y2, x1:x2] = True
    assert covered[mask > 0].all()


def test_a_digit_stands_out_from_its_canvas_by_its_shape():
    data = ScenesDataModule(most_digits=1, scales=(0.5, 0.5), texture=0.0)
    bunch = load_digits()
    drawings = torch.from_numpy(bunch.images).float().flatten(1)
    drawings = drawings - drawings.mean(1, keepdim=True)
    hits = 0
    for index in range(20):
        image, mask, _, labels = data.scene("test", index)
        pixels = image.float()
        background = pixels[:, mask == 0].median(1).values
        ink = (pixels - background[:, None, None]).abs().sum(0)
        best, found = 0.0, -1
        rows, columns = ink.sum(1).nonzero().flatten(), ink.sum(0).nonzero().flatten()
        for top in range(max(int(rows[0]) - 8, 0), min(int(rows[0]) + 1, 33)):
            for left in range(max(int(columns[0]) - 12, 0), min(int(columns[0]) + 1, 33)):
                window = ink[top : top + 32, left : left + 32]
                small = torch.nn.functional.avg_pool2d(window[None], 4).flatten()
                small = small - small.mean()
                scores = drawings @ small / (drawings.norm(dim=1) * small.norm())
                if scores.max() > best:
                    best, found = scores.max().item(), int(bunch.target[scores.argmax()])
        hits += found + 1 == labels[0]
    assert hits >= 18


def digits_of(data: ScenesDataModule, split: str) -> set[int]:
    """Return the indices of the digits that a split uses."""
    return set(data._digits_of_split[split].tolist())


def test_no_digit_is_in_two_splits(data: ScenesDataModule):
    train, val, test = (digits_of(data, split) for split in ("train", "val", "test"))
    assert not train & val
    assert not train & test
    assert not val & test
    assert len(train | val | test) == len(load_digits().target)


def batches(data: ScenesDataModule) -> list[tuple[Tensor, Tensor]]:
    return list(data.train_dataloader())


def test_batches_are_normalised_images_and_masks_in_seeded_order(data: ScenesDataModule):
    once, again = batches(data), batches(data)
    images, masks = once[0]
    assert (images.dtype, tuple(images.shape)) == (torch.float32, (4, 3, 64, 64))
    assert (masks.dtype, tuple(masks.shape)) == (torch.int64, (4, 64, 64))
    torch.testing.assert_close(once, again, rtol=0, atol=0)
    scenes = [data.scene("train", index) for index in range(12)]
    for image, mask in zip(images, masks, strict=True):
        (scene,) = [scene for scene in scenes if torch.equal(scene.mask, mask)]
        pixels = (image * 0.25 + 0.5) * 255
        np.testing.assert_allclose(pixels, scene.image, atol=1e-3)


def test_batches_are_the_same_with_worker_processes(data: ScenesDataModule):
    workers = ScenesDataModule(
        train_size=12, val_size=4, test_size=4, global_batch_size=4, num_workers=2
    )
    for one, other in zip(batches(data), batches(workers), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scene_size": 8}, "scene_size is 8"),
        ({"scales": (0.5, 0.2)}, "scales are 0.5, 0.2"),
        ({"scales": (0.01, 0.2)}, "which is 4 pixels"),
        ({"most_digits": 0}, "most_digits is 0"),
        ({"texture": 2.0}, "texture is 2.0"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        ScenesDataModule(**settings)


def test_an_empty_split_is_an_error_that_names_it():
    with pytest.raises(ValueError, match="val_size is 0"):
        ScenesDataModule(val_size=0).setup("validate")
