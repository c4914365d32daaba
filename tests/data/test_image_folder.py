"""Tests that folders per class are read, augmented by timm, and checked when opened."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms.functional import InterpolationMode

from lightning_dist.data.image_folder import ImageFolderDataModule

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLASSES = ["n01440764", "n01443537", "n02102040"]


def write_image(path: Path, shade: int, size: tuple[int, int] = (80, 64)) -> None:
    """Write an image that is a smooth gradient, so that no two crops of it are equal."""
    path.parent.mkdir(parents=True, exist_ok=True)
    x, y = np.meshgrid(np.linspace(0, 100, size[0]), np.linspace(0, 100, size[1]))
    pixels = np.stack([x + shade, y + shade, (x + y) / 2 + shade], axis=-1)
    Image.fromarray(pixels.astype(np.uint8)).save(path, format="JPEG", quality=95)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for label, name in enumerate(CLASSES):
        for number in range(4):
            shade = 40 * label + 5 * number
            write_image(tmp_path / "train" / name / f"{name}_{number}.JPEG", shade)
        write_image(tmp_path / "val" / name / f"ILSVRC2012_val_{label}.JPEG", 40 * label)
    return tmp_path


def view(data: ImageFolderDataModule, index: int, epoch: int = 0) -> torch.Tensor:
    """Return an augmented training image of an epoch; it is the same in every run of the tests."""
    return data.train_dataloader().dataset[index, epoch][0]


def test_attributes_are_those_of_imagenet_and_of_the_folders(root: Path) -> None:
    data = ImageFolderDataModule(root=root)
    assert (data.num_classes, data.class_names) == (3, CLASSES)
    assert (data.mean, data.std, data.image_size, data.in_channels) == (MEAN, STD, 224, 3)


def test_evaluation_resizes_to_256_and_takes_the_centre_224(root: Path) -> None:
    loader = ImageFolderDataModule(root=root).val_dataloader()
    images, labels = next(iter(loader))
    by_hand = transforms.Compose(
        [
            transforms.Resize(256, InterpolationMode.BILINEAR),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    files = sorted((root / "val").rglob("*.JPEG"))
    expected = torch.stack([by_hand(Image.open(file)) for file in files])
    torch.testing.assert_close(images, expected)
    assert labels.tolist() == [0, 1, 2]


def test_training_takes_random_crops_and_flips_of_every_image(root: Path) -> None:
    data = ImageFolderDataModule(root=root, image_size=32)
    views = torch.stack([view(data, 0, epoch) for epoch in range(40)])
    assert views.shape[1:] == (3, 32, 32)
    assert len(views.flatten(1).unique(dim=0)) == 40
    # The values increase to the right in every file, so they decrease only in a flipped image.
    red = views[:, 0]
    rises = red[:, :, -1].mean(1) > red[:, :, 0].mean(1)
    assert 5 < rises.sum() < 35
    labels = [label for _, label in data.train_dataset()]
    assert labels == [label for label in range(3) for _ in range(4)]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_strong_augmentation_is_the_same_in_every_fresh_module(
    num_workers: int, root: Path
) -> None:
    epochs = []
    for workers in (0, num_workers):
        loader = ImageFolderDataModule(
            root=root,
            image_size=32,
            auto_augment="rand-m9-mstd0.5",
            re_prob=0.5,
            global_batch_size=5,
            num_workers=workers,
        ).train_dataloader()
        loader.sampler.set_epoch(3)
        epochs.append([torch.cat(part) for part in zip(*loader, strict=True)])
    assert torch.equal(epochs[0][0], epochs[1][0])
    assert torch.equal(epochs[0][1], epochs[1][1])


def test_random_erasing_fills_in_noise_by_default_and_only_where_asked_for(root: Path) -> None:
    def jumps(**settings: object) -> list[int]:
        """Return the largest number of jumps in a pixel row of each image; the files have none."""
        data = ImageFolderDataModule(root=root, image_size=64, **settings)
        steps = [view(data, index).diff(dim=-1).abs() for index in range(12)]
        return [int((step > 0.5).sum(-1).max()) for step in steps]

    assert max(jumps()) == 0
    assert min(jumps(re_prob=1.0)) > 2
    assert 0 < max(jumps(re_prob=1.0, re_mode="const")) <= 2


def test_auto_augment_changes_the_colours(root: Path) -> None:
    def spread(**settings: object) -> float:
        data = ImageFolderDataModule(root=root, image_size=32, **settings)
        return torch.stack([view(data, 0, epoch).mean() for epoch in range(40)]).std().item()

    assert spread(auto_augment="rand-m9-mstd0.5") > 1.5 * spread()
    assert spread(color_jitter=0.8) > 1.5 * spread()


def test_random_interpolation_is_for_training_alone(root: Path) -> None:
    plain = ImageFolderDataModule(root=root, image_size=32)
    mixed = ImageFolderDataModule(root=root, image_size=32, interpolation="random")
    mixed.setup("fit")
    assert torch.equal(plain.val_dataset()[1][0], mixed.val_dataset()[1][0])


def test_any_other_image_folder_is_the_same_class_with_other_settings(root: Path) -> None:
    (root / "val").rename(root / "valid")
    write_image(root / "final" / CLASSES[0] / "grey.png", 0)
    Image.new("L", (50, 50), 255).save(root / "final" / CLASSES[0] / "grey.png")
    for name in CLASSES[1:]:
        write_image(root / "final" / name / "one.jpg", 0)
    data = ImageFolderDataModule(
        root=root,
        val_dir="valid",
        test_dir="final",
        image_size=16,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    )
    image, label = data.test_dataset()[0]
    assert torch.equal(image, torch.ones(3, 16, 16))
    assert label == 0
    assert len(data.val_dataset()) == 3
    assert all(view(data, index).min() >= -1 for index in range(12))


def test_missing_folder_is_an_error_that_names_the_layout(root: Path, tmp_path: Path) -> None:
    (root / "val").rename(root / "valid")
    with pytest.raises(FileNotFoundError, match=r"val is missing: expected .*val/CLASS/FILE"):
        ImageFolderDataModule(root=root).setup("fit")
    empty = tmp_path / "empty"
    (empty / "train").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"train holds no class folder: expected"):
        ImageFolderDataModule(root=empty).setup("fit")


def test_class_without_images_is_an_error_that_names_both(root: Path) -> None:
    next((root / "val" / CLASSES[1]).iterdir()).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{root}/val: .*{CLASSES[1]}"):
        ImageFolderDataModule(root=root).setup("validate")


def test_other_classes_in_validation_than_in_training_are_an_error(root: Path) -> None:
    (root / "val" / CLASSES[1]).rename(root / "val" / "n99999999")
    message = rf"val and .*train differ .* from val: {CLASSES[1]}; only there: n99999999"
    with pytest.raises(ValueError, match=message):
        ImageFolderDataModule(root=root).setup("fit")


@pytest.mark.parametrize("kept_bytes", [0, 3, 500])
def test_corrupt_image_is_an_error_that_names_the_file(kept_bytes: int, root: Path) -> None:
    file = next((root / "val" / CLASSES[1]).iterdir())
    file.write_bytes(file.read_bytes()[:kept_bytes])
    data = ImageFolderDataModule(root=root, image_size=32)
    with pytest.raises(OSError, match=f"{file} cannot be read as an image"):
        list(data.val_dataloader())
