"""Tests of the averaged weights that DistillModule evaluates beside the student's own."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_dist.tasks.classification import ClassificationModule


def make_module(ema_decay=0.9):
    student = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))
    sgd = functools.partial(torch.optim.SGD, lr=0.1)
    return ClassificationModule(
        student, nn.Linear(6, 4), num_classes=4, optimizer=sgd, ema_decay=ema_decay
    )


@pytest.fixture
def loader():
    return DataLoader(TensorDataset(torch.randn(48, 6), torch.randint(0, 4, (48,))), batch_size=8)


def floats(network):
    return {k: v.clone() for k, v in network.state_dict().items() if v.is_floating_point()}


def test_the_average_follows_the_optimizers_steps_parameters_and_buffers(make_trainer, loader):
    module = make_module()
    after_steps = []

    class Keep(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx % 2:
                after_steps.append(floats(module.student))

    make_trainer(accumulate_grad_batches=2, callbacks=[Keep()]).fit(module, loader)
    assert len(after_steps) == 3
    expected = after_steps[0]
    for state in after_steps[1:]:
        expected = {k: 0.9 * v + 0.1 * state[k] for k, v in expected.items()}
    torch.testing.assert_close(floats(module.student_ema.module), expected)


def test_raw_and_averaged_weights_are_both_evaluated(make_trainer, loader):
    module = make_module()
    trainer = make_trainer()
    trainer.fit(module, loader, loader)
    validated = {k: v.item() for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
    tested = trainer.test(module, loader, verbose=False)[0]
    images, labels = loader.dataset.tensors
    for prefix, network in [("", module.student), ("ema_", module.student_ema.module)]:
        logits = copy.deepcopy(network).eval()(images)
        expected = {
            "loss": F.cross_entropy(logits, labels).item(),
            "accuracy": (logits.argmax(1) == labels).float().mean().item(),
        }
        for name, value in expected.items():
            assert validated[f"val/{prefix}{name}"] == pytest.approx(value, rel=1e-5)
            assert tested[f"test/{prefix}{name}"] == pytest.approx(value, rel=1e-5)
    assert validated["val/loss"] != validated["val/ema_loss"]


def test_the_average_is_neither_trained_nor_does_it_change_training(make_trainer, loader):
    students = []
    for decay in (None, 0.9):
        torch.manual_seed(0)
        module = make_module(decay)
        trainer = make_trainer()
        trainer.fit(module, loader)
        held = sum(len(g["params"]) for g in trainer.optimizers[0].param_groups)
        assert held == len(list(module.student.parameters()))
        students.append(module.student.state_dict())
    torch.testing.assert_close(*students, rtol=0, atol=0)


def test_a_resumed_run_continues_the_average(make_trainer, loader, tmp_path):
    def module():
        torch.manual_seed(0)
        return make_module()

    whole, first, resumed = module(), module(), module()
    make_trainer(max_epochs=2).fit(whole, loader)
    trainer = make_trainer(max_epochs=1)
    trainer.fit(first, loader)
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    nn.init.zeros_(resumed.student_ema.module[0].weight)
    make_trainer(max_epochs=2).fit(resumed, loader, ckpt_path=tmp_path / "first.ckpt")
    torch.testing.assert_close(resumed.student_ema.state_dict(), whole.student_ema.state_dict())
