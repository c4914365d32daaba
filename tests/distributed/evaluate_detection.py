"""A script that tests a detector on a set that the processes cannot share evenly.

Rank 0 saves the logged metrics.
"""

import json
from pathlib import Path

import lightning as L

from lightning_dist.data.scenes import SceneDetectionDataModule
from lightning_dist.files.weights import load_weights
from lightning_dist.models.detection import small_faster_rcnn
from lightning_dist.tasks.detection import DetectionModule


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
    if trainer.is_global_zero:
        found = {name: float(value) for name, value in trainer.callback_metrics.items()}
        Path(out).write_text(json.dumps(found))
