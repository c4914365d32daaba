"""A script that tests a detector on a set that the processes cannot share evenly.

Rank 0 saves the logged metrics, and the mean average precision of random boxes.
"""

import json
from pathlib import Path

import lightning as L
import torch

from lightning_dist.data.scenes import SceneDetectionDataModule
from lightning_dist.files.weights import load_weights
from lightning_dist.models.detection import small_faster_rcnn
from lightning_dist.tasks.average_precision import BoxAveragePrecision
from lightning_dist.tasks.detection import DetectionModule


def random_boxes(rank: int, world: int) -> dict[str, float]:
    """Return the metric of 15 images, of which each rank sees every n-th; many scores are equal."""
    metric = BoxAveragePrecision()
    generator = torch.Generator().manual_seed(1)
    for index in range(15):
        corners = 50 * torch.rand(9, 2, generator=generator)
        target = {"boxes": torch.cat([corners, corners + 20], 1), "labels": torch.arange(9) // 4}
        found = {
            **target,
            "boxes": target["boxes"] + 6 * torch.rand(9, 4, generator=generator),
            "scores": torch.rand(9, generator=generator).mul(3).round(),
        }
        if index % world == rank:
            metric.update([found], [target])
    return {name: float(value) for name, value in metric.compute().items()}


def main(out: str, devices: int) -> None:
    trainer = L.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    student = small_faster_rcnn([32, 64, 96], 64, 128, num_classes=10, image_size=48)
    load_weights(student, "pkg://lightning_dist/assets/scenes_fasterrcnn_teacher.safetensors")
    data = SceneDetectionDataModule(
        test_size=7, scene_size=48, scales=(0.35, 0.6), texture=0.3, eval_batch_size=2
    )
    trainer.test(DetectionModule(student), data, verbose=False)
    boxes = random_boxes(trainer.global_rank, trainer.world_size)
    if trainer.is_global_zero:
        found = {name: float(value) for name, value in trainer.callback_metrics.items()}
        Path(out).write_text(json.dumps({"found": found, "boxes": boxes}))
