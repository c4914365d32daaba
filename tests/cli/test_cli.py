"""Tests of the command: the runs that it starts, its files, its output and its refusals."""

import json
import shlex
from importlib import metadata
from pathlib import Path

import pytest
import safetensors.torch
import torch

from lightning_dist import cli
from lightning_dist.cli.run.saved_config import CONFIG_KEY
from lightning_dist.tasks.classification import ClassificationModule

QUICK = ["trainer=cpu", "experiment=digits", "trainer.max_epochs=1"]
QUICK += ["print_config=false", "callbacks.progress=null"]


def results(folder: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(folder.rglob("result.json"))]


def test_train_leaves_a_result_a_checkpoint_and_curves(command, tmp_path, capsys):
    command("train", "seed=3", *QUICK, "print_config=true")
    (result,) = results(tmp_path / "outputs")
    assert result["status"] == "completed"
    assert result["metric"] == "test/accuracy"
    expected = {"val/loss", "val/accuracy", "test/loss", "test/accuracy"}
    assert set(result["metrics"]) == {*expected, "teacher/loss", "teacher/accuracy"}
    assert result["command"].startswith("lightning-dist train seed=3 trainer=cpu")
    assert result["student_parameters"] == 438
    assert result["teacher"] == "digits (digits_teacher.safetensors)"
    assert result["teacher_parameters"] == 94186
    assert (result["data"], result["student"]) == ("digits", "SmallCNN")
    (curves,) = tmp_path.rglob("metrics.csv")
    assert {"train/loss", "train/task", "train/distill"} < set(
        curves.read_text().split("\n")[0].split(",")
    )
    printed = capsys.readouterr().out
    assert "lightning_dist.models.small.SmallCNN" in printed  # The config is printed.
    assert Path(result["checkpoint"]).name in printed


def test_the_command_in_a_result_can_be_typed_again(command, tmp_path):
    command("train", "student.channels=[4, 8]", "distill=none", *QUICK)
    (result,) = results(tmp_path / "outputs")
    typed = shlex.split(result["command"])
    assert typed[:4] == ["lightning-dist", "train", "student.channels=[4, 8]", "distill=none"]
    assert typed[2:] == result["overrides"]
    assert result["teacher"] is None
    assert result["teacher_parameters"] is None


def test_eval_and_export_need_the_checkpoint_alone(command, tmp_path, capsys):
    command("train", *QUICK)
    (result,) = results(tmp_path / "outputs")
    capsys.readouterr()
    command("eval", f"ckpt={result['checkpoint']}", "trainer=cpu")
    assert str(result["metrics"]["test/accuracy"]) in capsys.readouterr().out
    command("export", f"ckpt={result['checkpoint']}", "file=student.safetensors")
    exported = safetensors.torch.load_file(tmp_path / "student.safetensors")
    checkpoint = torch.load(result["checkpoint"], weights_only=True)
    assert "teacher" not in checkpoint[CONFIG_KEY]["module"]
    saved = checkpoint["state_dict"]
    assert exported.keys() == {name.removeprefix("student.") for name in saved}
    assert all(torch.equal(value, saved["student." + name]) for name, value in exported.items())


def test_the_teacher_is_tested_in_its_own_view_of_the_images(command, tmp_path):
    bridge = "{_target_: lightning_dist.teacher.InputBridge, mean: [0.5], std: [0.5]"
    mean, std = "student_mean: ${data.mean}", "student_std: ${data.std}}"
    command("train", *QUICK, "hydra.run.dir=outputs/1")
    command("train", *QUICK, "hydra.run.dir=outputs/2", f"+teacher.inputs={bridge}, {mean}, {std}")
    command("train", *QUICK, "hydra.run.dir=outputs/3", "test_teacher=false")
    plain, bridged, untested = (run["metrics"] for run in results(tmp_path / "outputs"))
    assert plain["teacher/accuracy"] > 0.98
    assert bridged["teacher/accuracy"] != plain["teacher/accuracy"]
    assert "teacher/accuracy" not in untested


def test_the_averaged_weights_are_exported(command, tmp_path, capsys):
    command("train", *QUICK, "callbacks=[default,ema]", "callbacks.ema.decay=0.9")
    (result,) = results(tmp_path / "outputs")
    ckpt = f"ckpt={result['checkpoint']}"
    capsys.readouterr()
    command("eval", ckpt, "trainer=cpu")
    assert str(result["metrics"]["test/ema_accuracy"]) in capsys.readouterr().out
    command("export", ckpt, "ema=true", "file=average.safetensors")
    exported = safetensors.torch.load_file(tmp_path / "average.safetensors")
    saved = torch.load(result["checkpoint"], weights_only=True)["state_dict"]
    assert all(torch.equal(x, saved[f"student_ema.module.{name}"]) for name, x in exported.items())
    assert not all(torch.equal(x, saved[f"student.{name}"]) for name, x in exported.items())


def test_export_refuses_an_average_that_was_not_kept(command, tmp_path, capsys):
    command("train", *QUICK)
    (result,) = results(tmp_path / "outputs")
    with pytest.raises(SystemExit) as stop:
        command("export", f"ckpt={result['checkpoint']}", "ema=true")
    assert stop.value.code == 1
    assert (
        "holds no averaged weights: train with callbacks=[default,ema]" in capsys.readouterr().err
    )
    assert not (tmp_path / "student.safetensors").exists()


def test_a_run_resumes_from_a_checkpoint(command, tmp_path):
    command("train", *QUICK, "hydra.run.dir=outputs/1")
    command(
        "train",
        *QUICK,
        "trainer.max_epochs=2",
        "ckpt_path=outputs/1/checkpoints/last.ckpt",
        "hydra.run.dir=outputs/2",
    )
    steps = [
        torch.load(p, weights_only=True)["global_step"] for p in sorted(tmp_path.rglob("last.ckpt"))
    ]
    assert steps == [21, 42]


@pytest.mark.slow
def test_a_sweep_that_resumes_runs_only_what_is_missing(command, tmp_path, capsys):
    sweep = ["train", "-m", "seed=0,1", *QUICK, "hydra.sweep.dir=sweep"]
    command(*sweep)
    before = results(tmp_path / "sweep")
    kept, lost = (tmp_path / "sweep" / job / "result.json" for job in "01")
    stamp = kept.stat().st_mtime_ns
    lost.unlink()
    command(*sweep, "resume=true")
    assert kept.stat().st_mtime_ns == stamp
    after = results(tmp_path / "sweep")
    assert [run["metrics"] for run in after] == [run["metrics"] for run in before]
    assert [run["overrides"] for run in after] == [run["overrides"] for run in before]


@pytest.mark.slow
def test_resuming_in_another_runs_folder_is_refused(command, refused):
    command("train", *QUICK, "hydra.run.dir=run")
    again = ["train", *QUICK, "hydra.run.dir=run", "resume=true"]
    assert "run holds another run" in refused(*again, "optimizer.lr=0.02")
    Path("run/result.json").unlink()
    assert "other data, networks or settings" in refused(*again, "optimizer.lr=0.02")


def test_a_refused_attempt_leaves_the_result_of_a_completed_run(command, refused, tmp_path):
    command("train", *QUICK, "hydra.run.dir=run")
    result = tmp_path / "run" / "result.json"
    before = result.read_text()
    again = ["train", *QUICK, "hydra.run.dir=run"]
    assert "seed is 'abc'" in refused(*again, "seed=abc")
    assert "none.ckpt" in refused(*again, "ckpt_path=none.ckpt")
    assert result.read_text() == before
    (tmp_path / "run" / "checkpoints" / "last.ckpt").rename(tmp_path / "other.ckpt")
    line = refused(*again, "student.channels=[8,16]", "ckpt_path=other.ckpt")
    assert "other.ckpt does not fit" in line


@pytest.mark.parametrize("text", ["[]", "{", '{"status": "completed"}'])
def test_a_damaged_result_counts_as_none(command, tmp_path, text):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "result.json").write_text(text)
    command("train", *QUICK, "data.train_size=64", "hydra.run.dir=run", "resume=true")
    (result,) = results(tmp_path / "run")
    assert result["status"] == "completed"


def test_the_last_checkpoint_can_be_named_by_word(command, tmp_path):
    command("train", *QUICK, "scheduler=constant", "hydra.run.dir=run", "ckpt_path=last")
    assert "there is nothing to resume in" in (tmp_path / "run" / "train.log").read_text()
    command(
        "train",
        *QUICK,
        "scheduler=constant",
        "hydra.run.dir=run",
        "trainer.max_epochs=2",
        "ckpt_path=last",
    )
    saved = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 42
    rows = (tmp_path / "run" / "logs" / "metrics.csv").read_text().splitlines()
    assert sum(row.startswith("0,") for row in rows) > 1, "those of the first epoch are kept"


def test_students_with_and_without_a_teacher_start_and_train_alike(command, tmp_path):
    command("train", "distill=none", *QUICK)
    command("train", "distill=dist", "distill.weight=0", "hydra.run.dir=outputs/2", *QUICK)
    first, second = (
        {name: value for name, value in run["metrics"].items() if "teacher/" not in name}
        for run in results(tmp_path / "outputs")
    )
    assert first == second


@pytest.mark.slow
def test_a_sweep_ends_with_a_table_and_a_plot(command, tmp_path, capsys):
    command("train", "-m", "distill=none,dist", "seed=0,1", *QUICK)
    assert len(results(tmp_path / "multirun")) == 4
    printed = capsys.readouterr().out
    assert "distill" in printed
    assert "±" in printed
    (plot,) = (tmp_path / "multirun").rglob("report.png")
    assert plot.read_bytes().startswith(b"\x89PNG")
    page = plot.with_suffix(".html")
    assert str(page.relative_to(tmp_path)) in printed
    words = page.read_text()
    assert "val/accuracy" in words  # The page contains a learning curve.
    assert "438" in words
    assert "no teacher" in words
    command("report", "multirun", "--metric", "test/loss")
    assert "test/loss" in capsys.readouterr().out


def test_a_failed_run_leaves_its_reason(command, tmp_path):
    with pytest.raises(SystemExit):
        command("train", "num_classes=12", *QUICK)
    (result,) = results(tmp_path / "outputs")
    assert result["status"] == "failed"
    assert "num_classes=12 and the data has 10 classes: set num_classes=10" in result["error"]


def test_a_sweep_survives_a_failing_job(command, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        command("train", "-m", "data.train_size=64,100000,128", *QUICK)
    assert stop.value.code == 1
    found = results(tmp_path / "multirun")
    assert [run["status"] for run in found] == ["completed", "failed", "completed"]
    assert "train_size=100000" in found[1]["error"]
    printed = capsys.readouterr()
    assert "1 of 3 jobs failed" in printed.err
    assert "train_size=100000" in "".join(printed.out.split())


def test_the_version_is_that_of_the_package(command, capsys):
    with pytest.raises(SystemExit) as caught:
        command("--version")
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"lightning-dist {metadata.version('lightning-dist')}\n"


def test_help_lists_the_verbs(command, capsys):
    with pytest.raises(SystemExit) as caught:
        command("--help")
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert all(f"  {verb} " in printed for verb in cli.VERBS)


def test_a_checkpoint_of_another_program_is_refused(refused, tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    assert "other.ckpt holds no config" in refused("eval", "ckpt=other.ckpt")


@pytest.mark.parametrize(
    "target",
    [
        "os.mkdir",
        "torch.nn.functional.importlib.import_module",
        "lightning_dist.cli.os.mkdir",
        "lightning_dist.cli.main",
        "torch.load",
        "torchvision.datasets.utils.download_url",
        "timm.nothing.at.all",
        "timm.models.load_state_dict",
        "timm.models.load_checkpoint",
        "timm.task.DistillationTeacher",
        "torchmetrics.text.BERTScore",
        "lightning_dist.teacher.loading.load_teacher",
        "lightning_dist.DistillModule.load_from_checkpoint",
        "lightning_dist.__main__.main",
    ],
)
def test_a_checkpoint_that_names_other_code_is_refused(refused, tmp_path, target):
    config = {
        "module": {"_target_": "lightning_dist.DistillModule", "student": {"_target_": target}},
        "data": {"_target_": "lightning_dist.data.digits.DigitsDataModule"},
        "seed": 0,
    }
    torch.save({CONFIG_KEY: config, "state_dict": {}}, tmp_path / "hostile.ckpt")
    assert f"would run {target!r}" in refused("eval", "ckpt=hostile.ckpt")


def test_a_checkpoint_with_code_inside_is_refused(refused, tmp_path):
    class Runs:
        def __reduce__(self):
            return (Path.mkdir, (tmp_path / "trace",))

    torch.save({CONFIG_KEY: Runs()}, tmp_path / "hostile.ckpt")
    assert "hostile.ckpt is damaged, or contains" in refused("eval", "ckpt=hostile.ckpt")
    assert not (tmp_path / "trace").exists()


def test_a_teacher_that_cannot_be_tested_takes_no_results_away(
    command, tmp_path, monkeypatch, capsys
):
    def fail(module):
        raise RuntimeError("no such part")

    monkeypatch.setattr(ClassificationModule, "teacher_network", fail)
    command("train", *QUICK, "test_teacher=true")
    (result,) = results(tmp_path / "outputs")
    assert result["status"] == "completed"
    assert "test/accuracy" in result["metrics"]
    assert not any(name.startswith("teacher/") for name in result["metrics"])
    assert "the teacher cannot be tested (RuntimeError: no such part)" in capsys.readouterr().out


def test_a_complete_run_is_the_same_run_whatever_it_displays(command, tmp_path, capsys):
    own = [x for x in QUICK if not x.startswith(("print_config", "callbacks.progress"))]
    command("train", *QUICK, "hydra.run.dir=run")
    command("train", *own, "hydra.run.dir=run", "resume=true")
    assert "is complete: nothing to do" in capsys.readouterr().out


def test_a_test_on_the_validation_set_is_called_so(command, tmp_path, capsys):
    command("train", *QUICK, "data.val_fraction=0")
    (result,) = results(tmp_path / "outputs")
    assert result["test_set"] == "validation"
    assert "test on the validation set" in capsys.readouterr().out
    command("report", "outputs")
    assert "test/ of all runs is on the validation set" in capsys.readouterr().out
