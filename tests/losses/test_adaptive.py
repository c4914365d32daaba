"""Tests of the copy of the teacher's head that is trained with the student."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_dist import Term
from lightning_dist.functional import dist_loss
from lightning_dist.losses import AdaptiveTeacherHead
from lightning_dist.tasks.classification import ClassificationModule


def test_the_student_follows_the_head_and_the_head_the_student_and_the_labels():
    student, features = torch.randn(6, 4, requires_grad=True), torch.randn(6, 3)
    head, labels = nn.Linear(3, 4), torch.tensor([0, 1, 2, 3, -100, 0])
    loss = AdaptiveTeacherHead(head, task_weight=0.5)
    value = loss(student, features, labels)
    value.backward()
    fixed, moving = student.detach(), head(features)
    assert value.item() == pytest.approx(dist_loss(fixed, moving.detach()).item(), rel=1e-6)
    copy = fixed.clone().requires_grad_()
    (expected,) = torch.autograd.grad(dist_loss(copy, moving.detach()), copy)
    torch.testing.assert_close(student.grad, expected)
    own = dist_loss(moving, fixed) + 0.5 * F.cross_entropy(
        moving[[0, 1, 2, 3, 5]], labels[labels >= 0]
    )
    (expected,) = torch.autograd.grad(own, head.weight)
    torch.testing.assert_close(loss.head.weight.grad, expected)
    assert head.weight.grad is None
    assert loss(student, features, torch.full((6,), -100)).isfinite()


def test_the_head_is_trained_and_neither_changes_the_teacher_nor_joins_the_student(make_trainer):
    teacher = nn.Sequential(nn.Linear(6, 3), nn.Linear(3, 4))
    before = {name: x.clone() for name, x in teacher.state_dict().items()}
    loss = AdaptiveTeacherHead(teacher[1])
    module = ClassificationModule(
        nn.Linear(6, 4),
        teacher,
        num_classes=4,
        optimizer=functools.partial(torch.optim.SGD, lr=0.1),
        distill_terms={"adaptive": Term(loss, student="", teacher="0")},
    )
    data = DataLoader(TensorDataset(torch.randn(16, 6), torch.arange(16) % 4), batch_size=8)
    make_trainer().fit(module, data)
    assert not loss.head.weight.equal(before["1.weight"])
    assert all(x.equal(before[name]) for name, x in teacher.state_dict().items())
    assert set(module.state_dict()) == {"student.weight", "student.bias"}
