"""Measure the memory of DIST on RetinaNet's class maps: ``python -m benchmarks.detection``.

Two images of 800 x 1333 pixels, padded to 1344, have five maps of 9 anchors x 80 classes = 720
channels. The losses of the five maps, with sigmoid, are summed and differentiated. This is done
once with DISTLoss and once with torchdistill's formula, which is repeated here because its module
has only softmax. The table contains the peak memory that each loss allocates in addition to its
inputs, including the gradient, in units of the maps' bytes. The peak is computed from the events of
PyTorch's CPU allocator.
"""

import torch
from rich.table import Table
from torch import Tensor

from benchmarks.common import bar, peak_bytes, rows, show
from lightning_dist import DISTLoss

IMAGES, CHANNELS, HEIGHT, WIDTH = 2, 9 * 80, 800, 1344


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Return the mean Pearson correlation of the rows of two matrices, as in torchdistill."""
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    return torch.nn.functional.cosine_similarity(a, b, eps=1e-8).mean()


def torchdistill_formula(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute torchdistill's DIST loss of logits (N, C, H, W), with sigmoid instead of softmax."""
    y_s, y_t = rows(student).sigmoid(), rows(teacher).sigmoid()
    return 2 - correlation(y_s, y_t) - correlation(y_s.t(), y_t.t())


def main() -> None:
    """Measure both losses and print the table."""
    torch.manual_seed(0)
    sides = [(-(-HEIGHT // 2**level), -(-WIDTH // 2**level)) for level in range(3, 8)]
    shapes = [(IMAGES, CHANNELS, *side) for side in sides]
    student = [torch.randn(shape, requires_grad=True) for shape in shapes]
    teacher = [torch.randn(shape) for shape in shapes]
    total = 4 * sum(x.numel() for x in student)

    def run(loss) -> None:
        for x in student:
            x.grad = None
        value = torch.stack([loss(a, b) for a, b in zip(student, teacher, strict=True)]).sum()
        value.backward()

    table = Table(title=f"DIST on RetinaNet's maps, {total / 2**20:.0f} MB, float32")
    for column in ("loss", "peak, in units of the maps"):
        table.add_column(column)
    held = {}
    losses = {"ours": DISTLoss(activation="sigmoid"), "torchdistill": torchdistill_formula}
    for name, loss in losses.items():
        for x in student:
            x.grad = None
        held[name] = peak_bytes(lambda loss=loss: run(loss)) / total
        table.add_row(name, f"{held[name]:.2f}")
    show(
        table,
        f"torch {torch.__version__}; ours: {bar(held['ours'], '<= 1.3', held['ours'] <= 1.3)}",
    )


if __name__ == "__main__":
    main()
