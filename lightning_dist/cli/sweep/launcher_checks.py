"""A Hydra callback that refuses a launcher or sweeper which Hydra would silently ignore."""

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from lightning_dist.cli import fail


class RefuseLateChoices(Callback):
    """End a sweep before its first job if one of its configs chooses who launches the jobs.

    The launcher and the sweeper are there before Hydra reads what is swept over, so that the choice
    of an experiment file counts when it is the only one and not when there are several.
    """

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        for choice, job in _swept_configs(config):
            for part in ("launcher", "sweeper"):
                if _plain(job.hydra[part]) != _plain(config.hydra[part]):
                    name = job.hydra.runtime.choices[f"hydra/{part}"]
                    fail(
                        f"{choice} sets hydra.{part}, which is too late in a sweep over it: choose "
                        f"it on the command line, as hydra/{part}={name} or hydra.{part}.KEY=VALUE"
                    )


def _swept_configs(config: DictConfig) -> Iterator[tuple[str, DictConfig]]:
    """Each config file that the sweep goes over, composed as its jobs will."""
    loader = GlobalHydra.instance().config_loader()
    params = config.hydra.sweeper.get("params") or {}
    parser = OverridesParser.create(config_loader=loader)
    task = parser.parse_overrides(list(config.hydra.overrides.task))
    fixed = [override.input_line or "" for override in task if not override.is_sweep_override()]
    swept = parser.parse_overrides([f"{key}={value}" for key, value in params.items()])
    for override in [*swept, *task]:
        if not override.is_discrete_sweep() or not loader.get_group_options(override.key_or_group):
            continue
        for value in override.sweep_string_iterator():
            choice = f"{override.get_key_element()}={value}"
            with suppress(HydraException):  # Hydra checks every job next, and says what is wrong
                yield choice, loader.load_sweep_config(config, [*fixed, choice])


def _plain(config: DictConfig) -> Any:
    return OmegaConf.to_container(config, resolve=False)
