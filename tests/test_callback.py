"""Tests that the callback trains as a plain loop does, with many kinds of steps and Trainers."""

import contextlib
import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EMAWeightAveraging, WeightAveraging
from lightning.pytorch.tuner import Tuner
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_dist import (
    DistillationCallback,
    DISTLoss,
    KDLoss,
    Term,
)
from lightning_dist.functional import dist_loss
from plain import Plain, assert_same_weights, data, fitted, plain_loop, teacher_net


def test_weights_and_losses_equal_those_of_a_plain_loop(make_trainer):
    teacher = teacher_net()
    net, losses = plain_loop(copy.deepcopy(teacher))
    module = fitted(make_trainer(callbacks=[DistillationCallback(teacher)]))
    assert module.losses == pytest.approx(losses, rel=1e-6)
    torch.testing.assert_close(module.net.state_dict(), net.state_dict())


def test_the_task_weight_and_another_loss_are_used(make_trainer):
    teacher = teacher_net()
    _, losses = plain_loop(teacher, weight=1.0, task_weight=0.9, loss=KDLoss(tau=4.0))
    callback = DistillationCallback(teacher, loss=KDLoss(tau=4.0), weight=1.0, task_weight=0.9)
    assert fitted(make_trainer(callbacks=[callback])).losses == pytest.approx(losses, rel=1e-6)


def test_weight_0_changes_no_bit_of_the_student(make_trainer):
    alone = fitted(make_trainer(max_epochs=2))
    callback = DistillationCallback(teacher_net(), weight=0.0)
    assert_same_weights(alone, fitted(make_trainer(max_epochs=2, callbacks=[callback])))


def test_the_distillation_loss_is_logged(make_trainer):
    trainer = make_trainer(callbacks=[DistillationCallback(teacher_net())], max_steps=1)
    module = fitted(trainer)
    inputs, target = next(iter(data()))
    torch.manual_seed(3)
    task = F.cross_entropy(Plain().net(inputs), target).item()
    distill = trainer.callback_metrics["train/distill"].item()
    assert module.losses[0] == pytest.approx(task + distill, rel=1e-6)


def test_several_terms_on_different_sub_modules_are_summed(make_trainer):
    terms = {
        "dist": Term(DISTLoss(), weight=2.0),
        "hidden": Term(F.mse_loss, weight=0.5, student="0", teacher="0"),
    }
    trainer = make_trainer(callbacks=[DistillationCallback(teacher_net(), terms=terms)])
    fitted(trainer)
    logged = trainer.callback_metrics
    weighted = 2 * logged["train/distill/dist"] + 0.5 * logged["train/distill/hidden"]
    assert logged["train/distill"].item() == pytest.approx(weighted.item(), rel=1e-6)
    assert logged["train/distill/hidden"] > 0


def test_a_student_called_several_times_gives_the_sum_of_its_losses(make_trainer):
    class Twice(Plain):
        def training_step(self, batch, batch_idx):
            inputs, target = batch
            logits = self.net(inputs[:4]), self.net(inputs[4:])
            return F.cross_entropy(torch.cat(logits), target)

    teacher = teacher_net()
    trainer = make_trainer(callbacks=[DistillationCallback(teacher, weight=1.0)], max_steps=1)
    fitted(trainer, Twice)
    torch.manual_seed(3)
    net, inputs = Twice().net, next(iter(data()))[0]
    expected = sum(dist_loss(net(x), teacher.eval()(x)) for x in inputs.split(4))
    assert trainer.callback_metrics["train/distill"].item() == pytest.approx(expected.item(), 1e-5)


class Recursive(nn.Module):
    """A network that calls itself on rolled inputs, and has no memory for more than 4 samples."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, x, deep=False):
        if len(x) > 4:
            raise MemoryError
        y = self.layer(x)
        return y + self(x.roll(1, 1)) if deep else y


def test_calls_of_a_student_that_calls_itself_or_fails_are_paired_with_the_teachers(make_trainer):
    class Retries(Plain):
        def __init__(self):
            super().__init__()
            self.net = Recursive()

        def training_step(self, batch, batch_idx):
            x, target = batch
            with contextlib.suppress(MemoryError):
                self.net(x)
            return F.cross_entropy(self.net(x[:4], deep=True), target[:4])

    module, teacher, (x, _) = Retries(), Recursive(), next(iter(data()))
    net, x = copy.deepcopy(module.net), x[:4]
    calls = [(x.roll(1, 1), False), (x, True)]
    expected = sum(F.mse_loss(net(*call), teacher(*call)) for call in calls)
    callback = DistillationCallback(Calm(teacher), loss=F.mse_loss, weight=1.0)
    trainer = make_trainer(callbacks=[callback], max_steps=1)
    trainer.fit(module, data())
    assert trainer.callback_metrics["train/distill"].item() == pytest.approx(expected.item(), 1e-5)


class Calm(nn.Module):
    """A network that takes a batch of any size."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x, deep=False):
        return torch.cat([self.network(rows, deep) for rows in x.split(4)])


def test_a_call_of_the_student_without_gradient_is_not_distilled(make_trainer):
    class PseudoLabelling(Plain):
        def training_step(self, batch, batch_idx):
            with torch.no_grad():
                self.net(-batch[0])
            return super().training_step(batch, batch_idx)

    teacher = teacher_net()
    _, losses = plain_loop(teacher)
    module = fitted(make_trainer(callbacks=[DistillationCallback(teacher)]), PseudoLabelling)
    assert module.losses == pytest.approx(losses, rel=1e-6)


class Returns(Plain):
    """A module whose step returns a dict, or None for odd batches."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return {"loss": loss, "extra": batch_idx} if batch_idx % 2 == 0 else None

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.losses.append((outputs["loss"].item(), outputs["extra"]) if outputs else None)


@pytest.mark.filterwarnings("ignore:.*returned `None`.*")
def test_a_step_may_return_a_dict_or_none(make_trainer):
    teacher = teacher_net()
    module = fitted(make_trainer(callbacks=[DistillationCallback(teacher)]), Returns)
    _, losses = plain_loop(teacher, steps=1)
    assert module.losses[0] == (pytest.approx(losses[0], rel=1e-6), 0)
    assert module.losses[1] is None


@pytest.mark.parametrize(
    ("wrap", "output"),
    [
        (lambda x: (x, "features"), None),
        (lambda x: ("features", x), 1),
        (lambda x: {"logits": x}, None),
        (lambda x: {"out": x, "aux": x * 2}, "out"),
        (lambda x: SimpleNamespace(logits=x), None),
        (lambda x: SimpleNamespace(scores=x), "scores"),
    ],
    ids=["tuple", "index", "dict with logits", "named entry", "object", "named attribute"],
)
def test_logits_are_found_in_outputs_that_are_not_tensors(make_trainer, wrap, output):
    class Wrapped(nn.Sequential):
        def forward(self, inputs):
            return wrap(super().forward(inputs))

    class Unwrapping(Plain):
        def training_step(self, batch, batch_idx):
            self.net(batch[0])
            return F.cross_entropy(nn.Sequential.forward(self.net, batch[0]), batch[1])

    teacher = teacher_net()
    _, losses = plain_loop(teacher, steps=1)
    torch.manual_seed(3)
    module = Unwrapping(Wrapped(*Plain().net))
    # The teacher returns a plain tensor, which has no entries: then `output` is not used.
    callback = DistillationCallback(teacher, output=output)
    module = fitted(make_trainer(callbacks=[callback], max_steps=1), module)
    assert module.losses == pytest.approx(losses, rel=1e-6)


class Itself(Plain):
    """A module that is itself the student."""

    def forward(self, inputs):
        return self.net(inputs)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])


def test_the_student_may_be_the_module_itself(make_trainer):
    teacher = teacher_net()
    _, losses = plain_loop(teacher)
    callback = DistillationCallback(teacher, student="")
    assert fitted(make_trainer(callbacks=[callback]), Itself).losses == pytest.approx(losses, 1e-6)


def test_gradients_are_accumulated_and_clipped_as_in_a_plain_loop(make_trainer):
    teacher = teacher_net()
    trainer = make_trainer(
        callbacks=[DistillationCallback(teacher)], accumulate_grad_batches=2, gradient_clip_val=0.1
    )
    module = fitted(trainer)
    torch.manual_seed(3)
    net = Plain().net
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for i, (inputs, target) in enumerate(data()):
        logits = net(inputs)
        total = F.cross_entropy(logits, target) + 2 * dist_loss(logits, teacher.eval()(inputs))
        (total / 2).backward()
        if i % 2:
            nn.utils.clip_grad_norm_(net.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(module.net.state_dict(), net.state_dict())


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_training_works_in_every_precision(make_trainer, precision):
    trainer = make_trainer(callbacks=[DistillationCallback(teacher_net())], precision=precision)
    _, losses = plain_loop(teacher_net())
    assert fitted(trainer).losses == pytest.approx(losses, rel=0.02)


def test_the_relation_loss_is_float32_under_bf16_mixed(make_trainer):
    dtypes = []

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        value = dist_loss(student, teacher)
        dtypes.extend([student.dtype, teacher.dtype, value.dtype])
        return value

    callback = DistillationCallback(teacher_net(), loss=loss)
    fitted(make_trainer(callbacks=[callback], precision="bf16-mixed", max_steps=1))
    assert dtypes == [torch.bfloat16, torch.bfloat16, torch.float32]


@pytest.mark.parametrize("averaging", [WeightAveraging, EMAWeightAveraging])
def test_weight_averaging_copies_no_teacher(make_trainer, averaging):
    class Single(nn.Sequential):
        def __deepcopy__(self, memo):
            raise AssertionError("the teacher was copied")

    distilled = DistillationCallback(Single(*teacher_net()), weight=0.0)
    alone = fitted(make_trainer(callbacks=[averaging(), distilled]))
    assert_same_weights(alone, fitted(make_trainer(callbacks=[averaging()])))


class Tuned(Plain):
    """A module with the attributes (lr, batch_size) that Lightning's tuners set."""

    lr = 0.1
    batch_size = 2

    def train_dataloader(self):
        return DataLoader(data().dataset, batch_size=self.batch_size)

    val_dataloader = train_dataloader

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


@pytest.mark.parametrize("search", ["lr_find", "scale_batch_size"])
def test_tuners_search_with_the_teacher(make_trainer, search):
    teacher, calls = teacher_net(), []
    teacher.register_forward_hook(lambda *_: calls.append(1))
    trainer = make_trainer(callbacks=[DistillationCallback(teacher)], max_epochs=9)
    module = Tuned()
    options = {"lr_find": {"num_training": 6}, "scale_batch_size": {"max_trials": 2}}
    getattr(Tuner(trainer), search)(module, **options[search])
    assert len(calls) >= 6
    assert "training_step" not in module.__dict__


@pytest.mark.filterwarnings("ignore:.*dataloader_iter.*")
def test_a_step_that_takes_the_loaders_iterator(make_trainer):
    class Drawing(Plain):
        def training_step(self, dataloader_iter):
            batch, *_ = next(dataloader_iter)
            return F.cross_entropy(self.net(batch[0]), batch[1])

    teacher = teacher_net()
    trainer = make_trainer(callbacks=[DistillationCallback(teacher)])
    module = fitted(trainer, Drawing)
    torch.testing.assert_close(module.net.state_dict(), plain_loop(teacher)[0].state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("what", ["student", "module", "loss"])
def test_compiled_students_modules_and_losses_train_the_same(make_trainer, what):
    teacher = teacher_net()
    _, losses = plain_loop(teacher)
    torch.manual_seed(3)
    module = Plain()
    if what == "student":
        module.net = torch.compile(module.net, backend="aot_eager")
    compiled = torch.compile(module, backend="aot_eager") if what == "module" else module
    loss = torch.compile(DISTLoss(), backend="aot_eager") if what == "loss" else None
    make_trainer(callbacks=[DistillationCallback(teacher, loss=loss)]).fit(compiled, data())
    assert module.losses == pytest.approx(losses, rel=1e-5)
    # torch.compile itself sets training_step on the instance of a compiled module.
    assert ("training_step" in module.__dict__) == (what == "module")
