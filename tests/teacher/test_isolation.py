"""Tests that a teacher's calls do not change the student's inputs and random numbers."""

import copy
from dataclasses import dataclass
from types import SimpleNamespace

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_dist import DistillationCallback, Teacher
from lightning_dist.teacher.isolation import own_inputs
from plain import data

STEPS = 5


class Store:
    """A container of attributes in a dict of its own, as in PyTorch Geometric."""

    def __init__(self, **values: Tensor) -> None:
        self.__dict__["mapping"] = values

    def __getattr__(self, name):
        try:
            return self.__dict__["mapping"][name]
        except KeyError:
            raise AttributeError(name) from None

    def __setattr__(self, name, value):
        self.__dict__["mapping"][name] = value


class CopyingStore(Store):
    """A store that copies its dict itself, as the stores of PyTorch Geometric do."""

    def __copy__(self):
        return type(self)(**self.__dict__["mapping"])


@dataclass
class Sample:
    x: Tensor


@dataclass(slots=True, frozen=True)
class Slots:
    x: Tensor

    def assign(self, value):
        object.__setattr__(self, "x", value)


OBJECTS = {
    "store": Store,
    "store that copies itself": CopyingStore,
    "namespace": SimpleNamespace,
    "dataclass": Sample,
    "slots": Slots,
}


class OnObject(nn.Module):
    """A network that works on the attribute x of its input, in one of three ways."""

    def __init__(self, way: str = "read") -> None:
        super().__init__()
        torch.manual_seed(5)
        self.way = way
        self.layer = nn.Linear(6, 6)
        self.head = nn.Linear(6, 4)

    def forward(self, batch):
        if self.way == "assign":
            put = getattr(batch, "assign", lambda value: setattr(batch, "x", value))
            put(self.layer(batch.x))
            return self.head(batch.x)
        x = batch.x.mul_(0.5) if self.way == "write" else batch.x
        return self.head(self.layer(x))


class Objects(L.LightningModule):
    """A module that hands objects to its network."""

    def __init__(self, kind: type) -> None:
        super().__init__()
        self.net, self.kind = OnObject(), kind

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(self.kind(x=batch[0])), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def called_at_weight_0(trainer: L.Trainer) -> Tensor:
    """Return the weight 0 as a tensor; the callback does not read it, so it calls the teacher."""
    return torch.zeros(())


def trained(make_trainer, module: L.LightningModule, *callbacks) -> L.LightningModule:
    torch.manual_seed(3)
    make_trainer(callbacks=list(callbacks), max_epochs=2).fit(module, data(STEPS))
    return module


def assert_same_bits(left: nn.Module, right: nn.Module) -> None:
    torch.testing.assert_close(left.state_dict(), right.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("kind", OBJECTS.values(), ids=OBJECTS)
@pytest.mark.parametrize("way", ["assign", "write"])
def test_a_teacher_that_changes_objects_leaves_the_students_alone(make_trainer, kind, way):
    alone = trained(make_trainer, Objects(kind))
    callback = DistillationCallback(OnObject(way), weight=called_at_weight_0)
    assert_same_bits(alone, trained(make_trainer, Objects(kind), callback))


@pytest.mark.parametrize("way", ["data", "numpy"])
def test_a_write_that_no_version_counter_shows_leaves_the_students_input_alone(make_trainer, way):
    class Writes(nn.Linear):
        def forward(self, x):
            (x.data if way == "data" else x.numpy())[:] *= 0.5
            return super().forward(x)

    alone = trained(make_trainer, Plain(Noisy()))
    callback = DistillationCallback(Writes(6, 4), weight=called_at_weight_0)
    assert_same_bits(alone, trained(make_trainer, Plain(Noisy()), callback))


def test_a_copy_shares_its_tensors_and_what_is_not_data():
    network, x = nn.Linear(2, 2), torch.ones(2)
    batch = SimpleNamespace(network=network, items={"x": [x, x]}, batch=None)
    batch.batch = batch  # The object contains itself.
    stream = iter([1, 2])
    (own, own_stream), tensors = own_inputs((batch, stream), clone=False)
    assert own is not batch
    assert own.items["x"] is not batch.items["x"]
    assert own.batch is own
    assert own.network is network
    assert all(y is x for y in tensors)
    assert list(own_stream) == [1, 2]


class Noisy(nn.Module):
    """A network that draws random numbers in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.layer = nn.Linear(6, 4)
        self.drawn: list[Tensor] = []

    def forward(self, x):
        self.drawn.append(torch.rand(len(x), 1))
        return self.layer(x) * (1 + self.drawn[-1])


class Plain(L.LightningModule):
    """A module whose network can draw random numbers."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def test_a_teacher_that_draws_leaves_the_students_numbers_alone(make_trainer):
    alone = trained(make_trainer, Plain(Noisy()))
    callback = DistillationCallback(Noisy(), weight=called_at_weight_0)
    assert_same_bits(alone, trained(make_trainer, Plain(Noisy()), callback))


def test_a_teacher_draws_other_numbers_in_each_step_and_the_same_when_resumed(
    make_trainer, tmp_path
):
    student, teacher = Noisy(), Noisy()
    trained(make_trainer, Plain(student), DistillationCallback(teacher))
    every = torch.stack([*teacher.drawn, *student.drawn])
    assert len(teacher.drawn) == 2 * STEPS
    assert len(every.unique()) == every.numel()

    resumed = Noisy()
    first, second = DistillationCallback(Noisy()), DistillationCallback(resumed)
    for epochs, callback, checkpoint in [(1, first, None), (2, second, tmp_path / "one.ckpt")]:
        trainer = make_trainer(callbacks=[callback], max_epochs=epochs)
        module = Plain(Noisy())
        torch.manual_seed(3)
        trainer.fit(module, data(STEPS), ckpt_path=checkpoint)
        trainer.save_checkpoint(tmp_path / "one.ckpt")
    assert torch.equal(torch.stack(resumed.drawn), torch.stack(teacher.drawn[STEPS:]))


def test_a_copy_of_the_student_scores_0_with_the_students_numbers(make_trainer):
    module = Plain(Noisy())
    teacher = Teacher(copy.deepcopy(module.net), random_numbers="student")
    trainer = make_trainer(callbacks=[DistillationCallback(teacher)], max_steps=1)
    trainer.fit(module, data(STEPS))
    assert torch.equal(teacher.network.drawn[0], module.net.drawn[0])
    assert trainer.callback_metrics["train/distill"].item() == pytest.approx(0, abs=1e-5)
