"""Tests that need a GPU: half precision, NCCL, DeepSpeed, and compiled losses.

They are skipped without a GPU; with a GPU, ``pytest tests/test_gpu.py`` takes a few minutes.
"""

import functools
import importlib.util
import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from interruption import Send
from lightning_dist import DistillModule, DISTLoss
from lightning_dist.data.digits import DigitsDataModule
from lightning_dist.files.weights import load_weights
from lightning_dist.functional import dist_loss
from lightning_dist.models.small import SmallCNN
from lightning_dist.resume import ExactResume, Interrupted
from processes import Processes

TRAINED = "pkg://lightning_dist/assets/digits_teacher.safetensors"
# Logits of the last shape are so large that the loss is computed in blocks.
SHAPES = [(256, 100), (4, 19, 64, 128), (2, 100, 20, 30), (180_000, 100)]
pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.slow,
]


class Seen(Callback):
    """A callback that stores the distillation loss of each step."""

    def __init__(self) -> None:
        self.distill: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.distill.append(float(trainer.callback_metrics["train/distill"]))


def logits(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    student, teacher = (3 * torch.randn(shape) for _ in range(2))
    return student.to(dtype), teacher.to(dtype)


def trained_teacher() -> SmallCNN:
    network = SmallCNN([32, 64, 128])
    load_weights(network, TRAINED)
    return network


def gradient(
    loss: Callable[..., Tensor], student: Tensor, teacher: Tensor
) -> tuple[Tensor, Tensor]:
    student = student.clone().requires_grad_()
    value = loss(student, teacher)
    return value.detach(), torch.autograd.grad(value, student)[0]


@pytest.fixture
def run(processes: Processes, tmp_path: Path) -> Callable[..., dict[str, float]]:
    """Return a function that runs lightning-dist in a new process and returns its metrics.

    NCCL needs a new process for each run.
    """

    def metrics(*arguments: str) -> dict[str, float]:
        command = ["-m", "lightning_dist", *arguments, "hydra.run.dir=run"]
        done = processes.run(*command, cwd=tmp_path, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads((tmp_path / "run" / "result.json").read_text())["metrics"]

    return metrics


@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "identity"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_loss_equals_that_of_the_cpu(shape, activation):
    student, teacher = logits(shape)
    mask = torch.rand(len(student), *shape[2:]) > 0.3
    for options in ({}, {"mask": mask}):
        on_gpu = {name: value.cuda() for name, value in options.items()}
        expected = gradient(
            lambda s, t, o=options: dist_loss(s, t, activation=activation, **o),
            student.double(),
            teacher.double(),
        )
        found = gradient(
            lambda s, t, o=on_gpu: dist_loss(s, t, activation=activation, **o),
            student.cuda(),
            teacher.cuda(),
        )
        assert found[0].item() == pytest.approx(expected[0].item(), rel=1e-5)
        largest = expected[1].abs().max()
        assert (found[1].cpu() - expected[1]).abs().max() < 2e-6 * largest


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_error_with_half_precision_logits_is_below_their_epsilon(dtype):
    student, teacher = logits((256, 100), dtype)
    expected = gradient(dist_loss, student.double(), teacher.double())
    found = gradient(dist_loss, student.cuda(), teacher.cuda())
    assert found[0].item() == pytest.approx(expected[0].item(), rel=1e-5)
    error = (found[1].cpu() - expected[1]).abs().max() / expected[1].abs().max()
    assert error < torch.finfo(dtype).eps


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_compiled_loss_has_the_same_gradient(shape):
    student, teacher = (x.cuda() for x in logits(shape))
    expected = gradient(dist_loss, student.double(), teacher.double())
    found = gradient(torch.compile(DISTLoss(), fullgraph=True), student, teacher)
    assert found[0].item() == pytest.approx(expected[0].item(), rel=1e-5)
    assert (found[1] - expected[1]).abs().max() < 2e-6 * expected[1].abs().max()


def test_the_loss_allocates_its_gradient_and_little_more():
    student, teacher = (x.cuda() for x in logits((4_000_000, 100)))
    student.requires_grad_()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    dist_loss(student, teacher).backward()
    held = (torch.cuda.max_memory_allocated() - before) / (4 * student.numel())
    assert held < 1.5


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed", "16-true", "bf16-true"])
def test_the_distillation_loss_is_nearly_the_same_in_every_precision(make_trainer, precision):
    seen = {}
    for each in ("32-true", precision):
        seen[each] = Seen()
        torch.manual_seed(0)
        student = SmallCNN([4, 8])
        module = DistillModule(
            student, trained_teacher(), optimizer=functools.partial(torch.optim.SGD, lr=0.0)
        )
        trainer = make_trainer(
            accelerator="gpu", devices=1, precision=each, callbacks=[seen[each]], max_steps=5
        )
        trainer.fit(module, DigitsDataModule(global_batch_size=64))
        assert all(not p.requires_grad for p in module.teacher.network.parameters())
    assert seen[precision].distill == pytest.approx(seen["32-true"].distill, rel=0.05)


def test_the_error_for_overflowing_half_precision_logits_names_the_student(make_trainer):
    class Huge(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(64, 10)

        def forward(self, images: Tensor) -> Tensor:
            return self.head(images.flatten(1)) * 1e6

    module = DistillModule(Huge(), trained_teacher())
    trainer = make_trainer(accelerator="gpu", devices=1, precision="16-mixed")
    with pytest.raises(FloatingPointError, match=r"'distill'.*step 0.*student"):
        trainer.fit(module, DigitsDataModule(global_batch_size=64))


def test_an_interrupted_run_resumes_to_the_last_bit(make_trainer, tmp_path):
    def fit(name: str, *callbacks: Callback, resume: bool = False) -> nn.Module:
        torch.manual_seed(0)
        student = nn.Sequential(SmallCNN([4, 8], num_classes=32), nn.Dropout(), nn.Linear(32, 10))
        module = DistillModule(student, trained_teacher())
        trainer = make_trainer(
            accelerator="gpu",
            devices=1,
            precision="16-mixed",
            deterministic=True,
            max_epochs=2,
            enable_checkpointing=True,
            default_root_dir=tmp_path / name,
            callbacks=[
                ModelCheckpoint(tmp_path / name, save_last=True),
                ExactResume(seed=3),
                *callbacks,
            ],
        )
        checkpoint = tmp_path / name / "last.ckpt" if resume else None
        data = DigitsDataModule(global_batch_size=64, augment=True)
        trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
        return module.student

    whole = fit("whole")
    with pytest.raises(Interrupted):
        fit("stopped", Send(signal.SIGTERM, 12))
    resumed = fit("stopped", resume=True)
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


@pytest.mark.parametrize(
    "options",
    [
        ["trainer=gpu", "trainer.precision=16-mixed"],
        ["trainer=gpu", "trainer.precision=bf16-mixed", "module.channels_last=true"],
        ["trainer=gpu", "distill.cache=cache", "distill.cache_views=2"],
        ["trainer=gpu", "callbacks=[default,ema]", "callbacks.ema.decay=0.9", "distill=kd"],
        ["trainer=ddp"],
        ["trainer=ddp", "trainer.precision=16-mixed", "trainer.sync_batchnorm=true"],
        ["trainer=ddp_fp16", "trainer.devices=auto"],
        ["trainer=fsdp2", "trainer.devices=ALL"],
        ["trainer=fsdp2", "trainer.devices=ALL", "module.shard_teacher=true"],
    ],
    ids=" ".join,
)
def test_a_run_learns_and_its_checkpoint_evaluates_to_the_same(run, options):
    options = [x.replace("ALL", str(torch.cuda.device_count())) for x in options]
    options = ["experiment=digits", *options, "trainer.max_epochs=5", "print_config=false"]
    metrics = run("train", *options)
    assert metrics["test/accuracy"] > 0.5
    again = run("eval", "ckpt=run/checkpoints/best.ckpt", "trainer=gpu")
    assert again["test/accuracy"] == pytest.approx(metrics["test/accuracy"], abs=0.01)


@pytest.mark.skipif(not importlib.util.find_spec("deepspeed"), reason="needs deepspeed")
@pytest.mark.parametrize("stage", [1, 2])
def test_deepspeed_learns(run, stage):
    metrics = run(
        *("train", "trainer=deepspeed", f"trainer.strategy.stage={stage}"),
        *("experiment=digits", "trainer.max_epochs=5", "print_config=false"),
    )
    assert metrics["test/accuracy"] > 0.5


@pytest.mark.parametrize(
    ("experiment", "metric"),
    [
        ("segmentation", "test/miou"),
        ("detection_retinanet", "test/map"),
        ("detection_fasterrcnn", "test/map"),
    ],
)
def test_segmentation_and_detection_learn(run, experiment, metric):
    metrics = run(
        *("train", f"experiment=scenes/{experiment}", "trainer=gpu"),
        *("trainer.max_epochs=2", "trainer.precision=bf16-mixed", "print_config=false"),
    )
    assert metrics[metric] > 0
