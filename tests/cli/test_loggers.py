"""Tests of the loggers and callbacks that the config chooses, and of the values that they log."""

import csv
import json
import sys
from pathlib import Path

import pytest
import yaml
from mlflow.tracking import MlflowClient
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

QUICK = ["trainer=cpu", "experiment=digits", "trainer.max_epochs=2"]
QUICK += ["print_config=false", "data.train_size=128"]
PLAIN = [*QUICK, "callbacks.progress=null", "test_teacher=false"]


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "logs" / "metrics.csv") as file:
        return list(csv.DictReader(file))


def column(folder: Path, name: str) -> list[float]:
    return [float(row[name]) for row in rows(folder) if row.get(name)]


@pytest.mark.slow
def test_all_loggers_at_once_are_told_the_same(command, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    command(
        *("train", "-m", "seed=0,1", "logger=[csv,tensorboard,wandb,mlflow]"),
        *("logger.wandb.offline=true", "hydra.sweep.dir=sweep", *QUICK, "callbacks.progress=null"),
    )
    mlflow = MlflowClient("sqlite:///mlflow.db")
    experiment = mlflow.get_experiment_by_name("lightning-dist")
    of_seed = {
        run.data.params["seed"]: run for run in mlflow.search_runs([experiment.experiment_id])
    }
    assert of_seed.keys() == {"0", "1"}
    for seed in ("0", "1"):
        folder = tmp_path / "sweep" / seed
        expected = json.loads((folder / "result.json").read_text())["metrics"]
        assert "teacher/accuracy" in expected

        for name in ("logs", "tensorboard"):
            saved = yaml.safe_load((folder / name / "hparams.yaml").read_text())
            assert str(saved["seed"]) == seed
            assert saved["optimizer"]["lr"] == 0.01
            assert saved["callbacks"]["checkpoint"]["dirpath"] == str(folder / "checkpoints")
        (run,) = (folder / "wandb").glob("offline-run-*")  # There is one run for each job.
        assert [file.suffix for file in run.glob("run-*")] == [".wandb"]
        events = EventAccumulator(str(folder / "tensorboard")).Reload()
        for name, value in expected.items():
            assert column(folder, name)[-1] == pytest.approx(value)
            assert events.Scalars(name)[-1].value == pytest.approx(value)
            assert of_seed[seed].data.metrics[name] == pytest.approx(value)
        assert of_seed[seed].info.status == "FINISHED"
        assert of_seed[seed].data.params["distill/loss/tau"] == "1.0"


def test_the_config_chooses_early_stopping_learning_rates_and_throughput(command, tmp_path):
    command(
        *("train", "callbacks=[default,early_stopping,lr_monitor,throughput]", *PLAIN),
        *("trainer.max_epochs=20", "callbacks.early_stopping.patience=2", "optimizer.lr=0"),
        *("callbacks.throughput.window_size=3", "trainer.log_every_n_steps=1"),
        *("hydra.run.dir=run", "data.global_batch_size=32"),
    )
    run = tmp_path / "run"
    # These are the first epoch, and two epochs without an improvement.
    assert len(column(run, "val/accuracy")) == 3
    assert column(run, "lr-AdamW") == [0.0] * 3
    samples = column(run, "train/device/samples_per_sec")
    assert samples == pytest.approx([32 * x for x in column(run, "train/device/batches_per_sec")])
    assert len(samples) > 3
    assert (run / "checkpoints" / "best.ckpt").exists()
    assert (run / "checkpoints" / "last.ckpt").exists()


def test_the_summary_counts_the_student_alone(command, tmp_path, capsys):
    command("train", *QUICK, "test_teacher=false", "trainer.max_epochs=1")
    printed = capsys.readouterr().out
    assert "Trainable params: 438 " in printed
    assert "Total params: 438 " in printed
    summary = printed[printed.index("Name") : printed.index("Trainable params")]
    assert "student" in summary
    assert "eacher" not in summary


def test_a_learning_rate_needs_a_logger(refused, tmp_path):
    options = ["callbacks=[default,lr_monitor]", "logger=none", "callbacks.progress=null"]
    message = refused("train", *options, *PLAIN)
    assert "LearningRateMonitor" in message
    assert "no logger" in message


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_logger_that_is_not_installed_is_named_with_its_extra(refused, monkeypatch, name):
    monkeypatch.setattr(f"lightning.pytorch.loggers.{name}._{name.upper()}_AVAILABLE", False)
    monkeypatch.setitem(sys.modules, name, None)
    message = refused("train", f"logger={name}", *PLAIN)
    assert f"pip install 'lightning-dist[{name}]'" in message
