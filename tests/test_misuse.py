"""Tests that users' mistakes which no other test covers are refused with the expected message."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_dist import (
    DistillationCallback,
    DistillModule,
    DISTLoss,
    KDLoss,
    StudentEMA,
    Teacher,
    Term,
)
from lightning_dist.data.digits import DigitsDataModule
from lightning_dist.data.image_folder import ImageFolderDataModule
from lightning_dist.losses import FeatureMimic
from lightning_dist.resume import ExactResume
from lightning_dist.tasks.classification import ClassificationModule


class User(LightningModule):
    """A module that a user has written."""

    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__()
        self.net = net or nn.Linear(6, 4)
        self.unused = nn.Linear(1, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        inputs, target = batch
        return F.cross_entropy(self.net(inputs), target)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.net.parameters(), lr=0.1)


class Scaled(nn.Module):
    """A network whose output is multiplied by a value, such as NaN or infinity."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.value


def loader(batch_size: int = 8, classes: int = 4) -> DataLoader:
    target = torch.arange(16) % classes
    return DataLoader(TensorDataset(torch.randn(16, 6), target), batch_size=batch_size)


def spoilt() -> DataLoader:
    """Return a loader whose second batch has NaN in two samples."""
    inputs = torch.randn(16, 6)
    inputs[[10, 13], 3] = float("nan")
    return DataLoader(TensorDataset(inputs, torch.arange(16) % 4), batch_size=8)


def fit(module: LightningModule | None = None, *callbacks: Any, data: Any = None) -> Callable:
    """Return a function that trains a module (by default a new `User`) with some callbacks."""

    def run(context: SimpleNamespace) -> None:
        trainer = context.trainer(callbacks=list(callbacks), num_sanity_val_steps=1)
        trainer.fit(module or User(), data or loader())

    return run


def distil(**options: Any) -> DistillationCallback:
    return DistillationCallback(**({"teacher": nn.Linear(6, 4)} | options))


MISUSES: dict[str, tuple[Callable[..., Any], type[Exception], str]] = {
    # The losses
    "tau of KD below zero": (
        lambda _: KDLoss(tau=-1),
        ValueError,
        "tau is -1",
    ),
    "beta in words": (
        lambda _: DISTLoss(beta="abc"),
        ValueError,
        "beta is 'abc': give a number",
    ),
    "maps to mimic differ": (
        lambda _: FeatureMimic(3, 5)(torch.zeros(1, 3, 4, 4), torch.zeros(1, 5, 2, 2)),
        ValueError,
        "choose maps of the same height",
    ),
    # The teacher
    "class map empty": (
        lambda _: Teacher(nn.Linear(6, 4), class_map=[]),
        ValueError,
        r"class_map is \[\]",
    ),
    # The callback
    "terms in a list": (
        lambda _: distil(terms=[Term(DISTLoss())]),
        TypeError,
        "terms is a list: give a dict",
    ),
    "loss for a term": (
        lambda _: distil(terms={"a": DISTLoss()}),
        TypeError,
        "term 'a' is a DISTLoss: give a Term",
    ),
    "class for a loss": (
        lambda _: distil(loss=DISTLoss),
        TypeError,
        "the loss of term 'distill' is .*: give a function",
    ),
    "name for a loss": (
        lambda _: distil(loss="dist"),
        TypeError,
        "the loss of term 'distill' is 'dist': give a function",
    ),
    "student for its path": (
        lambda _: distil(student=nn.Linear(6, 4)),
        TypeError,
        "student is a Linear: give its dotted path",
    ),
    "student that is no network": (
        lambda _: DistillModule("resnet18"),
        TypeError,
        "the student is a str: give a torch.nn.Module",
    ),
    "loss of a vector": (
        fit(User(), distil(loss=lambda s, t: s.mean(1))),
        MisconfigurationException,
        "'distill'.*the loss returns \\(8,\\)",
    ),
    "loss of a float": (
        fit(User(), distil(loss=lambda s, t: 1.0)),
        MisconfigurationException,
        "'distill'.*the loss returns float",
    ),
    "loss of nothing": (
        fit(User(), distil(loss=lambda s, t: None)),
        MisconfigurationException,
        "'distill'.*the loss returns NoneType",
    ),
    "batch of one, compiled": (
        fit(User(), distil(loss=torch.compile(DISTLoss(), backend="eager")), data=loader(1)),
        MisconfigurationException,
        "the batch has one sample",
    ),
    "weight function that returns no number": (
        fit(User(), distil(weight=lambda _: None)),
        MisconfigurationException,
        "term 'distill': the weight gave None at step 0",
    ),
    "weight that is no number": (
        lambda _: distil(weight="2"),
        ValueError,
        "the weight of term 'distill' is '2': give a number",
    ),
    "task weight that is no number": (
        lambda _: distil(task_weight=None),
        ValueError,
        "task_weight is None: give a number",
    ),
    "weight that is not finite": (
        lambda _: distil(weight=float("nan")),
        ValueError,
        "the weight of term 'distill' is nan: give a number",
    ),
    "infinite weight": (
        fit(User(), distil(weight=lambda _: float("inf"))),
        FloatingPointError,
        "it comes from the loss or its weight",
    ),
    "unknown treatment of NaN": (
        lambda _: distil(nonfinite="ignore"),
        ValueError,
        "nonfinite is 'ignore': use 'raise' or 'skip'",
    ),
    "one-image batches": (
        fit(User(), distil(), data=loader(batch_size=1)),
        MisconfigurationException,
        "the batch has one sample.*gamma=0",
    ),
    "one-image batches, synchronised in one process": (
        fit(User(), distil(loss=DISTLoss(sync=True)), data=loader(batch_size=1)),
        MisconfigurationException,
        "the batch has one sample.*gamma=0",
    ),
    "NaN of the teacher": (
        fit(User(), distil(teacher=Scaled(float("nan")))),
        FloatingPointError,
        "term 'distill' is not finite at step 0 .*NaN or infinity is in the teacher's output",
    ),
    "NaN of the student": (
        fit(User(Scaled(float("nan"))), distil()),
        FloatingPointError,
        "is in the student's output",
    ),
    "NaN of the inputs": (
        fit(User(), distil(), data=spoilt()),
        FloatingPointError,
        r"step 1 \(epoch 0, batch 1\): NaN or infinity is in the batch itself, in the samples 2, 5",
    ),
    "infinity of the student": (
        fit(User(Scaled(float("inf"))), distil()),
        FloatingPointError,
        "is in the student's output",
    ),
    "loss that makes NaN": (
        fit(User(), distil(loss=lambda s, t: (s - t).sum() * float("nan"))),
        FloatingPointError,
        "in neither output, so it comes from the loss or its weight",
    ),
    # The module and the data
    "decay above 1": (
        lambda _: StudentEMA(99),
        ValueError,
        "decay is 99: give a number of at least 0 and at most 1",
    ),
    "no classes to learn": (
        lambda _: ClassificationModule(nn.Linear(6, 4), num_classes=0),
        ValueError,
        "num_classes is 0: give a whole number of at least 1",
    ),
    "labels out of range": (
        fit(ClassificationModule(nn.Linear(6, 4), num_classes=4), data=loader(classes=6)),
        ValueError,
        "a batch has the label 5 and num_classes is 4",
    ),
    "labels below zero": (
        fit(ClassificationModule(nn.Linear(6, 4), num_classes=4), data=loader(classes=-3)),
        ValueError,
        "a batch has the label -2",
    ),
    "learning rate": (
        fit(
            DistillModule(nn.Linear(6, 4), optimizer=lambda p: torch.optim.SGD(p.parameters(), -1))
        ),
        MisconfigurationException,
        "the optimizer cannot be built: Invalid learning rate: -1",
    ),
    "empty batches": (
        lambda _: DigitsDataModule(global_batch_size=0),
        ValueError,
        "global_batch_size is 0: give a whole number of at least 1",
    ),
    "normalisation of other channels": (
        lambda _: DigitsDataModule(mean=[0.5, 0.5]),
        ValueError,
        "mean has 2 values and an image 1 channels",
    ),
    "empty data set": (
        lambda context: ImageFolderDataModule(root=context.folder).setup("fit"),
        (ValueError, FileNotFoundError),
        "train is missing|is empty",
    ),
    "seed of a run": (lambda _: ExactResume(seed=-1), ValueError, "seed is -1"),
}


@pytest.mark.parametrize("name", MISUSES)
def test_a_misuse_is_refused_with_one_message(make_trainer, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    call, kind, message = MISUSES[name]
    with pytest.raises(kind, match=f"(?s){message}") as caught:
        call(SimpleNamespace(trainer=make_trainer, folder=tmp_path))
    assert str(caught.value)


COMMANDS = {
    "verb": ("tarin", "there is no verb 'tarin': use train"),
    "unknown option": ("train foo=1", "Could not override 'foo'"),
    "unknown loss": ("train distill=dits", "Could not find 'distill/dits'.* dist .* kd .* none"),
    "unknown student": ("train student=foo", "Could not find 'student/foo'"),
    "unknown experiment": ("train experiment=foo", "Could not find 'experiment/foo'"),
    "unknown optimizer": ("train optimizer=foo", "Could not find 'optimizer/foo'.*adamw sgd"),
    "unknown key of the trainer": ("train trainer.max_epoch=1", "max_epoch"),
    "no key": ("train ==", "=="),
    "equals signs": (
        "eval ckpt=epoch=0-step=2.ckpt",
        r"""quote it: 'ckpt="epoch=0-step=2\.ckpt"'""",
    ),
    "home": ("train data.root=~/x", f"""'data.root="{Path.home()}/x"'"""),
    "umlaut": ("eval ckpt=/dätä/x.ckpt", """'ckpt="/dätä/x.ckpt"'"""),
    "list without an end": ("train callbacks=[a", r"no viable alternative at input .\[a"),
    "epochs": ("train trainer.max_epochs=abc", "trainer.max_epochs is 'abc'"),
    "accelerator": ("train trainer.accelerator=foo", "accelerator='foo'"),
    "stage 3": (
        "train trainer=deepspeed trainer.strategy.stage=3",
        "use stage 2, or trainer=fsdp2",
    ),
    "forkserver": (
        "train trainer=ddp_spawn trainer.strategy.start_method=forkserver",
        "Lightning 2.6.6 does not copy the random states",
    ),
    "no GPU": ("train trainer=gpu", "No supported gpu backend found"),
    "tau": ("train distill.loss.tau=0", "tau is 0: the temperature must be above 0"),
    "weight": ("train distill.weight=abc", "distill_weight is 'abc': give a number"),
    "too few classes": ("train num_classes=5", "num_classes=5 and the data has 10 classes"),
    "too many classes": ("train num_classes=12", "num_classes=12 and the data has 10 classes"),
    "teacher of other images": (
        "train experiment=digits data=image_folder data.root=pictures num_classes=2 "
        "data.image_size=8 data.num_workers=0",
        "the teacher has 1 channels and the student 3: give both the same number",
    ),
    "student of other images": (
        "train data=image_folder data.root=pictures num_classes=2 data.image_size=8 "
        "data.num_workers=0 distill=none",
        "the images have 3 channels and the student, a SmallCNN, takes 1",
    ),
    "teacher's weights": ("train teacher.weights=w.pth", "there is no weight file w.pth"),
    "teacher's name": ("train teacher=timm", "Missing mandatory value: module.teacher.*source"),
    "train_size": ("train data.train_size=5000", "digits leave 1293 images"),
    "train_size in words": ("train data.train_size=abc", "train_size is 'abc': give a whole"),
    "half an image": ("train data.train_size=10.5", "train_size is 10.5: give a whole number"),
    "no batch": ("train trainer.limit_train_batches=0", "there is no training batch"),
    "batch that is dropped": (
        "train data.train_size=10 data.drop_last=true",
        "has 10 images, and drop_last drops",
    ),
    "no teacher for the data": (
        "train data=cifar10 student=cifar/resnet20",
        "no teacher is chosen.*such as teacher=timm.*distill=none",
    ),
    "deviation of zero": ("train data.std=[0]", "std has 0: give deviations above 0"),
    "accumulation": (
        "train trainer.accumulate_grad_batches=0",
        "trainer.accumulate_grad_batches is 0: give a whole number of at least 1",
    ),
    "validation": (
        "train trainer.val_check_interval=700",
        "trainer.val_check_interval does not fit the data",
    ),
    "fraction": ("train data.val_fraction=1.5", "val_fraction is 1.5: give a number"),
    "batch of one": ("train data.global_batch_size=1", "the batch has one sample"),
    "workers": ("train data.num_workers=-1", "num_workers is -1: give a whole number"),
    "seed": ("train seed=abc", "seed is 'abc': give a whole number"),
    "learning rate": ("train optimizer.lr=-1", "Invalid learning rate: -1"),
    "monitor": ("train monitor=val/foo", "monitor is 'val/foo'.*use val/loss or val/accuracy"),
    "monitor of the test": ("train monitor=test/accuracy", "'test/accuracy', which validation"),
    "monitor of training": ("train monitor=train/loss", "'train/loss', which validation"),
    "test of the teacher": ("train test_teacher=maybe", "test_teacher is 'maybe': give true or"),
    "resume": ("train resume=maybe", "resume is 'maybe': give true or false"),
    "trust": ("export ckpt=text trust=maybe", "trust is 'maybe': give true or false"),
    "sizes": ("export ckpt=text dynamic_size=maybe", "dynamic_size is 'maybe': give true"),
    "precision of products": ("train matmul_precision=foo", "use highest or high or medium"),
    "tested checkpoint": ("train test_checkpoint=foo", "use last or best"),
    "treatment of NaN": ("train distill.nonfinite=foo", "nonfinite is 'foo'"),
    "smoothing": ("train module.label_smoothing=2", "label_smoothing is 2"),
    "data that are missing": ("train data=imagenet distill=none", "data/imagenet/train is missing"),
    "run to resume": ("train ckpt_path=foo.ckpt", "there is no weight file foo.ckpt"),
    "run to resume of another kind": ("train ckpt_path=text", "text is damaged or no weight file"),
    "weights to resume": ("train ckpt_path=weights.pth", "weights.pth is no checkpoint that a run"),
    "safetensors to resume": ("train ckpt_path=w.safetensors", "w.safetensors is no checkpoint"),
    "no checkpoint": ("eval", "Missing mandatory value: ckpt"),
    "checkpoint that is missing": ("eval ckpt=foo", "there is no weight file foo"),
    "file to export that is missing": ("export ckpt=foo", "there is no weight file foo"),
    "text for a checkpoint": ("export ckpt=text", "text is damaged or no weight file"),
    "weights for a checkpoint": ("predict ckpt=weights.pth images=.", "holds no config"),
    "no runs": ("report foo", "no runs found under foo .no such folder"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_misused_command_prints_one_line(refused, tmp_path, name):
    arguments, message = COMMANDS[name]
    (tmp_path / "text").write_text("no weights")
    torch.save({"a": torch.zeros(1)}, tmp_path / "weights.pth")
    save_file({"a": torch.zeros(1)}, tmp_path / "w.safetensors")
    for path in ("train/a", "train/b", "val/a", "val/b"):
        (tmp_path / "pictures" / path).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "pictures" / path / "one.png")
    verb, *options = arguments.split()
    if verb == "train":
        options = ["trainer=auto", "print_config=false", "callbacks.progress=null", *options]
    line = refused(verb, *options)
    assert re.search(message, line), line


def test_an_error_in_a_worker_of_a_loader_is_one_line_too(refused, tmp_path):
    for split in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / "pictures" / split / name).mkdir(parents=True)
            (tmp_path / "pictures" / split / name / "one.png").write_bytes(b"no image")
    data = ["data=image_folder", "data.root=pictures", "num_classes=2", "data.num_workers=1"]
    options = ["distill=none", "student.in_channels=3", "trainer=cpu", "print_config=false"]
    line = refused("train", *data, *options, "callbacks.progress=null")
    assert re.search(r"error: pictures/val/a/one\.png cannot be read as an image", line), line


@pytest.mark.parametrize(
    ("arguments", "package"),
    [("train data=huggingface data.path=foo num_classes=2 distill=none", "datasets")],
)
def test_a_missing_package_is_named_with_its_extra(refused, monkeypatch, arguments, package):
    monkeypatch.setitem(sys.modules, package, None)
    line = refused(*arguments.split(), "print_config=false", "callbacks.progress=null")
    assert package in line
    assert "pip install" in line


def test_terms_that_are_not_finite_are_skipped_and_counted(make_trainer, tmp_path):
    teacher = Scaled(float("inf"))
    module, plain = User(), User()
    plain.load_state_dict(module.state_dict())
    data = loader()
    callback = distil(teacher=teacher, nonfinite="skip")
    trainer = make_trainer(callbacks=[callback], log_every_n_steps=1)
    trainer.fit(module, data)
    assert callback.skipped == 2
    assert trainer.callback_metrics["train/distill_skipped"] == 2
    assert trainer.callback_metrics["train/distill"] == 0
    make_trainer().fit(plain, data)  # This trains with the task loss alone.
    assert torch.equal(module.net.weight, plain.net.weight)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    again = distil(teacher=teacher, nonfinite="skip")
    resumed = make_trainer(callbacks=[again], max_epochs=2)
    resumed.fit(module, data, ckpt_path=tmp_path / "run.ckpt", weights_only=True)
    assert again.skipped == 4


def test_only_the_term_that_is_not_finite_is_skipped(make_trainer):
    terms = {
        "good": Term(DISTLoss(), 1.0),
        "bad": Term(lambda s, t: s.sum() * float("nan"), 1.0),
    }
    callback = distil(terms=terms, nonfinite="skip")
    trainer = make_trainer(callbacks=[callback])
    trainer.fit(User(), loader())
    assert trainer.callback_metrics["train/distill/good"] > 0
    assert trainer.callback_metrics["train/distill/bad"] == 0
    assert callback.skipped == 2


def test_a_last_batch_of_one_image_is_no_misuse(make_trainer):
    trainer = make_trainer(callbacks=[distil()])
    trainer.fit(User(), loader(batch_size=15))
    assert trainer.global_step == 2
