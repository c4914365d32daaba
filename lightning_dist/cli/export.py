"""``lightning-dist export``: write the student of a checkpoint as a plain weight file."""

import rich
import safetensors.torch
from omegaconf import DictConfig

from lightning_dist.cli import UserError, hydra_app
from lightning_dist.cli.saved import build_module, read_saved


def main() -> None:
    """Run the Hydra app on ``sys.argv``."""
    hydra_app("export", _job)


def _job(config: DictConfig) -> None:
    checkpoint, saved = read_saved(config.ckpt, config.trust)
    module = build_module(checkpoint, saved)
    student = module.student
    if config.ema:
        if module.student_ema is None:
            raise UserError(
                f"{config.ckpt} holds no averaged weights: train with module.ema_decay, or leave "
                "out ema=true"
            )
        student = module.student_ema.module
    safetensors.torch.save_model(student, config.file)
    rich.print(f"[bold]student[/bold] {config.file}")
