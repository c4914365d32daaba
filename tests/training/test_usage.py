"""Tests of terms that some steps do not use: a warning first, and an error after an epoch."""

import warnings

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_dist import DistillationCallback
from plain import data

STEPS = 4


class Alternating(L.LightningModule):
    """A module whose steps train one of two networks in turn."""

    def __init__(self, every: int = 2, freeze: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net, self.other = nn.Linear(6, 4), nn.Linear(6, 4)
        self.every, self.freeze = every, freeze

    def training_step(self, batch, batch_idx):
        own = batch_idx % self.every == self.every - 1
        self.net.requires_grad_(own or not self.freeze)
        network = self.net if own else self.other
        if self.freeze:
            return F.cross_entropy(self.net(batch[0]) + self.other(batch[0]), batch[1])
        return F.cross_entropy(network(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fitted(make_trainer, module, **options):
    trainer = make_trainer(callbacks=[DistillationCallback(nn.Linear(6, 4))], **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, data(STEPS))
    return trainer, [str(warning.message) for warning in caught]


@pytest.mark.parametrize("freeze", [False, True])
def test_a_step_without_the_student_is_left_out(make_trainer, freeze):
    before = Alternating().net.weight.clone()
    module = Alternating(freeze=freeze)
    trainer, messages = fitted(make_trainer, module, max_epochs=2)
    assert trainer.global_step == 2 * STEPS
    assert trainer.callback_metrics["train/distill"] > 0
    assert not torch.equal(module.net.weight, before)
    wanted = "term 'distill' waits" if freeze else "'net' was not called in training_step"
    assert sum(wanted in message for message in messages) == 1


def test_a_term_that_no_step_of_an_epoch_uses_is_refused(make_trainer):
    with pytest.raises(
        MisconfigurationException, match=r"'net' was not called.*No step of the epoch used"
    ):
        fitted(make_trainer, Alternating(every=STEPS + 1), max_epochs=2)


def test_a_term_that_was_used_before_may_pause_for_an_epoch(make_trainer):
    class Pausing(Alternating):
        def training_step(self, batch, batch_idx):
            self.every = 1 if self.current_epoch == 0 else STEPS + 1
            return super().training_step(batch, batch_idx)

    trainer, _ = fitted(make_trainer, Pausing(), max_epochs=2)
    assert trainer.global_step == 2 * STEPS
