"""Tests of the callback with compiled students and modules; its own code is not compiled."""

from contextlib import ExitStack

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils.data import DataLoader

from lightning_dist import DistillationCallback, Term

STEPS = 5


class Network(nn.Module):
    """A network that draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 12), nn.Linear(12, 4)

    def forward(self, x):
        return self.second(F.dropout(self.first(x).relu()))


class Module(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net = Network()

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.logits(batch[0]), batch[1])

    def logits(self, x):
        return self.net(x)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class RefusesToRecompile(L.Callback):
    """A callback that lets torch.compile raise an error if it recompiles after the first steps."""

    def __init__(self, stack: ExitStack) -> None:
        self.stack = stack

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 2:
            self.stack.enter_context(torch._dynamo.config.patch(error_on_recompile=True))


def compiled(how: str, **options) -> tuple[Module, nn.Module]:
    """Return a module with a compiled part, and the object to pass to ``fit``."""
    torch._dynamo.reset()
    module = Module()
    if how == "the student in place":
        module.net.compile(**options)
    elif how == "the student in a wrapper":
        module.net = torch.compile(module.net, **options)
    elif how == "its forward":
        module.net.forward = torch.compile(module.net.forward, **options)
    elif how == "the module in place":
        module.compile(**options)
        module.logits = module.__call__
    elif how == "a function":
        module.logits = torch.compile(module.logits, **options)
    return module, torch.compile(module, **options) if how == "the step" else module


def fit(make_trainer, fitted: nn.Module, *callbacks: L.Callback) -> None:
    generator = torch.Generator().manual_seed(1)
    batches = [
        (torch.randn(8, 6, generator=generator), torch.randint(0, 4, (8,), generator=generator))
        for _ in range(STEPS)
    ]
    torch.manual_seed(5)
    trainer = make_trainer(callbacks=[*callbacks])
    trainer.fit(fitted, DataLoader(batches, batch_size=None))


def called_at_weight_0(trainer) -> torch.Tensor:
    return torch.zeros(())


STUDENTS = [
    "the student in place",
    "the student in a wrapper",
    "its forward",
    "the module in place",
]
AROUND = ["the step", "a function"]


@pytest.mark.parametrize("how", STUDENTS)
def test_a_compiled_student_keeps_its_only_graph(make_trainer, how):
    graphs = CompileCounter()
    _, fitted = compiled(how, backend=graphs, fullgraph=True)
    student = "" if how == "the module in place" else "net"
    teacher = nn.Sequential(Network(), nn.Dropout())  # The teacher has other code than the student.
    fit(make_trainer, fitted, DistillationCallback(teacher, student))
    assert graphs.frame_count == 1


@pytest.mark.parametrize("how", [STUDENTS[0], *AROUND])
def test_nothing_is_compiled_again_in_later_steps(make_trainer, how):
    module, fitted = compiled(how, backend="eager")
    parts = ["first"] if how in STUDENTS else ["first", ""]
    terms = {f"a{x}": Term(F.mse_loss, student=x, teacher=x) for x in parts}
    callback = DistillationCallback(Network(), terms=terms)
    with ExitStack() as stack:
        fit(make_trainer, fitted, callback, RefusesToRecompile(stack))
    assert module.trainer.callback_metrics["train/distill"] > 0


def test_the_teacher_of_a_compiled_student_gets_what_hooks_make_of_its_inputs(make_trainer):
    asked = []
    for how in ("nothing", STUDENTS[0]):
        module, fitted = compiled(how, backend="eager")
        module.net.register_forward_pre_hook(lambda _, args: (2 * args[0],))
        teacher = nn.Linear(6, 4)
        teacher.register_forward_hook(lambda _, args, output: asked.append(args[0].clone()))
        fit(make_trainer, fitted, DistillationCallback(teacher))
    assert len(asked) == 2 * STEPS
    torch.testing.assert_close(asked[STEPS:], asked[:STEPS])


@pytest.mark.parametrize("how", [STUDENTS[0], *AROUND])
def test_weight_0_changes_no_bit_of_what_is_compiled(make_trainer, how):
    """Student and teacher draw numbers."""
    alone, fitted = compiled(how, backend="eager")
    fit(make_trainer, fitted)
    module, fitted = compiled(how, backend="eager")
    fit(make_trainer, fitted, DistillationCallback(Network(), weight=called_at_weight_0))
    torch.testing.assert_close(module.state_dict(), alone.state_dict(), rtol=0, atol=0)
