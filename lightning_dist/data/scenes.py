"""Data modules for generated scenes: digits on textured backgrounds, with masks and boxes."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import ToTensor

from lightning_dist.data.base import ImageDataModule, collate_as_lists, stratified_split
from lightning_dist.data.tensor_images import TensorImages
from lightning_dist.data.unlabeled import WithTarget

SPLITS = ("train", "val", "test")


class Scene(NamedTuple):
    """A generated image with its mask, boxes and labels."""

    image: Tensor  # uint8 (3, S, S)
    mask: Tensor  # int64 (S, S): 0 for the background, otherwise the digit plus 1
    boxes: Tensor  # float32 (K, 4): x1, y1, x2, y2 in pixels, around the visible parts
    labels: Tensor  # int64 (K,): the digits plus 1


class ScenesDataModule(ImageDataModule):
    """A data module of generated images (3, S, S) and masks (S, S) with digits, for segmentation.

    A scene has a few of scikit-learn's digits at random positions, in random sizes and bright
    colours, on a darker random texture. Later digits cover earlier digits. A scene depends only on
    (`scene_seed`, split, index). No image of a digit is used in two splits.

    Args:
        train_size: the number of training scenes.
        val_size: the number of validation scenes.
        test_size: the number of test scenes.
        scene_size: the height and width S of a scene in pixels, at least 16.
        most_digits: the largest number of digits in a scene; the smallest number is 1.
        scales: the smallest and the largest side of a digit, as fractions of the scene's side.
        texture: the contrast of the background, from 0 (one colour) to 1.
        scene_seed: the seed of the scenes; `seed` is the seed of the training order.
        **settings: the arguments of ImageDataModule.

    Raises:
        ValueError: if a setting is out of range.

    Example:
        >>> data = ScenesDataModule(train_size=4, global_batch_size=2)
        >>> images, masks = next(iter(data.train_dataloader()))
        >>> tuple(images.shape), tuple(masks.shape)
        ((2, 3, 64, 64), (2, 64, 64))
    """

    num_classes = 11
    mean = (0.5, 0.5, 0.5)
    std = (0.25, 0.25, 0.25)
    random_transforms = False
    location = "scenes of scikit-learn's digits"

    def __init__(
        self,
        *,
        train_size: int = 600,
        val_size: int = 100,
        test_size: int = 200,
        scene_size: int = 64,
        most_digits: int = 5,
        scales: tuple[float, float] = (0.25, 0.5),
        texture: float = 0.5,
        scene_seed: int = 0,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self.class_names = ["background", *map(str, range(10))]
        low, high = scales
        if scene_size < 16:
            raise ValueError(f"scene_size is {scene_size}: give at least 16 pixels")
        if not 0 < low <= high <= 1 or low * scene_size < 4:
            raise ValueError(
                f"scales are {low}, {high}: give two fractions of the scene's side, ascending, "
                f"at most 1 and at least {4 / scene_size}, which is 4 pixels"
            )
        if most_digits < 1:
            raise ValueError(f"most_digits is {most_digits}: give at least one digit")
        if not 0 <= texture <= 1:
            raise ValueError(f"texture is {texture}: give a contrast from 0 to 1")
        self.sizes = dict(zip(SPLITS, (train_size, val_size, test_size), strict=True))
        self.image_size = scene_size
        self.most_digits = most_digits
        self.scales = (low, high)
        self.texture = texture
        self.scene_seed = scene_seed

    def scene(self, split: str, index: int) -> Scene:
        """Generate a scene.

        Args:
            split: "train", "val" or "test".
            index: the number of the scene in its split, from 0.
        """
        rng = np.random.default_rng((self.scene_seed, SPLITS.index(split), index))
        images, digits = self._digits
        available = self._digits_of_split[split]
        size = self.image_size
        canvas = _texture(rng, size, self.texture)
        instances = torch.full((size, size), -1)
        labels = []
        for instance in range(rng.integers(1, self.most_digits + 1)):
            chosen = available[rng.integers(len(available))]
            side = round(size * rng.uniform(*self.scales))
            top, left = rng.integers(size - side + 1, size=2)
            ink = F.interpolate(
                images[chosen][None, None], (side, side), mode="bilinear", align_corners=False
            )[0, 0]
            place = (..., slice(top, top + side), slice(left, left + side))
            colour = torch.from_numpy(_brighter(rng, canvas[place].mean((1, 2)).numpy()))
            canvas[place] = torch.lerp(canvas[place], colour[:, None, None], ink)
            instances[place][ink > 0.5] = instance
            labels.append(int(digits[chosen]) + 1)
        mask = torch.tensor([*labels, 0])[instances]
        visible = [i for i in range(len(labels)) if (instances == i).any()]
        boxes = torch.stack([_box(instances == i) for i in visible])
        image = (canvas * 255).round().to(torch.uint8)
        return Scene(image, mask, boxes, torch.tensor([labels[i] for i in visible]))

    def image_facts(self) -> dict[str, Any]:
        """Return the fields of a Card that describe the images, which `prepare` does not resize."""
        unsized = {"crop_mode": None, "crop_pct": None, "interpolation": None}
        return super().image_facts() | unsized

    def prepare(self, image: Image.Image) -> Tensor:
        """Convert an image to a normalised tensor (3, H, W) without resizing it."""
        return self._to_tensor(image)

    def train_dataset(self) -> Dataset:
        """Return the training scenes."""
        return self._scenes("train")

    def val_dataset(self) -> Dataset:
        """Return the validation scenes."""
        return self._scenes("val")

    def test_dataset(self) -> Dataset:
        """Return the test scenes."""
        return self._scenes("test")

    def _scenes(self, split: str) -> Dataset:
        scenes = [self.scene(split, index) for index in range(self.sizes[split])]
        if not scenes:
            raise ValueError(f"{split}_size is 0: give at least one scene")
        return self._to_dataset(scenes)

    def _to_dataset(self, scenes: list[Scene]) -> Dataset:
        images = torch.stack([scene.image for scene in scenes])
        masks = torch.stack([scene.mask for scene in scenes])
        return TensorImages(images, masks, mean=self.mean, std=self.std)

    @cached_property
    def _digits(self) -> tuple[Tensor, Tensor]:
        bunch: Any = load_digits()
        return torch.from_numpy(bunch.images / 16).float(), torch.from_numpy(bunch.target)

    @cached_property
    def _digits_of_split(self) -> dict[str, Tensor]:
        """The indices of the digits that each split uses."""
        _, digits = self._digits
        train, others = stratified_split(digits, 0.4)
        val, test = stratified_split(digits[others], 0.5)
        return {"train": train, "val": others[val], "test": others[test]}


class SceneBoxes(Dataset):
    """A data set of scenes as (image, target), in the form that torchvision's detectors take.

    Args:
        scenes: the scenes. The data set subtracts 1 from their labels to get the digits 0 to 9.
    """

    def __init__(self, scenes: Sequence[Scene]) -> None:
        self.scenes = scenes

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        scene = self.scenes[index]
        return scene.image / 255, {"boxes": scene.boxes, "labels": scene.labels - 1}

    collate = staticmethod(collate_as_lists)


class SceneDetectionDataModule(ScenesDataModule):
    """A data module of generated scenes for detection: images (3, S, S) in 0..1, boxes and digits.

    Args:
        **settings: the arguments of ScenesDataModule.

    Example:
        >>> data = SceneDetectionDataModule(train_size=4, global_batch_size=2)
        >>> images, targets = next(iter(data.train_dataloader()))
        >>> tuple(images[0].shape), sorted(targets[0])
        ((3, 64, 64), ['boxes', 'labels'])
    """

    num_classes = 10
    mean = (0.0, 0.0, 0.0)
    std = (1.0, 1.0, 1.0)

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.class_names = [str(digit) for digit in range(10)]

    def unlabeled_transform(self) -> WithTarget:
        """Return the function that makes a training sample of an image without a label."""
        return WithTarget(ToTensor(), None)

    def _to_dataset(self, scenes: list[Scene]) -> SceneBoxes:
        return SceneBoxes(scenes)


def _texture(rng: np.random.Generator, size: int, contrast: float) -> Tensor:
    """Return a background (3, size, size) in 0..1 with waves and noise around a random colour."""
    y, x = np.mgrid[:size, :size] / size
    waves = np.zeros((3, size, size))
    for _ in range(4):
        across, down = rng.uniform(-6, 6, size=2)
        phase, strength = rng.uniform(0, 2 * np.pi, size=3), rng.uniform(0, 0.25, size=3)
        angle = 2 * np.pi * (across * x + down * y)
        waves += strength[:, None, None] * np.sin(angle + phase[:, None, None])
    waves += rng.normal(0, 0.1, size=waves.shape)
    base = rng.uniform(0.1, 0.6, size=(3, 1, 1))
    return torch.from_numpy(np.clip(base + contrast * waves, 0, 1)).float()


def _brighter(rng: np.random.Generator, background: np.ndarray) -> np.ndarray:
    """Return a random colour, each channel at least 0.25 above the background or equal to 1."""
    return rng.uniform(np.minimum(background + 0.25, 1), 1).astype(np.float32)


def _box(pixels: Tensor) -> Tensor:
    """Return the smallest box around the True pixels; x2 and y2 are exclusive."""
    rows, columns = pixels.any(1).nonzero().flatten(), pixels.any(0).nonzero().flatten()
    corners = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
    return torch.tensor(corners, dtype=torch.float32)
