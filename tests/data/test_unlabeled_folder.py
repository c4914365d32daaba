"""Tests of the data module for a folder of images without labels."""

import pytest
import torch
from PIL import Image

from lightning_dist.data.unlabeled_folder import UnlabeledFolderDataModule


@pytest.fixture
def images(tmp_path):
    """Write 20 images at several depths, each of another colour, and a file that is no image."""
    for index in range(20):
        path = tmp_path / "images" / "/".join("abc"[: index % 4]) / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), (12 * index, 0, 0)).save(path)
    (tmp_path / "images" / "notes.txt").write_text("no image")
    return tmp_path / "images"


def reds(loader) -> set[float]:
    """Return the red of each image, which says which image it is; check that none has a label."""
    found = set()
    for pixels, labels in loader:
        assert (labels == -100).all()
        found |= {round(float(x), 3) for x in pixels[:, 0].mean((1, 2))}
    return found


def data_of(images, **options):
    return UnlabeledFolderDataModule(
        root=images, image_size=16, mean=(0, 0, 0), std=(1, 1, 1), **options
    )


def test_every_run_holds_out_the_same_images_of_any_depth(images):
    parts = []
    for seed in (0, 1):
        data = data_of(images, val_fraction=0.25, seed=seed)
        data.setup("fit")
        parts.append([reds(data.train_dataloader()), reds(data.val_dataloader())])
        assert reds(data.test_dataloader()) == parts[-1][1]
    assert parts[0] == parts[1]
    train, held_out = parts[0]
    assert (len(train), len(held_out)) == (15, 5)
    assert train | held_out == {round(12 * index / 255, 3) for index in range(20)}


def test_labelled_images_for_validation_leave_all_others_for_training(images, tmp_path):
    for name in ("dog", "cat"):
        (tmp_path / "val" / name).mkdir(parents=True)
        Image.new("RGB", (40, 30)).save(tmp_path / "val" / name / "0.png")
    data = data_of(images, val_root=tmp_path / "val")
    data.setup("fit")
    assert len(reds(data.train_dataloader())) == 20
    assert torch.cat([labels for _, labels in data.val_dataloader()]).tolist() == [0, 1]
    assert (data.class_names, data.num_classes) == (["cat", "dog"], 2)


def test_validation_images_inside_the_folder_are_named(images, caplog):
    (images / "val" / "cat").mkdir(parents=True)
    Image.new("RGB", (40, 30)).save(images / "val" / "cat" / "0.png")
    data_of(images, val_root=images / "val").setup("fit")
    assert "val/cat/0.png: the student then trains on" in caplog.text


@pytest.mark.parametrize("fraction", [0.0, 0.02, 1.0])
def test_a_fraction_that_leaves_one_part_empty_is_refused(images, fraction):
    with pytest.raises(ValueError, match=f"val_fraction={fraction}"):
        data_of(images, val_fraction=fraction).setup("fit")


@pytest.mark.parametrize("name", ["labels", "unlabeled", "unlabeled_share"])
def test_settings_of_data_with_labels_are_refused(images, name):
    with pytest.raises(ValueError, match=f"{name} is for data with labels"):
        data_of(images, **{name: 0.5})


def test_a_folder_without_images_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no such folder with images"):
        data_of(tmp_path / "empty").setup("fit")
