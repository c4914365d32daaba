"""Tests that a sweep writes its best settings to a config, and that the config is used."""

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
METHODS = ["at", "dist", "dist_plus", "dkd", "kd", "lskd", "sp"]


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
    text = (tmp_path / "tuned" / "distill" / "kd" / "mine.yaml").read_text()
    assert yaml.safe_load(text) == {"weight": 1, "loss": {"tau": 2}}
    assert text.startswith("# @package distill\n")
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


@pytest.mark.parametrize("kind", ["other key", "failed", "nan", "one setting", "foreign"])
def test_settings_that_cannot_be_compared_are_not_written(tmp_path, put_run, kind, capsys):
    message = {
        "other key": "varies optimizer.lr",
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
    if kind == "other key":
        put_run(sweep / "lr", "distill=kd", "optimizer.lr=1", metrics={"val/x": 0.9})
    with pytest.raises(SystemExit):
        WriteTuned(str(tmp_path / "tuned")).on_multirun_end(config(sweep))
    assert message in capsys.readouterr().err
    assert not (tmp_path / "tuned").exists()


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_tuned_with_the_same_number_of_trials(method):
    with initialize_config_module("lightning_dist.conf", version_base="1.3"):
        options = [f"+sweep=tune/{method}", "experiment=digits_300"]
        sweeper = compose("train", options, return_hydra_config=True).hydra.sweeper
        params = OmegaConf.to_container(sweeper.params)
    assert params.pop("distill") == method
    assert params.pop("seed") == "100,101"
    trials = 1
    for key, values in params.items():
        assert OmegaConf.select(composed("experiment=digits_300", f"distill={method}"), key)
        trials *= len(str(values).split(","))
    assert trials == 12


@pytest.mark.slow
def test_a_tuned_config_is_used_by_the_next_sweep(tmp_path, command):
    quick = ["print_config=false", "callbacks.progress=null", "trainer=cpu", "trainer.max_epochs=1"]
    sweep = ["experiment=digits_300", "seed=1", "distill.weight=3,5", "distill.loss.tau=2.5"]
    command("train", "-m", "+sweep=tune/kd", *sweep, *quick, "hydra.sweep.dir=sweep")
    runs = read_runs(tmp_path / "sweep")
    best = max(runs, key=lambda run: run.metrics["val/accuracy"]).overrides["distill.weight"]
    with initialize_config_dir(str(tmp_path / "tuned"), version_base="1.3"):
        found = compose("distill/kd/digits_300")
    assert found.distill == {"weight": int(best), "loss": {"tau": 2.5}}
    command("train", "experiment=digits_300", "distill=kd", *quick, "--config-dir", "tuned")
