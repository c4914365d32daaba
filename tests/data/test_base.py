"""Tests that a data module gives the same batches in every run, also after a resume."""

import itertools
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_dist.data import shared_memory
from lightning_dist.data.base import ImageDataModule
from lightning_dist.data.digits import DigitsDataModule
from lightning_dist.data.seeding import EpochSampler
from lightning_dist.data.tensor_images import TensorImages

SAMPLES = 24
both_worker_counts = pytest.mark.parametrize("num_workers", [0, 2])


class Noisy(Dataset):
    """A data set that returns a number from each of the three random generators, and the index."""

    def __init__(self, length: int = SAMPLES) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        draws = [torch.rand(()).item(), np.random.rand(), random.random()]
        return torch.tensor([index, *draws], dtype=torch.float64), index % 2


class NoisyData(ImageDataModule):
    num_classes = 2
    class_names = None
    location = "a made-up folder"

    def __init__(self, length: int = SAMPLES, **settings: Any) -> None:
        super().__init__(global_batch_size=4, **settings)
        self.length = length

    def train_dataset(self) -> Dataset:
        return Noisy(self.length)

    def val_dataset(self) -> Dataset:
        return Noisy(self.length)

    def test_dataset(self) -> Dataset:
        return Noisy(self.length)


class Recorder(L.LightningModule):
    """A module that stores the batches of each epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.seen: dict[int, list[Tensor]] = {}

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        self.seen.setdefault(self.current_epoch, []).append(batch[0])
        return self.layer(batch[0][:, :1].float()).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)

    def pixels(self, epoch: int) -> Tensor:
        return torch.cat(self.seen[epoch])


class StopAt(Callback):
    """A callback that saves a checkpoint after a batch of an epoch and stops the run."""

    def __init__(self, epoch: int, batches: int, path: Path) -> None:
        self.at = (epoch, batches)
        self.path = path

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, out: Any, batch: Any, batch_idx: int
    ) -> None:
        if (trainer.current_epoch, batch_idx + 1) == self.at:
            trainer.save_checkpoint(self.path)
            raise KeyboardInterrupt


def epoch_of(data: ImageDataModule, epoch: int) -> Tensor:
    """Return all samples of the training loader in an epoch, in their order."""
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return torch.cat([images for images, _ in loader])


def fit(data: ImageDataModule, make_trainer: Callable[..., L.Trainer], **kwargs: Any) -> Recorder:
    ckpt_path = kwargs.pop("ckpt_path", None)
    model = Recorder()
    trainer = make_trainer(max_epochs=3, **kwargs)
    try:
        trainer.fit(model, datamodule=data, ckpt_path=ckpt_path)
    except (KeyboardInterrupt, SystemExit):
        assert any(isinstance(callback, StopAt) for callback in trainer.callbacks)
    return model


def on_rank(rank: int, **settings: Any) -> ImageDataModule:
    """Return a data module that believes to be in process `rank` of two processes."""
    data = NoisyData(**settings)
    data.trainer = SimpleNamespace(distributed_sampler_kwargs={"num_replicas": 2, "rank": rank})
    return data


@both_worker_counts
def test_epoch_has_the_same_order_and_draws_in_every_fresh_module(num_workers: int) -> None:
    expected = epoch_of(NoisyData(), epoch=3)
    data = NoisyData(num_workers=num_workers)
    for epoch in (0, 3):  # An earlier epoch must not change the batches of epoch 3.
        batches = epoch_of(data, epoch)
    assert torch.equal(batches, expected)


def test_order_and_draws_change_with_the_epoch_and_with_the_seed() -> None:
    samples = [
        epoch_of(NoisyData(seed=seed), epoch) for seed, epoch in [(0, 0), (0, 1), (1, 0), (1, 1)]
    ]
    by_index = [one[one[:, 0].argsort()] for one in samples]
    for first, second in itertools.combinations(range(4), 2):
        assert not torch.equal(samples[first][:, 0], samples[second][:, 0])
        assert not torch.isclose(by_index[first][:, 1:], by_index[second][:, 1:]).any()


def test_draws_of_one_sample_from_the_three_streams_are_unrelated() -> None:
    draws = epoch_of(NoisyData(length=500), epoch=0)[:, 1:]
    correlation = torch.corrcoef(draws.T)
    assert (correlation - torch.eye(3)).abs().max() < 0.2
    assert all(len(column.unique()) == 500 for column in draws.T)


@both_worker_counts
def test_random_streams_of_the_process_stay_as_they_are(
    num_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "manual_seed_all", pytest.fail)
    data = NoisyData(num_workers=num_workers)
    states = torch.get_rng_state(), str(np.random.get_state()), random.getstate()
    list(data.train_dataloader())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (str(np.random.get_state()), random.getstate()) == states[1:]


def test_making_evaluation_loaders_iterate_draws_nothing() -> None:
    state = torch.get_rng_state()
    data = DigitsDataModule()
    for loader in (data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()):
        list(loader)
    assert torch.equal(torch.get_rng_state(), state)


def test_training_set_without_random_transforms_is_not_seeded() -> None:
    data = NoisyData()
    data.random_transforms = False
    first, second = epoch_of(data, 0), epoch_of(data, 0)
    assert torch.equal(first[:, 0], second[:, 0])
    assert not torch.isclose(first[:, 1:], second[:, 1:]).any()


def test_shards_of_two_processes_are_disjoint_and_cover_the_set() -> None:
    whole = epoch_of(NoisyData(), epoch=2)
    shards = [epoch_of(on_rank(rank), epoch=2) for rank in (0, 1)]
    assert [len(shard) for shard in shards] == [12, 12]
    together = torch.cat(shards)
    assert torch.equal(together[together[:, 0].argsort()], whole[whole[:, 0].argsort()])


def test_uneven_set_is_filled_up_or_cut_so_that_shards_are_of_one_size() -> None:
    for drop_last, size in [(False, 3), (True, 2)]:
        samplers = [
            EpochSampler(Noisy(5), num_replicas=2, rank=rank, drop_last=drop_last)
            for rank in (0, 1)
        ]
        assert [len(list(sampler)) for sampler in samplers] == [size, size]


def test_shards_repeat_no_sample_where_the_uneven_rest_is_dropped() -> None:
    shards = [epoch_of(on_rank(rank, length=7, drop_last=True), epoch=0) for rank in (0, 1)]
    assert [len(shard) for shard in shards] == [2, 2]
    assert len(torch.cat(shards)[:, 0].unique()) == 4


def test_global_batch_is_shared_by_the_processes_of_the_trainer(
    make_trainer: Callable[..., L.Trainer],
) -> None:
    data = NoisyData()
    assert data.batch_size == 4
    data.trainer = make_trainer(devices=2, strategy="ddp")
    assert data.batch_size == 2
    assert data.train_dataloader().batch_size == data.val_dataloader().batch_size == 2
    data.trainer = make_trainer(devices=3, strategy="ddp")
    with pytest.raises(ValueError, match=r"global_batch_size=4 .* 3 processes: .* multiple of 3"):
        data.train_dataloader()


def test_settings_reach_the_loaders() -> None:
    data = NoisyData(length=6, eval_batch_size=5, drop_last=True)
    assert [len(images) for images, _ in data.train_dataloader()] == [4]
    assert [len(images) for images, _ in data.val_dataloader()] == [5, 1]
    loader = NoisyData(num_workers=2, pin_memory=False).train_dataloader()
    assert (loader.num_workers, loader.persistent_workers, loader.pin_memory) == (2, True, False)


def test_evaluation_goes_through_the_set_in_order() -> None:
    order = torch.cat([images[:, 0] for images, _ in NoisyData().val_dataloader()])
    assert order.tolist() == list(range(SAMPLES))


@both_worker_counts
def test_run_resumed_at_an_epoch_sees_what_the_whole_run_saw(
    num_workers: int, make_trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    save = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    data = NoisyData(num_workers=num_workers)
    whole = fit(data, make_trainer, enable_checkpointing=True, callbacks=[save])
    resumed = fit(
        NoisyData(num_workers=num_workers), make_trainer, ckpt_path=tmp_path / "epoch=1.ckpt"
    )
    assert list(resumed.seen) == [2]
    assert torch.equal(resumed.pixels(2), whole.pixels(2))


@both_worker_counts
@pytest.mark.parametrize(
    ("epoch", "batches"), [(0, 1), (1, 4), (1, 6)], ids=["first batch", "middle", "last batch"]
)
def test_run_resumed_within_an_epoch_continues_at_the_next_batch(
    num_workers: int,
    epoch: int,
    batches: int,
    make_trainer: Callable[..., L.Trainer],
    tmp_path: Path,
) -> None:
    whole = fit(NoisyData(), make_trainer)
    stop = StopAt(epoch, batches, tmp_path / "stopped.ckpt")
    before = fit(NoisyData(num_workers=num_workers), make_trainer, callbacks=[stop])
    after = fit(NoisyData(num_workers=num_workers), make_trainer, ckpt_path=stop.path)
    for one in range(3):
        seen = before.seen.get(one, []) + after.seen.get(one, [])
        assert torch.equal(torch.cat(seen), whole.pixels(one))


def test_resumed_loader_counts_on_and_skips_only_once() -> None:
    loader = NoisyData().train_dataloader()
    loader.load_state_dict({"epoch": 0, "batches": 2})
    first = next(iter(loader))
    assert loader.state_dict() == {"epoch": 0, "batches": 3}
    whole = list(loader)
    assert len(whole) == len(loader) == SAMPLES // 4
    assert torch.equal(first[0], whole[2][0])


def test_overfitting_some_batches_repeats_them(make_trainer: Callable[..., L.Trainer]) -> None:
    model = fit(NoisyData(), make_trainer, overfit_batches=2)
    assert torch.equal(model.pixels(0), model.pixels(2))
    assert model.pixels(0)[:, 0].tolist() == list(range(8))


@pytest.mark.parametrize("kind", ["train", "val", "view"])
def test_too_little_shared_memory_for_the_workers_is_refused_and_says_what_to_do(monkeypatch, kind):
    def loader(workers: int) -> DataLoader:
        arguments = (0, [range(4)]) if kind == "view" else ()
        return getattr(NoisyData(num_workers=workers), f"{kind}_dataloader")(*arguments)

    sample = NoisyData().train_dataset()[0][0]
    batches = 2 * 2 + 1  # torch lets each worker prepare two batches, and one is in use
    needed = batches * 4 * (sample.numel() * sample.element_size())
    monkeypatch.setattr(shared_memory, "free_bytes", lambda: needed)
    loader(2)
    monkeypatch.setattr(shared_memory, "free_bytes", lambda: needed - 1)
    with pytest.raises(ValueError, match=r"keeps 5 batches .*data.num_workers=0.*--shm-size"):
        loader(2)
    loader(1)
    loader(0)


def test_setup_opens_only_what_the_stage_reads() -> None:
    data = NoisyData()
    data.train_dataset = pytest.fail
    data.setup("test")
    assert len(data.test_dataloader().dataset) == SAMPLES


def test_empty_set_is_an_error_that_names_its_place() -> None:
    with pytest.raises(ValueError, match="the train set of a made-up folder is empty"):
        NoisyData(length=0).setup("fit")


def tensor_images(**settings: Any) -> TensorImages:
    images = torch.arange(8 * 16).reshape(8, 1, 4, 4).to(torch.uint8)
    return TensorImages(images, torch.arange(8), mean=[0.0], std=[1.0], white=1, **settings)


def windows(image: Tensor, padding: int) -> list[Tensor]:
    """Return every crop of the padded image."""
    padded = nn.functional.pad(image, (padding,) * 4)
    size, steps = image.shape[-1], range(2 * padding + 1)
    return [padded[:, y : y + size, x : x + size] for y in steps for x in steps]


def test_tensor_images_without_augmentation_are_the_scaled_images() -> None:
    dataset = TensorImages(
        torch.tensor([0, 51, 204, 255]).to(torch.uint8).reshape(1, 1, 2, 2),
        torch.tensor([3]),
        mean=[0.5],
        std=[0.25],
    )
    image, label = dataset[0]
    torch.testing.assert_close(image, torch.tensor([[[-2.0, -1.2], [1.2, 2.0]]]))
    assert label == 3


def test_tensor_images_take_every_crop_and_both_sides_and_nothing_else() -> None:
    dataset = tensor_images(padding=1, flip=True)
    possible = [
        side for crop in windows(dataset.images[2].float(), 1) for side in (crop, crop.flip(-1))
    ]
    taken = [dataset[2, epoch][0] for epoch in range(400)]
    times = [sum(torch.equal(one, other) for other in taken) for one in possible]
    assert sum(times) == 400
    assert min(times) > 5  # Each of the 18 images is expected 400 / 18 = 22 times.


def test_tensor_images_are_the_same_whatever_batch_they_come_in() -> None:
    dataset = tensor_images(padding=1, flip=True, seed=5)
    whole, _ = dataset.__getitems__([(index, 7) for index in range(8)])
    part, labels = tensor_images(padding=1, flip=True, seed=5).__getitems__([(6, 7), (1, 7)])
    assert torch.equal(part, whole[[6, 1]])
    assert labels.tolist() == [6, 1]
    other_epoch, _ = dataset.__getitems__([(index, 8) for index in range(8)])
    assert not torch.equal(other_epoch, whole)
    other_seed = tensor_images(padding=1, flip=True, seed=6)
    assert not torch.equal(other_seed.__getitems__([(index, 7) for index in range(8)])[0], whole)
