"""Check the settings of a run that nothing else checks before training."""

from omegaconf import DictConfig, OmegaConf

from lightning_dist.checks import check_flag, check_number
from lightning_dist.cli.renamed_keys import refuse_renamed_keys


def check_settings(config: DictConfig) -> None:
    """Refuse wrong settings that neither Hydra nor the objects of the config refuse.

    Args:
        config: the composed config ``train``.

    Raises:
        ValueError: if a setting is wrong; the message names its key and the values to use.
    """
    refuse_renamed_keys(config)
    check_number("seed", config.seed, int, least=0, most=2**32 - 1)
    check_number("num_classes", config.num_classes, int, least=1)
    for key in ("max_epochs", "max_steps"):
        if config.trainer.get(key) is not None:
            check_number(f"trainer.{key}", config.trainer[key], int, least=-1)
    if config.trainer.get("accumulate_grad_batches") is not None:
        accumulated = config.trainer.accumulate_grad_batches
        check_number("trainer.accumulate_grad_batches", accumulated, int, least=1)
    strategy = config.trainer.get("strategy")
    if OmegaConf.is_config(strategy) and strategy.get("stage") == 3:
        raise ValueError(
            "trainer.strategy.stage is 3, but DeepSpeed can load a checkpoint of stage 3 only to "
            "continue training, not to test: use stage 2, or trainer=fsdp2 to shard the parameters"
        )
    if OmegaConf.is_config(strategy) and strategy.get("start_method") == "forkserver":
        raise ValueError(
            "trainer.strategy.start_method is forkserver, for which Lightning 2.6.6 does not copy "
            "the random states and the weights to the processes: use 'spawn'"
        )
    teacher = config.distill.teacher
    if OmegaConf.is_config(teacher) and teacher.get("teacher", "") is None:
        raise ValueError(
            "no teacher is chosen, and these data come with none: add one, such as teacher=timm "
            "teacher.source=timm/resnet34.tv_in1k, or train the student alone by distill=none"
        )
    for key in ("test_teacher", "resume", "own_process", "print_config", "trust"):
        check_flag(key, config[key])
    choices = {
        "matmul_precision": ("highest", "high", "medium"),
        "test_checkpoint": ("last", "best"),
    }
    for key, known in choices.items():
        if config[key] not in known:
            raise ValueError(f"{key} is {config[key]!r}: use {' or '.join(known)}")
