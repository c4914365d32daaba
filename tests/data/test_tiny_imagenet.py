"""Tests that Tiny-ImageNet is read from its own layout, and that errors name the damaged file."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from lightning_dist.data.tiny_imagenet import TinyImageNetDataModule

# The classes are in the order of the archive, which is not sorted.
WNIDS = ["n02124075", "n01443537", "n07873807"]
WORDS = {"n01443537": "goldfish, Carassius auratus", "n02124075": "Egyptian cat"}
VALIDATION = [("val_0.JPEG", WNIDS[0]), ("val_1.JPEG", WNIDS[2]), ("val_2.JPEG", WNIDS[1])]
VALIDATION += [("val_3.JPEG", WNIDS[0])]


def write_image(path: Path, rng: np.random.Generator) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, format="JPEG")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Write a small data set in the archive's layout."""
    rng = np.random.default_rng(0)
    (tmp_path / "wnids.txt").write_text("\n".join(WNIDS) + "\n")
    unused = [("n00001740", "entity"), *WORDS.items()]
    (tmp_path / "words.txt").write_text("".join(f"{wnid}\t{word}\n" for wnid, word in unused))
    for wnid in WNIDS:
        folder = tmp_path / "train" / wnid
        names = [f"{wnid}_{number}.JPEG" for number in range(3)]
        for name in names:
            write_image(folder / "images" / name, rng)
        boxes = "".join(f"{name}\t0\t10\t63\t58\n" for name in names)
        (folder / f"{wnid}_boxes.txt").write_text(boxes)
    for name, _ in VALIDATION:
        write_image(tmp_path / "val" / "images" / name, rng)
    annotate(tmp_path, VALIDATION)
    write_image(tmp_path / "test" / "images" / "test_0.JPEG", rng)
    return tmp_path


def annotate(root: Path, rows: list[tuple[str, str]]) -> None:
    lines = [f"{name}\t{wnid}\t0\t32\t44\t62\n" for name, wnid in rows]
    (root / "val" / "val_annotations.txt").write_text("".join(lines))


def test_labels_follow_the_sorted_wnids_and_names_come_from_words(root: Path) -> None:
    data = TinyImageNetDataModule(root=root)
    assert data.wnids == sorted(WNIDS)
    assert data.class_names == [*WORDS.values(), "n07873807"]
    assert (data.num_classes, data.image_size, data.in_channels) == (3, 64, 3)
    assert [label for _, label in data.train_dataset()] == [0] * 3 + [1] * 3 + [2] * 3


def test_evaluation_images_are_the_annotated_files_normalised(root: Path) -> None:
    data = TinyImageNetDataModule(root=root)
    to_tensor = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize(data.mean, data.std)]
    )
    files = [root / "val" / "images" / name for name, _ in VALIDATION]
    for loader in (data.val_dataloader(), data.test_dataloader()):
        images, labels = next(iter(loader))
        assert torch.equal(images, torch.stack([to_tensor(Image.open(file)) for file in files]))
        assert labels.tolist() == [1, 2, 0, 1]


def test_training_images_are_crops_of_the_padded_image_or_its_mirror_image(root: Path) -> None:
    data = TinyImageNetDataModule(root=root)
    file = root / "train" / data.wnids[0] / "images" / f"{data.wnids[0]}_0.JPEG"
    padded = transforms.functional.pad(Image.open(file), 8)
    crops = transforms.functional.to_tensor(padded).unfold(1, 64, 1).unfold(2, 64, 1)
    crops = crops.permute(1, 2, 0, 3, 4).flatten(0, 1)
    possible = torch.cat([crops, crops.flip(-1)])
    mean, std = torch.tensor(data.mean).view(3, 1, 1), torch.tensor(data.std).view(3, 1, 1)
    dataset = data.train_dataset()
    places = set()
    for _ in range(12):
        same = torch.isclose(possible, dataset[0][0] * std + mean, atol=1e-5).flatten(1).all(1)
        assert same.sum() == 1
        places.add(int(same.nonzero()))
    sides, *offsets = zip(*(np.unravel_index(one, (2, 17, 17)) for one in places), strict=True)
    assert set(sides) == {0, 1}
    assert min(map(min, offsets)) < 4
    assert max(map(max, offsets)) > 12


@pytest.mark.parametrize("num_workers", [0, 2])
def test_epoch_is_the_same_in_every_fresh_module(num_workers: int, root: Path) -> None:
    epochs = []
    for workers in (0, num_workers):
        data = TinyImageNetDataModule(root=root, global_batch_size=4, num_workers=workers)
        loader = data.train_dataloader()
        loader.sampler.set_epoch(6)
        epochs.append(torch.cat([images for images, _ in loader]))
    assert torch.equal(*epochs)


@pytest.mark.parametrize("name", ["wnids.txt", "words.txt", "val/val_annotations.txt"])
def test_missing_file_is_an_error_that_names_the_layout(name: str, root: Path) -> None:
    (root / name).unlink()
    data = TinyImageNetDataModule(root=root)
    with pytest.raises(FileNotFoundError, match=rf"{name} is missing: .* train/CLASS/images"):
        (data.class_names, data.setup("fit"))


def test_missing_training_folder_is_an_error_that_names_it(root: Path) -> None:
    (root / "train").rename(root / "training")
    with pytest.raises(FileNotFoundError, match=f"{root}/train is missing"):
        TinyImageNetDataModule(root=root).setup("fit")


def test_training_classes_other_than_those_of_wnids_are_an_error(root: Path) -> None:
    (root / "train" / WNIDS[0]).rename(root / "train" / "n99999999")
    message = rf"train and .*wnids.txt differ .*missing from train: {WNIDS[0]}; .* n99999999"
    with pytest.raises(ValueError, match=message):
        TinyImageNetDataModule(root=root).setup("fit")


def test_annotated_class_that_is_not_among_the_wnids_is_an_error(root: Path) -> None:
    annotate(root, [*VALIDATION, ("val_3.JPEG", "n99999999")])
    with pytest.raises(ValueError, match=r"val_annotations.txt has classes .* n99999999"):
        TinyImageNetDataModule(root=root).setup("validate")


def test_annotated_file_that_is_missing_is_an_error(root: Path) -> None:
    (root / "val" / "images" / "val_2.JPEG").unlink()
    message = r"val/images lacks 1 files that .*val_annotations.txt lists: val_2.JPEG"
    with pytest.raises(FileNotFoundError, match=message):
        TinyImageNetDataModule(root=root).setup("validate")


def test_empty_annotations_are_an_error_that_names_the_folder(root: Path) -> None:
    annotate(root, [])
    with pytest.raises(ValueError, match=f"the val set of {root} is empty"):
        TinyImageNetDataModule(root=root).setup("validate")


def test_corrupt_image_is_an_error_that_names_the_file(root: Path) -> None:
    (root / "val" / "images" / "val_1.JPEG").write_bytes(b"cut off")
    with pytest.raises(OSError, match=r"val/images/val_1.JPEG cannot be read as an image"):
        list(TinyImageNetDataModule(root=root).val_dataloader())
