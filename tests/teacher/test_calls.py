"""Tests of teachers that are not ordinary networks, and of calls that a teacher does not accept."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_dist import DistillationCallback, Teacher, Term
from lightning_dist.losses import DISTLoss

IMAGES = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(64, 3))


class Student(LightningModule):
    """A module whose step calls the student with a keyword, as for Hugging Face's models."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Keyword(network())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.net(pixel_values=images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Keyword(nn.Module):
    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.layers(pixel_values)


def exported(source: nn.Module) -> nn.Module:
    batch = torch.export.Dim("batch")
    return torch.export.export(source, (IMAGES,), dynamic_shapes=({0: batch},)).module()


KINDS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "scripted": torch.jit.script,
    "traced": lambda source: torch.jit.trace(source, IMAGES),
    "frozen trace": lambda source: torch.jit.freeze(torch.jit.trace(source, IMAGES)),
    "optimized": lambda source: torch.jit.optimize_for_inference(torch.jit.script(source)),
    "exported": exported,
    "traced by fx": torch.fx.symbolic_trace,
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_a_network_of_any_kind_teaches_frozen(make_trainer, kind):
    plain = network().eval()
    teacher = Teacher(KINDS[kind](plain), inputs=lambda call: ((call[1]["pixel_values"],), {}))
    loader = DataLoader(TensorDataset(IMAGES, torch.arange(8) % 3), batch_size=4)
    trainer = make_trainer(callbacks=[DistillationCallback(teacher)])
    trainer.fit(Student(), loader)
    assert trainer.callback_metrics["train/distill"] > 0
    answers = [teacher(pixel_values=IMAGES) for _ in range(2)]
    assert not answers[0].requires_grad
    torch.testing.assert_close(answers[0], plain(IMAGES))
    assert torch.equal(*answers)


def test_a_graph_that_was_exported_in_training_mode_is_refused():
    with pytest.raises(MisconfigurationException, match=r"training mode .*call eval\(\)"):
        Teacher(exported(network().train()))


def test_a_part_of_torchscript_is_refused_with_advice(make_trainer):
    teacher = Teacher(torch.jit.script(network().eval()))
    terms = {"part": Term(DISTLoss(), teacher="5")}
    loader = DataLoader(TensorDataset(IMAGES, torch.arange(8) % 3), batch_size=4)
    with pytest.raises(MisconfigurationException, match=r"no sub-module that can be observed"):
        make_trainer(callbacks=[DistillationCallback(teacher, terms=terms)]).fit(Student(), loader)


@pytest.mark.parametrize("kind", ["plain", "scripted", "exported"])
def test_a_call_that_the_teacher_does_not_take_is_explained(make_trainer, kind):
    source = network().eval()
    teacher = source if kind == "plain" else KINDS[kind](source)
    loader = DataLoader(TensorDataset(IMAGES, torch.arange(8) % 3), batch_size=4)
    message = (
        r"DistillationCallback calls Teacher\(.*with \(pixel_values=Tensor \(4, 3, 6, 6\)\), but "
        r"its .* takes .*Teacher\(network, inputs=FUNCTION\)"
    )
    with pytest.raises(MisconfigurationException, match=message):
        make_trainer(callbacks=[DistillationCallback(teacher)]).fit(Student(), loader)
    callback = DistillationCallback(teacher, inputs=lambda batch: batch[0])
    make_trainer(callbacks=[callback]).fit(Student(), loader)


def test_a_layer_that_depends_on_the_mode_is_not_shared(make_trainer):
    def fit(shared: nn.Module) -> None:
        teacher, module = network(), Student()
        teacher.add_module("shared", shared)
        module.net.layers.add_module("shared", shared)
        loader = DataLoader(TensorDataset(IMAGES, torch.arange(8) % 3), batch_size=4)
        inputs = {"layers": ""}
        make_trainer(callbacks=[DistillationCallback(teacher, inputs=inputs)]).fit(module, loader)

    fit(nn.Sequential(nn.GELU(), nn.Identity()))
    for layer in (nn.Dropout(), nn.Sequential(nn.RReLU()), Keyword(nn.Identity())):
        with pytest.raises(
            MisconfigurationException, match=r"shares its 'shared.*with 'net\.layers"
        ):
            fit(layer)
        assert all(part.training for part in layer.modules())


@pytest.mark.parametrize("make", [iter, lambda items: map(torch.sin, items)])
def test_an_iterator_that_only_one_network_can_read_is_refused(make_trainer, make):
    class Sums(nn.Linear):
        def forward(self, inputs):
            return super().forward(sum(inputs[0]).flatten(1))

    class Module(Student):
        def __init__(self):
            super().__init__()
            self.net = Sums(108, 3)

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net([make([batch[0], batch[0]])]), batch[1])

    loader = DataLoader(TensorDataset(IMAGES, torch.arange(8) % 3), batch_size=4)
    callback = DistillationCallback(Sums(108, 3))
    with pytest.raises(
        MisconfigurationException, match=r"only one of student and .* can read: call"
    ):
        make_trainer(callbacks=[callback]).fit(Module(), loader)


def test_a_student_within_vmap_is_refused_with_a_way_out(make_trainer):
    class Module(Student):
        def __init__(self):
            super().__init__()
            self.net, self.all = nn.Linear(108, 3), nn.Identity()

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.all(torch.vmap(self.net)(batch[0].flatten(1))), batch[1])

    teacher = nn.Linear(108, 3)
    loader = DataLoader(TensorDataset(IMAGES, torch.arange(8) % 3), batch_size=4)
    with pytest.raises(MisconfigurationException, match=r"in torch\.vmap.*call an nn\.Identity"):
        make_trainer(callbacks=[DistillationCallback(teacher)]).fit(Module(), loader)
    terms = {"a": Term(F.mse_loss, student="all")}
    options = {"student": "", "inputs": lambda batch: batch[0].flatten(1), "terms": terms}
    trainer = make_trainer(callbacks=[DistillationCallback(teacher, **options)])
    trainer.fit(Module(), loader)
    assert trainer.callback_metrics["train/distill"] > 0


def test_an_iterator_that_ends_in_the_teacher_is_an_error_and_not_the_end_of_the_epoch(
    make_trainer,
):
    class Ends(nn.Module):
        def forward(self, pixel_values):
            return next(iter(()))

    loader = DataLoader(TensorDataset(IMAGES, torch.arange(8) % 3), batch_size=4)
    with pytest.raises(RuntimeError, match="the teacher raised StopIteration"):
        make_trainer(callbacks=[DistillationCallback(Ends())]).fit(Student(), loader)


def test_an_error_within_the_teacher_stays_what_it_is():
    teacher = Teacher(network())
    with pytest.raises(RuntimeError, match="expected input"):
        teacher(torch.zeros(2, 5, 6, 6))
