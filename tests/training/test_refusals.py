"""Tests that the callback refuses wrong settings before the first step changes a weight."""

import copy

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_dist import (
    CachedTeacher,
    DistillationCallback,
    DISTLoss,
    Teacher,
    Term,
)
from lightning_dist.teacher import EnsembleTeacher
from plain import Plain, data, fitted, teacher_net


class Holding(Plain):
    def __init__(self, teacher: nn.Module) -> None:
        super().__init__()
        self.teacher = teacher


def refused(make_trainer, message, module=None, **options):
    module = module or Plain()
    before = copy.deepcopy(module.state_dict())
    callback = DistillationCallback(**({"teacher": teacher_net()} | options))
    trainer = make_trainer(callbacks=[callback])
    with pytest.raises(MisconfigurationException, match=message):
        trainer.fit(module, data())
    assert trainer.global_step == 0
    assert "training_step" not in module.__dict__
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name])


def test_conflicting_arguments_are_refused():
    terms = {"dist": Term(DISTLoss())}
    for option in ({"loss": DISTLoss()}, {"weight": 5.0}, {"output": "logits"}):
        with pytest.raises(ValueError, match="give either loss, weight and output, or terms"):
            DistillationCallback(teacher_net(), terms=terms, **option)
    with pytest.raises(ValueError, match="terms is empty"):
        DistillationCallback(teacher_net(), terms={})
    with pytest.raises(TypeError, match=r"the teacher is a str: give a torch\.nn\.Module"):
        DistillationCallback("resnet50")


def test_two_callbacks_are_refused(make_trainer):
    callbacks = [
        DistillationCallback(teacher_net()),
        DistillationCallback(teacher_net(), student="net.0"),
    ]
    with pytest.raises(MisconfigurationException, match="several DistillationCallbacks: give one"):
        fitted(make_trainer(callbacks=callbacks))


def test_an_unknown_sub_module_is_refused_with_near_names(make_trainer):
    refused(make_trainer, "no sub-module 'nett'.* such as 'net'", student="nett")
    terms = {"hidden": Term(F.mse_loss, student="9", teacher="0")}
    refused(make_trainer, "no sub-module '9'.*student path of term 'hidden'", terms=terms)
    terms = {"hidden": Term(F.mse_loss, student="0", teacher="layer")}
    refused(make_trainer, "no sub-module 'layer'.*teacher path of term 'hidden'", terms=terms)


@pytest.mark.parametrize("inputs", [{"7": ""}, {"2": "7"}], ids=["student", "teacher"])
def test_inputs_of_an_unknown_part_are_refused(make_trainer, inputs):
    callback = DistillationCallback(teacher_net(), inputs=inputs)
    with pytest.raises(MisconfigurationException, match=r"inputs.*'7'|'7'.*inputs"):
        make_trainer(callbacks=[callback]).fit(Plain(), data())


def test_a_teacher_that_shares_parameters_is_refused(make_trainer):
    module = Plain()
    refused(make_trainer, "shares its '0.weight' with 'net.0.weight'", module, teacher=module.net)
    teacher = teacher_net()
    refused(make_trainer, "with 'teacher.0.weight'", Holding(teacher), teacher=teacher)
    view = nn.Linear(6, 12)
    view.weight = nn.Parameter(module.net[0].weight.data.view(12, 6))
    refused(make_trainer, "shares its 'weight'", module, teacher=view)


@pytest.mark.parametrize("kind", [Teacher, lambda net: EnsembleTeacher([net]), CachedTeacher])
def test_a_student_that_is_refused_as_its_own_teacher_is_not_frozen(make_trainer, kind):
    module = Plain()
    refused(make_trainer, "shares its", module, teacher=kind(module.net))
    assert all(parameter.requires_grad for parameter in module.net.parameters())
    assert all(part.training for part in module.net.modules())


def test_a_frozen_student_is_refused(make_trainer):
    module = Plain()
    module.net.requires_grad_(False)
    refused(
        make_trainer, "term 'distill': the student is frozen.*parameters of 'net' require", module
    )


def test_a_step_without_a_loss_is_refused(make_trainer):
    class Losing(Plain):
        def training_step(self, batch, batch_idx):
            return {"value": super().training_step(batch, batch_idx)}

    refused(make_trainer, "training_step of Losing returned dict without a loss", Losing())


def test_different_class_counts_are_refused(make_trainer):
    message = "'distill' of 'net'.*student has 4 classes and teacher 7"
    refused(make_trainer, message, teacher=nn.Linear(6, 7))


def test_parts_with_different_numbers_of_calls_are_refused(make_trainer):
    shared = nn.Linear(6, 6)
    module = Plain(nn.Sequential(shared, shared, nn.Linear(6, 4)))
    terms = {"hidden": Term(F.mse_loss, student="0", teacher="0")}
    refused(make_trainer, "called 2 times and the teacher's '0' 1 times", module, terms=terms)


def test_an_output_without_the_entry_is_refused(make_trainer):
    class Dict(nn.Linear):
        def forward(self, inputs):
            return {"scores": super().forward(inputs)}

    message = (
        r"with \['scores'\] and has none of 'logits' and 'out': let the network return a tensor"
    )
    refused(make_trainer, message, teacher=Dict(6, 4))


def test_an_output_that_is_changed_in_place_is_refused(make_trainer):
    class Scaling(Plain):
        def training_step(self, batch, batch_idx):
            logits = self.net(batch[0])
            logits /= 0.1
            return F.cross_entropy(logits, batch[1])

    message = "term 'distill' of 'net'.*was changed in place after the sub-module returned it"
    refused(make_trainer, message, Scaling())


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_term_on_a_layer_before_a_relu_in_place_is_refused(make_trainer, side):
    def net(inplace):
        return nn.Sequential(nn.Linear(6, 12), nn.ReLU(inplace), nn.Linear(12, 4))

    terms = {"hidden": Term(F.mse_loss, student="0", teacher="0")}
    module, teacher = Plain(net(side == "student")), net(side == "teacher")
    refused(make_trainer, "'hidden'.*changed in place", module, teacher=teacher, terms=terms)


def test_entries_that_no_term_compares_may_change_in_place(make_trainer):
    class Pair(nn.Sequential):
        def forward(self, inputs):
            logits = super().forward(inputs)
            return {"logits": logits, "other": logits * 2}

    class Changing(Plain):
        def training_step(self, batch, batch_idx):
            output = self.net(batch[0])
            output["other"] /= 2
            return F.cross_entropy(output["logits"], batch[1])

    trainer = make_trainer(callbacks=[DistillationCallback(teacher_net())])
    fitted(trainer, Changing(Pair(*Plain().net)))
    assert trainer.callback_metrics["train/distill"] > 0


def test_a_part_in_a_reentrant_checkpoint_is_refused(make_trainer):
    class Checkpointing(nn.Sequential):
        def forward(self, inputs):
            return checkpoint(nn.Sequential(*self[1:]), self[0](inputs), use_reentrant=True)

    terms = {"hidden": Term(F.mse_loss, student="1", teacher="2")}
    module = Plain(Checkpointing(*Plain().net))
    callback = DistillationCallback(teacher_net(), terms=terms)
    message = r"'hidden': no call of 'net\.1' has a gradient.*use_reentrant=False"
    with (
        pytest.warns(UserWarning, match=message),
        pytest.raises(MisconfigurationException, match=message),
    ):
        fitted(make_trainer(callbacks=[callback]), module)
