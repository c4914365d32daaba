"""Tests of a teacher in fit: its inputs, its precision and mode, and that it never changes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_dist import (
    DistillationCallback,
    DISTLoss,
    Teacher,
    Term,
)
from lightning_dist.functional import dist_loss
from plain import Plain, data, fitted, teacher_net


class Recording(nn.Module):
    """A teacher that stores the arguments of its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)
        self.calls: list[tuple] = []

    def forward(self, *args, **kwargs):
        self.calls.append((args, kwargs))
        return self.layer(args[0])


def test_a_teacher_sees_the_args_and_kwargs_of_the_students_call(make_trainer):
    class Student(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 4)

        def forward(self, inputs, scale=1.0, *, mask=None):
            return self.layer(inputs) * scale

    class Calling(Plain):
        def training_step(self, batch, batch_idx):
            mask = {"keep": batch[1] > 1}
            return F.cross_entropy(self.net(batch[0], 2.0, mask=mask), batch[1])

    teacher = Recording()
    fitted(make_trainer(callbacks=[DistillationCallback(teacher)], max_steps=1), Calling(Student()))
    ((inputs, scale), kwargs) = teacher.calls[0]
    expected_inputs, target = next(iter(data()))
    assert torch.equal(inputs, expected_inputs)
    assert scale == 2.0
    assert torch.equal(kwargs["mask"]["keep"], target > 1)


def test_a_teacher_sees_inputs_that_the_student_changes_in_place(make_trainer):
    class InPlace(nn.Sequential):
        def forward(self, inputs):
            return super().forward(inputs.mul_(0))

    teacher = Recording()
    seen = []
    teacher.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    module = Plain(InPlace(nn.Linear(6, 4)))
    fitted(make_trainer(callbacks=[DistillationCallback(teacher)], max_steps=1), module)
    assert torch.equal(seen[0], next(iter(data()))[0])


def test_a_part_of_the_teacher_can_get_the_inputs_of_a_part_of_the_student(make_trainer):
    # The whole teacher takes 9 features, so it cannot be called with the student's 6.
    teacher = nn.Sequential(nn.Linear(9, 12), nn.Linear(12, 4))
    module = Plain()
    student = copy.deepcopy(module.net)
    terms = {"head": Term(DISTLoss(), student="2", teacher="1")}
    callback = DistillationCallback(teacher, terms=terms, inputs={"2": "1"})
    trainer = make_trainer(max_steps=1, callbacks=[callback], limit_val_batches=0)
    trainer.fit(module, data())
    inputs, _ = next(iter(data()))
    hidden = student[:2](inputs)
    expected = dist_loss(student[2](hidden), teacher[1](hidden))
    assert trainer.callback_metrics["train/distill"].item() == pytest.approx(expected.item())


def test_a_teacher_computes_in_its_chosen_dtype(make_trainer):
    teacher = Teacher(teacher_net(), dtype="bfloat16")
    outputs = []
    teacher.network.register_forward_hook(lambda *args: outputs.append(args[-1]))
    module = fitted(make_trainer(callbacks=[DistillationCallback(teacher)]))
    assert {output.dtype for output in outputs} == {torch.bfloat16}
    assert {p.dtype for p in module.parameters()} == {torch.float32}


def test_a_teacher_stays_frozen_and_in_eval_mode(make_trainer):
    class Switching(Plain):
        def on_train_batch_start(self, batch, batch_idx):
            self.train()
            # The callback must put the teacher back into eval mode.
            teacher.train()

    teacher = teacher_net()
    before = copy.deepcopy(teacher.state_dict())
    modes = []
    teacher.register_forward_hook(lambda *_: modes.append([m.training for m in teacher.modules()]))
    fitted(make_trainer(callbacks=[DistillationCallback(teacher)]), Switching())
    assert len(modes) == 4
    assert not any(map(any, modes))
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_teacher_is_in_no_optimizer_and_no_checkpoint(make_trainer, tmp_path):
    trainer = make_trainer(callbacks=[DistillationCallback(teacher_net())])
    module = fitted(trainer)
    held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in module.parameters()}
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert set(checkpoint["state_dict"]) == set(module.state_dict())


def test_validation_does_not_call_the_teacher(make_trainer):
    teacher, calls = teacher_net(), []
    teacher.register_forward_hook(lambda *_: calls.append(1))
    trainer = make_trainer(callbacks=[DistillationCallback(teacher)])
    trainer.fit(Plain(), data(), data())
    assert len(calls) == 4
    assert trainer.callback_metrics["val/loss"] < 5


def test_a_teacher_moves_to_a_device_only_for_fit(make_trainer):
    class Teaching(Plain):
        test_step = Plain.validation_step

    teacher, moves = teacher_net(), []
    teacher.to = moves.append
    trainer = make_trainer(callbacks=[DistillationCallback(teacher)])
    module = Teaching()
    trainer.validate(module, data(), verbose=False)
    trainer.test(module, data(), verbose=False)
    assert not moves
    trainer.fit(module, data())
    # fit moves the teacher to the student's device, and back.
    assert [str(device) for device in moves] == ["cpu", "cpu"]
