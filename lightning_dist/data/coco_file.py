"""`CocoFile`: the images, boxes and categories of a file in COCO's format, which are checked."""

import gc
import itertools
import json
import operator
import re
from array import array
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from lightning_dist.data.annotations import AnnotatedFiles
from lightning_dist.data.boxes import as_numbers
from lightning_dist.data.packed import PackedPaths

# Polygons are most of COCO's file, and nobody reads them: as Python lists they take 2 GB.
_POLYGONS = re.compile(rb'"segmentation"\s*:\s*\[(?:\[[\d.,\seE+-]*\][,\s]*)*\]')
_ITEMS = operator.itemgetter("image_id", "category_id", "bbox", "iscrowd", "area")
# Columns with an item for each box: image, label, bbox as a flat list, crowd flag, area.
_Columns = tuple[Iterable[int], Iterable[int], Iterable[float], Iterable[int], Iterable[float]]


class CocoFile:
    """A file of COCO's annotations.

    Args:
        path: the file.

    Raises:
        FileNotFoundError: if the file is missing.
        ValueError: if it is not JSON in COCO's format, or a category has no id or name.

    Attributes:
        categories: the categories, mappings with an ``id`` and a ``name``, sorted by id.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._content = _read_json(path)
        categories = self._content["categories"]
        for number, category in enumerate(categories, start=1):
            for key in ("id", "name"):
                _entry(category, key, f"category {_name(category, number)} in {path}")
        self.categories = sorted(categories, key=lambda x: (isinstance(x["id"], str), x["id"]))

    def images(self, folder: Path) -> AnnotatedFiles:
        """Return the images and their boxes; the label of a category is its place in the order.

        Args:
            folder: the folder of the images.

        Raises:
            ValueError: if an image or an annotation is broken or refers to something unknown; the
                message names it.
        """
        place: dict[Any, int] = {}
        files: list[Path] = []
        sizes = array("i")
        for number, image in enumerate(self._content["images"], start=1):
            what = f"image {_name(image, number)} in {self.path}"
            name, key = _entry(image, "file_name", what), _entry(image, "id", what)
            if key in place:
                raise ValueError(f"{self.path} has several images with the id {key!r}: number them")
            place[key] = len(files)
            files.append(folder / str(name))
            size = image.get("width"), image.get("height")
            known = all(type(side) is int and 0 < side < 2**31 for side in size)  # True is an int
            sizes.extend(size if known else (0, 0))
        label_of = {category["id"]: label for label, category in enumerate(self.categories)}
        columns = _usual_columns(self._content["annotations"], place, label_of)
        if columns is None:
            columns = self._checked_columns(place, label_of, files)
        return _packed(files, sizes, *columns)

    def _checked_columns(
        self, place: dict[Any, int], label_of: dict[Any, int], files: list[Path]
    ) -> _Columns:
        """Return the boxes of all annotations, each of which is checked by itself."""
        owners, labels, sides = array("q"), array("q"), array("d")
        crowd, areas = array("b"), array("d")
        for number, annotation in enumerate(self._content["annotations"], start=1):
            found = self._checked_box(annotation, number, place, label_of, files)
            owners.append(found[0])
            labels.append(found[1])
            sides.extend(found[2])
            crowd.append(found[3])
            areas.append(found[4])
        return owners, labels, sides, crowd, areas

    def _checked_box(
        self,
        annotation: Any,
        number: int,
        place: dict[Any, int],
        label_of: dict[Any, int],
        files: list[Path],
    ) -> tuple[int, int, list[float], int, float]:
        """Return the box of an annotation, or raise an error that says what is wrong with it."""
        what = f"annotation {_name(annotation, number)} in {self.path}"
        owner = place.get(_entry(annotation, "image_id", what))
        if owner is None:
            raise ValueError(
                f"{what} is of image {annotation['image_id']}, which the file does not list: "
                "remove the annotation, or add the image"
            )
        what = f"{what}, of {files[owner].name},"
        category = _entry(annotation, "category_id", what)
        if category not in label_of:
            raise ValueError(
                f"{what} has category {category}, which the file does not list: correct the "
                "annotation, or add the category"
            )
        bbox = as_numbers(annotation.get("bbox"), 4, f"the bbox of {what}")
        area = annotation.get("area")
        crowd = annotation.get("iscrowd") or 0
        if crowd not in (0, 1):
            raise ValueError(f"{what} has iscrowd {crowd!r}: give 0 or 1")
        area = bbox[2] * bbox[3] if area is None else as_numbers([area], 1, what)[0]
        return owner, label_of[category], bbox, int(crowd), area


def _usual_columns(
    annotations: list[Any], place: dict[Any, int], label_of: dict[Any, int]
) -> _Columns | None:
    """Return the boxes of all annotations, or None if one is not in the usual form.

    Then each annotation must be checked by itself, which takes five times as long.
    """
    try:
        images, categories, boxes, crowd, areas = zip(*map(_ITEMS, annotations), strict=True)
        owners = np.fromiter(map(place.__getitem__, images), np.int64)
        labels = np.fromiter(map(label_of.__getitem__, categories), np.int64)
        sides, kinds = np.fromiter(_flat(boxes), np.float64), {*map(type, _flat(boxes))}
        area, kinds_of_area = np.fromiter(areas, np.float64), {*map(type, areas)}
        keys = {*map(type, images), *map(type, categories)}
        lengths = {*map(len, boxes)}
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
    usual = (kinds | kinds_of_area) <= {int, float} and keys <= {int, str} and lengths == {4}
    if not usual or {*map(type, crowd)} != {int} or not {*crowd} <= {0, 1}:
        return None
    if not np.isfinite(sides).all() or not np.isfinite(area).all():
        return None
    return owners, labels, sides, crowd, area


def _packed(
    files: list[Path],
    sizes: array,
    owners: Iterable[int],
    labels: Iterable[int],
    sides: Iterable[float],
    crowd: Iterable[int],
    areas: Iterable[float],
) -> AnnotatedFiles:
    """Return images and boxes as arrays, with the boxes in the order of their images."""
    of_image = np.array(owners, np.int64)
    order = np.argsort(of_image, kind="stable")
    boxes = np.array(sides, np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return AnnotatedFiles(
        PackedPaths(files),
        np.cumsum(np.bincount(of_image, minlength=len(files))),
        np.array(sizes).reshape(-1, 2),
        boxes[order].astype(np.float32),
        np.array(labels, np.int32)[order],
        np.array(crowd, bool)[order],
        np.array(areas, np.float32)[order],
    )


_flat = itertools.chain.from_iterable


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: expected COCO's annotations there")
    text = _POLYGONS.sub(b'"segmentation":0', path.read_bytes())
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON ({error}): restore it") from error
    needed = ("images", "annotations", "categories")
    if not isinstance(content, dict) or any(type(content.get(key)) is not list for key in needed):
        raise ValueError(f"{path} is not of COCO's form: expected {', '.join(needed)} in it")
    return content


def _name(record: Any, number: int) -> Any:
    """Return the id of an entry of a COCO file, or its position if it has no id."""
    named = isinstance(record, dict) and record.get("id") is not None
    return record["id"] if named else f"number {number} (without an id)"


def _entry(record: Any, key: str, what: str) -> Any:
    """Return an item of an entry of a COCO file.

    Raises:
        ValueError: if the entry is no mapping, or the item is missing or null.
    """
    if not isinstance(record, dict) or record.get(key) is None:
        raise ValueError(f"{what} has no {key}: add it, or remove the entry")
    kinds = (str,) if key == "name" else (int, str)
    if not isinstance(record[key], kinds):
        raise ValueError(
            f"{what} has the {key} {record[key]!r:.100}: give a text or a whole number"
        )
    return record[key]


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Stop the garbage collector, which would look at the objects of a large file over and over."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
