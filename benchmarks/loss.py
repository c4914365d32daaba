"""Measure speed, memory and accuracy of DISTLoss: ``python -m benchmarks.loss [--quick]``.

The logits are float32: 3 * randn for each shape, and 0.01 * randn for one shape. It measures the
forward and the backward to the student's logits. "Ours" is this package's DISTLoss. A bar is the
limit that a result should meet.

- Speed is the time of another loss divided by the time of ours: above 1, ours is faster. The other
  losses are torchdistill's DISTLoss and a KL divergence (log_softmax and kl_div). All run
  interleaved in this process, and the ratio is the median over the rounds. torchdistill takes
  matrices, so dense logits are permuted for it.
- Three dimensions are the logits (B, T, V) of a language model: ours takes them with class_dim=-1,
  the other losses take them as a matrix.
- Memory is the peak in addition to the two inputs, including the gradient, in units of one logits
  tensor. It is computed from PyTorch's allocation events. The bar is for the loss that is not
  compiled, which works block by block; the compiled loss stores about two more tensors.
- Gradient error is the largest difference from the float64 gradient, divided by that gradient's
  largest entry. Ours is compared with the authors' formula, and torchdistill with itself in
  float64, because torchdistill uses eps in another way. With two classes or nearly uniform logits,
  a float32 softmax is less exact: the bar is then twice the error of the authors' formula in
  float32.

The bars are for the CPU. On a GPU (``--device cuda``) the blocks and the memory are larger.

"Compiled" means ``torch.compile(DISTLoss(), fullgraph=True)``, compiled for each shape.
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
    (64, 200000),
    (16, 1000000),
    (262144, 19),
    (30400, 720),
    (8, 19, 64, 128),
    (2, 720, 100, 152),
    (200000, 100),
    (65536, 2),
    (8, 512, 32000),
]
QUICK: list[tuple[int, ...]] = [(256, 100), (2, 19, 16, 32), (2, 16, 100)]
MEMORY_BAR_SHAPES = {(200000, 100), (2, 720, 100, 152)}  # large enough to compare with the bar
SECONDS = 3.0  # the duration of the timing per shape
LARGE = 50_000_000  # logits of more elements are timed in one round, which takes longer than that
OURS, COMPILED, PLAIN = "ours", "ours compiled", "plain"
TORCHDISTILL, TORCHDISTILL_COMPILED, KL = "torchdistill", "torchdistill compiled", "KL"
NEARLY_UNIFORM: list[tuple[int, ...]] = [(1024, 1000)]
SCALE, UNIFORM_SCALE = 3.0, 0.01


class Row(NamedTuple):
    """The measurements of one shape, as dicts from losses to times, memory and gradient errors."""

    shape: tuple[int, ...]
    scale: float
    times: dict[str, list[float]]
    memory: dict[str, float]
    error: dict[str, float]

    @property
    def loses_digits(self) -> bool:
        """Return whether a float32 softmax is less exact at this shape and scale."""
        return self.shape[1] == 2 or self.scale != SCALE

    def speed(self, slower: str, faster: str) -> float:
        """Return the median ratio of two losses' times, or nan if `slower` was not measured."""
        if slower not in self.times:
            return float("nan")
        return statistics.median(ratios(self.times, slower, faster))


def kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute the KL divergence of student and teacher from their logits (N, C, ...)."""
    log_student, target = F.log_softmax(student, dim=1), F.softmax(teacher, dim=1)
    return F.kl_div(log_student, target, reduction="sum") * (student.shape[1] / student.numel())


def of_rows(loss: Loss) -> Loss:
    """Return a loss that takes the logits (B, T, V) of a language model as a matrix."""

    def of_matrices(student: Tensor, teacher: Tensor) -> Tensor:
        if student.dim() == 3:
            student, teacher = student.flatten(0, 1), teacher.flatten(0, 1)
        return loss(student, teacher)

    return of_matrices


def gradient(loss: Loss, student: Tensor, teacher: Tensor) -> Tensor:
    """Run a loss forward and backward, and return the gradient of the student's logits."""
    return torch.autograd.grad(loss(student, teacher), student)[0]


def measure(
    shape: tuple[int, ...], scale: float, torchdistill: Loss, seconds: float, device: str
) -> Row:
    """Measure all losses on one shape.

    Args:
        shape: shape (N, C, ...) of the logits.
        scale: factor of the random logits.
        torchdistill: torchdistill's loss.
        seconds: duration of the timing.
        device: "cpu" or "cuda".
    """
    torch._dynamo.reset()  # Else torch.compile would use dynamic shapes from the second shape on.
    generator = torch.Generator().manual_seed(0)
    student, teacher = (
        scale * torch.randn(shape, generator=generator).to(device) for _ in range(2)
    )
    student.requires_grad_()
    class_dim = -1 if len(shape) == 3 else 1
    losses: dict[str, Loss] = {
        OURS: DISTLoss(class_dim=class_dim),
        COMPILED: torch.compile(DISTLoss(class_dim=class_dim), fullgraph=True),
        TORCHDISTILL: of_rows(torchdistill),
        TORCHDISTILL_COMPILED: torch.compile(of_rows(torchdistill)),
        KL: of_rows(kl),
    }
    try:
        gradient(losses[TORCHDISTILL_COMPILED], student, teacher)
    except Exception as error:  # the benchmark continues without this loss
        print(f"torchdistill does not compile for {shape}: {error}")
        del losses[TORCHDISTILL_COMPILED]
    calls = {
        name: lambda loss=loss: gradient(loss, student, teacher) for name, loss in losses.items()
    }
    memory = {name: peak_bytes(call) / (4 * student.numel()) for name, call in calls.items()}
    error = errors(losses | {PLAIN: of_rows(plain_dist)}, student, teacher)
    least = 1 if student.numel() > LARGE else 3
    return Row(shape, scale, interleave(calls, seconds, least=least), memory, error)


def errors(losses: Mapping[str, Loss], student: Tensor, teacher: Tensor) -> dict[str, float]:
    """Return the gradient error of each DIST loss on logits (N, C, ...)."""

    def off(names: list[str], reference: Loss) -> dict[str, float]:
        wide = gradient(reference, student.detach().double().requires_grad_(), teacher.double())
        largest = wide.abs().max()
        return {
            name: ((gradient(losses[name], student, teacher) - wide).abs().max() / largest).item()
            for name in names
        }

    return off([OURS, COMPILED, PLAIN], losses[PLAIN]) | off([TORCHDISTILL], losses[TORCHDISTILL])


def table_of(results: list[Row]) -> Table:
    """Return the table of results, with a row per shape."""
    table = Table(
        title="DIST loss, forward + backward, float32",
        caption="td: torchdistill · c: compiled · memory in tensors of logits",
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
            row.speed(TORCHDISTILL, OURS),
            row.speed(TORCHDISTILL, COMPILED),
            row.speed(TORCHDISTILL_COMPILED, COMPILED),
            row.speed(KL, OURS),
        ]
        table.add_row(
            " x ".join(map(str, row.shape)) + ("" if row.scale == SCALE else f" * {row.scale}"),
            *(f"{speed:.2f}" for speed in speeds),
            *(f"{row.memory[name]:.2f}" for name in (OURS, COMPILED, TORCHDISTILL, KL)),
            *(f"{row.error[name]:.0e}" for name in (OURS, COMPILED, TORCHDISTILL)),
        )
    return table


def verdict(results: list[Row], device: str) -> list[str]:
    """Return lines with means and extremes, and on the CPU also with their bars."""

    def judged(value: float, limit: str, met: bool) -> str:
        return bar(value, limit, met) if device == "cpu" else f"{value:.3g}"

    lines = []
    for name, least in ((OURS, 1.8), (COMPILED, 3.0)):
        speeds = [row.speed(TORCHDISTILL, name) for row in results]
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
            line.append(f"divided by the authors' with two classes or uniform logits {over}")
        lean = [row.memory[name] for row in results if row.shape in MEMORY_BAR_SHAPES]
        if lean and name == OURS:
            line.append(f"memory {judged(max(lean), '<= 1.3', max(lean) <= 1.3)}")
        lines.append(", ".join(line))
    return lines


def main() -> None:
    """Measure all shapes and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="measure only two small shapes")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--seconds", type=float, help="duration per shape")
    options = parser.parse_args()
    seconds = options.seconds or (1.0 if options.quick else SECONDS)
    # cpp_extension logs a warning if CUDA is missing.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    torchdistill = torchdistill_loss()
    known = torch.randn(1000, 1000, device=options.device)
    meter = peak_bytes(known.exp) / (4 * known.numel())
    shapes = QUICK if options.quick else SHAPES
    cases = [(shape, SCALE) for shape in shapes]
    if not options.quick:
        cases += [(shape, UNIFORM_SCALE) for shape in NEARLY_UNIFORM]
    results = [
        measure(*case, torchdistill, seconds, options.device)
        for case in track(cases, "measuring", transient=True)
    ]
    where = f"{torch.get_num_threads()} threads"
    if options.device != "cpu":
        where = torch.cuda.get_device_name(options.device)
    show(
        table_of(results),
        f"{where}, torch {torch.__version__}; the measured memory of y = x.exp(), which is 1 "
        f"tensor, is {meter:.2f}",
        *verdict(results, options.device),
    )


if __name__ == "__main__":
    main()
