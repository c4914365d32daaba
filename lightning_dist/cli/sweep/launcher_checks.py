"""A Hydra callback that refuses a launcher or sweeper that Hydra would ignore."""

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from lightning_dist.cli.errors import fail


class RefuseSweptLauncher(Callback):
    """Refuse a sweep over config files if one of them sets the launcher or the sweeper.

    Hydra chooses the launcher and the sweeper before it composes the configs of the jobs (Hydra
    issue 2946). So it would ignore what a config file sets, if the sweep is over several files.
    """

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        for choice, job in _swept_configs(config):
            for part in ("launcher", "sweeper"):
                if _unresolved(job.hydra[part]) != _unresolved(config.hydra[part]):
                    name = job.hydra.runtime.choices[f"hydra/{part}"]
                    fail(
                        f"{choice} sets hydra.{part}, but Hydra chooses the {part} before it reads "
                        "the config files of a sweep: choose it on the command line, with "
                        f"hydra/{part}={name} or hydra.{part}.KEY=VALUE"
                    )


def _swept_configs(config: DictConfig) -> Iterator[tuple[str, DictConfig]]:
    """Yield the override of each config file in the sweep, and the config composed with it."""
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
            with suppress(HydraException):  # Hydra raises it later, when it composes the jobs
                yield choice, loader.load_sweep_config(config, [*fixed, choice])


def _unresolved(config: DictConfig) -> Any:
    return OmegaConf.to_container(config, resolve=False)
