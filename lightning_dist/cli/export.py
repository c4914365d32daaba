"""``lightning-dist export``: write the student of a checkpoint for use without this package."""

import logging
from collections.abc import Mapping
from typing import Any

import rich
from omegaconf import DictConfig, OmegaConf

from lightning_dist.checks import check_flag
from lightning_dist.cli.errors import UserError
from lightning_dist.cli.hydra_app import hydra_app
from lightning_dist.cli.run.saved_config import build_data, build_module, read_saved
from lightning_dist.export import export_student
from lightning_dist.module import DistillModule
from lightning_dist.tasks.classification import ClassificationModule
from lightning_dist.tasks.detection import DetectionModule
from lightning_dist.tasks.segmentation import SegmentationModule


def main() -> None:
    """Run the Hydra app on ``sys.argv``."""
    hydra_app("export", _job)


def _job(config: DictConfig) -> None:
    for chatty in ("onnx_ir", "onnxscript", "timm"):  # Hydra 1.3 sets the root logger to INFO
        logging.getLogger(chatty).setLevel(logging.WARNING)
    check_flag("ema", config.ema)
    check_flag("dynamic_size", config.dynamic_size)
    checkpoint, saved = read_saved(config.ckpt, config.trust)
    module = build_module(checkpoint, saved, config.ckpt, config.trust)
    student = module.student
    if config.ema:
        if module.student_ema is None:
            raise UserError(
                f"{config.ckpt} holds no averaged weights: train with callbacks=[default,ema], or "
                "leave out ema=true"
            )
        student = module.student_ema.module
    data = build_data(saved, OmegaConf.create(), config.ckpt, config.trust)
    try:
        path = export_student(
            student,
            config.file,
            config.format,
            input_size=_input_size(config, data),
            mean=_numbers(data, "mean"),
            std=_numbers(data, "std"),
            class_names=saved.get("class_names"),
            architecture=saved["module"]["student"],
            label_offset=getattr(module, "label_offset", None),
            dynamic_size=config.dynamic_size,
            extra=_extra(module, data, config.format),
        )
    except ImportError as error:
        raise UserError(str(error)) from error
    rich.print(f"[bold]student[/bold] {path}")


def _input_size(config: DictConfig, data: Any) -> list[int] | None:
    """Return (channels, height, width) of the evaluation images, or None if it is not known."""
    size = config.input_size
    if size is not None:
        size = OmegaConf.to_container(size) if OmegaConf.is_list(size) else size
        if not isinstance(size, list) or len(size) != 2:
            raise UserError(f"input_size is {size}: give height and width, as in [224,224]")
    elif getattr(data, "eval_size", None) is not None:
        size = list(data.eval_size)
    elif getattr(data, "image_size", None) is not None:
        size = [data.image_size, data.image_size]
    return None if size is None else [getattr(data, "in_channels", 3), *size]


def _numbers(data: Any, name: str) -> list[float] | None:
    values = getattr(data, name, None)
    return None if values is None else [float(value) for value in values]


def _extra(module: DistillModule, data: Any, format: str) -> Mapping[str, Any]:
    """Return the other settings that a user of the file needs for its images and outputs."""
    channels = {1: "gray", 3: "bgr" if getattr(data, "bgr", False) else "rgb"}
    extra: dict[str, Any] = {"channels": channels.get(getattr(data, "in_channels", 3))}
    if isinstance(module, ClassificationModule):
        resized = getattr(data, "interpolation", "bilinear")
        # "random" is for training only; the data module evaluates with bilinear.
        extra["interpolation"] = "bilinear" if resized == "random" else resized
        extra["crop_pct"] = getattr(data, "crop_pct", 1.0)
    if isinstance(module, SegmentationModule):
        extra["align_corners"] = module.align_corners
    if isinstance(module, DetectionModule):
        # The graph of an ONNX file subtracts the offset itself.
        extra["label_offset"] = 0 if format == "onnx" else module.label_offset
    return extra
