"""Tests that images and masks are read from the files of each data set, and checked."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from lightning_dist.data.segmentation import (
    CityscapesDataModule,
    MaskFolderDataModule,
    VOC2012DataModule,
)
from lightning_dist.data.segmentation_base import (
    MaskedImages,
    Pair,
    RandomScale,
    SegmentationDataModule,
)

# The values of PAPER.md
TRAINED = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
OTHERS = [*(i for i in range(34) if i not in TRAINED), 255]
SIZE = (32, 64)


def write(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    return path


def write_cityscapes(root: Path, ids: list[int]) -> None:
    rng = np.random.default_rng(0)
    for split, cities in {"train": ["aachen", "bochum"], "val": ["frankfurt"]}.items():
        for city in cities:
            for number in range(2):
                name = f"{city}_{number:06}_000019"
                image, mask = rng.integers(0, 256, (*SIZE, 3)), rng.choice(ids, SIZE)
                write(root / "leftImg8bit" / split / city / f"{name}_leftImg8bit.png", image)
                folder = root / "gtFine" / split / city
                write(folder / f"{name}_gtFine_labelIds.png", mask)
                write(folder / f"{name}_gtFine_color.png", image)


def write_voc(root: Path) -> None:
    rng = np.random.default_rng(0)
    base = root / "VOCdevkit" / "VOC2012"
    (base / "ImageSets" / "Segmentation").mkdir(parents=True)
    for split, names in {"train": ["2007_000032", "2007_000039"], "val": ["2007_000033"]}.items():
        (base / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("\n".join(names) + "\n")
        for name in names:
            write(base / "JPEGImages" / f"{name}.jpg", rng.integers(0, 256, (*SIZE, 3)))
            mask = Image.fromarray(rng.choice([*range(21), 255], SIZE).astype(np.uint8))
            mask.putpalette(rng.integers(0, 256, 768).tolist())
            (base / "SegmentationClass").mkdir(exist_ok=True)
            mask.save(base / "SegmentationClass" / f"{name}.png")


def write_folders(root: Path, ids: list[int]) -> None:
    rng = np.random.default_rng(0)
    for split in ("training", "validation"):
        for name in ("a/one", "two"):
            write(root / "images" / split / f"{name}.jpg", rng.integers(0, 256, (*SIZE, 3)))
            write(root / "annotations" / split / f"{name}.png", rng.choice(ids, SIZE))


@pytest.fixture
def cityscapes(tmp_path: Path) -> Path:
    write_cityscapes(tmp_path, TRAINED + OTHERS)
    return tmp_path


def ids_of(path: Path) -> np.ndarray:
    return np.array(Image.open(path))


def test_cityscapes_ids_become_the_classes_that_train(cityscapes: Path):
    data = CityscapesDataModule(root=cityscapes)
    assert data.num_classes == len(data.class_names or []) == len(data.class_colors or []) == 19
    assert (data.class_names or [])[0] == "road"
    assert (data.class_names or [])[18] == "bicycle"
    dataset = data.val_dataset()
    assert len(dataset) == 2
    for (_, mask), pair in zip((dataset[i] for i in range(2)), data.pairs("val"), strict=True):
        expected = np.full(SIZE, 255)
        for label, identity in enumerate(TRAINED):
            expected[ids_of(pair.mask) == identity] = label
        assert mask.dtype == torch.int64
        np.testing.assert_array_equal(mask, expected)


def test_the_published_input_is_bgr_less_the_mean(cityscapes: Path):
    mean = [104.00698793, 116.66876762, 122.67891434]
    data = CityscapesDataModule(
        root=cityscapes, bgr=True, mean=[m / 255 for m in mean], std=[1 / 255] * 3
    )
    image, _ = data.val_dataset()[1]
    rgb = np.array(Image.open(data.pairs("val")[1].image)).astype(float)
    expected = (rgb[..., ::-1] - mean).transpose(2, 0, 1)
    np.testing.assert_allclose(image, expected, atol=1e-4)
    assert torch.equal(data.prepare(Image.open(data.pairs("val")[1].image)), image)
    np.testing.assert_array_equal(data.to_pixels(image[None])[0], rgb.transpose(2, 0, 1))


class Coded(SegmentationDataModule):
    """A data set whose images have the class of the mask in their red channel."""

    num_classes = 3
    class_names = None

    def __init__(self, folder: Path, **settings: object) -> None:
        super().__init__(mean=[0.5] * 3, std=[1 / 255] * 3, **settings)  # type: ignore[arg-type]
        self.folder = folder
        self.location = str(folder)

    def pairs(self, split: str) -> list[Pair]:
        found = []
        for number in range(4):
            mask = np.zeros(SIZE)
            mask[:, 10 + number :] = 1
            mask[12:, 40:] = 2
            pixels = np.stack([100 * mask, mask, mask], axis=-1)
            stem = str(self.folder / str(number))
            found.append(
                Pair(write(Path(stem + ".png"), pixels), write(Path(stem + "m.png"), mask))
            )
        return found


@pytest.mark.parametrize("crop", [(20, 30), (48, 80)], ids=["crop", "pad"])
def test_augmentation_moves_image_and_mask_alike_and_fills_with_what_does_not_count(
    tmp_path: Path, crop: tuple[int, int]
):
    data = Coded(tmp_path, crop_size=crop, scales=(0.5, 1.0, 2.0), global_batch_size=4)
    sizes, flipped = set(), 0
    for epoch in range(12):
        data_loader = data.train_dataloader()
        data_loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        ((images, masks),) = data_loader
        assert images.shape == (4, 3, *crop)
        assert masks.shape == (4, *crop)
        for image, mask in zip(data.to_pixels(images), masks, strict=True):
            inside = mask != 255
            sizes.add(int(inside.sum()))
            # The padding is the mean, so it is 0 when normalised.
            assert (image[:, ~inside] == 128).all()
            right = image[0].float() / 100
            # Exclude pixels where resizing blends two classes.
            close = (right - mask).abs()[inside] < 0.5
            assert close.float().mean() > 0.9
            seen = mask[mask.shape[0] // 2][mask[mask.shape[0] // 2] < 3]
            flipped += bool(len(seen) and seen[0] > seen[-1])
    assert flipped > 4
    if crop == (48, 80):
        assert {16 * 32, 32 * 64, 48 * 80} <= sizes


def test_augmentation_depends_on_seed_epoch_and_index_alone(tmp_path: Path):
    def batch(epoch: int, **settings: object) -> torch.Tensor:
        loader = Coded(tmp_path, crop_size=(20, 30), global_batch_size=4, **settings)
        loader_of = loader.train_dataloader()
        loader_of.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        return next(iter(loader_of))[0]

    assert torch.equal(batch(1), batch(1, num_workers=2))
    assert not torch.equal(batch(1), batch(2))
    assert not torch.equal(batch(1), batch(1, seed=5))


def test_every_factor_is_drawn():
    scale = RandomScale([0.5, 1.0, 1.5])
    image, mask = torch.zeros(3, 20, 30), torch.zeros(1, 20, 30)
    sizes = {tuple(scale(image, mask)[0].shape[1:]) for _ in range(60)}
    assert sizes == {(10, 15), (20, 30), (30, 45)}


def test_evaluation_can_resize(cityscapes: Path):
    data = CityscapesDataModule(root=cityscapes, eval_size=(16, 16), eval_batch_size=2)
    images, masks = next(iter(data.val_dataloader()))
    assert (images.shape, masks.shape) == ((2, 3, 16, 16), (2, 16, 16))


def test_voc_and_ade_are_read_in_their_layouts(tmp_path: Path):
    write_voc(tmp_path / "voc")
    voc = VOC2012DataModule(root=tmp_path / "voc")
    assert len(voc.class_names or []) == 21
    assert (len(voc.train_dataset()), len(voc.test_dataset())) == (2, 1)
    np.testing.assert_array_equal(voc.val_dataset()[0][1], ids_of(voc.pairs("val")[0].mask))

    write_folders(tmp_path / "ade", [0, 1, 2, 3])
    ade = MaskFolderDataModule(root=tmp_path / "ade", num_classes=3, reduce_zero_label=True)
    assert len(ade.train_dataset()) == 2
    ids = ids_of(ade.pairs("val")[0].mask).astype(int)
    np.testing.assert_array_equal(ade.val_dataset()[0][1], np.where(ids == 0, 255, ids - 1))
    plain = MaskFolderDataModule(root=tmp_path / "ade", num_classes=4)
    np.testing.assert_array_equal(plain.val_dataset()[0][1], ids)


@pytest.mark.parametrize(
    "make",
    [
        lambda root: CityscapesDataModule(root=root / "no"),
        lambda root: VOC2012DataModule(root=root / "no"),
        lambda root: MaskFolderDataModule(root=root / "no", num_classes=2),
    ],
    ids=["cityscapes", "voc", "folder"],
)
def test_a_missing_data_set_is_an_error_that_names_the_layout(
    tmp_path: Path, make: Callable[[Path], SegmentationDataModule]
):
    with pytest.raises(FileNotFoundError, match=r"no.*expected") as caught:
        make(tmp_path).setup("fit")
    assert str(tmp_path) in str(caught.value)


def test_a_missing_counterpart_is_an_error_that_names_the_file(cityscapes: Path):
    data = CityscapesDataModule(root=cityscapes)
    image, mask = data.pairs("train")[2]
    content = mask.read_bytes()
    mask.unlink()
    with pytest.raises(FileNotFoundError, match=mask.name):
        data.setup("fit")
    mask.write_bytes(content)
    image.unlink()
    with pytest.raises(FileNotFoundError, match=mask.name):
        data.setup("fit")


@pytest.mark.parametrize("lone", ["images", "annotations"])
def test_a_missing_counterpart_in_folders_is_an_error_that_names_the_file(
    tmp_path: Path, lone: str
):
    write_folders(tmp_path, [0, 1])
    write(tmp_path / lone / "training" / "b" / "extra.png", np.zeros(SIZE))
    with pytest.raises(FileNotFoundError, match=r"b/extra\.png"):
        MaskFolderDataModule(root=tmp_path, num_classes=2).setup("fit")


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        pytest.param(np.full(SIZE, 34), r"m\.png has the ids 34, which are neither", id="id"),
        pytest.param(np.zeros((32, 60)), r"i\.png has 32 x 64 .*m\.png 32 x 60", id="size"),
        pytest.param(np.zeros((*SIZE, 3)), r"m\.png is no mask .* 32 x 64 x 3", id="channels"),
    ],
)
def test_a_mask_that_does_not_fit_is_an_error_that_names_the_file(
    tmp_path: Path, mask: np.ndarray, message: str
):
    pair = Pair(write(tmp_path / "i.png", np.zeros((*SIZE, 3))), write(tmp_path / "m.png", mask))
    dataset = MaskedImages([pair], TRAINED, OTHERS, lambda image, mask: (image, mask))
    with pytest.raises(ValueError, match=message):
        dataset[0]


def test_a_damaged_file_is_an_error_that_names_it(tmp_path: Path):
    pair = Pair(write(tmp_path / "i.png", np.zeros((*SIZE, 3))), tmp_path / "m.png")
    pair.mask.write_bytes(pair.image.read_bytes()[:60])
    dataset = MaskedImages([pair], [0], [], lambda image, mask: (image, mask))
    with pytest.raises(OSError, match=r"m\.png cannot be read as a mask"):
        dataset[0]


def folders(root: Path, train: list[np.ndarray], val: np.ndarray | None = None) -> Path:
    """Write images, and masks with the given pixels, in the layout of MaskFolderDataModule."""
    val = train[0] if val is None else val
    for split, masks in {"training": train, "validation": [val]}.items():
        for number, mask in enumerate(masks):
            shape = (*mask.shape[:2], 3)
            write(root / "images" / split / f"{number}.png", np.zeros(shape))
            path = root / "annotations" / split / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask if mask.dtype == bool else mask.astype(np.uint8)).save(path)
    return root


HALF = np.repeat([[0], [1]], 8, axis=0) * np.ones((1, 16), dtype=int)  # ids 0 and 1
ALL = np.full((16, 16), 255)
REFUSED_MASKS = {
    # masks, settings, and the message
    "0 and 255": ([255 * HALF], {}, "ids 0, 255; the classes have the ids 0 to 1, and 255 are"),
    "0 and 1 for 1 and 2": ([HALF], {"reduce_zero_label": True}, "ids 0, 1; .* ids 1 to 2"),
    "one class": ([0 * HALF], {}, "of one class only: they contain the ids 0;"),
    "all ignored": ([ALL], {}, "the ids 255"),
    "late id": ([HALF, HALF + 1], {}, r"1\.png has the ids 2, which are neither"),
}


@pytest.mark.parametrize("name", REFUSED_MASKS)
def test_masks_that_teach_nothing_are_refused_with_their_ids(tmp_path: Path, name: str):
    masks, settings, message = REFUSED_MASKS[name]
    data = MaskFolderDataModule(root=folders(tmp_path, masks), num_classes=2, **settings)
    with pytest.raises(ValueError, match=message):
        data.setup("fit")


def test_a_validation_split_that_is_ignored_is_refused(tmp_path: Path):
    data = MaskFolderDataModule(root=folders(tmp_path, [HALF], ALL), num_classes=2)
    with pytest.raises(ValueError, match=r"the val masks of .* no class only"):
        data.setup("fit")


SPARSE = np.where(np.arange(256).reshape(16, 16) < 10, HALF, 255)
SPARSE[0, 0] = 1
DOUBTFUL_MASKS = {
    "missing class": ([HALF], 3, "have no pixel of the ids 2: they contain the ids 0, 1"),
    "mostly ignored": ([SPARSE], 2, "have 96.1% of ignored pixels"),
}


@pytest.mark.parametrize("name", DOUBTFUL_MASKS)
def test_doubtful_masks_are_warned_about(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
):
    masks, num_classes, message = DOUBTFUL_MASKS[name]
    MaskFolderDataModule(root=folders(tmp_path, masks), num_classes=num_classes).setup("fit")
    assert message in caplog.text


READ_MASKS = {
    # masks, settings, and the labels of the upper and the lower half
    "one bit": ([HALF.astype(bool)], {}, [0, 1]),
    "black and white": ([255 * HALF], {"class_ids": [0, 255]}, [0, 1]),
    "zero ignored": ([HALF * 2, HALF], {"reduce_zero_label": True}, [255, 1]),
}


@pytest.mark.parametrize("name", READ_MASKS)
def test_ids_become_labels(tmp_path: Path, name: str):
    masks, settings, labels = READ_MASKS[name]
    data = MaskFolderDataModule(root=folders(tmp_path, masks), num_classes=2, **settings)
    data.setup("fit")
    _, mask = data.val_dataset()[0]
    assert mask.tolist() == [[labels[0]] * 16] * 8 + [[labels[1]] * 16] * 8


def test_masks_are_of_the_upright_picture(tmp_path: Path):
    folders(tmp_path, [HALF[:, :8]])  # 16 high, 8 wide
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: the file is 16 wide
    file = tmp_path / "images" / "validation" / "0.png"
    stored = np.rot90(np.stack([HALF[:, :8] * 200] * 3, axis=-1), 1).astype(np.uint8)
    Image.fromarray(stored).save(file, exif=exif)
    data = MaskFolderDataModule(root=tmp_path, num_classes=2, mean=[0.0] * 3, std=[1.0] * 3)
    image, mask = data.val_dataset()[0]
    assert torch.equal((image[0] > 0.5).long(), mask)


def test_a_lossy_mask_and_class_ids_that_do_not_fit_are_refused(tmp_path: Path):
    folders(tmp_path, [HALF])
    for split in ("training", "validation"):
        file = tmp_path / "annotations" / split / "0.png"
        Image.open(file).save(file.with_suffix(".jpg"))
        file.unlink()
    with pytest.raises(ValueError, match=r"0\.jpg is a JPEG"):
        MaskFolderDataModule(root=tmp_path, num_classes=2).setup("fit")
    for settings in ({"class_ids": [0]}, {"class_ids": [1, 2], "reduce_zero_label": True}):
        with pytest.raises(ValueError, match=r"class_ids is .* num_classes is 2"):
            MaskFolderDataModule(root=tmp_path, num_classes=2, **settings)


def test_the_command_and_python_have_the_same_default(tmp_path: Path):
    conf = Path(__file__).resolve().parents[2] / "conf"
    settings = OmegaConf.load(conf / "data" / "mask_folder.yaml")
    data = MaskFolderDataModule(root=tmp_path, num_classes=2)
    assert settings.reduce_zero_label == data.reduce_zero_label
