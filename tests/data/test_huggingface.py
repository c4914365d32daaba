"""Tests that Hugging Face data sets can be read; `datasets` saves small ones for the tests."""

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_dist.data.huggingface import HuggingFaceDataModule

NAMES = ["cat", "dog"]


@pytest.fixture
def datasets(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return pytest.importorskip("datasets", reason="needs lightning-dist[datasets]")


def columns(count: int, image: str = "image", label: str = "label") -> dict[str, list[Any]]:
    """Return labels, and images whose grey value is five times the row, so that row 0 is black."""
    shades = [Image.new("L" if row % 2 else "RGB", (20, 16), "black") for row in range(count)]
    for row, picture in enumerate(shades):
        picture.paste((5 * row,) * len(picture.getbands()), (0, 0, 20, 16))
    return {image: shades, label: [row % 2 for row in range(count)], "note": ["x"] * count}


def save(
    datasets: Any, path: Path, splits: dict[str, int], labels: Any = None, **names: str
) -> str:
    """Save a DatasetDict to disk, as users do."""
    features = datasets.Features(
        {
            names.get("image", "image"): datasets.Image(),
            names.get("label", "label"): labels or datasets.ClassLabel(names=NAMES),
            "note": datasets.Value("string"),
        }
    )
    datasets.DatasetDict(
        {
            split: datasets.Dataset.from_dict(columns(count, **names), features=features)
            for split, count in splits.items()
        }
    ).save_to_disk(path)
    return str(path)


def module(path: str, **settings: Any) -> HuggingFaceDataModule:
    black_to_white = {"mean": (0.0,) * 3, "std": (1.0,) * 3}
    return HuggingFaceDataModule(path=path, image_size=8, **(black_to_white | settings))


def test_saved_data_set_is_read_with_its_class_names(datasets: Any, tmp_path: Path) -> None:
    path = save(datasets, tmp_path / "pets", {"train": 10, "validation": 4})
    data = module(path, global_batch_size=5)
    data.prepare_data()
    data.setup()
    assert (data.num_classes, data.class_names) == (2, NAMES)
    images, labels = next(iter(data.val_dataloader()))
    shades = torch.arange(4) * 5 / 255
    torch.testing.assert_close(images, shades.view(-1, 1, 1, 1).expand(-1, 3, 8, 8))
    assert labels.tolist() == [0, 1, 0, 1]
    shades, labels = (torch.cat(part) for part in zip(*data.train_dataloader(), strict=True))
    rows = (shades[:, 0, 0, 0] * 51).round().long()
    assert sorted(rows.tolist()) == list(range(10))
    assert torch.equal(labels, rows % 2)


def test_columns_and_splits_can_have_any_name(datasets: Any, tmp_path: Path) -> None:
    splits = {"learn": 6, "check": 2, "final": 3}
    path = save(datasets, tmp_path / "pets", splits, image="img", label="fine_label")
    data = module(
        path,
        image_column="img",
        label_column="fine_label",
        train_split="learn",
        val_split="check",
        test_split="final",
    )
    sizes = [len(one()) for one in (data.train_dataset, data.val_dataset, data.test_dataset)]
    assert sizes == [6, 2, 3]


def test_labels_without_names_are_counted(datasets: Any, tmp_path: Path) -> None:
    number = datasets.Value("int64")
    data = module(save(datasets, tmp_path / "pets", {"train": 4}, labels=number))
    assert (data.num_classes, data.class_names) == (2, None)


def test_folder_of_images_is_read_through_load_dataset(
    datasets: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for split in ("train", "validation"):
        for name in NAMES:
            file = tmp_path / "pets" / split / name / "one.png"
            file.parent.mkdir(parents=True)
            Image.new("RGB", (9, 9)).save(file)
    data = module(str(tmp_path / "pets"))
    assert data.class_names == NAMES
    assert [label for _, label in data.val_dataset()] == [0, 1]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_augmented_epoch_is_the_same_in_every_fresh_module(
    num_workers: int, datasets: Any, tmp_path: Path
) -> None:
    path = save(datasets, tmp_path / "pets", {"train": 10})
    epochs = []
    for workers in (0, num_workers):
        data = module(path, re_prob=1.0, global_batch_size=4, num_workers=workers)
        loader = data.train_dataloader()
        loader.sampler.set_epoch(2)
        epochs.append(torch.cat([images for images, _ in loader]))
    assert torch.equal(*epochs)


def test_unknown_split_is_an_error_that_lists_the_splits(datasets: Any, tmp_path: Path) -> None:
    path = save(datasets, tmp_path / "pets", {"train": 2, "test": 2})
    with pytest.raises(ValueError, match=r"pets has no split validation but train, test"):
        module(path).setup("fit")


def test_unknown_column_is_an_error_that_lists_the_columns(datasets: Any, tmp_path: Path) -> None:
    path = save(datasets, tmp_path / "pets", {"train": 2}, image="img")
    with pytest.raises(ValueError, match=r"no column image but img, label, note: set image_col"):
        module(path).setup("fit")


def test_labels_in_words_are_an_error_that_says_how_to_number_them(
    datasets: Any, tmp_path: Path
) -> None:
    path = save(datasets, tmp_path / "pets", {"train": 2})
    with pytest.raises(ValueError, match=r"column note of .* one ClassLabel"):
        module(path, label_column="note").setup("fit")


def test_corrupt_image_is_an_error_that_names_the_row(datasets: Any, tmp_path: Path) -> None:
    good = io.BytesIO()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(good, format="PNG")
    rows = {
        "image": [{"bytes": good.getvalue(), "path": None}, {"bytes": b"cut off", "path": None}],
        "label": [0, 1],
    }
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    split = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"validation": split}).save_to_disk(tmp_path / "pets")
    with pytest.raises(OSError, match=r"row 1 of .*pets, split validation cannot be read"):
        list(module(str(tmp_path / "pets")).val_dataloader())


def test_columns_that_are_not_asked_for_are_not_decoded(datasets: Any, tmp_path: Path) -> None:
    table = columns(2) | {"thumbnail": [{"bytes": b"broken", "path": None}] * 2}
    features = {"image": datasets.Image(), "label": datasets.Value("int64")}
    features |= {"thumbnail": datasets.Image(), "note": datasets.Value("string")}
    split = datasets.Dataset.from_dict(table, features=datasets.Features(features))
    datasets.DatasetDict({"validation": split}).save_to_disk(tmp_path / "pets")
    assert len(list(module(str(tmp_path / "pets")).val_dataset())) == 2


def test_absent_package_is_an_error_that_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'lightning-dist\[datasets\]'"):
        module("pets").setup("fit")


def splits_of(datasets: Any, path: Path, splits: dict[str, tuple[list[Any], Any]]) -> str:
    """Save a DatasetDict whose splits have the given labels and types of labels."""
    saved = {}
    for split, (labels, kind) in splits.items():
        rows = {"image": [Image.new("RGB", (9, 9))] * len(labels), "label": labels}
        features = datasets.Features({"image": datasets.Image(), "label": kind(datasets)})
        saved[split] = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict(saved).save_to_disk(path)
    return str(path)


def named(*names: str) -> Any:
    return lambda datasets: datasets.ClassLabel(names=list(names))


def number(datasets: Any) -> Any:
    return datasets.Value("int64")


def real(datasets: Any) -> Any:
    return datasets.Value("float32")


CAT_DOG, DOG_CAT, NUMBERS = (
    ([0, 1], named("cat", "dog")),
    ([0], named("dog", "cat")),
    ([0, 1], number),
)
REFUSED_SPLITS = {
    # train, validation and test, and the message
    "other order": (CAT_DOG, DOG_CAT, CAT_DOG, "train has cat, dog and validation has dog, cat"),
    "other order in test": (CAT_DOG, CAT_DOG, DOG_CAT, "test has dog, cat.*one ClassLabel"),
    "train -1": (([0, -1], number), NUMBERS, NUMBERS, "split train has the label -1"),
    "validation -1": (NUMBERS, ([-1, -1], number), NUMBERS, "split validation has the label -1"),
    "test partly -1": (NUMBERS, NUMBERS, ([0, -1], number), "split test has the label -1"),
    "test too large": (NUMBERS, NUMBERS, ([0, 2], number), "split test has the label 2 and num_cl"),
    "missing label": (([0, None], number), NUMBERS, NUMBERS, "split train, has .* such as None"),
    "real numbers": (([0.0, 1.5], real), NUMBERS, NUMBERS, "are no whole numbers"),
}


@pytest.mark.parametrize("name", REFUSED_SPLITS)
def test_splits_that_contradict_are_refused_before_training(
    datasets: Any, tmp_path: Path, name: str
) -> None:
    *splits, message = REFUSED_SPLITS[name]
    saved = dict(zip(("train", "validation", "test"), splits, strict=True))
    data = module(splits_of(datasets, tmp_path / "pets", saved), test_split="test")
    with pytest.raises(ValueError, match=message):
        data.setup("fit")


def test_a_test_split_without_labels_is_no_test_split(
    datasets: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    splits = {"train": CAT_DOG, "validation": CAT_DOG, "test": ([-1] * 3, named("cat", "dog"))}
    data = module(splits_of(datasets, tmp_path / "pets", splits), test_split="test")
    data.setup("fit")
    assert "split test of" in caplog.text
    assert "the test uses split validation" in caplog.text
    assert [labels.tolist() for _, labels in data.test_dataloader()] == [[0, 1]]
    assert [len(images) for images, _ in data.predict_dataloader()] == [3]
