"""Tests of modules that optimize manually: the terms join the backward that trains the student."""

import copy

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_dist import DistillationCallback
from lightning_dist.functional import dist_loss
from plain import data

STEPS = 4


class Manual(L.LightningModule):
    """A module that steps its optimizer itself, with the result of automatic optimization."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 4))
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self.logits(batch[0]), batch[1]))
        optimizer.step()

    def logits(self, x):
        return self.net(x)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Automatic(Manual):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = True

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])


class Adversarial(Manual):
    """A step with two optimizers: the first trains a critic on the student's output."""

    def __init__(self) -> None:
        super().__init__()
        self.critic = nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        of_critic, of_net = self.optimizers()
        logits = self.net(batch[0])
        of_critic.zero_grad()
        self.manual_backward(self.critic(logits.detach()).square().mean())
        of_critic.step()
        of_net.zero_grad()
        self.manual_backward(F.cross_entropy(logits, batch[1]) - self.critic(logits).mean())
        of_net.step()

    def configure_optimizers(self):
        networks = (self.critic, self.net)
        return [torch.optim.SGD(network.parameters(), lr=0.1) for network in networks]


def teacher_net() -> nn.Module:
    torch.manual_seed(7)
    return nn.Linear(6, 4)


def fitted(make_trainer, module, *callbacks, **options):
    trainer = make_trainer(callbacks=list(callbacks), **options)
    trainer.fit(module, data(STEPS))
    return module


def assert_same_bits(left: nn.Module, right: nn.Module) -> None:
    torch.testing.assert_close(left.state_dict(), right.state_dict(), rtol=0, atol=0)


def called_at_weight_0(trainer) -> Tensor:
    return torch.zeros(())


def test_manual_optimization_trains_as_automatic_optimization(make_trainer):
    manual = fitted(make_trainer, Manual(), DistillationCallback(teacher_net()))
    automatic = fitted(make_trainer, Automatic(), DistillationCallback(teacher_net()))
    assert_same_bits(manual, automatic)
    assert "manual_backward" not in vars(manual)


@pytest.mark.parametrize(("kind", "backward"), [(Manual, None), (Adversarial, 1)])
def test_weight_0_changes_no_weight(make_trainer, kind, backward):
    callback = DistillationCallback(teacher_net(), weight=called_at_weight_0, backward=backward)
    assert_same_bits(fitted(make_trainer, kind()), fitted(make_trainer, kind(), callback))


def test_the_terms_join_the_backward_that_the_user_names(make_trainer):
    module = Adversarial()
    net, teacher, (x, target) = copy.deepcopy(module.net), teacher_net(), next(iter(data(STEPS)))
    critic = copy.deepcopy(module.critic)
    logits = net(x)
    torch.optim.SGD(critic.parameters(), lr=0.1).zero_grad()
    critic(logits.detach()).square().mean().backward()
    with torch.no_grad():
        for parameter in critic.parameters():
            parameter -= 0.1 * parameter.grad
    loss = F.cross_entropy(logits, target) - critic(logits).mean()
    (loss + 2 * dist_loss(logits, teacher(x).detach())).backward()
    callback = DistillationCallback(teacher_net(), backward=1)
    fitted(make_trainer, module, callback, max_epochs=1, limit_train_batches=1)
    for own, expected in zip(module.net.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(own, expected - 0.1 * expected.grad)


def test_a_backward_must_be_named_with_several_optimizers_and_only_there(make_trainer):
    with pytest.raises(MisconfigurationException, match=r"with 2 optimizers: set backward to"):
        fitted(make_trainer, Adversarial(), DistillationCallback(teacher_net()))
    with pytest.raises(MisconfigurationException, match=r"Automatic optimizes automatically"):
        fitted(make_trainer, Automatic(), DistillationCallback(teacher_net(), backward=0))


def test_a_backward_that_goes_past_the_callback_is_refused(make_trainer):
    class Past(Manual):
        def manual_backward(self, loss):
            raise AssertionError

        def training_step(self, batch, batch_idx):
            F.cross_entropy(self.net(batch[0]), batch[1]).backward()
            self.optimizers().step()

    message = r"manual_backward that the term joins did not follow.*not loss\.backward\(\)"
    with (
        pytest.warns(UserWarning, match=message),
        pytest.raises(MisconfigurationException, match=message),
    ):
        fitted(make_trainer, Past(), DistillationCallback(teacher_net()))


@pytest.mark.parametrize("kind", [Manual, Automatic])
def test_a_step_can_take_the_loss_itself(make_trainer, kind):
    class Taking(kind):
        def training_step(self, batch, batch_idx):
            loss = F.cross_entropy(self.net(batch[0]), batch[1]) + callback.take_loss()
            if self.automatic_optimization:
                return loss
            self.optimizers().zero_grad()
            self.manual_backward(loss)
            self.optimizers().step()

    callback = DistillationCallback(teacher_net())
    expected = fitted(make_trainer, Automatic(), DistillationCallback(teacher_net()))
    assert_same_bits(fitted(make_trainer, Taking(), callback), expected)
    with pytest.raises(RuntimeError, match="call take_loss only in training_step"):
        callback.take_loss()


def test_a_checkpointed_part_that_backward_repeats_counts_once(make_trainer):
    class Checkpointed(Manual):
        def logits(self, x):
            return checkpoint(self.net, x, use_reentrant=False)

    expected = fitted(make_trainer, Manual(), DistillationCallback(teacher_net()))
    callback, calls = DistillationCallback(teacher_net()), []
    callback.teacher.network.register_forward_hook(lambda *_: calls.append(1))
    assert_same_bits(fitted(make_trainer, Checkpointed(), callback), expected)
    assert len(calls) == STEPS
