"""``lightning-dist export``: write the student of a checkpoint for use without this package."""

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import rich
from omegaconf import DictConfig, OmegaConf

from lightning_dist.checks import check_flag
from lightning_dist.cli.errors import UserError
from lightning_dist.cli.hydra_app import hydra_app
from lightning_dist.cli.run.checkpoint_card import card_of_checkpoint, use_weights
from lightning_dist.cli.run.saved_config import build_module, read_saved
from lightning_dist.export import export_student
from lightning_dist.module import DistillModule
from lightning_dist.tasks.detection import DetectionModule
from lightning_dist.tasks.segmentation import SegmentationModule


def main() -> None:
    """Run the Hydra app on ``sys.argv``."""
    hydra_app("export", _job)


def _job(config: DictConfig) -> None:
    for chatty in ("onnx_ir", "onnxscript", "timm"):  # Hydra 1.3 sets the root logger to INFO
        logging.getLogger(chatty).setLevel(logging.WARNING)
    check_flag("dynamic_size", config.dynamic_size)
    checkpoint, saved = read_saved(config.ckpt, config.trust)
    card = card_of_checkpoint(checkpoint, saved, config.ckpt)
    module = build_module(checkpoint, saved, config.ckpt, config.trust)
    card = use_weights(module, card, config.ema, config.ckpt)
    if config.input_size is not None:
        card = dataclasses.replace(card, size=_size(config.input_size))
    try:
        path = export_student(
            module.student,
            config.file,
            config.format,
            card=card,
            architecture=saved["module"]["student"],
            label_offset=getattr(module, "label_offset", None),
            dynamic_size=config.dynamic_size,
            extra=_extra(module, config.format),
        )
    except ImportError as error:
        raise UserError(str(error)) from error
    rich.print(f"[bold]student[/bold] {path}")


def _size(given: Any) -> tuple[int, int]:
    """Return the height and width that the user has given."""
    size = OmegaConf.to_container(given) if OmegaConf.is_list(given) else given
    if not isinstance(size, list) or len(size) != 2:
        raise UserError(f"input_size is {size}: give height and width, as in [224,224]")
    return size[0], size[1]


def _extra(module: DistillModule, format: str) -> Mapping[str, Any]:
    """Return the settings that a user of the file needs for its outputs."""
    if isinstance(module, SegmentationModule):
        return {"align_corners": module.align_corners}
    if isinstance(module, DetectionModule):
        # The graph of an ONNX file subtracts the offset itself.
        return {"label_offset": 0 if format == "onnx" else module.label_offset}
    return {}
