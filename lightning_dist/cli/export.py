"""``lightning-dist export``: write the student of a checkpoint as a plain weight file."""

import sys

import hydra
import rich
import safetensors.torch
from omegaconf import DictConfig

from lightning_dist.cli import one_line_errors
from lightning_dist.cli.saved import build_module, read_saved


def main() -> None:
    """Run the Hydra app on ``sys.argv``, the verb taken out."""
    del sys.argv[1]
    hydra.main(version_base="1.3", config_path="pkg://lightning_dist.conf", config_name="export")(
        _job
    )()


@one_line_errors()
def _job(config: DictConfig) -> None:
    checkpoint, saved = read_saved(config.ckpt, config.trust)
    student = build_module(checkpoint, saved).student
    safetensors.torch.save_model(student, config.file)
    rich.print(f"[bold]student[/bold] {config.file}")
