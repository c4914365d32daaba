"""Speed, memory and accuracy of DISTLoss: ``python -m benchmarks.loss [--quick]``.

For each shape of logits, float32, forward + backward to the student's logits. These are 3 * randn,
and once 0.01 * randn, which makes probabilities nearly uniform.

- time of a peer over ours, above 1 where ours is faster. The peers are torchdistill's DISTLoss and
  a plain KL divergence (log_softmax and kl_div). All run interleaved in this process; the ratio is
  the median over rounds. torchdistill takes matrices, so dense logits are permuted for it.
- peak extra memory in units of one logits tensor, above the two inputs and with the gradient (1.0),
  from PyTorch's allocation events. Its bar is that of the streaming operator, which holds a block
  at a time; when compiled, inductor materialises about two tensors of its own choice.
- gradient error: largest difference from the float64 gradient over the largest entry of that. Ours
  is compared with the authors' plain formulation, torchdistill with itself in float64, since it
  treats eps otherwise. Where rows of two classes nearly tie, or logits are nearly uniform, the
  softmax itself loses digits: there the bar is twice the error of the plain formulation in float32.

The bars are for the CPU. On a GPU (``--device cuda``) a block is larger, and counts in the memory.

"Compiled" is ``torch.compile(DISTLoss(), fullgraph=True)``, each shape for itself.
"""

import argparse
import logging
import statistics
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from rich.progress import track
from rich.table import Table
from torch import Tensor

from benchmarks.common import (
    bar,
    interleave,
    peak_bytes,
    plain_dist,
    ratios,
    show,
    torchdistill_loss,
)
from lightning_dist import DISTLoss

Loss = Callable[[Tensor, Tensor], Tensor]

SHAPES: list[tuple[int, ...]] = [
    (64, 10),
    (256, 100),
    (256, 1000),
    (1024, 1000),
    (256, 21841),
    (262144, 19),
    (30400, 720),
    (8, 19, 64, 128),
    (2, 720, 100, 152),
    (200000, 100),
    (65536, 2),
]
QUICK: list[tuple[int, ...]] = [(256, 100), (2, 19, 16, 32)]
NEARLY_UNIFORM: list[tuple[int, ...]] = [(1024, 1000)]
SCALE, UNIFORM_SCALE = 3.0, 0.01
LEAN = {(200000, 100), (2, 720, 100, 152)}  # the shapes whose memory has a bar
SECONDS = 6.0
OURS, COMPILED, PLAIN = "ours", "ours compiled", "plain"
THEIRS, THEIRS_COMPILED, KL = "torchdistill", "torchdistill compiled", "KL"


class Row(NamedTuple):
    """What was measured for one shape."""

    shape: tuple[int, ...]
    scale: float
    times: dict[str, list[float]]
    memory: dict[str, float]
    error: dict[str, float]

    @property
    def loses_digits(self) -> bool:
        """Whether the softmax loses digits, see above."""
        return self.shape[1] == 2 or self.scale != SCALE

    def speed(self, slower: str, faster: str) -> float:
        if slower not in self.times:
            return float("nan")
        return statistics.median(ratios(self.times, slower, faster))


def kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Plain distillation at temperature 1."""
    log_student, target = F.log_softmax(student, dim=1), F.softmax(teacher, dim=1)
    return F.kl_div(log_student, target, reduction="sum") * (student.shape[1] / student.numel())


def gradient(loss: Loss, student: Tensor, teacher: Tensor) -> Tensor:
    """Forward and backward."""
    return torch.autograd.grad(loss(student, teacher), student)[0]


def measure(shape: tuple[int, ...], scale: float, theirs: Loss, seconds: float, device: str) -> Row:
    """All numbers of one shape and scale of logits."""
    torch._dynamo.reset()  # a graph for this shape, not one for any shape
    generator = torch.Generator().manual_seed(0)
    student, teacher = (
        scale * torch.randn(shape, generator=generator).to(device) for _ in range(2)
    )
    student.requires_grad_()
    losses: dict[str, Loss] = {
        OURS: DISTLoss(),
        COMPILED: torch.compile(DISTLoss(), fullgraph=True),
        THEIRS: theirs,
        THEIRS_COMPILED: torch.compile(theirs),
        KL: kl,
    }
    try:
        gradient(losses[THEIRS_COMPILED], student, teacher)
    except Exception as error:  # a peer that does not compile is a finding, no failure
        print(f"torchdistill does not compile for {shape}: {error}")
        del losses[THEIRS_COMPILED]
    calls = {
        name: lambda loss=loss: gradient(loss, student, teacher) for name, loss in losses.items()
    }
    memory = {name: peak_bytes(call) / (4 * student.numel()) for name, call in calls.items()}
    error = errors(losses | {PLAIN: plain_dist}, student, teacher)
    return Row(shape, scale, interleave(calls, seconds), memory, error)


def errors(losses: Mapping[str, Loss], student: Tensor, teacher: Tensor) -> dict[str, float]:
    """Gradient error of each DIST loss."""

    def off(names: list[str], reference: Loss) -> dict[str, float]:
        wide = gradient(reference, student.detach().double().requires_grad_(), teacher.double())
        largest = wide.abs().max()
        return {
            name: ((gradient(losses[name], student, teacher) - wide).abs().max() / largest).item()
            for name in names
        }

    return off([OURS, COMPILED, PLAIN], plain_dist) | off([THEIRS], losses[THEIRS])


def table_of(results: list[Row]) -> Table:
    """One line a shape."""
    table = Table(
        title="DIST loss, forward + backward, float32",
        caption="td: torchdistill · c: compiled · memory in logits tensors",
    )
    table.add_column("logits", no_wrap=True)
    for title in (
        *("td /\nours", "td /\nours c", "td c /\nours c", "KL /\nours"),
        *("memory\nours", "memory\nours c", "memory\ntd", "memory\nKL"),
        *("error\nours", "error\nours c", "error\ntd"),
    ):
        table.add_column(title, justify="right", no_wrap=True)
    for row in results:
        speeds = [
            row.speed(THEIRS, OURS),
            row.speed(THEIRS, COMPILED),
            row.speed(THEIRS_COMPILED, COMPILED),
            row.speed(KL, OURS),
        ]
        table.add_row(
            " x ".join(map(str, row.shape)) + ("" if row.scale == SCALE else f" * {row.scale}"),
            *(f"{speed:.2f}" for speed in speeds),
            *(f"{row.memory[name]:.2f}" for name in (OURS, COMPILED, THEIRS, KL)),
            *(f"{row.error[name]:.0e}" for name in (OURS, COMPILED, THEIRS)),
        )
    return table


def verdict(results: list[Row], device: str) -> list[str]:
    """Means and extremes, beside their bars where they have one."""

    def judged(value: float, limit: str, met: bool) -> str:
        return bar(value, limit, met) if device == "cpu" else f"{value:.3g}"

    lines = []
    for name, least in ((OURS, 1.8), (COMPILED, 3.0)):
        speeds = [row.speed(THEIRS, name) for row in results]
        mean = statistics.geometric_mean(speeds)
        error = max(row.error[name] for row in results if not row.loses_digits)
        line = [
            f"{name}: speed over torchdistill, mean {judged(mean, f'>= {least}', mean >= least)}",
            f"least {judged(min(speeds), '>= 1.0', min(speeds) >= 1)}",
            f"gradient error {judged(error, '<= 1e-6', error <= 1e-6)}",
        ]
        lossy = [row.error[name] / row.error[PLAIN] for row in results if row.loses_digits]
        if lossy:
            over = judged(max(lossy), "<= 2", max(lossy) <= 2)
            line.append(f"over the plain formula's with two classes or uniform logits {over}")
        lean = [row.memory[name] for row in results if row.shape in LEAN]
        if lean and name == OURS:
            line.append(f"memory {judged(max(lean), '<= 1.3', max(lean) <= 1.3)}")
        lines.append(", ".join(line))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few small shapes, as a smoke test")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of timing a shape")
    options = parser.parse_args()
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # no CUDA: no matter
    theirs = torchdistill_loss()
    known = torch.randn(1000, 1000, device=options.device)
    meter = peak_bytes(known.exp) / (4 * known.numel())
    shapes = QUICK if options.quick else SHAPES
    cases = [(shape, SCALE) for shape in shapes]
    if not options.quick:
        cases += [(shape, UNIFORM_SCALE) for shape in NEARLY_UNIFORM]
    results = [
        measure(*case, theirs, 1.0 if options.quick else options.seconds, options.device)
        for case in track(cases, "measuring", transient=True)
    ]
    where = f"{torch.get_num_threads()} threads"
    if options.device != "cpu":
        where = torch.cuda.get_device_name(options.device)
    show(
        table_of(results),
        f"{where}, torch {torch.__version__}; the memory meter reads "
        f"{meter:.2f} tensors for y = x.exp()",
        *verdict(results, options.device),
    )


if __name__ == "__main__":
    main()
