"""A script that trains on images, few of which have a label, and saves the weights of each rank.

Each rank gets half of the images of each batch; a single process gets all of them.
"""

import functools
from pathlib import Path

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_dist import DistillModule, DISTLoss
from lightning_dist.models.detection import small_retinanet
from lightning_dist.tasks.detection import DetectionModule
from lightning_dist.tasks.segmentation import SegmentationModule

CLASSES, SIZE = 3, 16
# The images with a label in each batch of four. The first two images are those of rank 0.
LABELED = [
    (True, False, False, False),
    (True, True, True, False),
    (False,) * 4,
    (False, False, True, True),
]


def batches(task: str, rank: int, world: int) -> list:
    """Return the batches of a rank."""
    generator = torch.Generator().manual_seed(1)
    box = torch.tensor([[2.0, 2.0, 12.0, 14.0]]).double()
    found = []
    for labeled in LABELED:
        images = torch.rand(4, 3, SIZE, SIZE, generator=generator).double()
        masks = torch.randint(0, CLASSES, (4, SIZE, SIZE), generator=generator)
        masks[0, :9] = 255  # The labelled masks differ in their numbers of labels.
        masks[[not has for has in labeled]] = 255
        targets = [
            {"boxes": box + index, "labels": torch.tensor([index % CLASSES])} if has else None
            for index, has in enumerate(labeled)
        ]
        own = slice(rank * 4 // world, (rank + 1) * 4 // world)
        boxes = list(images[own]), targets[own]
        found.append((images[own], masks[own]) if task == "segmentation" else boxes)
    return found


def network(task: str, width: int) -> nn.Module:
    torch.manual_seed(width)
    if task == "segmentation":
        return nn.Sequential(nn.Conv2d(3, width, 3), nn.Tanh(), nn.Conv2d(width, CLASSES, 1))
    return small_retinanet((width,) * 3, width, CLASSES, SIZE)


def main(out: str, task: str, devices: int = 2) -> None:
    """Train, and save the weights of this rank.

    Args:
        out: the folder for the files.
        task: "segmentation" or "detection".
        devices: the number of processes.
    """
    options = {
        "distill_loss": DISTLoss(sync=True, activation=None),
        "optimizer": functools.partial(torch.optim.SGD, lr=0.01),
        "measure_teacher": False,
    }
    networks = (network(task, width).double() for width in (4, 8))
    module: DistillModule
    if task == "segmentation":
        module = SegmentationModule(*networks, num_classes=CLASSES, head="", **options)
    else:
        # A batch norm in training mode would see the images of its rank only.
        module = DetectionModule(*networks, norm_eval=True, **options)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        max_epochs=1,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    shares = batches(task, trainer.global_rank, trainer.world_size)
    trainer.fit(module, DataLoader(shares, batch_size=None))
    Path(out).mkdir(exist_ok=True)
    saved = {"weights": module.state_dict(), "steps": trainer.global_step}
    torch.save(saved, Path(out) / f"rank{trainer.global_rank}.pt")
