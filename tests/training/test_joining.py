"""Tests of the wrapped training step: it exists only during fit, and never in copies or pickles."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_dist.training.joining import WrappedStep, add_to_loss


def wrapped(module, training=True):
    return WrappedStep(SimpleNamespace(training=training), module, lambda step, args, kwargs: "run")


def test_a_step_is_wrapped_until_it_is_removed():
    module = BoringModel()
    wrap = wrapped(module)
    assert module.training_step(None, 0) == "run"
    wrap.remove()
    assert "training_step" not in vars(module)


def test_a_step_that_calls_itself_for_parts_of_its_batch_is_wrapped_once():
    class Parts(BoringModel):
        def training_step(self, batch, batch_idx):
            return [self.training_step(x, 0) for x in batch] if batch_idx else batch

    def run(step, args, kwargs):
        if args[0] == "fails":
            raise ValueError("from the step")
        return ("run", step(*args, **kwargs))

    module = Parts()
    WrappedStep(SimpleNamespace(training=True), module, run)
    for _ in range(2):
        assert module.training_step("ab", 1) == ("run", ["a", "b"])
        with pytest.raises(ValueError, match="from the step"):
            module.training_step("fails", 1)


def test_a_step_that_was_set_on_the_instance_is_restored():
    module = BoringModel()
    module.training_step = own = lambda batch, batch_idx: "own"
    wrapped(module).remove()
    assert vars(module)["training_step"] is own


def test_copies_and_other_loops_run_the_modules_own_step():
    module = BoringModel()
    wrapped(module)
    batch = torch.ones(1, 32)
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert copied.training_step(batch, 0) != "run"
    other = BoringModel()
    wrapped(other, training=False)
    assert other.training_step(batch, 0) != "run"


def test_the_sum_is_added_to_the_loss_in_a_tensor_or_a_mapping():
    loss, distill = torch.tensor(3.0), torch.tensor(1.0)
    assert add_to_loss(loss, distill, 0.5, BoringModel()) == 2.5
    assert add_to_loss({"loss": loss, "x": 1}, distill, 0.5, BoringModel()) == {"loss": 2.5, "x": 1}
    with pytest.raises(MisconfigurationException, match="BoringModel returned list without a loss"):
        add_to_loss([loss], distill, 0.5, BoringModel())
    assert add_to_loss(loss[None], distill, 0.5, BoringModel()) == torch.tensor([2.5])
    with pytest.raises(
        MisconfigurationException, match=r"BoringModel has the shape \(3,\): to add"
    ):
        add_to_loss(loss.expand(3), distill, 0.5, BoringModel())
