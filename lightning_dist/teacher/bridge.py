"""Conversion from student to teacher: ``InputBridge`` for images, ``match_classes`` for classes."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from lightning_dist.files.text import read_bounded

_MOST_LISTED = 20  # classes in an error message


class InputBridge:
    """A function that converts the student's images to the normalisation and size of the teacher.

    A floating-point tensor ``(N, C, H, W)`` with as many channels as ``student_mean`` is an image.
    Everything else in the student's call is passed on unchanged. A step that would change nothing
    is left out: if no step is needed, the teacher gets the student's own tensors.

    Means and standard deviations are those of pixels in 0..1, as in the data modules. If they are
    those of pixels in 0..255, divide them by 255. A teacher that takes raw pixels in 0..255 has
    mean 0 and standard deviation 1/255. If the student's images have one channel but the teacher's
    have three, the channel is repeated.

    Args:
        mean: the mean of each channel in the teacher's training.
        std: the standard deviation of each channel in the teacher's training.
        student_mean: the mean of each channel in the student's normalisation.
        student_std: the standard deviation of each channel in the student's normalisation.
        size: the height and width of the teacher's input in pixels, or one number for both. The
            whole image is resized, with antialiasing. ``None`` keeps the size.
        interpolation: the method of resizing, ``"bicubic"`` or ``"bilinear"``.
        flip_channels: reverse the channels, if one of the two networks takes RGB images and the
            other BGR images. The means and standard deviations of each network are in the channel
            order of that network.

    Raises:
        ValueError: if the numbers of channels do not fit together, or a standard deviation is not
            above 0.

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
        teacher, student = (list(mean), list(std)), (list(student_mean), list(student_std))
        for names, (means, stds) in (
            ("mean, std", teacher),
            ("student_mean, student_std", student),
        ):
            if len(means) != len(stds) or not means or min(stds) <= 0:
                raise ValueError(
                    f"{names} are {means}, {stds}: give a mean and a deviation above 0 for each "
                    "channel"
                )
        if len(student[0]) not in (1, len(teacher[0])):
            raise ValueError(
                f"the teacher has {len(teacher[0])} channels and the student {len(student[0])}: "
                "give both the same number, or the student one channel, which is repeated"
            )
        if interpolation not in ("bicubic", "bilinear"):
            raise ValueError(f"interpolation is {interpolation!r}: use 'bicubic' or 'bilinear'")
        if flip_channels:
            student = (student[0][::-1], student[1][::-1])
        repeat = len(teacher[0]) // len(student[0])
        columns = zip(*teacher, *(values * repeat for values in student), strict=True)
        # (x * student_std + student_mean - mean) / std is one multiplication and one addition.
        affine = [
            (s_std / t_std, (s_mean - t_mean) / t_std) for t_mean, t_std, s_mean, s_std in columns
        ]
        same = repeat == 1 and all(
            math.isclose(scale, 1, rel_tol=1e-6) and abs(shift) < 1e-6 for scale, shift in affine
        )
        self.channels = len(student[0])
        self.affine = None if same else affine
        self.size = (size, size) if isinstance(size, int) else size and tuple(size)
        self.interpolation = interpolation
        self.flip_channels = flip_channels
        # These are the values of black and white in the teacher's normalisation.
        self.limits = [(-m / s, (1 - m) / s) for m, s in zip(*teacher, strict=True)]
        self._constants: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}

    @torch.no_grad()
    def __call__(self, inputs: Any) -> Any:
        """Return the teacher's inputs for the student's inputs.

        Args:
            inputs: images ``(N, C, H, W)``, or nested containers of images.

        Returns:
            The same containers with the teacher's images, which are in float32 or float64 if they
            were converted.

        Raises:
            ValueError: if ``inputs`` contains no image.
        """
        leaves, nesting = tree_flatten(inputs)
        images = [index for index, leaf in enumerate(leaves) if self._is_image(leaf)]
        if not images:
            shapes = [f"{x.dtype} {tuple(x.shape)}" for x in leaves if isinstance(x, Tensor)]
            raise ValueError(
                f"the student's call has no image (N, {self.channels}, H, W) of floating-point "
                f"numbers for the teacher's InputBridge, but {', '.join(shapes) or 'no tensor'}: "
                "give student_mean and student_std one number per channel of the student's images"
            )
        for index in images:
            leaves[index] = self._convert(leaves[index])
        return tree_unflatten(leaves, nesting)

    def _is_image(self, x: Any) -> bool:
        return (
            isinstance(x, Tensor)
            and x.dim() == 4
            and x.is_floating_point()
            and x.shape[1] == self.channels
        )

    def _convert(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        if self.flip_channels:
            x = x.flip(1)
        if self.affine is not None:
            scale, shift = self._constant("affine", x.device, dtype)
            x = torch.addcmul(shift, x.to(dtype), scale)
        if self.size is not None and x.shape[2:] != self.size:
            x = self._resized(x.to(dtype))
        return x

    def _resized(self, x: Tensor) -> Tensor:
        """Resize images as Pillow does: the width, then the height; clip the values after each."""
        if self.interpolation == "bilinear":
            return F.interpolate(x, self.size, mode="bilinear", antialias=True)
        black, white = self._constant("limits", x.device, x.dtype)
        # Random erasing may have drawn values outside the range from black to white: do not clip
        # them.
        least = torch.minimum(black, x.amin((2, 3), keepdim=True))
        most = torch.maximum(white, x.amax((2, 3), keepdim=True))
        assert self.size is not None
        for size in ((x.shape[2], self.size[1]), self.size):
            if x.shape[2:] != size:
                x = F.interpolate(x, size, mode="bicubic", antialias=True).clamp(least, most)
        return x

    def _constant(self, name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return an attribute, a list of one pair per channel, as a tensor ``(2, C, 1, 1)``."""
        key = (name, device, dtype)
        if key not in self._constants:
            pairs = torch.tensor(getattr(self, name), dtype=dtype, device=device)
            self._constants[key] = pairs.T.unsqueeze(-1).unsqueeze(-1)
        return self._constants[key]

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the constants, because they are on devices of this process."""
        return self.__dict__ | {"_constants": {}}


def match_classes(
    student_names: Sequence[str] | str | Path, teacher_names: Sequence[str] | str | Path
) -> list[int]:
    """Return a ``class_map``: for each class of the student, the teacher's class with that name.

    Names are compared without regard to case, underscores and repeated spaces.

    Args:
        student_names: names in the order of the labels, or a text file with one name per line. If
            the teacher has another name for a class, write the teacher's name here.
        teacher_names: names in the order of the teacher's outputs, or a text file.

    Returns:
        One index into the teacher's classes for each of the student's classes.

    Raises:
        ValueError: if the teacher has no class or several classes with the name of a student's
            class; the message lists all such names.

    Example:
        >>> match_classes(["tabby_cat", "Beagle"], ["beagle", "pug", "tabby cat"])
        [2, 0]
    """
    students, teachers = _read_names(student_names), _read_names(teacher_names)
    wanted, offered = map(_normalise_name, students), [_normalise_name(x) for x in teachers]
    keys = dict(zip(students, wanted, strict=True))
    place = {key: index for index, key in reversed(list(enumerate(offered)))}
    missing = [name for name in students if keys[name] not in place]
    if missing:
        raise ValueError(
            f"{len(missing)} of the student's {len(students)} classes have no partner among the "
            f"teacher's {len(teachers)}: {_first(map(repr, missing))}. Write them in "
            "student_names as in teacher_names, or give class_map as a list of indices"
        )
    counts = Counter(offered)
    several = [name for name in keys if counts[keys[name]] > 1]
    if several:
        found = _first(
            f"{name!r} at [{_first(str(i) for i, x in enumerate(offered) if x == keys[name])}]"
            for name in several
        )
        raise ValueError(
            f"the teacher has several classes of one name: {found}. Give class_map as a list of "
            "indices, or make teacher_names distinct"
        )
    return [place[keys[name]] for name in students]


def _first(texts: Iterable[str]) -> str:
    """Join the first texts; a file can have so many that all of them would fill the memory."""
    first = list(islice(texts, _MOST_LISTED + 1))
    return ", ".join(first[:_MOST_LISTED]) + ", ..." * (len(first) > _MOST_LISTED)


def is_same_name(one: str, other: str) -> bool:
    """Return whether two names of classes are equal, compared as in :func:`match_classes`."""
    return _normalise_name(one) == _normalise_name(other)


def _read_names(names: Sequence[str] | str | Path) -> list[str]:
    """Return the names of a list, or of the lines of a text file."""
    if isinstance(names, (str, Path)):
        lines = read_bounded(Path(names).expanduser()).decode("utf-8").splitlines()
        return [line for line in lines if line.strip()]
    return list(names)


def _normalise_name(name: str) -> str:
    """Return a name in lower case, with single spaces instead of underscores and many spaces."""
    return " ".join(name.replace("_", " ").casefold().split())
