"""Tests of the step styles of docs/attach.md: each example is attached, and disturbs nothing."""

import copy
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader

from lightning_dist import DistillationCallback, DISTLoss, Term

PAGE = (Path(__file__).parents[1] / "docs" / "attach.md").read_text()
STYLES = dict(re.findall(r"^### (.*?)\n.*?^```python\n(.*?)^```", PAGE, re.M | re.S))
NAMES = {
    "torch": torch,
    "nn": nn,
    "F": F,
    "LightningModule": LightningModule,
    "DistillationCallback": DistillationCallback,
    "DISTLoss": DISTLoss,
    "Term": Term,
}


def batches() -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    made = [
        (torch.randn(8, 6, generator=generator), torch.randint(0, 4, (8,), generator=generator))
        for _ in range(4)
    ]
    return DataLoader(made, batch_size=None)


def example(style: str) -> tuple[LightningModule, DistillationCallback]:
    """Return the module and the callback of an example."""
    names = dict(NAMES)
    torch.manual_seed(3)
    exec(compile(STYLES[style], style, "exec"), names)
    torch.manual_seed(4)
    return names["Module"](), names["callback"]


def disturb(network: nn.Module, args, kwargs) -> None:
    """Draw random numbers and write to the inputs, before a call of the teacher."""
    torch.rand(3)
    for x in (*args, *kwargs.values()):
        x = x["x"] if isinstance(x, dict) else x
        x.mul_(0.5)


def test_the_page_has_the_styles():
    assert len(STYLES) >= 9


@pytest.mark.filterwarnings("ignore:.*was not called in training_step")
@pytest.mark.parametrize("style", STYLES)
def test_at_weight_0_a_disturbing_teacher_changes_nothing(make_trainer, style):
    alone, _ = example(style)
    make_trainer(max_epochs=1).fit(alone, batches())
    module, callback = example(style)
    network = callback.teacher.network
    before = copy.deepcopy(network.state_dict())
    for term in callback.terms.values():
        # The callback does not read the value of a tensor, so it calls the teacher.
        term.weight = lambda trainer: torch.zeros(())
    calls = []
    for part in network.modules():
        part.register_forward_hook(lambda *_: calls.append(1))
    network.register_forward_pre_hook(disturb, with_kwargs=True)
    trainer = make_trainer(max_epochs=1, callbacks=[callback])
    trainer.fit(module, batches())
    assert calls
    assert module.state_dict().keys() == alone.state_dict().keys()
    torch.testing.assert_close(module.state_dict(), alone.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:.*was not called in training_step")
@pytest.mark.parametrize("style", STYLES)
def test_at_weight_0_every_validation_is_the_same(make_trainer, style):
    def validations(*callbacks) -> list[float]:
        module, values = example(style)[0], []

        def validation_step(batch, batch_idx):
            x, target = F.dropout(batch[0]), batch[1]
            if style in (
                "Manual optimization",
                "The network returns something else in training mode",
            ):
                loss = F.cross_entropy(module.net(x), target)
            else:
                loss = module.training_step((x, target), batch_idx)
            values.append(loss.item())

        module.validation_step = validation_step
        trainer = make_trainer(max_epochs=2, val_check_interval=2, callbacks=[*callbacks])
        trainer.fit(module, batches(), batches())
        return values

    _, callback = example(style)
    for term in callback.terms.values():
        term.weight = lambda trainer: torch.zeros(())
    callback.teacher.network.register_forward_pre_hook(disturb, with_kwargs=True)
    alone, distilled = validations(), validations(callback)
    # There are values from the sanity check and from each half epoch.
    assert len(alone) == 2 + 2 * 2 * 4
    assert len(set(alone)) == len(alone)
    assert distilled == alone


@pytest.mark.filterwarnings("ignore:.*was not called in training_step")
@pytest.mark.parametrize("style", STYLES)
def test_a_copy_of_the_student_scores_0(make_trainer, style):
    module, callback = example(style)
    student = module.get_submodule(callback.student)
    own, wanted = student.state_dict(), callback.teacher.network.state_dict()
    # In the last example the teacher is the student's part "net".
    state = {name: own[name if name in own else f"net.{name}"] for name in wanted}
    callback.teacher.network.load_state_dict(state)
    trainer = make_trainer(max_steps=1, callbacks=[callback])
    trainer.fit(module, batches())
    assert trainer.callback_metrics["train/distill"].item() == pytest.approx(0, abs=1e-5)


@pytest.mark.filterwarnings("ignore:.*was not called in training_step")
@pytest.mark.parametrize("style", STYLES)
def test_the_explanation_names_the_setting_and_changes_nothing(make_trainer, style, capsys):
    module, callback = example(style)
    (batch, *_) = batches()
    before, inputs = copy.deepcopy(module.state_dict()), batch[0].clone()
    state = torch.get_rng_state()
    text = callback.explain(module, batch)
    assert capsys.readouterr().out == f"{text}\n"
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(batch[0], inputs)
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)
    assert "(float32[8, " in text
    if callable(callback.inputs) or "train_step" in callback.inputs:
        return  # explain cannot find these settings by trying.
    part = next(iter(callback.terms.values())).student
    wanted = f"inputs={callback.inputs}, terms=dict(a=Term(loss, student={part!r}))"
    assert (wanted if part else f"student={callback.student!r}") in text.split("settings that")[1]
