"""``lightning-dist eval``: test the student of a checkpoint on its data."""

from hydra.utils import instantiate
from lightning.pytorch import seed_everything
from omegaconf import DictConfig

from lightning_dist.cli.hydra_app import hydra_app
from lightning_dist.cli.run.channels import channel_errors
from lightning_dist.cli.run.checkpoint_card import MatchData, card_of_checkpoint, use_weights
from lightning_dist.cli.run.saved_config import build_data, build_module, read_saved


def main() -> None:
    """Run the Hydra app on ``sys.argv``."""
    hydra_app("eval", _job)


def _job(config: DictConfig) -> None:
    checkpoint, saved = read_saved(config.ckpt, config.trust)
    seed_everything(saved["seed"], workers=True)
    card = card_of_checkpoint(checkpoint, saved, config.ckpt)
    datamodule = build_data(saved, config.data, config.ckpt, config.trust, reads=True)
    module = build_module(checkpoint, saved, config.ckpt, config.trust)
    if config.ema is not None:  # otherwise the raw and the averaged weights are both tested
        card = use_weights(module, card, config.ema, config.ckpt)
        module.evaluate_only(module.student)
    trainer = instantiate(
        config.trainer,
        logger=False,
        callbacks=[MatchData(card)],
        precision=config.trainer.precision or card.precision,
    )
    with channel_errors(module, len(card.mean) if card.mean else None):
        trainer.test(module, datamodule=datamodule)
