"""Tests that a sweep writes its best settings to a config, and that the config is used."""

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir, initialize_config_module
from omegaconf import OmegaConf

from composition import composed
from lightning_dist.cli.sweep.tuned import WriteTuned
from lightning_dist.report import read_runs

PutRun = Callable[..., Path]
METHODS = ["at", "dist", "dist_plus", "dkd", "kd", "lskd", "none", "sp"]
TUNED = ["dist", "kd", "none"]  # the methods with a file in conf/tuned/digits_300/


def config(sweep: Path, *, distill: str = "kd", protocol: str = "mine", monitor: str = "val/x"):
    choices = {"protocol": protocol}
    hydra = {"sweep": {"dir": str(sweep)}, "runtime": {"choices": choices}}
    params = {"distill": distill, "distill.weight": "0.5,1,4", "distill.loss.tau": "2"}
    hydra["sweeper"] = {"params": params}
    return OmegaConf.create({"hydra": hydra, "monitor": monitor, "monitor_mode": "max"})


def put_sweep(folder: Path, put_run: PutRun, values: dict[str, list[float]]) -> None:
    for weight, numbers in values.items():
        for seed, x in enumerate(numbers):
            put_run(
                folder / f"{weight}_{seed}",
                "distill=kd",
                f"distill.weight={weight}",
                "distill.loss.tau=2",
                f"seed={seed}",
                metrics={"val/x": x, "test/accuracy": 1 - x},
            )


def test_the_settings_with_the_best_mean_on_the_validation_are_written(
    tmp_path, put_run, monkeypatch
):
    sweep = tmp_path / "sweep"
    put_sweep(sweep, put_run, {"0.5": [0.9, 0.2], "1": [0.6, 0.7], "4": [0.1, 0.3]})
    arguments = ["train", "-m", "+sweep=tune/kd", "hydra.sweep.dir=/somewhere"]
    monkeypatch.setattr(sys, "argv", arguments)
    WriteTuned(str(tmp_path / "tuned")).on_multirun_end(config(sweep))
    text = (tmp_path / "tuned" / "mine" / "kd.yaml").read_text()
    assert yaml.safe_load(text) == {"distill": {"weight": 1}, "tuned_keys": ["distill.weight"]}
    assert text.startswith("# @package _global_\n")
    assert "lightning-dist train -m +sweep=tune/kd\n" in text
    assert "val/x 0.65 ± 0.07071 over 2 seeds, the best of 3 settings" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"distill": "kd,dist"}, "one distill="),
        ({"protocol": "none"}, "choose protocol="),
        ({"monitor": "test/accuracy"}, "tuned on the validation"),
    ],
)
def test_a_sweep_whose_best_settings_have_no_place_is_refused(tmp_path, options, message, capsys):
    with pytest.raises(SystemExit):
        WriteTuned(str(tmp_path)).on_multirun_start(config(tmp_path, **options))
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["experiment", "failed", "nan", "one setting", "foreign"])
def test_settings_that_cannot_be_compared_are_not_written(tmp_path, put_run, kind, capsys):
    message = {
        "experiment": "varies experiment",
        "failed": "resume=true",
        "nan": "no run has a finite val/x",
        "one setting": "varies no setting",
        "foreign": "runs of other sweeps, which set 'distill.loss._target_'",
    }[kind]
    sweep, nan = tmp_path / "sweep", float("nan")
    values = {"1": [0.5, 0.6], "2": [0.7, 0.8]} if kind != "nan" else {"1": [nan], "2": [nan]}
    put_sweep(sweep, put_run, values if kind != "one setting" else {"1": [0.5]})
    if kind == "failed":
        own = ["distill=kd", "distill.weight=2", "distill.loss.tau=2", "seed=9"]
        put_run(sweep / "broken", *own, status="failed", error="x", metrics={})
    if kind == "foreign":
        for seed in range(2):
            own = ["distill=kd", "distill.loss._target_=os.system", f"seed={seed}"]
            put_run(sweep / f"foreign{seed}", *own, metrics={"val/x": 1.0})
    if kind == "experiment":
        put_run(sweep / "other", "distill=kd", "experiment=digits", metrics={"val/x": 0.9})
    with pytest.raises(SystemExit):
        WriteTuned(str(tmp_path / "tuned")).on_multirun_end(config(sweep))
    assert message in capsys.readouterr().err
    assert not (tmp_path / "tuned").exists()


def test_every_method_is_tuned_with_the_same_budget_and_learning_rates():
    budgets = set()
    for method in METHODS:
        with initialize_config_module("lightning_dist.conf", version_base="1.3"):
            options = [f"+sweep=tune/{method}", "experiment=digits_300"]
            composed_sweep = compose("train", options, return_hydra_config=True)
        sweeper = composed_sweep.hydra.sweeper
        assert composed_sweep.hydra.runtime.choices.distill == method
        params = OmegaConf.to_container(sweeper.params)
        budgets.add((sweeper.n_trials, params.pop("seed"), params["optimizer.lr"]))
        assert all(OmegaConf.select(composed_sweep, key) for key in params)
        config = composed("experiment=digits_300", f"distill={method}")
        assert config.tuned_keys == (list(params) if method in TUNED else [])
        for key in config.tuned_keys:
            low, high = map(float, re.findall(r"[0-9.]+", params[key]))
            assert low < OmegaConf.select(config, key) < high
    assert len(budgets) == 1


@pytest.mark.slow
def test_a_tuned_config_is_used_by_the_next_sweep_and_shown_by_its_report(
    tmp_path, command, capsys
):
    quick = ["print_config=false", "callbacks.progress=null", "trainer=cpu", "trainer.max_epochs=1"]
    sweep = ["experiment=digits_300", "hydra.sweeper.n_trials=2", "distill.loss.tau=2.5"]
    command("train", "-m", "+sweep=tune/kd", *sweep, *quick, "hydra.sweep.dir=sweep")
    runs = read_runs(tmp_path / "sweep")
    best = max(runs, key=lambda run: run.metrics["val/accuracy"]).overrides
    lr, weight = float(best["optimizer.lr"]), float(best["distill.weight"])
    with initialize_config_dir(str(tmp_path / "tuned"), version_base="1.3"):
        found = compose("own_tuned/digits_300/kd")
    assert found.optimizer.lr == lr
    assert found.distill.weight == weight
    options = ["hydra.sweep.dir=table", *quick, "--config-dir", "tuned"]
    command("train", "-m", "experiment=digits_300", "distill=kd", *options)
    assert read_runs(tmp_path / "table")[0].tuned == f"lr {lr:.3g}, weight {weight:.3g}"
