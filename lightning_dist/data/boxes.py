"""Functions that clip boxes to their image, and refuse boxes that are no boxes."""

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

LEAST_SIDE = 0.01  # pixels; resizing in float32 could take the area of a box with a shorter side


def clip_boxes(boxes: Tensor, sizes: Tensor, least: float = LEAST_SIDE) -> tuple[Tensor, Tensor]:
    """Clip boxes to their images, and find those that have an area there.

    Args:
        boxes: boxes (K, 4) as x1, y1, x2, y2, float32.
        sizes: the width and height of the image, (2,), or of the image of each box, (K, 2), in the
            unit of the boxes.
        least: the shortest side of a box with area, in the unit of the boxes.

    Returns:
        The clipped boxes (K, 4), and a mask (K,) that is False where a box has no area.

    Example:
        >>> boxes = torch.tensor([[-2.0, 1.0, 3.0, 9.0], [9.0, 0.0, 12.0, 1.0]])
        >>> clip_boxes(boxes, torch.tensor([8, 4]))
        (tensor([[0., 1., 3., 4.],
                [8., 0., 8., 1.]]), tensor([ True, False]))
    """
    limits = torch.cat([sizes, sizes], dim=-1).to(boxes.dtype)
    clipped = torch.minimum(boxes.clamp(min=0), limits)
    return clipped, ((clipped[:, 2:] - clipped[:, :2]) >= least).all(1)


def check_fractions(box: Sequence[float], where: str) -> None:
    """Refuse a box whose numbers are no fractions of an image's size.

    Args:
        box: x1, y1, x2, y2, which may reach a little beyond 0 and 1.
        where: the file and the line, for the message.

    Raises:
        ValueError: if a number is not finite, or below -1 or above 2.
    """
    if not all(-1 <= value <= 2 for value in box):  # also false for NaN
        sides = ", ".join(f"{value:g}" for value in box)
        raise ValueError(
            f"{where}: the box from x1, y1 to x2, y2 = {sides} lies far off its image: are these "
            "pixels? Divide x and width by the image's width, y and height by its height"
        )


def as_numbers(values: Any, count: int, what: str) -> list[float]:
    """Return a list of finite numbers, such as the `bbox` of a JSON file.

    Args:
        values: the object that should be a list of numbers.
        count: the length that the list should have.
        what: the name of the object, for the message.

    Raises:
        ValueError: if the object is no list of `count` finite numbers.
    """
    numbers = isinstance(values, (list, tuple)) and all(
        # False for NaN, and for infinity and larger whole numbers
        isinstance(x, (int, float)) and not isinstance(x, bool) and abs(x) <= sys.float_info.max
        for x in values
    )
    if not numbers or len(values) != count:
        raise ValueError(f"{what} is {values!r}: give a list of {count} numbers, or remove it")
    return [float(x) for x in values]
