"""What all data modules share: their settings, their loaders, and an order that can be repeated."""

import random
from collections.abc import Iterator, Sequence, Sized
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from PIL import Image
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, DistributedSampler

Key = tuple[int, int]  # (index, epoch): a sample, and the epoch that decides its augmentation
SPLIT_SEED = 0  # which images are held out never depends on a run's seed
SPLITS_OF_STAGE = {
    "fit": ("train", "val"),
    "validate": ("val",),
    "test": ("test",),
    "predict": ("test",),
    None: ("train", "val", "test"),
}


def derive_seeds(*parts: int, count: int = 1) -> list[int]:
    """Mix whole numbers (a seed, an epoch, an index) into `count` unrelated 32-bit seeds.

    Example:
        >>> derive_seeds(0, 1) == derive_seeds(1, 0)
        False
    """
    return np.random.SeedSequence(parts).generate_state(count).tolist()


@contextmanager
def seeded(*parts: int) -> Iterator[None]:
    """Seed torch, NumPy and random from `parts`, and put their streams back afterwards.

    Only torch's CPU generator takes part: `torch.manual_seed` would reset the GPUs' too, and with
    them the dropout of the network that trains in this process.
    """
    states = torch.default_generator.get_state(), np.random.get_state(), random.getstate()
    for_torch, for_numpy, for_random = derive_seeds(*parts, count=3)
    torch.default_generator.manual_seed(for_torch)
    np.random.seed(for_numpy)
    random.seed(for_random)
    try:
        yield
    finally:
        torch.default_generator.set_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])


class EpochSampler(DistributedSampler):
    """Shuffles by (seed, epoch) alone and yields Keys; a DistributedSampler, so Lightning keeps it.

    Args:
        dataset: what is sampled.
        seed: of the run; two seeds never share an order, whatever the epochs.
        num_replicas: number of processes among which each epoch is dealt out.
        rank: which of them this is.
        drop_last: drop the samples that cannot be dealt out evenly, where some would be repeated.
    """

    def __init__(
        self,
        dataset: Dataset,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
        drop_last: bool = False,
    ) -> None:
        super().__init__(
            dataset, num_replicas, rank, seed=derive_seeds(seed)[0], drop_last=drop_last
        )
        self.skip = 0

    def __iter__(self) -> Iterator[Key]:
        for index in list(super().__iter__())[self.skip :]:
            yield index, self.epoch


class ResumableLoader(DataLoader):
    """A loader of Keys that a checkpoint taken in mid-epoch brings back to its next batch.

    Lightning makes the iterator before it tells the sampler the epoch, and worker processes ask for
    their first batches at once: on a resume they would repeat the order of epoch 0. So everything
    waits until the first batch is asked for.
    """

    _position: dict[str, int] | None = None
    _resume_at: dict[str, int] | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        sampler = self.sampler
        if not isinstance(sampler, EpochSampler):  # Lightning replaces it under overfit_batches
            yield from super().__iter__()
            return
        resume_at, self._resume_at = self._resume_at, None
        # A checkpoint at an epoch's end names the epoch before: nothing to skip then.
        resumes = resume_at is not None and resume_at["epoch"] == sampler.epoch
        done = resume_at["batches"] if resume_at is not None and resumes else 0
        sampler.skip = done * cast(int, self.batch_size)
        for batches, batch in enumerate(super().__iter__(), start=done + 1):
            self._position = {"epoch": sampler.epoch, "batches": batches}
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Epoch and number of its batches handed out; Lightning puts it into the checkpoint."""
        return dict(self._position or {})

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continue behind the batches that `state_dict` counts, if its epoch is the next to run."""
        self._resume_at = state_dict or None


class SeededDataset(Dataset):
    """Reads samples by Key; what their random transforms draw depends on (seed, Key) alone.

    Args:
        dataset: a map-style data set, read by index.
        seed: of the run; None where no transform is random, which saves the seeding (some 30 us).
    """

    def __init__(self, dataset: Dataset, seed: int | None) -> None:
        self.dataset = dataset
        self.seed = seed

    def __len__(self) -> int:
        return len(cast(Sized, self.dataset))

    def __getitem__(self, key: Key | int) -> Any:
        index, epoch = key if isinstance(key, tuple) else (key, 0)
        if self.seed is None:
            return self.dataset[index]
        with seeded(self.seed, epoch, index):
            return self.dataset[index]


class TensorImages(Dataset):
    """Images in memory, read, augmented and normalised a batch at a time; takes Keys or indices.

    Args:
        images: uint8 of shape (N, C, H, W), H = W.
        labels: int64 of shape (N,).
        mean: of each channel, for pixels scaled to 0..1.
        std: of each channel, likewise.
        white: the pixel value that scales to 1.
        padding: pad by this many black pixels on each side and crop at random; 0 for none.
        flip: mirror at random.
        seed: of the run; decides crops and flips with the Keys' epoch and index.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        white: int = 255,
        padding: int = 0,
        flip: bool = False,
        seed: int = 0,
    ) -> None:
        self.images = images
        self.labels = labels
        self.mean = _of_channels(mean)
        self.std = _of_channels(std)
        self.white = white
        self.padding = padding
        self.flip = flip
        self.seed = seed
        self._draws: tuple[int, Tensor, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: Key | int) -> tuple[Tensor, Tensor]:
        images, labels = self.__getitems__([key])
        return images[0], labels[0]

    def __getitems__(self, keys: Sequence[Key | int]) -> tuple[Tensor, Tensor]:
        """A whole batch, images (B, C, H, W) and labels (B,); all its Keys are of one epoch."""
        pairs = [key if isinstance(key, tuple) else (key, 0) for key in keys]
        indices = torch.tensor([index for index, _ in pairs])
        images = self.images[indices]
        if self.padding or self.flip:
            images = self._augment(images, indices, epoch=pairs[0][1])
        pixels = images.float().div_(self.white).sub_(self.mean).div_(self.std)
        return pixels, self.labels[indices]

    @staticmethod
    def collate(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Nothing is left to collate."""
        return batch

    def _augment(self, images: Tensor, indices: Tensor, epoch: int) -> Tensor:
        """Crop and mirror in one gather, which is several times faster than image by image."""
        offsets, flips = (draw[indices] for draw in self._draws_of(epoch))
        count, channels, size, _ = images.shape
        pixel = torch.arange(size)
        rows = offsets[:, :1] + pixel
        columns = offsets[:, 1:] + torch.where(flips[:, None], pixel.flip(0), pixel)
        source = rows[:, :, None] * (size + 2 * self.padding) + columns[:, None, :]
        source = source.view(count, 1, -1).expand(-1, channels, -1)
        padded = F.pad(images, (self.padding,) * 4).flatten(2)
        return padded.gather(2, source).view_as(images)

    def _draws_of(self, epoch: int) -> tuple[Tensor, Tensor]:
        """Offsets (N, 2) and flips (N,) of every image in an epoch, drawn once an epoch."""
        if self._draws is None or self._draws[0] != epoch:
            seeds = derive_seeds(self.seed, epoch, count=2)
            crops, mirrors = (torch.Generator().manual_seed(seed) for seed in seeds)
            offsets = torch.randint(2 * self.padding + 1, (len(self), 2), generator=crops)
            flips = (torch.rand(len(self), generator=mirrors) < 0.5) & self.flip
            self._draws = (epoch, offsets, flips)
        return self._draws[1:]


def list_collate(samples: Sequence[tuple[Any, Any]]) -> tuple[list[Any], list[Any]]:
    """A batch of images of unlike sizes and their targets, as lists."""
    images, targets = zip(*samples, strict=True)
    return list(images), list(targets)


def _of_channels(values: Sequence[float]) -> Tensor:
    """One number a channel, to broadcast over an image."""
    return torch.tensor(values).view(-1, 1, 1)


def stratified_split(labels: Tensor, fraction: float) -> tuple[Tensor, Tensor]:
    """Indices of (the rest, a stratified `fraction`); always the same ones; in ascending order.

    Example:
        >>> rest, held_out = stratified_split(torch.tensor([0, 1] * 10), fraction=0.2)
        >>> len(rest), len(held_out)
        (16, 4)
    """
    everything = np.arange(len(labels))
    if not fraction:
        return torch.from_numpy(everything), torch.empty(0, dtype=torch.int64)
    parts = train_test_split(
        everything, test_size=fraction, stratify=labels.numpy(), random_state=SPLIT_SEED
    )
    rest, held_out = (torch.from_numpy(np.sort(part)) for part in parts)
    return rest, held_out


class ImageDataModule(LightningDataModule):
    """Loaders over the three data sets that a subclass provides, repeatable to the pixel.

    The training order is a function of (seed, epoch) alone, a sample's augmentation of (seed,
    epoch, index) alone: not of the number of workers or processes, nor of what ran before. Also a
    run that resumes, at an epoch's start or within it, sees what it would have seen. The global
    random streams stay as they are.

    A subclass sets the attributes below and defines `train_dataset`, `val_dataset` and
    `test_dataset`, and `prepare_data` where there is something to download.

    Args:
        global_batch_size: training batch over all processes.
        eval_batch_size: evaluation batch of each process; by default its training batch.
        num_workers: processes that load, for each loader; 0 loads in the main process.
        seed: of the training order and the augmentation, not of the split.
        pin_memory: copy batches into pinned memory; by default where there is CUDA.
        drop_last: drop the last training batch where it is smaller (timm's Mixup needs even ones).
        mean: of each channel, for pixels scaled to 0..1, instead of the data set's own.
        std: of each channel, likewise.

    Attributes:
        num_classes: number of classes.
        class_names: their names in the order of the labels, or None where they have none.
        mean: of each channel, which the loaders have subtracted from pixels scaled to 0..1.
        std: of each channel, by which they have then divided.
        class_colors: a colour (red, green, blue) of each, in 0..255, or None to choose some.
        image_size: height and width in pixels, where all images have one size.
        in_channels: channels of an image.
    """

    num_classes: int
    class_names: list[str] | None
    class_colors: list[tuple[int, int, int]] | None = None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int
    in_channels: int = 3
    random_transforms: bool = True  # a subclass whose training set draws none saves the seeding
    location: str  # where the images are, for error messages

    def __init__(
        self,
        *,
        global_batch_size: int = 64,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        pin_memory: bool | None = None,
        drop_last: bool = False,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if mean is not None:
            self.mean = tuple(mean)
        if std is not None:
            self.std = tuple(std)
        self.global_batch_size = global_batch_size
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.pin_memory = torch.cuda.is_available() if pin_memory is None else pin_memory
        self.drop_last = drop_last
        self._datasets: dict[str, Dataset] = {}

    def train_dataset(self) -> Dataset:
        """The training set, read by index, or by Key if it is a TensorImages."""
        raise NotImplementedError

    def val_dataset(self) -> Dataset:
        """The set on which runs are compared while they train."""
        raise NotImplementedError

    def test_dataset(self) -> Dataset:
        """The set that gives the published number; also predicted on."""
        raise NotImplementedError

    def setup(self, stage: str | None = None) -> None:
        """Open what the stage ("fit", "validate", "test", "predict" or None for all) reads."""
        for split in SPLITS_OF_STAGE[stage]:
            self._dataset(split)

    @property
    def batch_size(self) -> int:
        """Training batch of each process.

        Raises:
            ValueError: if the processes cannot share `global_batch_size` evenly.
        """
        processes = self._share()["num_replicas"]
        if self.global_batch_size % processes:
            raise ValueError(
                f"global_batch_size={self.global_batch_size} cannot be shared by {processes} "
                f"processes: set it to a multiple of {processes}"
            )
        return self.global_batch_size // processes

    def prepare(self, image: Image.Image) -> Tensor:
        """Any image as evaluation shows it to the network: (C, H, W)."""
        size = (self.image_size, self.image_size)
        return self._normalised(image.resize(size, Image.Resampling.BILINEAR))

    def _normalised(self, image: Image.Image) -> Tensor:
        """An image (C, H, W) at its own size."""
        image = image.convert("L" if self.in_channels == 1 else "RGB")
        pixels = torch.from_numpy(np.array(image)).float().div_(255)
        pixels = pixels.view(image.height, image.width, -1).movedim(2, 0)
        return pixels.sub_(_of_channels(self.mean)).div_(_of_channels(self.std))

    def to_pixels(self, images: Tensor) -> Tensor:
        """The uint8 images (N, C, H, W) that a batch of the loaders was made from."""
        mean, std = (_of_channels(x).to(images) for x in (self.mean, self.std))
        return (255 * (images * std + mean)).round().clamp(0, 255).to(torch.uint8)

    def train_dataloader(self) -> DataLoader:
        """Shuffled, augmented batches of the training set."""
        dataset = self._dataset("train")
        keyed = isinstance(dataset, TensorImages)
        sampler = EpochSampler(dataset, self.seed, drop_last=self.drop_last, **self._share())
        return ResumableLoader(
            dataset
            if keyed
            else SeededDataset(dataset, self.seed if self.random_transforms else None),
            batch_size=self.batch_size,
            sampler=sampler,
            drop_last=self.drop_last,
            **self._loader_settings(dataset),
        )

    def val_dataloader(self) -> DataLoader:
        """Batches of the validation set in order."""
        return self._eval_dataloader("val")

    def test_dataloader(self) -> DataLoader:
        """Batches of the test set in order."""
        return self._eval_dataloader("test")

    def predict_dataloader(self) -> DataLoader:
        """Batches of the test set in order."""
        return self._eval_dataloader("test")

    def _eval_dataloader(self, split: str) -> DataLoader:
        dataset = self._dataset(split)
        batch_size = self.eval_batch_size or self.batch_size
        return DataLoader(dataset, batch_size=batch_size, **self._loader_settings(dataset))

    def _loader_settings(self, dataset: Dataset) -> dict[str, Any]:
        return {
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "pin_memory": self.pin_memory,
            "collate_fn": getattr(dataset, "collate", None),
            # A loader draws its workers' base seed: from the global stream, were this not given.
            "generator": torch.Generator().manual_seed(self.seed),
        }

    def _dataset(self, split: str) -> Dataset:
        """The data set of a split, opened on first use.

        Raises:
            ValueError: if it is empty.
        """
        if split not in self._datasets:
            dataset: Dataset = getattr(self, f"{split}_dataset")()
            if not len(cast(Sized, dataset)):
                raise ValueError(f"the {split} set of {self.location} is empty")
            self._datasets[split] = dataset
        return self._datasets[split]

    def _share(self) -> dict[str, int]:
        """How many processes share the data, and which one this is.

        The strategy knows best: processes that split one network between them read the same data.
        """
        kwargs = self.trainer.distributed_sampler_kwargs if self.trainer is not None else None
        return kwargs or {"num_replicas": 1, "rank": 0}
