"""Tests of terms with trainable parameters: in optimizers, checkpoints and averages of weights."""

import copy

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_dist import (
    DistillationCallback,
    Term,
)
from plain import Plain, Projection, data, fitted, teacher_net


def projecting() -> tuple[DistillationCallback, Projection]:
    loss = Projection(12)
    terms = {"mimic": Term(loss, weight=1.0, student="0", teacher="0")}
    return DistillationCallback(teacher_net(), terms=terms), loss


def test_a_terms_parameters_train_and_resume_but_are_not_in_the_module(make_trainer, tmp_path):
    callback, loss = projecting()
    before = copy.deepcopy(loss.state_dict())
    trainer = make_trainer(callbacks=[callback], enable_checkpointing=True, max_epochs=2)
    module = fitted(trainer)
    assert not torch.equal(loss.project.weight, before["project.weight"])
    assert set(module.state_dict()) == set(Plain().state_dict())

    checkpoint = trainer.checkpoint_callback.best_model_path
    saved = torch.load(checkpoint, weights_only=True)
    assert set(saved["state_dict"]) == set(Plain().state_dict())
    callback, resumed = projecting()
    make_trainer(callbacks=[callback], max_epochs=2).fit(Plain(), data(), ckpt_path=checkpoint)
    assert torch.equal(resumed.project.weight, loss.project.weight)


def test_a_checkpoint_of_other_terms_is_refused_in_fit_but_accepted_in_test(make_trainer, tmp_path):
    class Testing(Plain):
        test_step = Plain.validation_step

    trainer = make_trainer(callbacks=[projecting()[0]])
    fitted(trainer)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    for terms in (None, {"mimic": Term(F.mse_loss)}):
        resuming, testing = (
            make_trainer(callbacks=[DistillationCallback(teacher_net(), terms=terms)], max_epochs=2)
            for _ in range(2)
        )
        with pytest.raises(
            MisconfigurationException, match="does not fit the loss of term 'mimic'"
        ):
            resuming.fit(Plain(), data(), ckpt_path=tmp_path / "last.ckpt")
        testing.test(Testing(), data(), ckpt_path=tmp_path / "last.ckpt", verbose=False)


def test_a_terms_parameters_join_the_module_before_weights_are_averaged(make_trainer):
    fitted(make_trainer(callbacks=[projecting()[0], EMAWeightAveraging()]))
    message = "EMAWeightAveraging comes before.*list DistillationCallback first"
    with pytest.raises(MisconfigurationException, match=message):
        fitted(make_trainer(callbacks=[EMAWeightAveraging(), projecting()[0]]))


def test_a_terms_parameters_that_are_in_no_optimizer_are_refused(make_trainer):
    class OnlyNet(Plain):
        def configure_optimizers(self):
            return torch.optim.SGD(self.net.parameters(), lr=0.1)

    callback, _ = projecting()
    with pytest.raises(MisconfigurationException, match=r"'mimic' has parameters.*self.parameters"):
        fitted(make_trainer(callbacks=[callback]), OnlyNet())
