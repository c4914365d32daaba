"""Between student and teacher: the teacher's view of the student's batch, and of its classes."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten


class InputBridge:
    """Turns the student's images into those that the teacher was trained on, on their device.

    An image is a floating-point tensor ``(N, C, H, W)`` with as many channels as ``student_mean``;
    all else in the call is left alone. What does not differ is not computed: where nothing does,
    the teacher gets the very tensors of the student.

    Means and deviations are those of pixels in 0..1, as the data modules have them: divide by 255
    those of a pipeline in 0..255. So a teacher of raw pixels in 0..255 has mean 0 and deviation
    1/255. A teacher of three channels may have a student of one, which is then repeated.

    Args:
        mean: of each channel, which the teacher's training subtracted.
        std: of each channel, by which it then divided.
        student_mean: the same of the student's batch.
        student_std: the same of the student's batch.
        size: height and width of the teacher's input in pixels, or one number for both; the whole
            image is resized to it, with antialiasing. ``None`` keeps the student's.
        interpolation: ``"bicubic"`` or ``"bilinear"``.
        flip_channels: the teacher takes BGR where the student takes RGB, or the other way round.
            Each ``mean`` and ``std`` is in the order of its own network.

    Raises:
        ValueError: if the numbers do not belong together.

    Example:
        >>> bridge = InputBridge([0.0], [1 / 255], student_mean=[0.5], student_std=[0.25], size=2)
        >>> bridge(torch.full((1, 1, 4, 4), 2.0)).round().flatten()
        tensor([255., 255., 255., 255.])
    """

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        student_mean: Sequence[float],
        student_std: Sequence[float],
        *,
        size: int | Sequence[int] | None = None,
        interpolation: str = "bicubic",
        flip_channels: bool = False,
    ) -> None:
        theirs, ours = (list(mean), list(std)), (list(student_mean), list(student_std))
        for names, (means, stds) in (("mean, std", theirs), ("student_mean, student_std", ours)):
            if len(means) != len(stds) or not means or min(stds) <= 0:
                raise ValueError(
                    f"{names} are {means}, {stds}: give one of each a channel, deviations above 0"
                )
        if len(ours[0]) not in (1, len(theirs[0])):
            raise ValueError(
                f"the teacher has {len(theirs[0])} channels and the student {len(ours[0])}: only a "
                "student of one channel can be shown to a teacher of another number"
            )
        if interpolation not in ("bicubic", "bilinear"):
            raise ValueError(f"interpolation is {interpolation!r}: use 'bicubic' or 'bilinear'")
        if flip_channels:
            ours = (ours[0][::-1], ours[1][::-1])
        repeat = len(theirs[0]) // len(ours[0])
        columns = zip(*theirs, *(values * repeat for values in ours), strict=True)
        # (x * student_std + student_mean - mean) / std is one multiplication and one addition.
        affine = [
            (s_std / t_std, (s_mean - t_mean) / t_std) for t_mean, t_std, s_mean, s_std in columns
        ]
        same = repeat == 1 and all(
            math.isclose(scale, 1, rel_tol=1e-6) and abs(shift) < 1e-6 for scale, shift in affine
        )
        self.channels = len(ours[0])
        self.affine = None if same else affine
        self.size = (size, size) if isinstance(size, int) else size and tuple(size)
        self.interpolation = interpolation
        self.flip_channels = flip_channels
        self._constants: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def __call__(self, inputs: Any) -> Any:
        """The teacher's view.

        Args:
            inputs: an image, or any nesting of containers that holds one.

        Returns:
            The same nesting; images in float32 or wider where they were computed anew.

        Raises:
            ValueError: if there is no image in it.
        """
        leaves, nesting = tree_flatten(inputs)
        images = [index for index, leaf in enumerate(leaves) if self._is_image(leaf)]
        if not images:
            shapes = [f"{x.dtype} {tuple(x.shape)}" for x in leaves if isinstance(x, Tensor)]
            raise ValueError(
                f"the student's call has no image (N, {self.channels}, H, W) of floating-point "
                f"numbers for the teacher's InputBridge, but {', '.join(shapes) or 'no tensor'}: "
                "give student_mean and student_std one number a channel of the student's images"
            )
        for index in images:
            leaves[index] = self._view(leaves[index])
        return tree_unflatten(leaves, nesting)

    def _is_image(self, x: Any) -> bool:
        return (
            isinstance(x, Tensor)
            and x.dim() == 4
            and x.is_floating_point()
            and x.shape[1] == self.channels
        )

    def _view(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        if self.flip_channels:
            x = x.flip(1)
        if self.affine is not None:
            if (x.device, dtype) not in self._constants:
                scale, shift = torch.tensor(self.affine, dtype=dtype, device=x.device).T
                self._constants[x.device, dtype] = scale.view(-1, 1, 1), shift.view(-1, 1, 1)
            scale, shift = self._constants[x.device, dtype]
            x = torch.addcmul(shift, x.to(dtype), scale)
        if self.size is not None and x.shape[2:] != self.size:
            x = F.interpolate(x.to(dtype), self.size, mode=self.interpolation, antialias=True)
        return x

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_constants": {}}  # they lie on devices


def match_classes(
    student_names: Sequence[str] | str | Path, teacher_names: Sequence[str] | str | Path
) -> list[int]:
    """The teacher's class of each of the student's classes, by name: a ``class_map``.

    Upper and lower case, underscores and runs of spaces make no difference.

    Args:
        student_names: names in the order of the labels, or a text file with one name a line. A
            class that the teacher calls otherwise is given the teacher's name here.
        teacher_names: the same of the teacher, in the order of its outputs.

    Returns:
        One index into the teacher's classes for each of the student's.

    Raises:
        ValueError: if a student's class has no partner, or several; all such names are listed.

    Example:
        >>> match_classes(["tabby_cat", "Beagle"], ["beagle", "pug", "tabby cat"])
        [2, 0]
    """
    students, teachers = _read_names(student_names), _read_names(teacher_names)
    places: dict[str, list[int]] = {}
    for index, name in enumerate(teachers):
        places.setdefault(_plain(name), []).append(index)
    lonely = [name for name in students if _plain(name) not in places]
    if lonely:
        raise ValueError(
            f"{len(lonely)} of the student's {len(students)} classes have no partner among the "
            f"teacher's {len(teachers)}: {', '.join(map(repr, lonely))}. Write them in "
            "student_names as the teacher calls them, or give class_map as a list of indices"
        )
    several = [name for name in students if len(places[_plain(name)]) > 1]
    if several:
        found = ", ".join(f"{name!r} at {places[_plain(name)]}" for name in several)
        raise ValueError(
            f"the teacher has several classes of one name: {found}. Give class_map as a list of "
            "indices, or make teacher_names distinct"
        )
    return [places[_plain(name)][0] for name in students]


def _read_names(names: Sequence[str] | str | Path) -> list[str]:
    if isinstance(names, (str, Path)):
        lines = Path(names).expanduser().read_text(encoding="utf-8").splitlines()
        return [line for line in lines if line.strip()]
    return list(names)


def _plain(name: str) -> str:
    return " ".join(name.replace("_", " ").casefold().split())
