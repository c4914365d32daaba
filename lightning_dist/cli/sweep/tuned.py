"""A Hydra callback that writes the best settings of a sweep to a config."""

import math
import shlex
import sys
from pathlib import Path
from typing import Any

import rich
import yaml
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from lightning_dist.cli.errors import fail
from lightning_dist.files.text import printable
from lightning_dist.files.writing import naming, replaced_together
from lightning_dist.report.runs import Group, group_runs, read_runs


class WriteTuned(Callback):
    """Write the settings of a sweep with the best mean over the seeds to a config.

    The sweep varies settings of one method, such as its weight and the learning rate. They are
    judged by the metric that ``monitor`` names, which must be of the validation. The config is for
    the method and the protocol of the sweep: ``FOLDER/PROTOCOL/METHOD.yaml``. If ``FOLDER`` is
    ``DIR/own_tuned``, runs with ``--config-dir DIR`` use it for this method and protocol. It
    replaces the values of conf/tuned/, which are in this package.

    Args:
        folder: the folder for the config.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Refuse, before its first job, a sweep whose best settings cannot be judged or written."""
        method, protocol = _method(config), config.hydra.runtime.choices.get("protocol")
        if not protocol or protocol == "none":
            fail("tuned settings belong to a protocol: choose protocol=..., or such an experiment")
        if not str(config.monitor).startswith("val/"):
            fail(f"monitor={config.monitor}: settings are tuned on the validation, as val/accuracy")
        if not method:
            fail("a sweep tunes one method: choose one distill=..., without commas")

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Find the best settings among the completed runs, and write and print them."""
        metric, protocol = str(config.monitor), config.hydra.runtime.choices.protocol
        try:
            groups = group_runs(read_runs(config.hydra.sweep.dir))
            best = best_group(groups, metric, config.monitor_mode)
        except ValueError as error:
            fail(f"no tuned settings were written: {error}")
        values = {key: value for key, value in best.values.items() if value is not None}
        if foreign := values.keys() - _settings(config):
            folder = config.hydra.sweep.dir
            fail(f"{folder} has runs of other sweeps, which set {min(foreign)!r:.100}")
        text = "".join(f"# {line}\n" for line in _origin(best, metric, len(groups)))
        path = self.folder / protocol / f"{_method(config)}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        settings = _nested(values) | {"tuned_keys": list(values)}
        with naming(path), replaced_together([path]) as (part,):
            part.write_text(f"# @package _global_\n{text}{yaml.safe_dump(settings)}")
        rich.print(f"[bold]tuned settings[/bold] {path}: {best.name}")


def best_group(groups: list[Group], metric: str, mode: str) -> Group:
    """Return the group with the best mean of a metric.

    Args:
        groups: the groups of a sweep, as :func:`group_runs` returns them.
        metric: the metric.
        mode: ``"max"`` or ``"min"``.

    Raises:
        ValueError: if the groups differ in more than settings with values, such as in an
            experiment, or if they do not have the same number of completed runs, so that they
            cannot be compared.
    """
    if not groups[0].values:
        raise ValueError("the sweep varies no setting")
    if choices := [key for key in groups[0].values if "." not in key]:
        raise ValueError(f"the sweep varies {choices[0]}, and tuned settings belong to one")
    if any(len(group.completed) != len(group.runs) for group in groups):
        raise ValueError("some runs failed: run them again with resume=true")
    if len({len(group.runs) for group in groups}) > 1:
        raise ValueError("some settings have fewer seeds than others")
    means = [summary.mean if (summary := x.summary(metric)) else math.nan for x in groups]
    finite = [i for i, mean in enumerate(means) if math.isfinite(mean)]
    if not finite:
        raise ValueError(f"no run has a finite {metric}")
    return groups[(max if mode == "max" else min)(finite, key=lambda i: means[i])]


def _method(config: DictConfig) -> str:
    """Return the one value of ``distill`` that the sweep sets, or an empty text."""
    params = config.hydra.sweeper.get("params") or {}
    name = str(params.get("distill", config.hydra.runtime.choices.get("distill", "")))
    return "" if "," in name else name


def _settings(config: DictConfig) -> set[str]:
    """Return the settings that the command line or the config of the sweep names.

    A result that is not from this sweep could set others, such as the function of a loss.
    """
    overrides = OmegaConf.select(config, "hydra.overrides.task") or []
    overrides = [override.partition("=")[0] for override in overrides]
    return {key.lstrip("+~") for key in (*overrides, *(config.hydra.sweeper.get("params") or {}))}


def _origin(best: Group, metric: str, trials: int) -> list[str]:
    summary, seeds = best.summary(metric), len(best.completed)
    assert summary is not None
    shown = [x for x in sys.argv[1:] if not x.startswith(("hydra.", "print_config", "callbacks."))]
    command = shlex.join(["lightning-dist", "train", *shown])
    of_seeds = "of one seed" if seeds == 1 else f"over {seeds} seeds"
    return [
        "The best of the trials of this command:",
        f"  {printable(command)}",
        f"{metric} {summary.text(seeds)} {of_seeds}, the best of {trials} settings",
    ]


def _nested(values: dict[str, str]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in values.items():
        *parents, name = key.split(".")
        place = tree
        for parent in parents:
            place = place.setdefault(parent, {})
        place[name] = _number(value)
    return tree


def _number(text: str) -> Any:
    """Return the value of an override; YAML 1.1 would read 1e-3 as text."""
    try:
        return float(text) if "e" in text else yaml.safe_load(text)
    except ValueError:
        return yaml.safe_load(text)
