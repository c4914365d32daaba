"""Measure the memory of DIST in a segmentation step: ``python -m benchmarks.segmentation``.

The step consists of the forward, the cross-entropy of the main and the auxiliary head at full
resolution, and the backward. The student is a DeepLabV3-ResNet18 with 19 classes on images
(2, 3, 512, 1024). The step runs without distillation, with this package's DISTLoss on the logits of
both heads (stride 8), and with torchdistill's DISTLoss. The teacher's logits are computed before,
so their memory is not included.

The peak of the step is computed from the events of PyTorch's CPU allocator. If another part of the
step needs more memory, the loss does not change this peak. So the last column has the peak of each
loss without the rest of the step, in addition to its inputs, in units of the logits' bytes.
"""

import torch
from rich.table import Table

from benchmarks.common import bar, peak_bytes, show, torchdistill_loss
from lightning_dist import DISTLoss
from lightning_dist.models.segmentation import deeplabv3
from lightning_dist.tasks.segmentation import PixelLoss

CLASSES, AUX_WEIGHT = 19, 0.4


def main() -> None:
    """Measure the step with each loss and print the table."""
    torch.manual_seed(0)
    student = deeplabv3("resnet18", CLASSES).train()
    images = torch.randn(2, 3, 512, 1024)
    masks = torch.randint(0, CLASSES, (2, 512, 1024))
    task = PixelLoss(AUX_WEIGHT, ignore_index=255, align_corners=True)
    with torch.no_grad():
        shape = student(images)["out"].shape
    teacher_logits = {"out": 3 * torch.randn(shape), "aux": 3 * torch.randn(shape)}
    losses = {"none": None, "ours": DISTLoss(), "torchdistill": torchdistill_loss()}

    def step(loss) -> None:
        outputs = student(images)
        total = task(outputs, masks)
        if loss is not None:
            total = total + loss(outputs["out"], teacher_logits["out"])
            total = total + AUX_WEIGHT * loss(outputs["aux"], teacher_logits["aux"])
        total.backward()

    def apart(loss) -> None:
        leaves = {name: torch.randn(shape, requires_grad=True) for name in teacher_logits}
        total = sum(loss(leaves[name], teacher_logits[name]) for name in teacher_logits)
        total.backward()

    one = 4 * shape.numel()  # the bytes of the logits of one head
    step(None)  # This allocates the gradients of the parameters, which later steps reuse.
    table = Table(title=f"DeepLabV3-ResNet18, {tuple(images.shape)}, logits {tuple(shape)}")
    for column in ("loss", "peak of the step, MB", "added to it", "used by the loss alone"):
        table.add_column(column, justify="left" if column == "loss" else "right")
    peaks, added = {}, {}
    for name, loss in losses.items():
        peak = peaks[name] = peak_bytes(lambda loss=loss: step(loss))
        alone = 0.0
        if loss is not None:
            added[name] = (peak - peaks["none"]) / (2 * one)
            alone = (peak_bytes(lambda loss=loss: apart(loss)) - 2 * one) / (2 * one)
        table.add_row(name, f"{peak / 2**20:.1f}", f"{added.get(name, 0.0):.2f}", f"{alone:.2f}")
    show(
        table,
        "added and used: in units of the logits of both heads, "
        f"{2 * one / 2**20:.2f} MB; torch {torch.__version__}",
        f"added by ours: {bar(added['ours'], '<= 1.3', added['ours'] <= 1.3)}",
    )


if __name__ == "__main__":
    main()
