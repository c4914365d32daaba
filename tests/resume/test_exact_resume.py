"""Tests that a run loses nothing if it is interrupted or cannot write a file."""

import json
import os
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import nn

from disk import almost_full_disk
from interruption import Send
from lightning_dist import DistillModule
from lightning_dist.data.digits import DigitsDataModule
from lightning_dist.resume import ExactResume, Interrupted, ResumableCSVLogger
from lightning_dist.resume.checkpoint_io import AtomicCheckpointIO
from processes import TIMEOUT, wait_until

QUICK = ["train", "experiment=digits", "trainer=cpu", "print_config=false"]
QUICK += ["callbacks.progress=null", "test_teacher=false", "hydra.run.dir=run"]


def dropout_module() -> DistillModule:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 10))
    return DistillModule(network, nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))


@pytest.fixture
def fit(make_trainer: Callable[..., L.Trainer], tmp_path: Path) -> Callable[..., DistillModule]:
    """Return a function that trains a student with dropout for two epochs of 21 batches."""

    def run(name: str, *callbacks: Callback, resume: bool = False, **kwargs: object):
        module = dropout_module()
        saver = ModelCheckpoint(tmp_path / name, save_last=True, enable_version_counter=False)
        trainer = make_trainer(
            enable_checkpointing=True,
            max_epochs=2,
            log_every_n_steps=1,
            callbacks=[saver, ExactResume(seed=3), *callbacks],
            logger=ResumableCSVLogger(tmp_path, name, version=""),
            **kwargs,
        )
        data = DigitsDataModule(global_batch_size=64, augment=True)
        checkpoint = tmp_path / name / "last.ckpt" if resume else None
        trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
        return module

    return run


@pytest.fixture(scope="module")
def whole_runs() -> dict[str, tuple[dict, str]]:
    """Return a dict in which tests store the weights and curves of uninterrupted runs."""
    return {}


@pytest.mark.slow
@pytest.mark.parametrize("limits", [{}, {"max_steps": 42}], ids=["epochs", "steps"])
@pytest.mark.parametrize(
    ("batch", "number", "status"),
    [
        *((batch, signal.SIGTERM, 143) for batch in (0, 12, 20, 30, 41)),
        *((batch, signal.SIGINT, 130) for batch in (12, 20)),
    ],
)
def test_a_run_that_a_signal_stopped_resumes_to_the_last_bit(
    fit, whole_runs, tmp_path, number, status, batch, limits
):
    if str(limits) not in whole_runs:
        weights = fit("whole", **limits).state_dict()
        whole_runs[str(limits)] = weights, (tmp_path / "whole" / "metrics.csv").read_text()
    weights, curves = whole_runs[str(limits)]
    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(Interrupted) as stopped:
        fit("stopped", Send(number, batch), **limits)
    assert stopped.value.code == status
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == before
    saved = torch.load(tmp_path / "stopped" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == batch + 1  # The batch of the signal was completed.
    resumed = fit("stopped", resume=True, **limits)
    for name, value in weights.items():
        assert torch.equal(resumed.state_dict()[name], value)
    assert (tmp_path / "stopped" / "metrics.csv").read_text() == curves


def test_a_run_completes_the_accumulation_of_gradients_before_it_stops(fit, tmp_path):
    whole = fit("whole", accumulate_grad_batches=4)
    with pytest.raises(Interrupted):
        fit("stopped", Send(signal.SIGTERM, 9), accumulate_grad_batches=4)
    saved = torch.load(tmp_path / "stopped" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 3
    resumed = fit("stopped", resume=True, accumulate_grad_batches=4)
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value)


def test_a_steps_random_numbers_do_not_depend_on_earlier_draws(fit):
    class DrawBetween(Callback):
        def on_train_batch_end(self, *args) -> None:
            torch.rand(7)

    class DrawWithin(Callback):
        def on_train_batch_start(self, *args) -> None:
            torch.rand(7)

    plain, between, within = (
        fit(f"run{i}", *callbacks).student[2].weight
        for i, callbacks in enumerate([(), (DrawBetween(),), (DrawWithin(),)])
    )
    assert torch.equal(plain, between)
    assert not torch.equal(plain, within)


def test_a_second_ctrl_c_ends_the_run_at_once(fit):
    class Twice(Callback):
        def on_before_backward(self, trainer, pl_module, loss) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    # Lightning ends the process after a KeyboardInterrupt.
    with pytest.raises(SystemExit) as stopped:
        fit("run", Twice())
    assert stopped.value.code == 1
    # After its handling, Lightning leaves the signal ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)


class SendIn(Callback):
    """A callback that sends SIGTERM to its process in a hook."""

    def __init__(self, hook: str) -> None:
        setattr(self, hook, self.send)

    def send(self, *_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


class SendAtStart(DistillModule):
    """A module that sends SIGTERM when Lightning has just installed its handlers for a stage."""

    stage = "fit"

    def zero_grad(self, *args: object, **kwargs: object) -> None:
        if (
            self.trainer.state.fn == self.stage
            and not self.trainer.fit_loop.epoch_progress.total.ready
        ):
            os.kill(os.getpid(), signal.SIGTERM)
        super().zero_grad(*args, **kwargs)


@pytest.mark.parametrize(
    "hook",
    ["on_train_epoch_end", "on_train_end", "on_test_start", "on_test_batch_end", "on_test_end"],
)
def test_a_signal_near_the_end_never_reads_as_done(make_trainer, hook):
    trainer = make_trainer(limit_train_batches=2, limit_val_batches=0, limit_test_batches=1)
    trainer.callbacks += [ExactResume(), SendIn(hook)]

    def fit_and_test() -> None:
        trainer.fit(dropout_module(), DigitsDataModule())
        trainer.test(dropout_module(), DigitsDataModule(), verbose=False)

    with pytest.raises(Interrupted) as stopped:
        fit_and_test()
    assert stopped.value.code == 143
    assert trainer.state.fn == ("test" if "test" in hook else "fit")


@pytest.mark.parametrize("stage", ["fit", "test"])
def test_a_signal_before_the_first_hook_of_a_stage_is_not_missed(make_trainer, monkeypatch, stage):
    monkeypatch.setattr(SendAtStart, "stage", stage)
    module = SendAtStart(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))
    trainer = make_trainer(limit_train_batches=2, limit_val_batches=0, limit_test_batches=1)
    trainer.callbacks += [ExactResume()]
    with pytest.raises(Interrupted) as stopped:
        getattr(trainer, stage)(module, DigitsDataModule())
    assert stopped.value.code == 143
    assert trainer.global_step == 0


@pytest.mark.parametrize("stage", ["fit", "test"])
def test_a_signal_while_lightning_ends_a_stage_keeps_its_status(make_trainer, monkeypatch, stage):
    trainer = make_trainer(limit_train_batches=2, limit_val_batches=0, limit_test_batches=1)
    trainer.callbacks += [ExactResume()]
    clean_up = CombinedLoader.reset

    def interrupted(loader: CombinedLoader) -> None:
        monkeypatch.undo()
        clean_up(loader)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(CombinedLoader, "reset", interrupted)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted) as stopped:
        getattr(trainer, stage)(dropout_module(), DigitsDataModule())
    assert stopped.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("stage", ["fit", "test"])
def test_a_signal_while_an_object_is_deleted_is_not_missed(make_trainer, stage):
    class Deleted:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    class Delete(Callback):
        def on_train_end(self, trainer, pl_module) -> None:
            Deleted()

        on_test_end = on_train_end

    trainer = make_trainer(limit_train_batches=2, limit_val_batches=0, limit_test_batches=1)
    trainer.callbacks += [ExactResume(), Delete()]
    with pytest.raises(Interrupted) as stopped:
        getattr(trainer, stage)(dropout_module(), DigitsDataModule())
    assert stopped.value.code == 143


def test_a_run_without_checkpoints_stops_and_says_that_nothing_is_saved(make_trainer, caplog):
    trainer = make_trainer(callbacks=[ExactResume(), Send(signal.SIGTERM, 3)])
    with pytest.raises(Interrupted), caplog.at_level("INFO"):
        trainer.fit(dropout_module(), DigitsDataModule())
    assert trainer.global_step == 4
    assert "SIGTERM: stopped at step 4, nothing is saved" in caplog.text


def test_a_run_without_a_resume_replaces_the_curves(tmp_path):
    for value in (1.0, 2.0):
        logger = ResumableCSVLogger(tmp_path, "run", version="")
        logger.log_metrics({"loss": value}, step=0)
        logger.save()
    assert (tmp_path / "run" / "metrics.csv").read_text() == "loss,step\n2.0,0\n"


def test_rewound_curves_keep_the_rows_before_a_step_and_their_columns(tmp_path):
    logger = ResumableCSVLogger(tmp_path, "run", version="")
    for step in range(4):
        logger.log_metrics({"loss": step} | ({"late": 1} if step == 3 else {}), step=step)
    logger.save()
    path = tmp_path / "run" / "metrics.csv"
    with path.open("a") as file:
        file.write("1,")  # The last row was not written completely.
    again = ResumableCSVLogger(tmp_path, "run", version="")
    again.rewind(2)
    assert path.read_text() == "loss,step\n0,0\n1,1\n"
    again.log_metrics({"loss": 2, "accuracy": 0.5}, step=2)
    again.save()
    assert path.read_text() == "accuracy,loss,step\n,0,0\n,1,1\n0.5,2,2\n"


def test_a_full_disk_leaves_the_previous_checkpoint_intact(tmp_path):
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"weights": torch.zeros(100)}, path)
    whole = path.read_bytes()
    refusal = pytest.raises(OSError, match=r"File too large.*is intact: delete other files")
    with almost_full_disk(50_000), refusal:
        AtomicCheckpointIO().save_checkpoint({"weights": torch.zeros(100_000)}, path)
    assert path.read_bytes() == whole
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_run_with_a_full_disk_ends_with_one_line_and_resumes(refused, command, tmp_path):
    command(*QUICK, "trainer.max_epochs=1")
    (tmp_path / "run" / "result.json").unlink()
    before = (tmp_path / "run" / "checkpoints" / "last.ckpt").read_bytes()
    with almost_full_disk(10_000):
        line = refused(*QUICK, "trainer.max_epochs=2", "ckpt_path=run/checkpoints/last.ckpt")
    assert re.search(r"cannot write the checkpoint .*best.ckpt: .*checkpoint is intact", line)
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").read_bytes() == before
    command(*QUICK, "trainer.max_epochs=2", "ckpt_path=run/checkpoints/last.ckpt")


def test_a_folder_that_cannot_be_written_to_is_refused_before_training(refused, tmp_path):
    (tmp_path / "file").touch()
    line = refused("train", "trainer=cpu", "callbacks.checkpoint.dirpath=file/checkpoints")
    assert "cannot write checkpoints to" in line
    assert "Not a directory" in line
    assert "Not a directory" in refused("train", "trainer=cpu", "hydra.run.dir=file/run")


def test_a_run_with_one_batch_per_epoch_stops_too(fit, tmp_path):
    with pytest.raises(Interrupted):
        fit("stopped", Send(signal.SIGTERM, 0), limit_train_batches=1)
    whole = fit("whole", limit_train_batches=1)
    resumed = fit("stopped", resume=True, limit_train_batches=1)
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value)


def test_an_interruption_and_the_end_of_an_epoch_save_under_one_name(make_trainer, tmp_path):
    # ModelCheckpoint writes last-v1.ckpt if it does not know that it wrote last.ckpt.
    saver = ModelCheckpoint(tmp_path, save_last=True)
    trainer = make_trainer(
        enable_checkpointing=True, callbacks=[saver, ExactResume(), Send(signal.SIGTERM, 3)]
    )
    with pytest.raises(Interrupted):
        trainer.fit(dropout_module(), DigitsDataModule())
    trainer = make_trainer(
        enable_checkpointing=True,
        callbacks=[ModelCheckpoint(tmp_path, save_last=True), ExactResume()],
    )
    trainer.fit(
        dropout_module(), DigitsDataModule(), ckpt_path=tmp_path / "last.ckpt", weights_only=True
    )
    assert [path.name for path in tmp_path.glob("last*")] == ["last.ckpt"]
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 21


@pytest.mark.parametrize(
    "options",
    [
        ["trainer.max_epochs=2"],
        [
            *("trainer.max_epochs=9", "callbacks=[default,early_stopping]"),
            *("callbacks.early_stopping.patience=1", "optimizer.lr=0"),
        ],
        ["trainer.max_epochs=3", "trainer.max_steps=30"],
    ],
    ids=["all epochs", "early stopping", "ends in mid-epoch"],
)
def test_a_run_that_was_killed_in_its_test_resumes_with_the_same_result(command, tmp_path, options):
    command(*QUICK, *options)
    folder = tmp_path / "run"
    result, curves = json.loads((folder / "result.json").read_text()), folder / "logs/metrics.csv"
    before = curves.read_text()
    curves.write_text(before[: before.rindex("\n", 0, -1) + 1])  # Delete the row of the test.
    (folder / "result.json").write_text(json.dumps(result | {"status": "failed"}))
    command(*QUICK, *options, "resume=true")
    assert json.loads((folder / "result.json").read_text())["metrics"] == result["metrics"]
    assert curves.read_text() == before


@pytest.fixture
def start_sweep(processes, tmp_path) -> Callable[..., subprocess.Popen]:
    """Return a function that starts a sweep of very long runs and waits until the first trains."""

    def start(*options: str) -> subprocess.Popen:
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        command = ["-m", "lightning_dist", "train", "-m", "experiment=digits", *options]
        command += ["trainer.max_epochs=1000000", "print_config=false", "hydra.sweep.dir=sweep"]
        sweep = processes.start(*command, cwd=tmp_path, **quiet)
        curves = tmp_path / "sweep" / "0" / "logs" / "metrics.csv"
        wait_until(lambda: curves.exists() or sweep.poll() is not None)
        assert sweep.poll() is None
        return sweep

    return start


@pytest.mark.slow
@pytest.mark.parametrize(
    "how", [["own_process=true"], ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]], ids=str
)
def test_runs_of_a_sweep_that_is_killed_save_and_end(start_sweep, processes, tmp_path, how):
    sweep = start_sweep("trainer=cpu", *how)
    sweep.kill()
    sweep.wait()
    run = tmp_path / "sweep" / "0"
    wait_until(lambda: "stopped by SIGTERM" in (run / "result.json").read_text())
    assert (run / "checkpoints" / "last.ckpt").exists()
    if how == ["own_process=true"]:  # joblib's workers do not end: they wait for another job.
        wait_until(lambda: not processes.alive())


@pytest.mark.slow
def test_a_sweep_that_a_signal_stops_lets_its_processes_save(start_sweep, processes, tmp_path):
    sweep = start_sweep("trainer=ddp_sim", "seed=0,1")
    sweep.terminate()
    assert sweep.wait(timeout=TIMEOUT) == 143
    assert not processes.alive()
    run = tmp_path / "sweep" / "0"
    assert (run / "checkpoints" / "last.ckpt").exists()
    assert "stopped by SIGTERM" in (run / "result.json").read_text()
    assert not (tmp_path / "sweep" / "1").exists()


def test_a_run_in_a_renamed_folder_keeps_its_best_checkpoint(make_trainer, tmp_path):
    def fit(folder: Path, epochs: int) -> ModelCheckpoint:
        options = {"monitor": "val/loss", "mode": "max", "enable_version_counter": False}
        best = ModelCheckpoint(folder, filename="best", **options)
        last = ModelCheckpoint(folder, filename="last", enable_version_counter=False)
        callbacks = [best, last, ExactResume()]
        trainer = make_trainer(
            enable_checkpointing=True, max_epochs=epochs, limit_train_batches=2, callbacks=callbacks
        )
        known = folder / "last.ckpt" if folder.exists() else None
        data = DigitsDataModule()
        trainer.fit(dropout_module(), data, ckpt_path=known, weights_only=True)
        return best

    before = fit(tmp_path / "run", 1)  # With mode="max", the loss of the first epoch is the best.
    saved = torch.load(tmp_path / "run" / "best.ckpt", weights_only=True)
    (tmp_path / "run").rename(tmp_path / "renamed")
    after = fit(tmp_path / "renamed", 3)
    assert after.best_model_path == str(tmp_path / "renamed" / "best.ckpt")
    assert after.best_model_score == before.best_model_score
    kept = torch.load(after.best_model_path, weights_only=True)
    assert kept["global_step"] == saved["global_step"]


@pytest.mark.parametrize("contents", [None, "step,a\n1," + 200_000 * "x", "step,a\n" + 5000 * "9"])
def test_a_log_of_another_program_is_refused_by_name(tmp_path, contents):
    """None: a link to a device, which never ends."""
    path = tmp_path / "metrics.csv"
    path.write_text(contents) if contents else path.symlink_to("/dev/zero")
    logger = ResumableCSVLogger(tmp_path, name="", version="")
    with pytest.raises((OSError, ValueError), match=r"metrics\.csv is (no regular|damaged)"):
        logger.rewind(5)
