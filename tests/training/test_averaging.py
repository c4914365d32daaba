"""Tests of StudentEMA: the average of the weights, its evaluation and its checkpoints."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_dist import StudentEMA
from lightning_dist.tasks.classification import ClassificationModule


def make_module():
    student = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))
    sgd = functools.partial(torch.optim.SGD, lr=0.1)
    return ClassificationModule(student, nn.Linear(6, 4), num_classes=4, optimizer=sgd)


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

    make_trainer(accumulate_grad_batches=2, callbacks=[Keep(), StudentEMA(0.9)]).fit(module, loader)
    assert len(after_steps) == 3
    expected = after_steps[0]
    for state in after_steps[1:]:
        expected = {k: 0.9 * v + 0.1 * state[k] for k, v in expected.items()}
    torch.testing.assert_close(floats(module.student_ema.module), expected)


def test_raw_and_averaged_weights_are_both_evaluated(make_trainer, loader):
    module = make_module()
    trainer = make_trainer(callbacks=[StudentEMA(0.9)])
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


def test_the_average_is_not_trained_and_does_not_change_the_training(make_trainer, loader):
    students = []
    for callbacks in ([], [StudentEMA(0.9)]):
        torch.manual_seed(0)
        module = make_module()
        trainer = make_trainer(callbacks=callbacks)
        trainer.fit(module, loader)
        held = sum(len(g["params"]) for g in trainer.optimizers[0].param_groups)
        assert held == len(list(module.student.parameters()))
        students.append(module.student.state_dict())
    torch.testing.assert_close(*students, rtol=0, atol=0)


@pytest.fixture
def checkpoint(make_trainer, loader, tmp_path):
    """Train one epoch with StudentEMA, and return the path of the checkpoint."""
    torch.manual_seed(0)
    trainer = make_trainer(max_epochs=1, callbacks=[StudentEMA(0.9)])
    trainer.fit(make_module(), loader)
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    return tmp_path / "first.ckpt"


def test_a_resumed_run_continues_the_average(make_trainer, loader, checkpoint):
    torch.manual_seed(0)
    whole = make_module()
    make_trainer(max_epochs=2, callbacks=[StudentEMA(0.9)]).fit(whole, loader)
    torch.manual_seed(0)
    resumed = make_module()
    # The average is a copy of the student at first, so the checkpoint must replace both.
    nn.init.zeros_(resumed.student[0].weight)
    trainer = make_trainer(max_epochs=2, callbacks=[StudentEMA(0.9)])
    trainer.fit(resumed, loader, ckpt_path=checkpoint)
    torch.testing.assert_close(resumed.student_ema.state_dict(), whole.student_ema.state_dict())


def test_a_checkpoint_of_any_callback_holds_the_average_of_its_step(make_trainer, loader, tmp_path):
    module = make_module()
    states = []

    # This callback is first in the list, but StudentEMA moves itself before it.
    class Save(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            trainer.save_checkpoint(tmp_path / "step.ckpt")
            saved = torch.load(tmp_path / "step.ckpt", weights_only=True)["state_dict"]
            states.append(saved["student_ema.n_averaged"].item())

    make_trainer(callbacks=[Save(), StudentEMA(0.9)]).fit(module, loader)
    assert states == [1, 2, 3, 4, 5, 6]


def test_the_average_of_a_checkpoint_is_tested_without_the_callback(
    make_trainer, loader, checkpoint
):
    found = make_trainer().test(make_module(), loader, ckpt_path=checkpoint, verbose=False)[0]
    loaded = ClassificationModule.load_from_checkpoint(
        checkpoint, student=make_module().student, num_classes=4
    )
    images, labels = loader.dataset.tensors
    logits = loaded.student_ema.module.eval()(images)
    assert found["test/ema_loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert found["test/ema_loss"] != found["test/loss"]


def test_a_run_without_the_callback_does_not_resume_from_a_checkpoint_with_an_average(
    make_trainer, loader, checkpoint
):
    with pytest.raises(MisconfigurationException, match=r"holds an average .* add .*StudentEMA"):
        make_trainer(max_epochs=2).fit(make_module(), loader, ckpt_path=checkpoint)


def test_a_module_without_a_student_is_refused(make_trainer):
    with pytest.raises(MisconfigurationException, match="is a BoringModel: use Lightning's EMA"):
        make_trainer(callbacks=[StudentEMA()]).fit(BoringModel())


def test_a_module_with_an_average_does_not_train_without_the_callback(make_trainer, loader):
    module = make_module()
    make_trainer(callbacks=[StudentEMA(0.9)]).fit(module, loader)
    with pytest.raises(MisconfigurationException, match=r"holds an average .* add .*StudentEMA"):
        make_trainer().fit(module, loader)


def test_integer_buffers_are_copied(make_trainer, loader):
    module = make_module()
    module.student.register_buffer("index", torch.arange(200))
    make_trainer(max_epochs=2, callbacks=[StudentEMA()]).fit(module, loader)
    assert torch.equal(module.student_ema.module.index, torch.arange(200))
    assert module.student_ema.module[1].num_batches_tracked == 12


def test_several_averages_and_a_wrong_order_of_callbacks_are_refused(make_trainer, loader):
    for callbacks, message in [
        ([StudentEMA(), StudentEMA()], "several StudentEMAs"),
        ([EMAWeightAveraging(), StudentEMA()], "list StudentEMA first"),
    ]:
        with pytest.raises(MisconfigurationException, match=message):
            make_trainer(callbacks=callbacks).fit(make_module(), loader)


def test_a_checkpoint_without_an_average_is_refused_by_name(make_trainer, loader, tmp_path):
    trainer = make_trainer(max_epochs=1)
    trainer.fit(make_module(), loader)
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    trainer = make_trainer(max_epochs=2, callbacks=[StudentEMA()])
    with pytest.raises(MisconfigurationException, match="the checkpoint holds none"):
        trainer.fit(make_module(), loader, ckpt_path=tmp_path / "plain.ckpt")
