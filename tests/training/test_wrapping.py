"""Tests that the callback leaves no trace on a module: not after fit, nor in copies of it."""

import copy
import io

import lightning as L
import pytest
import torch
import torch.nn.functional as F

from lightning_dist import (
    DistillationCallback,
)
from plain import Plain, data, fitted, teacher_net


def test_no_trace_is_left_after_fit(make_trainer):
    module, alone = Plain(), Plain()
    fitted(make_trainer(callbacks=[DistillationCallback(teacher_net())]), module)
    fitted(make_trainer(), alone)
    assert "training_step" not in module.__dict__
    assert set(module.__dict__) == set(alone.__dict__)
    assert set(module._modules) == {"net"}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


def test_no_trace_is_left_when_fit_raises_and_fit_can_run_again(make_trainer):
    class Failing(Plain):
        broken = True

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if self.broken and batch_idx == 2:
                raise RuntimeError("broken")
            return loss

    module, callback = Failing(), DistillationCallback(teacher_net())
    with pytest.raises(RuntimeError, match="broken"):
        fitted(make_trainer(callbacks=[callback]), module)
    assert "training_step" not in module.__dict__
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    module.broken, module.losses = False, []
    trainer = make_trainer(callbacks=[callback])
    fitted(trainer, module)
    assert len(module.losses) == 4
    assert "train/distill" in trainer.callback_metrics


@pytest.mark.parametrize("kind", ["copy", "pickle"])
def test_a_copy_of_the_module_made_during_fit_trains_by_itself(make_trainer, kind):
    class Keeping(L.Callback):
        def on_train_end(self, trainer, pl_module):
            if kind == "copy":
                self.module = copy.deepcopy(pl_module)
                return
            file = io.BytesIO()
            torch.save(pl_module.cpu(), file)
            file.seek(0)
            self.module = torch.load(file, weights_only=False)

    teacher, keeping, calls = teacher_net(), Keeping(), []
    module = fitted(make_trainer(callbacks=[DistillationCallback(teacher), keeping]))
    teacher.register_forward_hook(lambda *_: calls.append(1))
    inputs, target = next(iter(data()))
    expected = F.cross_entropy(keeping.module.net(inputs), target)
    before = copy.deepcopy(keeping.module.net.state_dict())
    with torch.no_grad():
        module.net[0].weight.zero_()
    assert torch.equal(keeping.module.training_step((inputs, target), 0), expected)
    fitted(make_trainer(), keeping.module)
    assert not calls
    assert not torch.equal(keeping.module.net[0].weight, before["0.weight"])


def test_a_second_fit_does_not_wrap_the_step_twice(make_trainer):
    module, callback, calls = Plain(), DistillationCallback(teacher_net()), []
    callback.teacher.network.register_forward_hook(lambda *_: calls.append(1))
    for _ in range(2):
        fitted(make_trainer(callbacks=[callback]), module)
    assert len(calls) == 8
