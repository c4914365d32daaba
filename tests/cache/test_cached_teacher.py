"""Tests of CachedTeacher: training with it, its files, runs that share them, and its refusals."""

import copy
import json
import logging
import os
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from caching import (
    SAMPLES,
    SIZE,
    TRAINED,
    assert_rows_are_the_teachers_outputs,
    digits,
    files,
    fork,
    same_weights,
    teacher,
)
from lightning_dist import (
    CachedTeacher,
    DistillationCallback,
    DistillModule,
    KDLoss,
    Teacher,
    Term,
)
from lightning_dist.cache import cached
from lightning_dist.data.digits import DigitsDataModule
from lightning_dist.data.scenes import ScenesDataModule
from lightning_dist.models.small import SmallCNN, SmallUNet
from lightning_dist.tasks.classification import ClassificationModule
from lightning_dist.tasks.segmentation import SegmentationModule
from lightning_dist.teacher import EnsembleTeacher, InputBridge


class Counting(SmallCNN):
    """A teacher that counts, in class attributes, its images and its moves to a device."""

    images = moves = 0

    def __init__(self) -> None:
        super().__init__([32, 64, 128])

    def forward(self, images):
        Counting.images += len(images)
        return super().forward(images)

    def to(self, *args, **kwargs):
        Counting.moves += 1
        return super().to(*args, **kwargs)


@pytest.fixture(autouse=True)
def _reset() -> None:
    Counting.images = Counting.moves = 0


# The training


@pytest.mark.parametrize("workers", [0, 1])
def test_a_student_is_the_same_with_a_cached_and_with_a_live_teacher(train, tmp_path, workers):
    """Without a cache, a run with seed 0 has the augmentations of the views in its first epochs."""
    live = train(teacher())
    warm = CachedTeacher(teacher(), tmp_path, views=3, dtype="float32")
    assert same_weights(live, train(warm, digits(num_workers=workers)))
    assert same_weights(live, train(warm, digits(num_workers=workers)))


def test_a_student_that_draws_random_numbers_draws_those_of_the_live_teacher(train, tmp_path):
    def run(teacher):
        torch.manual_seed(0)
        student = nn.Sequential(SmallCNN([4, 8]), nn.Dropout(0.1))
        module = ClassificationModule(student, teacher, num_classes=10)
        return train(None, digits(num_workers=1), module)

    kept = CachedTeacher(teacher(), tmp_path, views=3, dtype="float32")
    live = run(teacher())
    assert same_weights(live, run(kept))
    assert same_weights(live, run(kept))


def test_a_copy_of_the_module_shares_the_teacher_and_a_pickle_holds_no_file(train, tmp_path):
    kept = CachedTeacher(teacher(), tmp_path, views=1)
    before = len(pickle.dumps(kept))

    class Copying(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            assert copy.deepcopy(pl_module).teacher is kept
            assert len(pickle.dumps(kept)) < before + 2000

    train(kept, epochs=1, callbacks=[Copying()])


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="there is no /proc")
def test_views_are_open_one_at_a_time_and_no_lock_stays_open(train, tmp_path):
    opened = []

    class Look(L.Callback):
        def on_train_epoch_end(self, *args):
            names = map(os.path.realpath, Path("/proc/self/fd").iterdir())
            opened.append([name[-4:] for name in names if name.startswith(str(tmp_path))])

    train(CachedTeacher(teacher(), tmp_path, views=3), epochs=3, callbacks=[Look()])
    assert opened == [[".npy"]] * 3


def test_float16_changes_the_student_only_by_rounding(train, tmp_path):
    live = train(teacher()).student.state_dict()
    kept = train(CachedTeacher(teacher(), tmp_path, views=3)).student.state_dict()
    for name, value in live.items():
        torch.testing.assert_close(kept[name], value, rtol=1e-2, atol=1e-3)
    assert any(not torch.equal(kept[name], value) for name, value in live.items())


def test_every_row_is_the_teachers_output(train, tmp_path):
    train(CachedTeacher(teacher(), tmp_path, views=2))
    assert len(files(tmp_path)) == 2
    assert_rows_are_the_teachers_outputs(tmp_path, digits())


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_the_cache_works_with_every_precision_of_the_student(train, tmp_path, precision):
    kept = CachedTeacher(teacher(), tmp_path, views=1)
    module = train(kept, epochs=1, precision=precision)
    assert all(value.isfinite().all() for value in module.student.state_dict().values())
    assert_rows_are_the_teachers_outputs(tmp_path, digits())


def test_a_view_is_drawn_in_the_loaders_default_dtype(train, tmp_path):
    """In a step under bf16-true the default dtype is bfloat16: torch.rand draws other numbers."""

    class Noisy(Dataset):
        def __init__(self, samples):
            self.samples = samples

        def __len__(self):
            return len(self.samples)

        def __getitem__(self, index):
            image, label = self.samples[index]
            return image + torch.rand(image.shape), label

    class NoisyDigits(DigitsDataModule):
        def train_dataset(self):
            return Noisy(super().train_dataset())

    data = NoisyDigits(train_size=SIZE)
    train(CachedTeacher(teacher(), tmp_path, views=1), data, epochs=1, precision="bf16-true")
    train(CachedTeacher(teacher(), tmp_path, views=1), data, epochs=1)
    assert len(files(tmp_path)) == 1


def test_the_callback_reads_the_cache_with_a_users_module(train, tmp_path):
    class Plain(L.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = SmallCNN([4, 8])

        def training_step(self, batch, batch_idx):
            images, labels = batch
            return F.cross_entropy(self.net(images), labels)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    kept = CachedTeacher(teacher(), tmp_path, views=3, dtype="float32")
    live, warm = (
        train(None, module=Plain(), callbacks=[DistillationCallback(t)]) for t in (teacher(), kept)
    )
    assert same_weights(live, warm)


def test_a_tuner_reads_the_cached_outputs(make_trainer, tmp_path):
    kept = CachedTeacher(teacher(), tmp_path, views=1)
    module = ClassificationModule(SmallCNN([4, 8]), kept, num_classes=10)
    trainer = make_trainer(max_epochs=9)
    Tuner(trainer).lr_find(module, datamodule=digits(), num_training=4, update_attr=False)
    assert_rows_are_the_teachers_outputs(tmp_path, digits())
    assert len(files(tmp_path)) == 1


def test_an_ensemble_with_bridge_and_class_map_is_cached(train, tmp_path):
    bridge = InputBridge([0.5], [0.5], DigitsDataModule.mean, DigitsDataModule.std)
    bridged = Teacher(SmallCNN([32, 64, 128]), TRAINED, inputs=bridge, class_map=range(10))
    ensemble = EnsembleTeacher([teacher(), bridged])
    live = train(ensemble)
    assert same_weights(live, train(CachedTeacher(ensemble, tmp_path, views=3, dtype="float32")))


def test_a_run_that_resumes_within_an_epoch_reads_the_outputs_for_its_batches(train, tmp_path):
    def run(name, **kwargs):
        kept = CachedTeacher(teacher(), tmp_path / "cache", views=2)
        return train(kept, epochs=3, enable_checkpointing=True, **kwargs)

    whole = run("whole")
    saver = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=5, save_top_k=-1)
    run("first", max_steps=5, callbacks=[saver])
    (path,) = (tmp_path / "saved").glob("*.ckpt")
    torch.manual_seed(1)
    module = ClassificationModule(
        SmallCNN([4, 8]), CachedTeacher(teacher(), tmp_path / "cache", views=2), num_classes=10
    )
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=3,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, datamodule=digits(), ckpt_path=path)
    assert same_weights(whole, module)


@pytest.mark.parametrize("network", ["one head", "two heads"])
def test_dense_logits_are_cached(make_trainer, tmp_path, network):
    """The files contain the logits of both heads, at the network's own resolution."""

    class TwoHeads(SmallUNet):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.aux_classifier = nn.Conv2d(3, self.num_classes, 1)

        def forward(self, images):
            return {"out": super().forward(images), "aux": self.aux_classifier(images)}

    kind = SmallUNet if network == "one head" else TwoHeads

    def run(wrap):
        torch.manual_seed(0)
        student, theirs = kind([4, 8], num_classes=11), kind([8, 8], num_classes=11)
        module = SegmentationModule(student, wrap(theirs), num_classes=11)
        data = ScenesDataModule(train_size=8, val_size=2, global_batch_size=4, scene_size=32)
        trainer = make_trainer(max_epochs=2, limit_val_batches=0)
        trainer.fit(module, datamodule=data)
        return module

    live = run(Teacher)
    assert same_weights(live, run(lambda t: CachedTeacher(t, tmp_path, dtype="float32")))
    (path,) = files(tmp_path)  # Scenes have no random augmentation, so there is one view.
    dtype = np.load(path, allow_pickle=False).dtype
    assert dtype["classifier"].shape == (11, 16, 16)
    assert ("aux_classifier" in dtype.names) == (network == "two heads")


# The number of calls of the teacher, and the runs that share a cache


def test_runs_of_all_seeds_compute_each_view_once(train, tmp_path):
    kept = CachedTeacher(Counting(), tmp_path, views=2)
    train(kept, digits(seed=1), epochs=1)
    # The first run calls the teacher twice with the samples, to check that it is deterministic.
    assert Counting.images == SIZE + 2 * SAMPLES
    train(kept, digits(seed=1), epochs=5)
    train(kept, digits(seed=2, num_workers=1, global_batch_size=32, drop_last=True), epochs=5)
    assert Counting.images == 2 * SIZE + 4 * SAMPLES


def test_a_view_computes_each_image_without_a_label_once(train, tmp_path):
    (tmp_path / "more").mkdir()
    for number in range(7):
        Image.new("L", (8, 8), 30 * number).save(tmp_path / "more" / f"{number}.png")
    settings = {"unlabeled": tmp_path / "more", "labels": 20}
    kept = CachedTeacher(Counting(), tmp_path / "cache", views=2)
    train(kept, digits(**settings), epochs=3)
    train(kept, digits(**settings, unlabeled_share=0.25), epochs=3)
    assert Counting.images == 2 * (SIZE + 7) + 3 * SAMPLES


def test_a_run_with_a_filled_cache_calls_the_teacher_for_the_samples_only(train, tmp_path):
    kept = CachedTeacher(Counting(), tmp_path, views=1)
    train(kept, epochs=1)
    assert Counting.images > SIZE
    Counting.images = Counting.moves = 0
    train(kept, epochs=2)
    assert Counting.images == SAMPLES
    assert Counting.moves == 2  # The teacher moves to the device, and back to the CPU.


def test_a_run_with_more_views_computes_only_the_missing_views(train, tmp_path):
    network = Counting()
    for views in (1, 3):
        train(CachedTeacher(network, tmp_path, views=views), epochs=3)
    assert Counting.images == 3 * SIZE + 3 * SAMPLES
    assert len({path.parent for path in files(tmp_path)}) == 1


def test_the_data_module_has_no_views_after_fit(train, tmp_path):
    data = digits()
    train(CachedTeacher(teacher(), tmp_path), data, epochs=1)
    assert data.views is None


def with_other_pixels() -> DigitsDataModule:
    data = digits()
    data.setup("fit")
    data._dataset("train").images[0] += 1
    return data


def with_another_attribute() -> DigitsDataModule:
    """Return a data module with a new setting that changes none of the samples' pixels."""
    data = digits()
    data.rarely = 0.001
    return data


CHANGES = {
    "weights": lambda: (CachedTeacher(SmallCNN([32, 64, 128])), digits()),
    "class": lambda: (CachedTeacher(Teacher(Counting(), TRAINED)), digits()),
    "class map": lambda: (CachedTeacher(teacher(class_map=range(10))), digits()),
    "teacher's dtype": lambda: (CachedTeacher(teacher(dtype="float64")), digits()),
    "stored dtype": lambda: (CachedTeacher(teacher(), dtype="float32"), digits()),
    "normalisation": lambda: (CachedTeacher(teacher()), digits(mean=[0.3])),
    "samples": lambda: (CachedTeacher(teacher()), digits(val_fraction=0.2)),
    "augmentation": lambda: (
        CachedTeacher(teacher()),
        DigitsDataModule(train_size=SIZE, augment=False),
    ),
    "pixels": lambda: (CachedTeacher(teacher()), with_other_pixels()),
    "a setting": lambda: (CachedTeacher(teacher()), with_another_attribute()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_teacher_or_other_data_have_another_cache(train, tmp_path, change):
    torch.manual_seed(5)
    train(CachedTeacher(teacher(), tmp_path), epochs=1)
    other, data = CHANGES[change]()
    other.root = tmp_path
    train(other, data, epochs=1)
    assert len({path.parent for path in files(tmp_path)}) == 2


def test_with_cache_off_the_teacher_is_returned():
    network = teacher()
    for off in ("off", False):  # YAML reads off as False.
        assert cached(network, off) is network
    assert cached(network, True).root == Path("data/teacher_cache")
    assert cached(network, "auto").root == Path("data/teacher_cache")
    assert cached(network, "some/folder", views=3).views == 3


@pytest.mark.parametrize("word", [None, "none", "None", "no", "on", "false", ""])
def test_a_word_that_is_probably_no_folder_is_refused(word):
    with pytest.raises(ValueError, match=f"distill.cache is {word!r}: use auto, off or a folder"):
        cached(teacher(), word)


def test_the_command_writes_its_caches_to_data_teacher_cache(command, tmp_path):
    options = ["trainer=cpu", "trainer.max_epochs=2", "print_config=false", "test_teacher=false"]
    command("train", "distill.cache=auto", *options, "callbacks.progress=null")
    (path,) = files(tmp_path / "data" / "teacher_cache")  # Digits without shifts have one view.
    about = json.loads((path.parent / "about.json").read_text())
    assert about["samples"] == len(np.load(path, allow_pickle=False))


def test_a_direct_call_calls_the_wrapped_teacher(tmp_path):
    images = torch.randn(2, 1, 8, 8)
    kept = CachedTeacher(Teacher(SmallCNN([4]), class_map=[3, 1]), tmp_path)
    assert torch.equal(kept(images), kept.teacher(images))
    assert torch.equal(kept.as_network()(images), kept.teacher(images))


# The refusals


def test_an_image_that_has_changed_since_the_view_was_computed_is_refused(train, tmp_path):
    kept = CachedTeacher(teacher(), tmp_path, views=1)
    train(kept, epochs=1)
    data = digits()
    data.setup("fit")
    # Image 7 is not one of the samples whose pixels are in the digest of the folder.
    data._dataset("train").images[7] += 1
    with pytest.raises(ValueError, match=r"sample 7 in view 0 is another image.*Delete .*"):
        train(kept, data, epochs=1)


@pytest.mark.parametrize("damage", ["truncated", "foreign rows", "no array", "pickle", "empty"])
def test_a_damaged_file_is_refused_by_name(train, tmp_path, damage):
    train(CachedTeacher(teacher(), tmp_path, views=1), epochs=1)
    (path,) = files(tmp_path)
    content = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "foreign rows":
        np.save(path, np.zeros((SIZE, 10), np.float16))
    elif damage == "pickle":
        path.write_bytes(pickle.dumps(Exploding()))
    else:
        path.write_bytes(b"" if damage == "empty" else b"logits")
    with pytest.raises(
        ValueError, match=rf"{path.name} (is damaged|is not a file of 150).*delete it"
    ):
        train(CachedTeacher(teacher(), tmp_path, views=1), epochs=1)


class Exploding:
    def __reduce__(self):
        return pytest.fail, ("it was unpickled",)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"mixup": lambda x, y: (x, y)}, r"module.mixup=null.*distill.cache=off"),
        ({"shard_teacher": True}, r"leave out shard_teacher.*distill.cache=off"),
    ],
    ids=["mixup", "shard_teacher"],
)
def test_unsupported_options_are_refused_before_training(train, tmp_path, option, message):
    kept, data = CachedTeacher(teacher(), tmp_path), digits()
    module = ClassificationModule(SmallCNN([4]), kept, num_classes=10, **option)
    with pytest.raises(MisconfigurationException, match=message):
        train(None, data, module)
    assert data.views is None
    assert not any(tmp_path.iterdir())


def test_an_unknown_part_is_refused_before_training(train, tmp_path):
    term = Term(nn.MSELoss(), 1.0, "head", "heat")
    callback = DistillationCallback(
        CachedTeacher(teacher(), tmp_path), student="student", terms={"head": term}
    )
    module = ClassificationModule(SmallCNN([4, 8]), num_classes=10)
    with pytest.raises(MisconfigurationException, match=r"no sub-module 'heat'.*'head'"):
        train(None, module=module, callbacks=[callback])


def test_another_network_is_refused(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"whole images only.*distill.cache=off"):
        CachedTeacher(teacher(), tmp_path).with_network(SmallCNN([4]))


class InPlace(DistillModule):
    def training_step(self, batch, batch_idx):
        images, labels = batch
        return super().training_step((images.mul_(0.5), labels), batch_idx)


class Copied(DistillModule):
    def training_step(self, batch, batch_idx):
        images, labels = batch
        return super().training_step((images * 0.5, labels), batch_idx)


class OnDevice(DistillModule):
    def on_after_batch_transfer(self, batch, dataloader_idx):
        images, labels = batch
        return images * 0.5, labels


@pytest.mark.parametrize(
    ("kind", "message"),
    [(InPlace, "changed images"), (Copied, "changed images"), (OnDevice, "OnDevice that")],
)
def test_images_that_the_module_changes_are_refused(train, tmp_path, kind, message):
    student = SmallCNN([4, 8])
    before = {name: value.clone() for name, value in student.state_dict().items()}
    with pytest.raises(MisconfigurationException, match=message):
        train(None, module=kind(student, CachedTeacher(teacher(), tmp_path, views=1)))
    after = student.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_data_without_the_indices_of_samples_is_refused(make_trainer, tmp_path):
    module = ClassificationModule(SmallCNN([4]), CachedTeacher(teacher(), tmp_path), num_classes=10)
    loader = DataLoader(TensorDataset(torch.zeros(4, 1, 8, 8), torch.zeros(4).long()))
    with pytest.raises(MisconfigurationException, match=r"no data module.*ImageDataModule"):
        make_trainer().fit(module, loader)

    class Users(L.LightningDataModule):
        def train_dataloader(self):
            return loader

    with pytest.raises(MisconfigurationException, match=r"has a Users: .*ImageDataModule"):
        make_trainer().fit(module, datamodule=Users())


def test_detection_is_refused_before_training(refused):
    line = refused(
        "train",
        "experiment=scenes/detection_retinanet",
        "distill.cache=auto",
        "trainer=cpu",
        "print_config=false",
        "data.train_size=4",
    )
    assert "knows whole images only, and detection calls parts of the teacher" in line


def test_a_part_that_is_called_twice_is_refused(train, tmp_path):
    class Twice(SmallCNN):
        def forward(self, images):
            return super().forward(images) + super().forward(images)

    kept = CachedTeacher(Twice([4, 8]), tmp_path)
    callback = DistillationCallback(
        kept, student="student", terms={"head": Term(nn.MSELoss(), 1.0, "head", "head")}
    )
    module = ClassificationModule(SmallCNN([4, 8]), num_classes=10)
    with pytest.raises(MisconfigurationException, match="'head' was called 2 times"):
        train(None, module=module, callbacks=[callback])
    assert not files(tmp_path)


def test_logits_that_are_too_large_for_float16_are_refused(train, tmp_path):
    network = SmallCNN([4, 8])
    network.head.weight.data *= 1e7
    with pytest.raises(MisconfigurationException, match=r"large for float16.*dtype='float32'"):
        train(CachedTeacher(network, tmp_path), epochs=1)
    assert not files(tmp_path)
    train(CachedTeacher(network, tmp_path, dtype="float32"), epochs=1)


def test_logits_that_are_too_large_for_float32_are_refused_with_other_advice(train, tmp_path):
    network = SmallCNN([4, 8]).double()
    network.head.weight.data *= 1e80
    with pytest.raises(MisconfigurationException, match=r"large for float32: use a teacher"):
        train(CachedTeacher(network, tmp_path, dtype="float32"), epochs=1)


class Excluding(SmallCNN):
    """A network that sets the logit of class 3 to `value`, such as -inf to exclude the class."""

    def __init__(self, value: float) -> None:
        torch.manual_seed(3)
        super().__init__([4, 8])
        self.value = value

    def forward(self, images):
        return super().forward(images).index_fill(1, torch.tensor([3]), self.value)


def test_a_class_that_the_teacher_excludes_stays_excluded(train, tmp_path):
    def run(network, dtype=None):
        torch.manual_seed(0)
        kept = CachedTeacher(network, tmp_path, dtype=dtype) if dtype else network
        return train(
            None,
            module=ClassificationModule(
                SmallCNN([4, 8]), kept, num_classes=10, distill_loss=KDLoss()
            ),
        )

    live = run(Excluding(-float("inf")))
    assert same_weights(live, run(Excluding(-float("inf")), "float32"))
    run(Excluding(-float("inf")), "float16")
    rows = np.load(files(tmp_path)[-1], allow_pickle=False)["(output)"]
    assert np.isneginf(rows[:, 3]).all()
    assert np.isfinite(np.delete(rows, 3, axis=1)).all()


def test_a_teacher_that_returns_nan_is_refused(train, tmp_path):
    with pytest.raises(MisconfigurationException, match=r"teacher's \(output\) is NaN"):
        train(CachedTeacher(Excluding(float("nan")), tmp_path, dtype="float32"), epochs=1)
    assert not files(tmp_path)


def test_a_full_disk_is_an_error_with_both_sizes(train, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2000))
    with (
        caplog.at_level(logging.INFO),
        pytest.raises(OSError, match=r"needs 0.0 MB and .* has 0.0 MB left.*distill.cache=PATH"),
    ):
        train(CachedTeacher(teacher(), tmp_path), epochs=1)
    assert "8 views of 150 samples take 0.0 MB, of which 0.0 MB are still" in caplog.text
    assert not files(tmp_path)


@pytest.mark.parametrize("settings", [{"views": 0}, {"dtype": "float8"}], ids=str)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        CachedTeacher(nn.Linear(1, 1), **settings)


def test_a_teacher_that_is_no_network_is_refused(tmp_path):
    for wrong in ("resnet50", CachedTeacher(teacher(), tmp_path)):
        with pytest.raises(TypeError, match=f"the teacher is a {type(wrong).__name__}"):
            CachedTeacher(wrong, tmp_path)


# Several processes


def test_runs_that_need_a_view_at_once_compute_it_once(train, counted, tmp_path, monkeypatch):
    monkeypatch.setenv("SLOWLY", "0.1")
    data = digits(global_batch_size=50)
    runs = [fork(train, counted.teacher(), data, epochs=2) for _ in range(3)]
    for run in runs:
        run.join()
        assert run.exitcode == 0
    assert sum(counted.batches()) == 2 * SIZE
    assert_rows_are_the_teachers_outputs(tmp_path / "cache", digits())


def test_the_processes_of_a_run_compute_a_share_each(train, counted, tmp_path):
    data = digits(global_batch_size=80)
    train(counted.teacher(), data, epochs=2, strategy="ddp_fork", devices=2)
    assert sorted(counted.batches()) == [30, 30, 40, 40, 40, 40, 40, 40]
    assert len(files(tmp_path / "cache")) == 2
    assert_rows_are_the_teachers_outputs(tmp_path / "cache", digits())


def test_a_sweep_over_seeds_and_losses_computes_each_view_once(command, counted, tmp_path):
    overrides = [
        "seed=0,1",
        "distill.loss.tau=1,2",
        f"distill.cache={tmp_path / 'cache'}",
        "distill.cache_views=2",
        "teacher.network._target_=counted.CountedCNN",
        "data.augment=true",
        f"data.train_size={SIZE}",
        "test_teacher=false",
        "trainer=cpu",
        "trainer.max_epochs=2",
        "print_config=false",
        "callbacks.progress=null",
    ]
    command("train", "-m", *overrides)
    assert sum(counted.batches()) == 2 * SIZE
    assert len(files(tmp_path / "cache")) == 2
