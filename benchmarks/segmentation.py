"""Memory of DIST in a segmentation step: ``python -m benchmarks.segmentation``.

A DeepLabV3-ResNet18 student of images (2, 3, 512, 1024), 19 classes: forward, cross-entropy at full
resolution on the main and the auxiliary head, and backward; with no distillation, with DIST on the
logits of both heads at their own resolution (stride 8), and with torchdistill's DISTLoss in its
place. The teacher's logits are there before: what a teacher costs is its own.

The peak is the most that PyTorch's CPU allocator holds at once during the step, from its allocation
events. What a loss adds is also given apart from the step, where nothing hides it: the most that it
holds beyond its inputs, in units of the logits' bytes.
"""

import torch
from rich.table import Table

from benchmarks.common import bar, peak_bytes, show, torchdistill_loss
from lightning_dist import DISTLoss
from lightning_dist.models.segmentation import deeplabv3
from lightning_dist.tasks.segmentation import PixelLoss

CLASSES, AUX_WEIGHT = 19, 0.4


def main() -> None:
    torch.manual_seed(0)
    student = deeplabv3("resnet18", CLASSES).train()
    images = torch.randn(2, 3, 512, 1024)
    masks = torch.randint(0, CLASSES, (2, 512, 1024))
    task = PixelLoss(AUX_WEIGHT, ignore_index=255, align_corners=True)
    with torch.no_grad():
        shape = student(images)["out"].shape
    taught = {"out": 3 * torch.randn(shape), "aux": 3 * torch.randn(shape)}
    losses = {"none": None, "ours": DISTLoss(), "torchdistill": torchdistill_loss()}

    def step(loss) -> None:
        outputs = student(images)
        total = task(outputs, masks)
        if loss is not None:
            total = total + loss(outputs["out"], taught["out"])
            total = total + AUX_WEIGHT * loss(outputs["aux"], taught["aux"])
        total.backward()

    def apart(loss) -> None:
        leaves = {name: torch.randn(shape, requires_grad=True) for name in taught}
        total = sum(loss(leaves[name], taught[name]) for name in taught)
        total.backward()

    one = 4 * shape.numel()  # bytes of one head's logits
    step(None)  # gradients are there from now on
    table = Table(title=f"DeepLabV3-ResNet18, {tuple(images.shape)}, logits {tuple(shape)}")
    for column in ("loss", "peak of the step, MB", "added to it", "held by the loss apart"):
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
        "added and held: in units of the logits of both heads, "
        f"{2 * one / 2**20:.2f} MB; torch {torch.__version__}",
        f"added by ours: {bar(added['ours'], '<= 1.3', added['ours'] <= 1.3)}",
    )


if __name__ == "__main__":
    main()
