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

PART = "distill."


class WriteTuned(Callback):
    """Write the settings of distill with the best mean over the seeds to a config.

    The sweep varies settings ``distill.*`` of one method. They are judged by the metric that
    ``monitor`` names, which must be of the validation. The config is for the method and the
    protocol of the sweep: ``FOLDER/distill/METHOD/PROTOCOL.yaml``. With ``--config-dir FOLDER``, or
    if ``FOLDER`` is conf/, ``distill=METHOD`` then uses it with this protocol.

    Args:
        folder: the folder of configs.
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
        values = {k: v for k, v in best.runs[0].overrides.items() if k.startswith(PART)}
        if foreign := values.keys() - _settings(config):
            folder = config.hydra.sweep.dir
            fail(f"{folder} has runs of other sweeps, which set {min(foreign)!r:.100}")
        text = "".join(f"# {line}\n" for line in _origin(best, metric, len(groups)))
        path = self.folder / "distill" / _method(config) / f"{protocol}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        with naming(path), replaced_together([path]) as (part,):
            part.write_text(f"# @package distill\n{text}{yaml.safe_dump(_nested(values))}")
        rich.print(f"[bold]tuned settings[/bold] {path}: {best.name}")


def best_group(groups: list[Group], metric: str, mode: str) -> Group:
    """Return the group with the best mean of a metric.

    Args:
        groups: the groups of a sweep, as :func:`group_runs` returns them.
        metric: the metric.
        mode: ``"max"`` or ``"min"``.

    Raises:
        ValueError: if a group varies other settings than those of distill, or if the groups do not
            have the same number of completed runs, so that they cannot be compared.
    """
    if not groups[0].values:
        raise ValueError("the sweep varies no setting")
    if others := [key for key in groups[0].values if not key.startswith(PART)]:
        raise ValueError(f"the sweep varies {others[0]}: a config of distill can only set {PART}*")
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
    summary = best.summary(metric)
    assert summary is not None
    shown = [x for x in sys.argv[1:] if not x.startswith(("hydra.", "print_config", "callbacks."))]
    command = shlex.join(["lightning-dist", "train", *shown])
    return [
        "The best of the trials of this command:",
        f"  {printable(command)}",
        f"{metric} {summary.text(len(best.completed))} over {len(best.completed)} seeds, the best "
        f"of {trials} settings",
    ]


def _nested(values: dict[str, str]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in values.items():
        *parents, name = key.removeprefix(PART).split(".")
        place = tree
        for parent in parents:
            place = place.setdefault(parent, {})
        place[name] = yaml.safe_load(value)
    return tree
