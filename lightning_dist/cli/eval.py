"""``lightning-dist eval``: test the student of a checkpoint."""

import sys

import hydra
from hydra.utils import instantiate
from lightning.pytorch import seed_everything
from omegaconf import DictConfig, OmegaConf

from lightning_dist.cli import one_line_errors
from lightning_dist.cli.saved import build_module, read_saved


def main() -> None:
    """Run the Hydra app on ``sys.argv``, the verb taken out."""
    del sys.argv[1]
    hydra.main(version_base="1.3", config_path="pkg://lightning_dist.conf", config_name="eval")(
        _job
    )()


@one_line_errors()
def _job(config: DictConfig) -> None:
    sys.argv.insert(1, "eval")  # the command line that subprocess DDP starts again
    try:
        checkpoint, saved = read_saved(config.ckpt, config.trust)
        seed_everything(saved["seed"], workers=True)
        datamodule = instantiate(OmegaConf.merge(saved["data"], config.data))
        trainer = instantiate(config.trainer, logger=False)
        trainer.test(build_module(checkpoint, saved), datamodule=datamodule)
    finally:
        del sys.argv[1]
