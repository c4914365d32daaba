"""Tests that images and boxes are read from the files of each data set, and checked."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from formats import write_yolo
from lightning_dist.data.detection import CocoDataModule, VOCDetectionDataModule, YoloDataModule
from lightning_dist.data.image_files import warn_once
from lightning_dist.data.scenes import SceneDetectionDataModule

SIZE = (32, 48)


def write_image(path: Path, size: tuple[int, int] = SIZE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(len(path.name)).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def coco() -> dict[str, Any]:
    """Return COCO annotations of three images, of which one has no boxes, and of a crowd region."""
    return {
        "images": [
            {"id": 5, "file_name": "a.jpg", "height": 32, "width": 48},
            {"id": 3, "file_name": "b.jpg", "height": 32, "width": 48},
            {"id": 9, "file_name": "c.jpg", "height": 32, "width": 48},
        ],
        "annotations": [
            {"id": 1, "image_id": 5, "category_id": 90, "bbox": [1, 2, 10, 20], "area": 150}
            | {"iscrowd": 0},
            {"id": 2, "image_id": 5, "category_id": 7, "bbox": [0, 0, 48, 32], "area": 900}
            | {"iscrowd": 1},
            {"id": 3, "image_id": 3, "category_id": 7, "bbox": [5, 6, 7, 8], "area": 40}
            | {"iscrowd": 0},
        ],
        "categories": [{"id": 90, "name": "toothbrush"}, {"id": 7, "name": "train"}],
    }


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Write a data set in COCO's layout."""
    (tmp_path / "annotations").mkdir()
    for split in ("train2017", "val2017"):
        for name in ("a", "b", "c"):
            write_image(tmp_path / split / f"{name}.jpg")
        write_coco(tmp_path, coco(), split)
    return tmp_path


def write_coco(root: Path, content: object, split: str = "train2017") -> None:
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


def module(root: Path, **settings: Any) -> CocoDataModule:
    return CocoDataModule(root=root, num_classes=2, **settings)


def test_coco_categories_are_labels_in_order_and_crowds_are_for_evaluation(root: Path):
    data = module(root, flip=0.0)
    data.setup()
    assert data.class_names == ["train", "toothbrush"]
    train = [data.train_dataset()[index] for index in range(3)]
    assert [target["boxes"].tolist() for _, target in train] == [
        [[1, 2, 11, 22]],
        [[5, 6, 12, 14]],
        [],
    ]
    assert [target["labels"].tolist() for _, target in train] == [[1], [0], []]
    assert all(target["boxes"].shape[1:] == (4,) for _, target in train)
    image, target = data.val_dataset()[0]
    assert (image.dtype, tuple(image.shape)) == (torch.float32, (3, *SIZE))
    assert 0 <= image.min() < image.max() <= 1
    assert target["iscrowd"].tolist() == [0, 1]
    assert target["area"].tolist() == [150, 900]
    assert type(target["boxes"]) is torch.Tensor


def test_images_without_boxes_can_be_left_out_of_training(root: Path):
    data = module(root, skip_empty=True, global_batch_size=3)
    assert len(data.train_dataset()) == 2
    assert len(data.val_dataset()) == 3
    images, targets = next(iter(data.train_dataloader()))
    assert (len(images), len(targets)) == (2, 2)


def test_boxes_are_mirrored_with_their_image(root: Path):
    plain, mirrored = (module(root, flip=p).train_dataset()[0] for p in (0.0, 1.0))
    torch.testing.assert_close(mirrored[0], plain[0].flip(2))
    assert mirrored[1]["boxes"].tolist() == [[48 - 11, 2, 48 - 1, 22]]


def test_a_box_without_area_is_left_out_and_named(root: Path, caplog: pytest.LogCaptureFixture):
    content = coco()
    content["annotations"][2]["bbox"] = [5, 6, 0, 8]
    write_coco(root, content)
    with caplog.at_level(logging.WARNING):
        dataset = module(root).train_dataset()
    assert dataset[1][1]["boxes"].shape == (0, 4)
    assert "1 boxes without area in their image are left out" in caplog.text
    assert "b.jpg" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"category_id": 8}, r"annotation 1 .*of a\.jpg, has category 8", id="class"),
        pytest.param({"image_id": 6}, r"annotation 1 in .* is of image 6", id="image"),
    ],
)
def test_an_annotation_of_something_unknown_is_an_error(root: Path, change: dict, message: str):
    content = coco()
    content["annotations"][0] |= change
    write_coco(root, content)
    with pytest.raises(ValueError, match=message):
        module(root).setup("fit")


def test_broken_coco_files_are_errors_that_name_them(root: Path):
    with pytest.raises(ValueError, match=r"train2017\.json has 2 categories and num_classes is 80"):
        CocoDataModule(root=root).setup("fit")
    (root / "train2017" / "b.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 3 images are missing: .*b\.jpg"):
        module(root).setup("fit")
    write_coco(root, [1])
    with pytest.raises(ValueError, match=r"not of COCO's form"):
        module(root).setup("fit")
    (root / "annotations" / "instances_train2017.json").write_text("{")
    with pytest.raises(ValueError, match=r"instances_train2017\.json is no JSON"):
        module(root).setup("fit")
    (root / "annotations" / "instances_train2017.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"instances_train2017\.json is missing"):
        module(root).setup("fit")


OBJECT = """<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>
<xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"""


def write_voc(root: Path, objects: str) -> Path:
    base = root / "VOCdevkit" / "VOC2012"
    (base / "ImageSets" / "Main").mkdir(parents=True)
    (base / "Annotations").mkdir()
    for split in ("train", "val"):
        (base / "ImageSets" / "Main" / f"{split}.txt").write_text(f"2008_{split}\n")
        write_image(base / "JPEGImages" / f"2008_{split}.jpg")
        file = base / "Annotations" / f"2008_{split}.xml"
        file.write_text(f"<annotation>{objects}</annotation>")
    return base / "Annotations" / "2008_train.xml"


def test_vocs_boxes_count_from_one_and_difficult_ones_are_ignored(tmp_path: Path):
    cat = OBJECT.format(name="cat", difficult=0, x1=1, y1=2, x2=48, y2=32)
    hidden = OBJECT.format(name="sofa", difficult=1, x1=5, y1=5, x2=9, y2=9)
    write_voc(tmp_path, cat + hidden)
    data = VOCDetectionDataModule(root=tmp_path, flip=0.0)
    assert data.train_dataset()[0][1]["boxes"].tolist() == [[0, 1, 48, 32]]
    target = data.val_dataset()[0][1]
    assert target["labels"].tolist() == [7, 17]
    assert target["iscrowd"].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("objects", "message"),
    [
        (OBJECT.format(name="unicorn", difficult=0, x1=1, y1=2, x2=4, y2=3), "unknown class"),
        ("<object><name>cat</name></object>", "a cat without a box"),
        ("<object>", "no XML"),
    ],
)
def test_broken_voc_files_are_errors_that_name_them(tmp_path: Path, objects: str, message: str):
    file = write_voc(tmp_path, objects)
    with pytest.raises(ValueError, match=rf"2008_train\.xml .*{message}"):
        VOCDetectionDataModule(root=tmp_path).setup("fit")
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"2008_train\.xml is missing"):
        VOCDetectionDataModule(root=tmp_path).setup("fit")
    with pytest.raises(FileNotFoundError, match="no Pascal VOC 2007"):
        VOCDetectionDataModule(root=tmp_path, year=2007).setup("fit")


def yolo(root: Path, text: str = "1 0.5 0.25 0.5 0.5\n\n0 0.25 0.5 0.25 1\n") -> YoloDataModule:
    pixels = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    for split in ("train", "val"):
        write_yolo(root, split, "a/one", pixels, text)
        write_yolo(root, split, "two", pixels, "")
    return YoloDataModule(root=root, class_names=["cat", "dog"], flip=0.0)


def test_yolos_boxes_are_centre_and_size_in_parts_of_the_image(tmp_path: Path):
    dataset = yolo(tmp_path).train_dataset()
    assert dataset[0][1]["boxes"].tolist() == [[12, 0, 36, 16], [6, 0, 18, 32]]
    assert dataset[0][1]["labels"].tolist() == [1, 0]
    assert dataset[1][1]["boxes"].shape == (0, 4)


@pytest.mark.parametrize(
    ("text", "message"),
    [("0 0.5 0.5 0.5", "line 1: .*is not 'class x y"), ("\n2 .5 .5 .5 .5", "line 2: class 2")],
)
def test_broken_yolo_lines_are_errors_that_name_them(tmp_path: Path, text: str, message: str):
    with pytest.raises(ValueError, match=rf"one\.txt, {message}"):
        yolo(tmp_path, text).setup("fit")


def test_broken_yolo_folders_are_errors_that_name_the_file(tmp_path: Path):
    data = yolo(tmp_path)
    (tmp_path / "labels" / "train" / "three.txt").write_text("")
    with pytest.raises(FileNotFoundError, match=r"three\.txt have no image"):
        data.setup("fit")
    (tmp_path / "labels" / "train" / "three.txt").unlink()
    write_image(tmp_path / "images" / "train" / "two.jpg")
    with pytest.raises(ValueError, match=r"several images share .*two\.txt"):
        data.setup("fit")
    with pytest.raises(FileNotFoundError, match=r"images/test is missing"):
        YoloDataModule(root=tmp_path, class_names=["cat"], train="test").setup("fit")


def test_scenes_for_detection_are_those_for_segmentation():
    data = SceneDetectionDataModule(train_size=3, val_size=2, test_size=2, global_batch_size=3)
    images, targets = next(iter(data.val_dataloader()))
    scene = data.scene("val", 1)
    torch.testing.assert_close(images[1], scene.image / 255)
    assert torch.equal(targets[1]["boxes"], scene.boxes)
    assert torch.equal(targets[1]["labels"], scene.labels - 1)
    assert data.class_names[int(targets[1]["labels"][0])].isdigit()


@pytest.fixture(autouse=True)
def _fresh_warnings():
    warn_once.cache_clear()


ANNOTATION = {"id": 1, "image_id": 5, "category_id": 90, "bbox": [1, 2, 10, 20]}
BROKEN_COCO: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    # changes of the first annotation and of its image, and the message; a None removes the item
    "no bbox": ({"bbox": None}, {}, "bbox of annotation 1 in .*, of a.jpg, is None"),
    "empty bbox": ({"bbox": []}, {}, r"annotation 1 .* is \[\]: give a list of 4 numbers"),
    "words": ({"bbox": ["1", "2", "3", "4"]}, {}, "annotation 1 .* give a list of 4 numbers"),
    "NaN": ({"bbox": [1, 2, float("nan"), 4]}, {}, "annotation 1 .* list of 4 numbers"),
    "too large": ({"bbox": [1, 2, 10**400, 4]}, {}, "annotation 1 .* list of 4 numbers"),
    "no category": ({"category_id": None}, {}, "annotation 1 .*a.jpg, has no category_id"),
    "no image": ({"image_id": None}, {}, "annotation 1 .* has no image_id"),
    "no image, no id": ({"id": None, "image_id": None}, {}, "annotation number 1 .without an id"),
    "crowd in words": ({"iscrowd": "no"}, {}, "annotation 1 .* iscrowd 'no'"),
    "image without id": ({}, {"id": None}, r"image number 1 \(without an id\) in .* has no id"),
    "image without file": ({}, {"file_name": None}, "image 5 in .* has no file_name"),
    "image twice": ({}, {"id": 3}, "several images with the id 3"),
    "id is a list": ({}, {"id": [1]}, r"has the id \[1\]"),
    "category is a list": ({"category_id": [1]}, {}, r"has the category_id \[1\]"),
    "other size": ({}, {"width": 40}, r"a.jpg has 48 x 32 pixels .*annotations say 40 x 32"),
}


@pytest.mark.parametrize("name", BROKEN_COCO)
def test_a_broken_coco_annotation_is_an_error_that_names_it(root: Path, name: str):
    annotation, image, message = BROKEN_COCO[name]
    content = coco()
    for entry, changes in ((content["annotations"][0], annotation), (content["images"][0], image)):
        entry |= changes
        for key in [key for key, value in changes.items() if value is None]:
            entry.pop(key)
    write_coco(root, content)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        module(root).setup("fit")


def test_null_is_as_good_as_missing_for_optional_items(root: Path):
    content = coco()
    content["annotations"][0] |= {"area": None, "iscrowd": None, "id": None}
    content["images"][0] |= {"width": None}
    content["images"][1] |= {"width": True, "height": True}
    write_coco(root, content)
    data = module(root, flip=0.0)
    data.setup("fit")
    target = data.train_dataset()[0][1]
    assert target["boxes"].tolist() == [[1, 2, 11, 22]]
    assert target["area"].tolist() == [200]


@pytest.mark.parametrize("usual", [True, False])
def test_boxes_come_to_their_images_in_the_order_of_the_file(root: Path, usual: bool):
    """Annotations that lack an optional item are checked one by one, with the same result."""
    content = coco()
    sides = np.random.default_rng(0).uniform(1, 12, (20, 4)).round(2).tolist()
    content["annotations"] = [
        {"id": number, "image_id": (5, 3)[number % 3 == 0], "category_id": (7, 90)[number % 2]}
        | {"bbox": bbox, "iscrowd": int(number % 7 == 0), "area": number + 0.5}
        | {"segmentation": [[1, 2.5, -3e2, 4], [5]] if number % 5 else {"counts": [1, 2]}}
        for number, bbox in enumerate(sides)
    ]
    content["annotations"][4] |= {"note": 'a "segmentation": [[1]] in a text'}
    expected = {5: [], 3: [], 9: []}
    for one in content["annotations"]:
        x, y, width, height = one["bbox"]
        expected[one["image_id"]].append(
            ([x, y, x + width, y + height], one["category_id"] // 90, one["iscrowd"], one["area"])
        )
    if not usual:
        del content["annotations"][0]["iscrowd"], expected[3][0]
        content["annotations"][0]["bbox"] = [0, 0, 0, 0]
    write_coco(root, content, "val2017")
    data = module(root).val_dataset()
    for index, boxes in enumerate(expected.values()):
        target = data[index][1]
        columns = (target[name].tolist() for name in ("labels", "iscrowd", "area"))
        torch.testing.assert_close(
            target["boxes"], torch.tensor([box for box, *_ in boxes]).reshape(-1, 4), rtol=0, atol=0
        )
        assert list(zip(*columns, strict=True)) == [tuple(rest) for _, *rest in boxes]


ODD_BOXES: dict[str, tuple[list[float], list[float] | None]] = {
    # x, y, width and height in COCO's form, and what is trained on as x1, y1, x2, y2
    "beyond the image": ([60, 40, 5, 5], None),
    "left of the image": ([-9, 2, 5, 5], None),
    "no width": ([3, 3, 0, 5], None),
    "tiny width": ([3, 3, 1e-9, 5], None),
    "negative width": ([9, 3, -5, 5], None),
    "over the edge": ([40, -3, 20, 10], [40, 0, 48, 7]),
    "on the edge": ([48, 3, 5, 5], None),
}


@pytest.mark.parametrize("sized", [True, False], ids=["size", "no-size"])
@pytest.mark.parametrize("name", ODD_BOXES)
def test_boxes_are_clipped_and_dropped_in_training_and_validation(
    root: Path, caplog: pytest.LogCaptureFixture, name: str, sized: bool
):
    bbox, expected = ODD_BOXES[name]
    content = coco()
    content["annotations"][1] |= {"bbox": bbox, "iscrowd": 0}
    for image in content["images"] if not sized else []:
        del image["width"]
    for split in ("train2017", "val2017"):
        write_coco(root, content, split)
    data = module(root, flip=0.0)
    data.setup("fit")
    for dataset in (data.train_dataset(), data.val_dataset()):
        boxes = dataset[0][1]["boxes"].tolist()
        assert boxes == [[1, 2, 11, 22], *([] if expected is None else [expected])]
    if expected is None or sized:
        assert "a.jpg" in caplog.text


def test_one_warning_counts_all_boxes(root: Path, caplog: pytest.LogCaptureFixture):
    content = coco()
    content["annotations"][0]["bbox"] = [1, 2, 0, 0]
    content["annotations"][2]["bbox"] = [60, 60, 2, 2]
    for split in ("train2017", "val2017"):
        write_coco(root, content, split)
    content["annotations"][1] |= {"iscrowd": 0}
    write_coco(root, content)
    module(root).setup("fit")
    assert caplog.text.count("2 boxes without area in their image are left out") == 2
    assert len(caplog.records) == 2


def test_an_image_is_upright_for_its_boxes(root: Path):
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.zeros((48, 32, 3), np.uint8)  # stored as the turned camera saw it
    for split in ("train2017", "val2017"):
        Image.fromarray(pixels).save(root / split / "a.jpg", exif=exif)
    data = module(root)
    data.setup("fit")
    assert data.val_dataset()[0][0].shape == (3, 32, 48)


EMPTY_YOLO = {
    "no folder": (None, FileNotFoundError, r"labels/train is missing: expected a text file"),
    "no file": ({}, ValueError, "the train set of .* has 2 images and no box"),
    "no line": ({"two.txt": "\n"}, ValueError, "the train set of .* has 2 images and no box"),
    "pixels": ({"two.txt": "0 16 16 8 8"}, ValueError, r"two.txt, line 1: .* are these\s+pixels"),
    "NaN": ({"two.txt": "0 .5 .5 nan .5"}, ValueError, "two.txt, line 1"),
    "negative": ({"two.txt": "0 .5 .5 -.5 .5"}, ValueError, "line 1: .* negative width"),
}


@pytest.mark.parametrize("name", EMPTY_YOLO)
def test_yolo_labels_that_teach_nothing_are_refused(tmp_path: Path, name: str):
    texts, kind, message = EMPTY_YOLO[name]
    data = yolo(tmp_path)
    shutil.rmtree(tmp_path / "labels" / "train")
    for file, text in (texts or {}).items():
        (tmp_path / "labels" / "train").mkdir(exist_ok=True)
        (tmp_path / "labels" / "train" / file).write_text(text)
    if texts == {}:
        (tmp_path / "labels" / "train").mkdir()
    with pytest.raises(kind, match=message):
        data.setup("fit")


def test_yolo_images_without_a_text_file_are_counted_and_links_are_followed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    data = yolo(tmp_path / "data")
    for kind in ("images", "labels"):
        folder = tmp_path / "data" / kind / "train" / "a"
        folder.rename(tmp_path / kind)
        folder.symlink_to(tmp_path / kind)
    (tmp_path / "data" / "labels" / "train" / "classes.txt").write_text("cat\ndog\n")
    (tmp_path / "data" / "labels" / "train" / "._two.txt").write_bytes(b"\xff")
    data.setup("fit")
    assert len(data.train_dataset()[0][1]["boxes"]) == 2
    assert "1 of 2 images in" in caplog.text
    assert "two.txt" in caplog.text


def test_fractions_where_pixels_are_expected_are_refused(root: Path):
    content = coco()
    for annotation in content["annotations"]:
        annotation["bbox"] = [0.1, 0.1, 0.5, 0.5]
    write_coco(root, content)
    with pytest.raises(ValueError, match="they are fractions of its size"):
        module(root).setup("fit")


def test_a_voc_box_that_is_no_number_and_another_size_are_refused(tmp_path: Path):
    cat = OBJECT.format(name="cat", difficult=0, x1="left", y1=2, x2=4, y2=3)
    file = write_voc(tmp_path, cat)
    with pytest.raises(ValueError, match=r"2008_train\.xml has a cat with the box"):
        VOCDetectionDataModule(root=tmp_path).setup("fit")
    size = "<size><width>500</width><height>32</height></size>"
    cat = OBJECT.format(name="cat", difficult=0, x1=1, y1=2, x2=4, y2=3)
    file.write_text(f"<annotation>{size}{cat}</annotation>")
    with pytest.raises(ValueError, match=r"has 48 x 32 pixels .* say 500 x 32"):
        VOCDetectionDataModule(root=tmp_path).setup("fit")
