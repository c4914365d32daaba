"""Tests of DistillationCallback with ordinary LightningModules, in one process."""

import copy
import io
from types import SimpleNamespace

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EMAWeightAveraging, WeightAveraging
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_dist import (
    CachedTeacher,
    DistillationCallback,
    DISTLoss,
    KDLoss,
    Teacher,
    Term,
    WeightSchedule,
)
from lightning_dist.functional import dist_loss
from lightning_dist.teacher import EnsembleTeacher

BATCH = 8


class Plain(L.LightningModule):
    """A module as users write it, with no code for distillation."""

    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__()
        self.net = net or nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 4))
        self.losses: list[float] = []

    def training_step(self, batch, batch_idx):
        inputs, target = batch
        return F.cross_entropy(self.net(inputs), target)

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.training_step(batch, batch_idx))

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item() if outputs else None)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def data(batches: int = 4) -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(batches * BATCH, 6, generator=generator)
    target = torch.randint(0, 4, (len(inputs),), generator=generator)
    return DataLoader(TensorDataset(inputs, target), batch_size=BATCH)


def teacher_net() -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(6, 12), nn.Dropout(0.5), nn.BatchNorm1d(12), nn.Linear(12, 4))


def fitted(trainer, module=Plain, loader=None) -> Plain:
    torch.manual_seed(3)
    module = module() if isinstance(module, type) else module
    trainer.fit(module, loader or data())
    return module


def plain_loop(teacher, steps: int = 4, weight: float = 2.0, task_weight: float = 1.0, loss=None):
    """Train in the same way without Lightning; return the network and the losses to expect."""
    torch.manual_seed(3)
    net = Plain().net
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for inputs, target in [*data()][:steps]:
        with torch.no_grad():
            expected = teacher.eval()(inputs)
        logits = net(inputs)
        total = task_weight * F.cross_entropy(logits, target)
        total = total + weight * (loss or dist_loss)(logits, expected)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        losses.append(total.item())
    return net, losses


def assert_same_weights(left: nn.Module, right: nn.Module) -> None:
    for a, b in zip(left.state_dict().values(), right.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_weights_and_losses_equal_those_of_a_plain_loop(make_trainer):
    teacher = teacher_net()
    net, losses = plain_loop(copy.deepcopy(teacher))
    module = fitted(make_trainer(callbacks=[DistillationCallback(teacher)]))
    assert module.losses == pytest.approx(losses, rel=1e-6)
    torch.testing.assert_close(module.net.state_dict(), net.state_dict())


def test_task_weight_and_another_loss_are_used(make_trainer):
    teacher = teacher_net()
    _, losses = plain_loop(teacher, weight=1.0, task_weight=0.9, loss=KDLoss(tau=4.0))
    callback = DistillationCallback(teacher, loss=KDLoss(tau=4.0), weight=1.0, task_weight=0.9)
    assert fitted(make_trainer(callbacks=[callback])).losses == pytest.approx(losses, rel=1e-6)


def test_weight_0_changes_no_bit_of_the_student(make_trainer):
    alone = fitted(make_trainer(max_epochs=2))
    callback = DistillationCallback(teacher_net(), weight=0.0)
    assert_same_weights(alone, fitted(make_trainer(max_epochs=2, callbacks=[callback])))


def test_distillation_loss_is_logged(make_trainer):
    trainer = make_trainer(callbacks=[DistillationCallback(teacher_net())], max_steps=1)
    module = fitted(trainer)
    inputs, target = next(iter(data()))
    torch.manual_seed(3)
    task = F.cross_entropy(Plain().net(inputs), target).item()
    distill = trainer.callback_metrics["train/distill"].item()
    assert module.losses[0] == pytest.approx(task + distill, rel=1e-6)


def test_several_terms_on_different_sub_modules_are_summed(make_trainer):
    terms = {
        "dist": Term(DISTLoss(), weight=2.0),
        "hidden": Term(F.mse_loss, weight=0.5, student="0", teacher="0"),
    }
    trainer = make_trainer(callbacks=[DistillationCallback(teacher_net(), terms=terms)])
    fitted(trainer)
    logged = trainer.callback_metrics
    weighted = 2 * logged["train/distill/dist"] + 0.5 * logged["train/distill/hidden"]
    assert logged["train/distill"].item() == pytest.approx(weighted.item(), rel=1e-6)
    assert logged["train/distill/hidden"] > 0


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


class Recording(nn.Module):
    """A teacher that stores the arguments of its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)
        self.calls: list[tuple] = []

    def forward(self, *args, **kwargs):
        self.calls.append((args, kwargs))
        return self.layer(args[0])


def test_teacher_sees_the_args_and_kwargs_of_the_students_call(make_trainer):
    class Student(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 4)

        def forward(self, inputs, scale=1.0, *, mask=None):
            return self.layer(inputs) * scale

    class Calling(Plain):
        def training_step(self, batch, batch_idx):
            mask = {"keep": batch[1] > 1}
            return F.cross_entropy(self.net(batch[0], 2.0, mask=mask), batch[1])

    teacher = Recording()
    fitted(make_trainer(callbacks=[DistillationCallback(teacher)], max_steps=1), Calling(Student()))
    ((inputs, scale), kwargs) = teacher.calls[0]
    expected_inputs, target = next(iter(data()))
    assert torch.equal(inputs, expected_inputs)
    assert scale == 2.0
    assert torch.equal(kwargs["mask"]["keep"], target > 1)


def test_teacher_sees_inputs_that_the_student_changes_in_place(make_trainer):
    class InPlace(nn.Sequential):
        def forward(self, inputs):
            return super().forward(inputs.mul_(0))

    teacher = Recording()
    seen = []
    teacher.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    module = Plain(InPlace(nn.Linear(6, 4)))
    fitted(make_trainer(callbacks=[DistillationCallback(teacher)], max_steps=1), module)
    assert torch.equal(seen[0], next(iter(data()))[0])


def test_a_student_called_several_times_gives_the_sum_of_its_losses(make_trainer):
    class Twice(Plain):
        def training_step(self, batch, batch_idx):
            inputs, target = batch
            logits = self.net(inputs[:4]), self.net(inputs[4:])
            return F.cross_entropy(torch.cat(logits), target)

    teacher = teacher_net()
    trainer = make_trainer(callbacks=[DistillationCallback(teacher, weight=1.0)], max_steps=1)
    fitted(trainer, Twice)
    torch.manual_seed(3)
    net, inputs = Twice().net, next(iter(data()))[0]
    expected = sum(dist_loss(net(x), teacher.eval()(x)) for x in inputs.split(4))
    assert trainer.callback_metrics["train/distill"].item() == pytest.approx(expected.item(), 1e-5)


def test_a_call_of_the_student_without_gradient_is_not_distilled(make_trainer):
    class PseudoLabelling(Plain):
        def training_step(self, batch, batch_idx):
            with torch.no_grad():
                self.net(-batch[0])
            return super().training_step(batch, batch_idx)

    teacher = teacher_net()
    _, losses = plain_loop(teacher)
    module = fitted(make_trainer(callbacks=[DistillationCallback(teacher)]), PseudoLabelling)
    assert module.losses == pytest.approx(losses, rel=1e-6)


class Returns(Plain):
    """A module whose step returns a dict, or None for odd batches."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return {"loss": loss, "extra": batch_idx} if batch_idx % 2 == 0 else None

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.losses.append((outputs["loss"].item(), outputs["extra"]) if outputs else None)


@pytest.mark.filterwarnings("ignore:.*returned `None`.*")
def test_a_step_may_return_a_dict_or_none(make_trainer):
    teacher = teacher_net()
    module = fitted(make_trainer(callbacks=[DistillationCallback(teacher)]), Returns)
    _, losses = plain_loop(teacher, steps=1)
    assert module.losses[0] == (pytest.approx(losses[0], rel=1e-6), 0)
    assert module.losses[1] is None


@pytest.mark.parametrize(
    ("wrap", "output"),
    [
        (lambda x: (x, "features"), None),
        (lambda x: ("features", x), 1),
        (lambda x: {"logits": x}, None),
        (lambda x: {"out": x, "aux": x * 2}, "out"),
        (lambda x: SimpleNamespace(logits=x), None),
        (lambda x: SimpleNamespace(scores=x), "scores"),
    ],
    ids=["tuple", "index", "dict with logits", "named entry", "object", "named attribute"],
)
def test_logits_are_found_in_outputs_that_are_not_tensors(make_trainer, wrap, output):
    class Wrapped(nn.Sequential):
        def forward(self, inputs):
            return wrap(super().forward(inputs))

    class Unwrapping(Plain):
        def training_step(self, batch, batch_idx):
            self.net(batch[0])
            return F.cross_entropy(nn.Sequential.forward(self.net, batch[0]), batch[1])

    teacher = teacher_net()
    _, losses = plain_loop(teacher, steps=1)
    torch.manual_seed(3)
    module = Unwrapping(Wrapped(*Plain().net))
    # The teacher returns a plain tensor, which has no entries: then `output` is not used.
    callback = DistillationCallback(teacher, output=output)
    module = fitted(make_trainer(callbacks=[callback], max_steps=1), module)
    assert module.losses == pytest.approx(losses, rel=1e-6)


class Itself(Plain):
    """A module that is itself the student."""

    def forward(self, inputs):
        return self.net(inputs)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])


def test_the_student_may_be_the_module_itself(make_trainer):
    teacher = teacher_net()
    _, losses = plain_loop(teacher)
    callback = DistillationCallback(teacher, student="")
    assert fitted(make_trainer(callbacks=[callback]), Itself).losses == pytest.approx(losses, 1e-6)


def test_gradients_are_accumulated_and_clipped_as_in_a_plain_loop(make_trainer):
    teacher = teacher_net()
    trainer = make_trainer(
        callbacks=[DistillationCallback(teacher)], accumulate_grad_batches=2, gradient_clip_val=0.1
    )
    module = fitted(trainer)
    torch.manual_seed(3)
    net = Plain().net
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for i, (inputs, target) in enumerate(data()):
        logits = net(inputs)
        total = F.cross_entropy(logits, target) + 2 * dist_loss(logits, teacher.eval()(inputs))
        (total / 2).backward()
        if i % 2:
            nn.utils.clip_grad_norm_(net.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(module.net.state_dict(), net.state_dict())


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_training_works_in_every_precision(make_trainer, precision):
    trainer = make_trainer(callbacks=[DistillationCallback(teacher_net())], precision=precision)
    _, losses = plain_loop(teacher_net())
    assert fitted(trainer).losses == pytest.approx(losses, rel=0.02)


def test_the_relation_loss_is_float32_under_bf16_mixed(make_trainer):
    dtypes = []

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        value = dist_loss(student, teacher)
        dtypes.extend([student.dtype, teacher.dtype, value.dtype])
        return value

    callback = DistillationCallback(teacher_net(), loss=loss)
    fitted(make_trainer(callbacks=[callback], precision="bf16-mixed", max_steps=1))
    assert dtypes == [torch.bfloat16, torch.bfloat16, torch.float32]


def test_a_teacher_computes_in_its_chosen_dtype(make_trainer):
    teacher = Teacher(teacher_net(), dtype="bfloat16")
    outputs = []
    teacher.network.register_forward_hook(lambda *args: outputs.append(args[-1]))
    module = fitted(make_trainer(callbacks=[DistillationCallback(teacher)]))
    assert {output.dtype for output in outputs} == {torch.bfloat16}
    assert {p.dtype for p in module.parameters()} == {torch.float32}


def test_teacher_stays_frozen_and_in_eval_mode(make_trainer):
    class Switching(Plain):
        def on_train_batch_start(self, batch, batch_idx):
            self.train()
            # The callback must put the teacher back into eval mode.
            teacher.train()

    teacher = teacher_net()
    before = copy.deepcopy(teacher.state_dict())
    modes = []
    teacher.register_forward_hook(lambda *_: modes.append([m.training for m in teacher.modules()]))
    fitted(make_trainer(callbacks=[DistillationCallback(teacher)]), Switching())
    assert len(modes) == 4
    assert not any(map(any, modes))
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name])


def test_teacher_is_in_no_optimizer_and_no_checkpoint(make_trainer, tmp_path):
    trainer = make_trainer(callbacks=[DistillationCallback(teacher_net())])
    module = fitted(trainer)
    held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in module.parameters()}
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert set(checkpoint["state_dict"]) == set(module.state_dict())


@pytest.mark.parametrize("averaging", [WeightAveraging, EMAWeightAveraging])
def test_weight_averaging_copies_no_teacher(make_trainer, averaging):
    class Single(nn.Sequential):
        def __deepcopy__(self, memo):
            raise AssertionError("the teacher was copied")

    distilled = DistillationCallback(Single(*teacher_net()), weight=0.0)
    alone = fitted(make_trainer(callbacks=[averaging(), distilled]))
    assert_same_weights(alone, fitted(make_trainer(callbacks=[averaging()])))


class Tuned(Plain):
    """A module with the attributes (lr, batch_size) that Lightning's tuners set."""

    lr = 0.1
    batch_size = 2

    def train_dataloader(self):
        return DataLoader(data().dataset, batch_size=self.batch_size)

    val_dataloader = train_dataloader

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


@pytest.mark.parametrize("search", ["lr_find", "scale_batch_size"])
def test_tuners_search_with_the_teacher(make_trainer, search):
    teacher, calls = teacher_net(), []
    teacher.register_forward_hook(lambda *_: calls.append(1))
    trainer = make_trainer(callbacks=[DistillationCallback(teacher)], max_epochs=9)
    module = Tuned()
    options = {"lr_find": {"num_training": 6}, "scale_batch_size": {"max_trials": 2}}
    getattr(Tuner(trainer), search)(module, **options[search])
    assert len(calls) >= 6
    assert "training_step" not in module.__dict__


def test_validation_does_not_call_the_teacher(make_trainer):
    teacher, calls = teacher_net(), []
    teacher.register_forward_hook(lambda *_: calls.append(1))
    trainer = make_trainer(callbacks=[DistillationCallback(teacher)])
    trainer.fit(Plain(), data(), data())
    assert len(calls) == 4
    assert trainer.callback_metrics["val/loss"] < 5


def test_a_weight_schedule_counts_epochs_or_steps(make_trainer):
    seen = []

    def spy(schedule):
        def weight(trainer):
            seen.append(schedule(trainer))
            return seen[-1]

        return weight

    for schedule, expected in [
        (WeightSchedule({0: 0.0, 2: 2.0}), [0.0, 0.0, 1.0, 1.0, 2.0, 2.0]),
        (WeightSchedule({0: 3.0, 3: 0.0}, unit="step"), [3.0, 2.0, 1.0, 0.0, 0.0, 0.0]),
    ]:
        seen.clear()
        callback = DistillationCallback(teacher_net(), weight=spy(schedule))
        fitted(make_trainer(callbacks=[callback], max_epochs=3), loader=data(2))
        assert seen == pytest.approx(expected)


@pytest.mark.parametrize("points", [{}, {-1: 1.0}])
def test_a_schedule_without_valid_points_is_refused(points):
    with pytest.raises(ValueError, match="points is"):
        WeightSchedule(points)


class Projection(nn.Module):
    """A loss with trainable parameters, like FeatureMimic."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(12, 12)

    def forward(self, student, teacher):
        return F.mse_loss(self.project(student), teacher)


def projecting() -> tuple[DistillationCallback, Projection]:
    loss = Projection()
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


@pytest.mark.filterwarnings("ignore:.*dataloader_iter.*")
def test_a_step_that_takes_the_loaders_iterator(make_trainer):
    class Drawing(Plain):
        def training_step(self, dataloader_iter):
            batch, *_ = next(dataloader_iter)
            return F.cross_entropy(self.net(batch[0]), batch[1])

    teacher = teacher_net()
    trainer = make_trainer(callbacks=[DistillationCallback(teacher)])
    module = fitted(trainer, Drawing)
    torch.testing.assert_close(module.net.state_dict(), plain_loop(teacher)[0].state_dict())


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


def test_an_unknown_sub_module_is_refused_with_near_names(make_trainer):
    refused(make_trainer, "no sub-module 'nett'.* such as 'net'", student="nett")
    terms = {"hidden": Term(F.mse_loss, student="9", teacher="0")}
    refused(make_trainer, "no sub-module '9'.*student path of term 'hidden'", terms=terms)
    terms = {"hidden": Term(F.mse_loss, student="0", teacher="layer")}
    refused(make_trainer, "no sub-module 'layer'.*teacher path of term 'hidden'", terms=terms)


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


def test_two_callbacks_are_refused(make_trainer):
    callbacks = [
        DistillationCallback(teacher_net()),
        DistillationCallback(teacher_net(), student="net.0"),
    ]
    with pytest.raises(MisconfigurationException, match="several DistillationCallbacks: give one"):
        fitted(make_trainer(callbacks=callbacks))


def test_a_teacher_moves_to_a_device_only_for_fit(make_trainer):
    class Teaching(Plain):
        test_step = Plain.validation_step

    teacher, moves = teacher_net(), []
    teacher.to = moves.append
    trainer = make_trainer(callbacks=[DistillationCallback(teacher)])
    module = Teaching()
    trainer.validate(module, data(), verbose=False)
    trainer.test(module, data(), verbose=False)
    assert not moves
    trainer.fit(module, data())
    # fit moves the teacher to the student's device, and back.
    assert [str(device) for device in moves] == ["cpu", "cpu"]


def test_conflicting_arguments_are_refused():
    terms = {"dist": Term(DISTLoss())}
    for option in ({"loss": DISTLoss()}, {"weight": 5.0}, {"output": "logits"}):
        with pytest.raises(ValueError, match="give either loss, weight and output, or terms"):
            DistillationCallback(teacher_net(), terms=terms, **option)
    with pytest.raises(ValueError, match="terms is empty"):
        DistillationCallback(teacher_net(), terms={})
    with pytest.raises(TypeError, match=r"the teacher is a str: give a torch\.nn\.Module"):
        DistillationCallback("resnet50")


@pytest.mark.slow
@pytest.mark.parametrize("what", ["student", "module", "loss"])
def test_compiled_students_modules_and_losses_train_the_same(make_trainer, what):
    teacher = teacher_net()
    _, losses = plain_loop(teacher)
    torch.manual_seed(3)
    module = Plain()
    if what == "student":
        module.net = torch.compile(module.net, backend="aot_eager")
    compiled = torch.compile(module, backend="aot_eager") if what == "module" else module
    loss = torch.compile(DISTLoss(), backend="aot_eager") if what == "loss" else None
    make_trainer(callbacks=[DistillationCallback(teacher, loss=loss)]).fit(compiled, data())
    assert module.losses == pytest.approx(losses, rel=1e-5)
    # torch.compile itself sets training_step on the instance of a compiled module.
    assert ("training_step" in module.__dict__) == (what == "module")


def test_a_part_of_the_teacher_can_get_the_inputs_of_a_part_of_the_student(make_trainer):
    # The whole teacher takes 9 features, so it cannot be called with the student's 6.
    teacher = nn.Sequential(nn.Linear(9, 12), nn.Linear(12, 4))
    module = Plain()
    student = copy.deepcopy(module.net)
    terms = {"head": Term(DISTLoss(), student="2", teacher="1")}
    callback = DistillationCallback(teacher, terms=terms, inputs={"2": "1"})
    trainer = make_trainer(max_steps=1, callbacks=[callback], limit_val_batches=0)
    trainer.fit(module, data())
    inputs, _ = next(iter(data()))
    hidden = student[:2](inputs)
    expected = dist_loss(student[2](hidden), teacher[1](hidden))
    assert trainer.callback_metrics["train/distill"].item() == pytest.approx(expected.item())


@pytest.mark.parametrize("inputs", [{"7": ""}, {"2": "7"}], ids=["student", "teacher"])
def test_inputs_of_an_unknown_part_are_refused(make_trainer, inputs):
    callback = DistillationCallback(teacher_net(), inputs=inputs)
    with pytest.raises(MisconfigurationException, match=r"inputs.*'7'|'7'.*inputs"):
        make_trainer(callbacks=[callback]).fit(Plain(), data())
