"""Tests of DistillModule and ClassificationModule: steps, metrics, optimizers, checkpoints."""

import copy
import functools

import pytest
import timm.optim
import timm.scheduler
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import BatchSizeFinder, EMAWeightAveraging
from lightning.pytorch.cli import ReduceLROnPlateau
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from timm.data import Mixup
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_dist import DistillationCallback, DistillModule, DISTLoss, KDLoss, Teacher, Term
from lightning_dist.data.digits import DigitsDataModule
from lightning_dist.functional import dist_loss
from lightning_dist.tasks.classification import ClassificationModule
from plain import Projection, data


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))


sgd = functools.partial(torch.optim.SGD, lr=0.1)


def test_logged_losses_add_up(make_trainer):
    module = DistillModule(network(), network(), optimizer=sgd, distill_weight=3.0)
    trainer = make_trainer(accumulate_grad_batches=2)
    trainer.fit(module, data())
    logged = trainer.callback_metrics
    total = logged["train/task"] + logged["train/distill"]
    assert logged["train/loss"].item() == pytest.approx(total.item(), rel=1e-6)


def test_without_a_teacher_the_training_is_supervised(make_trainer):
    torch.manual_seed(0)
    module = DistillModule(network(), optimizer=sgd)
    net = copy.deepcopy(module.student)
    trainer = make_trainer()
    trainer.fit(module, data())
    assert not any(isinstance(c, DistillationCallback) for c in trainer.callbacks)
    assert trainer.callback_metrics["train/loss"] == trainer.callback_metrics["train/task"]
    optimizer = sgd(net.parameters())
    for inputs, target in data():
        optimizer.zero_grad()
        F.cross_entropy(net(inputs), target).backward()
        optimizer.step()
    torch.testing.assert_close(module.student.state_dict(), net.state_dict())


def test_the_given_distillation_loss_is_used(make_trainer):
    torch.manual_seed(0)
    module = DistillModule(
        network(), network(), optimizer=sgd, distill_loss=KDLoss(2.0), distill_weight=0.7
    )
    trainer = make_trainer(max_steps=1)
    student, teacher = copy.deepcopy(module.student), module.teacher.network
    trainer.fit(module, data())
    inputs, _ = next(iter(data()))
    expected = 0.7 * KDLoss(2.0)(student.train()(inputs), teacher.eval()(inputs))
    assert trainer.callback_metrics["train/distill"].item() == pytest.approx(expected.item(), 1e-5)


def test_a_callback_of_the_trainer_replaces_the_modules_own(make_trainer):
    mine = DistillationCallback(network(), student="student", weight=0.0)
    module = DistillModule(network(), network(), optimizer=sgd)
    trainer = make_trainer(callbacks=[mine])
    trainer.fit(module, data())
    assert [c for c in trainer.callbacks if isinstance(c, DistillationCallback)] == [mine]
    assert trainer.callback_metrics["train/distill"] == 0


@pytest.mark.filterwarnings("ignore:.*configure_model.*")
def test_the_modules_callback_comes_before_callbacks_that_average_weights(make_trainer):
    class Hinted(DistillModule):
        def configure_distillation(self):
            terms = {"hint": Term(Projection(8), student="0", teacher="0")}
            return DistillationCallback(self.teacher, "student", terms=terms)

    trainer = make_trainer(callbacks=[EMAWeightAveraging()])
    trainer.fit(Hinted(network(), network(), optimizer=sgd), data())
    assert trainer.callback_metrics["train/distill/hint"] > 0


def test_one_trainer_fits_two_modules_each_with_its_own_teacher(make_trainer):
    first, second = (DistillModule(network(), network(), optimizer=sgd) for _ in range(2))
    alone = DistillModule(network(), optimizer=sgd)
    calls = []
    for name, module in [("first", first), ("second", second)]:
        module.teacher.network.register_forward_hook(lambda *_, name=name: calls.append(name))
    trainer = make_trainer()
    for module in (first, second, alone):
        trainer.fit_loop.epoch_progress.reset()
        trainer.fit(module, data())
    assert calls == ["first"] * 4 + ["second"] * 4


def test_teacher_is_no_part_of_the_module():
    module = DistillModule(network(), network())
    assert all(name.startswith("student.") for name in module.state_dict())
    assert len(list(module.parameters())) == len(list(module.student.parameters()))
    module.train()
    assert not module.teacher.network.training


def test_checkpoint_loads_and_predicts_without_a_teacher(make_trainer, tmp_path):
    module = ClassificationModule(network(), network(), num_classes=4, optimizer=sgd)
    trainer = make_trainer()
    trainer.fit(module, data())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = ClassificationModule.load_from_checkpoint(
        tmp_path / "last.ckpt", student=network(), num_classes=4, weights_only=True
    )
    assert loaded.teacher is None
    batches = make_trainer().predict(loaded, data())
    module.eval()
    with torch.no_grad():
        expected = [module(inputs) for inputs, _ in data()]
    torch.testing.assert_close(batches, expected)


def test_checkpoint_is_the_size_of_the_student_and_its_optimizer(make_trainer, tmp_path):
    teacher = nn.Sequential(nn.Linear(6, 50_000), nn.Linear(50_000, 4))  # The weights have 2.2 MB.
    module = DistillModule(network(), teacher, optimizer=torch.optim.AdamW)
    trainer = make_trainer()
    trainer.fit(module, data())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    optimizer = trainer.optimizers[0].state_dict()
    torch.save((module.student.state_dict(), optimizer), tmp_path / "parts.pt")
    size, parts = ((tmp_path / name).stat().st_size for name in ("last.ckpt", "parts.pt"))
    assert size < parts + 200_000


def test_metrics_are_computed_over_the_whole_set(make_trainer):
    module = ClassificationModule(network(), num_classes=4, optimizer=sgd)
    loader = data(batches=3)
    loader = DataLoader(loader.dataset, batch_size=10)  # The batches have 10, 10 and 4 images.
    metrics = make_trainer().test(module, loader, verbose=False)[0]
    inputs, target = loader.dataset.tensors
    logits = module.eval()(inputs)
    accuracy = (logits.argmax(1) == target).float().mean().item()
    assert metrics["test/accuracy"] == pytest.approx(accuracy)
    assert metrics["test/loss"] == pytest.approx(F.cross_entropy(logits, target).item(), rel=1e-6)


def test_top5_accuracy_is_logged_only_with_many_classes():
    for num_classes, shown in [(10, False), (100, True)]:
        metrics = ClassificationModule(network(), num_classes=num_classes).val_metrics
        assert ("val/accuracy_top5" in list(metrics)) == shown


def test_metrics_of_the_user_are_logged(make_trainer):
    module = DistillModule(network(), metrics={"top2": MulticlassAccuracy(4, top_k=2)})
    assert "test/top2" in make_trainer().test(module, data(), verbose=False)[0]


def test_label_smoothing_is_used_in_training_only(make_trainer):
    module = ClassificationModule(network(), num_classes=4, label_smoothing=0.2, optimizer=sgd)
    inputs, target = next(iter(data(1)))
    student = copy.deepcopy(module.student).train()
    trainer = make_trainer(max_steps=1)
    trainer.fit(module, data(1), data(1))
    expected = F.cross_entropy(student(inputs), target, label_smoothing=0.2).item()
    assert trainer.callback_metrics["train/task"].item() == pytest.approx(expected, rel=1e-5)
    plain = F.cross_entropy(module.student.eval()(inputs), target).item()
    assert trainer.callback_metrics["val/loss"].item() == pytest.approx(plain, rel=1e-5)


def test_student_and_teacher_get_the_same_mixed_images(make_trainer):
    class Pixels(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(16, 4)
            self.seen = []

        def forward(self, images):
            self.seen.append(images.detach().clone())
            return self.layer(images.flatten(1))

    images, labels = torch.randn(8, 1, 4, 4), torch.randint(0, 4, (8,))
    loader = DataLoader(TensorDataset(images, labels), batch_size=8)
    mixup = Mixup(mixup_alpha=0.8, num_classes=4, label_smoothing=0.1)
    module = ClassificationModule(Pixels(), Pixels(), num_classes=4, mixup=mixup, optimizer=sgd)
    make_trainer(num_sanity_val_steps=0).fit(module, loader, loader)
    trained_on, validated_on = module.student.seen
    assert torch.equal(trained_on, module.teacher.network.seen[-1])
    assert not torch.equal(trained_on, images)
    assert torch.equal(validated_on, images)


def rates(make_trainer, module, epochs=4):
    seen = []
    trainer = make_trainer(max_epochs=epochs)

    def on_train_batch_start(*_):
        seen.append(trainer.optimizers[0].param_groups[0]["lr"])

    module.on_train_batch_start = on_train_batch_start
    trainer.fit(module, data(2))
    return seen


def test_timm_optimizer_filters_weight_decay_and_timm_scheduler_steps_by_epoch(make_trainer):
    module = DistillModule(
        network(),
        optimizer=functools.partial(
            timm.optim.create_optimizer_v2, opt="sgd", lr=0.8, weight_decay=0.01
        ),
        scheduler=functools.partial(
            timm.scheduler.create_scheduler_v2,
            sched="step",
            num_epochs=4,
            decay_epochs=2,
            decay_rate=0.5,
            warmup_epochs=0,
        ),
    )
    assert rates(make_trainer, module) == pytest.approx([0.8] * 4 + [0.4] * 4)
    decays = {
        len(g["params"]): g["weight_decay"] for g in module.trainer.optimizers[0].param_groups
    }
    # One group has the four biases and norm weights, the other one the two weights of layers.
    assert decays == {4: 0.0, 2: 0.01}


def test_timm_scheduler_changes_the_rate_at_every_step(make_trainer):
    module = DistillModule(
        network(),
        optimizer=sgd,
        scheduler=functools.partial(
            timm.scheduler.StepLRScheduler, decay_t=3, decay_rate=0.5, t_in_epochs=False
        ),
        scheduler_interval="step",
    )
    assert rates(make_trainer, module) == pytest.approx([0.1] * 3 + [0.05] * 3 + [0.025] * 2)


def test_torch_scheduler_changes_the_rate_at_every_step(make_trainer):
    module = DistillModule(
        network(),
        optimizer=sgd,
        scheduler=functools.partial(torch.optim.lr_scheduler.StepLR, step_size=3, gamma=0.5),
        scheduler_interval="step",
    )
    assert rates(make_trainer, module) == pytest.approx([0.1] * 3 + [0.05] * 3 + [0.025] * 2)


def test_a_subclass_may_override_training_step_only(make_trainer):
    class Regression(DistillModule):
        def training_step(self, batch, batch_idx):
            inputs, target = batch
            return F.mse_loss(self.student(inputs)[:, 0], target.float())

    torch.manual_seed(0)
    module = Regression(network(), network(), optimizer=sgd, distill_loss=DISTLoss(tau=2.0))
    student, teacher = copy.deepcopy(module.student).train(), module.teacher
    trainer = make_trainer(max_steps=1)
    trainer.fit(module, data())
    inputs, target = next(iter(data()))
    output = student(inputs)
    expected = F.mse_loss(output[:, 0], target.float())
    expected = expected + 2 * dist_loss(output, teacher(inputs), tau=2.0)
    assert trainer.callback_metrics["train/loss"].item() == pytest.approx(expected.item(), 1e-5)


def test_parameters_of_a_subclass_are_trained(make_trainer):
    class Extra(DistillModule):
        def __init__(self):
            factory = functools.partial(timm.optim.create_optimizer_v2, opt="sgd", lr=0.1)
            super().__init__(network(), optimizer=factory)
            self.scale = nn.Parameter(torch.ones(()))

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.student(batch[0]) * self.scale, batch[1])

    module = Extra()
    make_trainer().fit(module, data())
    assert module.scale.item() != 1.0


def test_a_teacher_object_is_not_wrapped_again():
    teacher = Teacher(network(), dtype="bfloat16")
    assert DistillModule(network(), teacher).teacher is teacher


@pytest.mark.parametrize("library", ["torch", "timm"])
def test_a_scheduler_that_waits_for_a_plateau_gets_its_metric(make_trainer, library):
    factory = functools.partial(timm.scheduler.PlateauLRScheduler, decay_rate=0.5, patience_t=0)
    if library == "torch":
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau
        factory = functools.partial(plateau, factor=0.5, patience=0, mode="max")
    seen = []

    class Worse(DistillModule):
        def on_validation_epoch_end(self):
            self.log("val/score", 1.0 / (1 + self.current_epoch))

        def on_train_epoch_start(self):
            seen.append(self.trainer.optimizers[0].param_groups[0]["lr"])

    module = Worse(network(), optimizer=sgd, scheduler=factory, scheduler_monitor="val/score")
    make_trainer(max_epochs=4).fit(module, data(), data())
    assert seen == pytest.approx([0.1, 0.1, 0.05, 0.025])


def test_a_plateau_scheduler_that_waits_for_a_loss_to_rise_is_refused(make_trainer):
    module = DistillModule(network(), scheduler=timm.scheduler.PlateauLRScheduler)
    with pytest.raises(MisconfigurationException, match=r"val/loss .* mode='min'"):
        make_trainer().fit(module, data(), data())


def test_an_unknown_scheduler_interval_is_refused():
    with pytest.raises(ValueError, match="scheduler_interval is 'batch': use 'epoch' or 'step'"):
        DistillModule(network(), scheduler_interval="batch")


def test_a_scheduler_with_the_argument_updates_per_epoch_gets_the_number(make_trainer):
    numbers = []

    def scheduler(optimizer, updates_per_epoch):
        numbers.append(updates_per_epoch)
        return torch.optim.lr_scheduler.StepLR(optimizer, updates_per_epoch)

    module = DistillModule(network(), optimizer=sgd, scheduler=scheduler)
    make_trainer(accumulate_grad_batches=3, max_epochs=2).fit(module, data(batches=7))
    make_trainer(max_steps=2, max_epochs=-1).fit(module, data(batches=7))
    assert numbers == [3, 7]


def test_timm_schedule_with_times_in_epochs_changes_the_rate_at_every_step(make_trainer):
    factory = functools.partial(
        timm.scheduler.create_scheduler_v2,
        sched="step",
        num_epochs=3,
        decay_epochs=0.5,
        decay_rate=0.5,
        warmup_epochs=1,
        warmup_lr=0.0,
        warmup_prefix=True,
        step_on_epochs=False,
    )
    module = DistillModule(network(), optimizer=sgd, scheduler=factory, scheduler_interval="step")
    assert rates(make_trainer, module, epochs=3) == pytest.approx(
        [0.0, 0.05, 0.1, 0.05, 0.025, 0.0125]
    )


def configured(params, model=None):
    return torch.optim.SGD(params, lr=0.1, momentum=0.5)


FACTORIES = {
    "class": torch.optim.SGD,
    "partial": sgd,
    "function of the parameters": lambda params: torch.optim.SGD(params, 0.1),
    "function of the network": lambda net: torch.optim.SGD(net.parameters(), 0.1),
    "function of both names": configured,
}


@pytest.mark.parametrize("kind", FACTORIES)
@pytest.mark.parametrize("student", [network, lambda: network()[0]], ids=["sequential", "linear"])
def test_an_optimizer_may_be_a_function_of_the_network_or_of_its_parameters(kind, student):
    module = DistillModule(student(), optimizer=FACTORIES[kind])
    optimizer = module.configure_optimizers()
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert held == [id(p) for p in module.student.parameters()]


def test_a_function_of_the_network_keeps_its_own_error():
    def broken(net):
        return torch.optim.SGD(net.parameters(), lr="fast")

    with pytest.raises(MisconfigurationException, match=r"cannot be built: .*'str'"):
        DistillModule(network(), optimizer=broken).configure_optimizers()


def test_lightnings_plateau_scheduler_brings_its_own_monitor(make_trainer):
    plateau = functools.partial(ReduceLROnPlateau, monitor="val/score", mode="max")

    class Scored(DistillModule):
        def on_validation_epoch_end(self):
            self.log("val/score", 1.0)

    module = Scored(network(), optimizer=sgd, scheduler=plateau)
    trainer = make_trainer()
    trainer.fit(module, data(), data())
    assert trainer.lr_scheduler_configs[0].monitor == "val/score"


class Stream(IterableDataset):
    """Training data without a length."""

    def __iter__(self):
        return iter(TensorDataset(torch.randn(32, 6), torch.arange(32) % 4))


def test_a_scheduler_that_counts_updates_of_data_without_length_is_explained(make_trainer):
    def scheduler(optimizer, updates_per_epoch):
        return torch.optim.lr_scheduler.StepLR(optimizer, updates_per_epoch)

    def fit(**settings):
        module = DistillModule(network(), network(), optimizer=sgd, scheduler=scheduler)
        make_trainer(**settings).fit(module, DataLoader(Stream(), batch_size=8))

    with pytest.raises(MisconfigurationException, match=r"have no length .*limit_train_batches"):
        fit()
    fit(limit_train_batches=3)


class Saving(DistillModule):
    """A module that saves its hyper-parameters, with a teacher in several places."""

    def __init__(self, student, teacher=None, width=8, names=("a", "b"), **kwargs):
        super().__init__(student, teacher, **kwargs)
        self.save_hyperparameters()


class SavingChild(Saving):
    def __init__(self, student, teacher=None, depth=3, **kwargs):
        super().__init__(student, teacher, **kwargs)
        self.save_hyperparameters("depth", "teacher")


@pytest.mark.parametrize("kind", [Saving, SavingChild])
@pytest.mark.parametrize("wrap", [lambda net: net, Teacher], ids=["network", "Teacher"])
def test_saved_hyperparameters_contain_no_network(make_trainer, tmp_path, kind, wrap):
    teacher = nn.Sequential(network(), nn.Linear(4, 4000), nn.Linear(4000, 4))
    options = {"distill_loss": KDLoss(2.0), "optimizer": sgd, "task_weight": 0.5}
    module = kind(network(), wrap(teacher), **options)
    trainer = make_trainer(max_steps=1)
    trainer.fit(module, data())
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    assert (tmp_path / "x.ckpt").stat().st_size < 20_000
    saved = torch.load(tmp_path / "x.ckpt", weights_only=True)["hyper_parameters"]
    assert saved["task_weight"] == 0.5
    assert not {"student", "teacher", "distill_loss", "optimizer"} & saved.keys()
    loaded = kind.load_from_checkpoint(tmp_path / "x.ckpt", student=network(), teacher=network())
    torch.testing.assert_close(loaded.state_dict(), module.state_dict())
    assert loaded.task_weight == 0.5


@pytest.mark.parametrize("start", [2, 6])
def test_lightnings_batch_size_finder_changes_the_batches_of_a_data_module(make_trainer, start):
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    digits = DigitsDataModule(global_batch_size=8, train_size=100)
    finder = BatchSizeFinder(steps_per_trial=1, max_trials=2, init_val=start)
    trainer = make_trainer(callbacks=[finder], limit_train_batches=1)
    trainer.fit(ClassificationModule(net, copy.deepcopy(net), num_classes=10), digits)
    assert digits.batch_size == digits.global_batch_size == 2 * start
    assert trainer.train_dataloader.batch_size == 2 * start
