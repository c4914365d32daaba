"""Tests of the callback and its teacher: when it is called, and that it changes nothing."""

import warnings

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import BackboneFinetuning
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_dist import (
    DistillationCallback,
    DISTLoss,
    KDLoss,
    Teacher,
    Term,
    WeightSchedule,
)
from lightning_dist.functional import dist_loss, kd_loss
from lightning_dist.losses import FeatureMimic
from lightning_dist.teacher import EnsembleTeacher
from plain import Projection, data

STEPS = 6


class Plain(L.LightningModule):
    """A module as users write it, with no code for distillation."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 4))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    def train_dataloader(self):
        return data(STEPS)


class Counting(nn.Module):
    """A teacher that counts its calls."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.network(x)


def teacher_net(*first: nn.Module) -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(*first, nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 4))


def fitted(make_trainer, *callbacks, module=Plain, **options):
    trainer = make_trainer(callbacks=list(callbacks), **options)
    trainer.fit(module := module())
    return module, trainer


def assert_same_bits(left: nn.Module, right: nn.Module) -> None:
    torch.testing.assert_close(left.state_dict(), right.state_dict(), rtol=0, atol=0)


# The calls of the teacher


def test_a_teacher_is_not_called_at_weight_0(make_trainer):
    teacher = Counting(teacher_net())
    module, _ = fitted(make_trainer, DistillationCallback(teacher, weight=0.0))
    assert teacher.calls == 0
    assert_same_bits(module, fitted(make_trainer)[0])


def test_a_schedule_calls_the_teacher_only_in_steps_with_a_weight(make_trainer):
    weight = WeightSchedule({0: 0.0, 2: 0.0, 3: 2.0, STEPS - 2: 0.0}, unit="step")
    teacher = Counting(teacher_net())
    module, _ = fitted(make_trainer, DistillationCallback(teacher, weight=weight))
    assert teacher.calls == 1
    net, teacher = Plain().net, teacher_net().eval()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for step, (inputs, target) in enumerate(Plain().train_dataloader()):
        output = net(inputs)
        loss = F.cross_entropy(output, target)
        if step == 3:
            loss = loss + 2.0 * dist_loss(output, teacher(inputs).detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert_same_bits(module.net, net)


def test_a_term_of_weight_0_does_not_change_the_others(make_trainer):
    terms = {"a": Term(DISTLoss(), 2.0), "b": Term(F.mse_loss, 0.0, student="0", teacher="0")}
    both, trainer = fitted(make_trainer, DistillationCallback(teacher_net(), terms=terms))
    del terms["b"]
    one, _ = fitted(make_trainer, DistillationCallback(teacher_net(), terms=terms))
    assert_same_bits(both, one)
    assert "train/distill/b" not in trainer.callback_metrics


def test_a_teacher_is_not_called_where_the_student_has_no_gradient(make_trainer):
    class Labelling(Plain):
        def training_step(self, batch, batch_idx):
            with torch.no_grad():
                for _ in range(3):
                    self.net(batch[0])
            return super().training_step(batch, batch_idx)

    teacher = Counting(teacher_net())
    module, _ = fitted(make_trainer, DistillationCallback(teacher), module=Labelling)
    assert teacher.calls == STEPS
    assert_same_bits(module, fitted(make_trainer, DistillationCallback(teacher_net()))[0])


# A teacher does not change the training


class Scaling(nn.Module):
    """A layer that writes to its input, but only after `first_call` calls."""

    def __init__(self, first_call: int) -> None:
        super().__init__()
        self.left = first_call

    def forward(self, x):
        self.left -= 1
        return x.mul_(0.5) if self.left < 0 else x


@pytest.mark.parametrize("first", [Scaling(0), nn.ReLU(inplace=True)], ids=["scaling", "relu"])
def test_a_teacher_that_writes_to_its_input_does_not_change_the_students(make_trainer, first):
    """The training is the same as with a teacher that copies its input before it writes."""

    class Copying(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x.clone())

    writing, _ = fitted(make_trainer, DistillationCallback(teacher_net(first)))
    copying, _ = fitted(make_trainer, DistillationCallback(teacher_net(Copying(first))))
    assert_same_bits(writing, copying)


def test_a_teacher_that_writes_to_its_input_only_later_is_refused(make_trainer):
    callback = DistillationCallback(teacher_net(Scaling(3)))
    with pytest.raises(MisconfigurationException, match=r"changed its input in place.*x\.clone"):
        fitted(make_trainer, callback)


def test_a_part_of_the_teacher_in_train_mode_is_put_back_into_eval_mode(make_trainer):
    network = teacher_net(nn.BatchNorm1d(6))
    before = {k: v.clone() for k, v in network.state_dict().items()}

    class Switching(L.Callback):
        def on_train_batch_start(self, *args):
            network[0].train()

    fitted(make_trainer, DistillationCallback(network), Switching())
    assert not network[0].training
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)


def test_inference_mode_in_the_teacher_does_not_change_the_training(make_trainer):
    class Inference(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = teacher_net()

        @torch.inference_mode()
        def forward(self, x):
            return self.inner(x)

    for loss in (DISTLoss(), F.mse_loss):
        quick, _ = fitted(make_trainer, DistillationCallback(Inference(), loss=loss))
        plain, _ = fitted(make_trainer, DistillationCallback(teacher_net(), loss=loss))
        assert_same_bits(quick, plain)


# The classes of the teacher


def test_a_class_map_applies_to_a_part_that_returns_class_logits(make_trainer):
    values = []
    for class_map in (None, [3, 2, 1, 0], [0, 0, 0, 0]):
        teacher = Teacher(teacher_net(), class_map=class_map)
        terms = {"head": Term(DISTLoss(), student="2", teacher="2")}
        callback = DistillationCallback(teacher, terms=terms)
        _, trainer = fitted(make_trainer, callback, max_steps=1)
        values.append(trainer.callback_metrics["train/distill"].item())
        inputs, _ = next(iter(Plain().train_dataloader()))
        logits = teacher_net()(inputs).detach()
        expected = dist_loss(Plain().net(inputs), logits[:, class_map or [0, 1, 2, 3]])
        assert values[-1] == pytest.approx(expected.item(), rel=1e-5)
    assert len(set(values)) == 3


def test_a_class_map_is_not_applied_to_features_and_an_unclear_term_is_refused(make_trainer):
    teacher = Teacher(teacher_net(), class_map=[3, 2, 1, 0])
    terms = {"hidden": Term(F.mse_loss, student="0", teacher="0")}
    with pytest.raises(
        MisconfigurationException, match=r"'hidden' compares its part '0'.*classes="
    ):
        fitted(make_trainer, DistillationCallback(teacher, terms=terms))
    terms = {"hidden": Term(FeatureMimic(4, 4), student="0", teacher="0")}
    DistillationCallback(teacher, terms=terms)
    assert terms["hidden"].compares_classes() is False
    terms = {"hidden": Term(F.mse_loss, student="0", teacher="0", classes=False)}
    mapped, _ = fitted(make_trainer, DistillationCallback(teacher, terms=terms))
    plain, _ = fitted(make_trainer, DistillationCallback(teacher_net(), terms=terms))
    assert_same_bits(mapped, plain)


def test_members_of_an_ensemble_may_have_other_heads_and_class_maps(make_trainer):
    ten = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 10))
    seven = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 7))
    ensemble = EnsembleTeacher([Teacher(ten, class_map=[3, 9, 1, 0]), teacher_net(), seven])
    inputs, _ = next(iter(Plain().train_dataloader()))
    terms = {
        "ten": Term(DISTLoss(), student="2", teacher="0.2"),
        "whole": Term(KDLoss(), teacher="0", weight=0.5),
        "four": Term(DISTLoss(), student="2", teacher="1.2", weight=2.0),
        "hidden": Term(F.mse_loss, student="0", teacher="2.0", classes=False),
    }
    callback = DistillationCallback(ensemble, terms=terms)
    _, trainer = fitted(make_trainer, callback, max_steps=1)
    own, mapped = Plain().net(inputs), ten(inputs)[:, [3, 9, 1, 0]]
    expected = {
        "ten": dist_loss(own, mapped),
        "whole": kd_loss(own, mapped),
        "four": dist_loss(own, teacher_net()(inputs)),
        "hidden": F.mse_loss(Plain().net[0](inputs), seven[0](inputs)),
    }
    for name, value in expected.items():
        found = trainer.callback_metrics[f"train/distill/{name}"].item()
        assert found == pytest.approx(value.item(), rel=1e-5), name
    with pytest.raises(ValueError, match="give each a class_map"):
        ensemble(inputs)  # Outside of a run, the output is the mean.


def test_an_unclear_term_on_a_member_with_a_class_map_is_refused(make_trainer):
    ensemble = EnsembleTeacher([teacher_net(), Teacher(teacher_net(), class_map=[3, 2, 1, 0])])
    plain = {"hidden": Term(F.mse_loss, student="0", teacher="0.0")}
    fitted(make_trainer, DistillationCallback(ensemble, terms=plain), max_steps=1)
    terms = {"hidden": Term(F.mse_loss, student="0", teacher="1.0")}
    with pytest.raises(MisconfigurationException, match=r"compares its part '1\.0'.*classes="):
        fitted(make_trainer, DistillationCallback(ensemble, terms=terms))


# Arguments of a loss from the batch


def test_a_loss_gets_what_its_term_takes_from_the_batch(make_trainer):
    def known(batch, logits):
        assert logits.shape == (8, 4)
        return {"mask": batch[1] > 0}

    def weighted(student, teacher, *, target):
        return F.cross_entropy(student, target) + 0 * teacher.sum()

    terms = {
        "dist": Term(DISTLoss(), from_batch=known),
        "kd": Term(KDLoss(), from_batch=known),
        "own": Term(weighted, from_batch=lambda batch, _: {"target": batch[1]}),
    }
    callback = DistillationCallback(teacher_net(), terms=terms)
    _, trainer = fitted(make_trainer, callback, max_steps=1)
    inputs, target = next(iter(Plain().train_dataloader()))
    logits, kept = Plain().net(inputs), target > 0
    pair = logits[kept], teacher_net()(inputs)[kept]
    expected = {
        "dist": dist_loss(*pair),
        "kd": kd_loss(*pair),
        "own": F.cross_entropy(logits, target),
    }
    for name, value in expected.items():
        found = trainer.callback_metrics[f"train/distill/{name}"].item()
        assert found == pytest.approx(value.item(), rel=1e-5), name


def test_from_batch_must_be_a_function_that_returns_a_dict(make_trainer):
    with pytest.raises(TypeError, match="from_batch of term 'dist' is 'mask': give a function"):
        DistillationCallback(teacher_net(), terms={"dist": Term(DISTLoss(), from_batch="mask")})
    terms = {"dist": Term(DISTLoss(), from_batch=lambda batch, logits: batch[1] > 0)}
    with pytest.raises(MisconfigurationException, match="from_batch returns Tensor: it must"):
        fitted(make_trainer, DistillationCallback(teacher_net(), terms=terms))


@pytest.mark.parametrize(
    ("loss", "classes", "warned"),
    [
        (DISTLoss(), 2, True),
        (DISTLoss(beta=0), 2, False),
        (DISTLoss(activation="sigmoid"), 2, False),
        (DISTLoss(), 3, False),
        (KDLoss(), 2, False),
    ],
)
def test_two_softmax_classes_lead_to_one_warning(make_trainer, recwarn, loss, classes, warned):
    class Few(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(6, classes)

        def training_step(self, batch, batch_idx):
            return self.net(batch[0]).square().mean()

    fitted(make_trainer, DistillationCallback(nn.Linear(6, classes), loss=loss), module=Few)
    found = [w for w in recwarn if "DIST compares two softmax classes" in str(w.message)]
    assert len(found) == warned


# Frozen parts, warnings and messages


class Finetuned(Plain):
    """A module whose backbone is frozen at first."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = self.net[0], self.net[2]
        del self.net

    def forward(self, x):
        return self.head(self.backbone(x).relu())

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        # BackboneFinetuning adds the backbone's parameters when it unfreezes them.
        held = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.SGD(held, lr=0.1)


@pytest.mark.parametrize("loss", [F.mse_loss, "projection"])
def test_a_term_on_a_frozen_part_is_0_until_the_part_trains(make_trainer, loss):
    if loss == "projection":
        loss = Projection(12)
    terms = {"hidden": Term(loss, student="backbone", teacher="0")}
    callback = DistillationCallback(teacher_net(), student="", terms=terms)
    values = []

    class Values(L.Callback):
        def on_train_batch_end(self, trainer, *args):
            values.append(trainer.logged_metrics["train/distill"].item())

    finetuning = BackboneFinetuning(unfreeze_backbone_at_epoch=1, verbose=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        callbacks = [callback, finetuning, Values()]
        fitted(make_trainer, *callbacks, module=Finetuned, max_epochs=2)
    assert values[:STEPS] == [0.0] * STEPS
    assert min(values[STEPS:]) > 0
    assert sum("term 'hidden' waits" in str(warning.message) for warning in caught) == 1


def test_a_resume_with_another_teacher_causes_a_warning_that_names_both(make_trainer, tmp_path):
    _, trainer = fitted(make_trainer, DistillationCallback(teacher_net()), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")

    def resume(teacher):
        trainer = make_trainer(max_epochs=2, callbacks=[DistillationCallback(teacher)])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.fit(Plain(), ckpt_path=tmp_path / "one.ckpt")
        return [str(w.message) for w in caught if "goes on with" in str(w.message)]

    assert resume(teacher_net()) == []
    other = teacher_net()
    other[0].bias.data[0] += 1
    (message,) = resume(other)
    assert message.count("Teacher(Sequential), 136 numbers of torch.float32, checksum ") == 2


# Teachers and students of unusual kinds


@pytest.mark.parametrize(("weight", "nonfinite"), [(1.0, "skip"), (0.0, "raise")])
def test_an_overflow_in_an_unused_term_changes_no_weight(make_trainer, weight, nonfinite):
    class Module(Plain):
        """A module with a part `extra` that overflows and that only distillation trains."""

        def __init__(self):
            super().__init__()
            self.extra, self.identity = nn.Linear(6, 4), nn.Identity()

        def training_step(self, batch, batch_idx):
            self.identity((1000 * self.extra(batch[0])).exp())
            return super().training_step(batch, batch_idx)

    terms = {"extra": Term(F.mse_loss, weight, student="identity")}
    options = {"terms": terms, "nonfinite": nonfinite, "inputs": {"net": ""}}
    callback = DistillationCallback(teacher_net(), student="", **options)
    module, _ = fitted(make_trainer, callback, module=Module)
    assert all(x.isfinite().all() for x in module.parameters())
    torch.testing.assert_close(
        module.net.state_dict(), fitted(make_trainer)[0].net.state_dict(), rtol=0, atol=0
    )


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_teacher_that_writes_does_not_change_a_compiled_modules_batch(make_trainer, backend):
    teacher = teacher_net(nn.ReLU(inplace=True))
    eager, _ = fitted(make_trainer, DistillationCallback(teacher))
    trainer = make_trainer(callbacks=[DistillationCallback(teacher)])
    trainer.fit(torch.compile(module := Plain(), backend=backend))
    torch.testing.assert_close(module.state_dict(), eager.state_dict(), rtol=1e-5, atol=1e-6)


def test_a_member_of_an_ensemble_that_writes_does_not_change_the_inputs_of_others():
    members = [teacher_net(nn.ReLU(inplace=True)), teacher_net()]
    x = torch.randn(5, 6)
    expected = sum(member(x.clone()) for member in members) / 2
    ensemble = EnsembleTeacher(members, mean="logits")
    for _ in range(3):
        torch.testing.assert_close(ensemble(x), expected)


def test_a_class_map_applies_to_another_entry_of_the_teachers_output(make_trainer):
    class Two(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            logits = self.net(x)
            return {"out": logits, "aux": 2 * logits}

    class Module(Plain):
        def __init__(self):
            super().__init__()
            self.net = Two(self.net)

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net(batch[0])["out"], batch[1])

    values = set()
    for class_map in (None, [3, 2, 1, 0], [0, 0, 0, 0]):
        teacher = Teacher(Two(teacher_net()), class_map=class_map)
        callback = DistillationCallback(teacher, output="aux")
        _, trainer = fitted(make_trainer, callback, module=Module, max_steps=1)
        values.add(trainer.callback_metrics["train/distill"].item())
    assert len(values) == 3


class Batch(dict):
    """A mapping of a class that is not registered with torch's tree functions."""


def test_inputs_in_a_container_of_an_unknown_class_are_protected(make_trainer):
    class Named(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, batch):
            return self.net(batch["x"])

    class Module(Plain):
        def __init__(self):
            super().__init__()
            self.net = Named(self.net)

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net(Batch(x=batch[0])), batch[1])

    writing = Named(teacher_net(nn.ReLU(inplace=True)))
    module, _ = fitted(make_trainer, DistillationCallback(writing), module=Module)
    plain = Named(teacher_net(nn.ReLU()))
    other, _ = fitted(make_trainer, DistillationCallback(plain), module=Module)
    assert_same_bits(module, other)


def test_validation_by_another_trainer_within_fit_does_not_end_the_distillation(make_trainer):
    teacher = Counting(teacher_net())
    callback = DistillationCallback(teacher)

    class Nested(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 1:
                other = make_trainer(callbacks=[callback])
                other.validate(pl_module, pl_module.train_dataloader(), verbose=False)
                pl_module.trainer = trainer

    class Validating(Plain):
        def validation_step(self, batch, batch_idx):
            self.net(batch[0])

    fitted(make_trainer, callback, Nested(), module=Validating)
    assert teacher.calls == STEPS
