"""Tests of sweeps: launchers, the search with Optuna, and jobs that fail or are killed."""

import csv
import json
import shlex
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import optuna
import pytest
from hydra.errors import HydraException
from omegaconf import OmegaConf
from optuna.trial import FrozenTrial, TrialState

import lightning_dist
from hydra_plugins.lightning_dist_optuna.sweeper import STUDY, OptunaSweeper, open_storage

ASSETS = Path(lightning_dist.__file__).parent / "assets"
QUICK = ["trainer=cpu", "trainer.max_epochs=1", "print_config=false", "callbacks.progress=null"]
TINY = [*QUICK, "data.train_size=64", "test_teacher=false"]
# joblib's workers also run the jobs of later sweeps, but stay in the folder where they started. So
# the tests give hydra.sweep.dir as a full path.
JOBLIB = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]


def results(folder: Path) -> list[dict]:
    """Return the result of each job, in the order of the jobs."""
    paths = sorted(folder.glob("*/result.json"), key=lambda path: int(path.parent.name))
    return [json.loads(path.read_text()) for path in paths]


@pytest.fixture
def ends_badly(command, capsys):
    """Return a function that runs a failing command and returns the last line that it prints."""

    def run(*arguments: str) -> str:
        with pytest.raises(SystemExit) as stop:
            command(*arguments)
        assert stop.value.code == 1
        return capsys.readouterr().err.strip().splitlines()[-1]

    return run


@pytest.mark.slow
def test_six_runs_complete_through_joblib_with_loader_workers(command, tmp_path):
    sweep = ["distill=none,kd,dist", "seed=0,1", "data.num_workers=1", *TINY]
    command("train", "-m", *JOBLIB, *sweep, f"hydra.sweep.dir={tmp_path}/sweep")
    found = results(tmp_path / "sweep")
    assert [run["status"] for run in found] == ["completed"] * 6
    assert len({tuple(run["overrides"]) for run in found}) == 6
    folders = [path for path in (tmp_path / "sweep").iterdir() if path.is_dir()]
    assert len(folders) == 6
    assert len(list((tmp_path / "sweep").glob("*/checkpoints/last.ckpt"))) == 6
    with open(tmp_path / "sweep" / "report.csv") as file:
        assert len(list(csv.DictReader(file))) == 6
    command("train", "distill=dist", "seed=1", *TINY, "hydra.run.dir=single/0")
    (single,) = results(tmp_path / "single")
    assert single["metrics"] == found[5]["metrics"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher", [JOBLIB, ["hydra/launcher=submitit_local"]], ids=lambda x: x[0]
)
def test_resume_runs_only_missing_jobs_and_a_failing_job_ends_no_other(
    command, ends_badly, tmp_path, launcher
):
    sizes, common = "data.train_size=64,100000", [*QUICK, "test_teacher=false"]
    command("train", "-m", "data.train_size=64", *common, f"hydra.sweep.dir={tmp_path}/sweep")
    (before,) = results(tmp_path / "sweep")
    line = ends_badly(
        *("train", "-m", *launcher, sizes, *common, "resume=true"),
        f"hydra.sweep.dir={tmp_path}/sweep",
    )
    assert "1 of 2 jobs failed" in line
    found = results(tmp_path / "sweep")
    assert "train_size=100000" in found[1]["error"]
    assert found[0] == before


def test_a_sweep_in_a_folder_with_runs_is_refused_before_its_first_job(refused, put_run, tmp_path):
    put_run(tmp_path / "sweep" / "0", "seed=7", status="failed", error="an old one")
    put_run(tmp_path / "sweep" / "5", "seed=8")
    line = refused("train", "-m", "seed=0,1", *TINY, "hydra.sweep.dir=sweep")
    assert "sweep contains 2 runs already: continue with resume=true, or choose another" in line
    assert {path.name for path in (tmp_path / "sweep").iterdir() if path.is_dir()} == {"0", "5"}


def test_a_sweep_whose_report_cannot_be_written_fails_and_counts_its_failures(
    ends_badly, put_run, tmp_path
):
    """The folder has an older run, which optimises another metric. It is counted as a job too.

    An older run whose file is broken is left out of the report, but it is counted as failed.
    """
    other = put_run(tmp_path / "sweep" / "9", "seed=9", metric="test/miou")
    monitors = "monitor=val/accuracy,val/nothing"
    options = [*TINY, "resume=true", "hydra.sweep.dir=sweep"]
    line = ends_badly("train", "-m", monitors, *options)
    assert "there is no report: runs disagree on the metric" in line
    assert line.endswith("; 1 of 3 jobs failed")
    (other / "result.json").write_text("{")
    line = ends_badly("train", "-m", monitors, *options)
    assert line.endswith("; 2 of 3 jobs failed")


def test_the_command_of_a_trial_runs_alone_without_the_pruning_of_its_search(command, tmp_path):
    """The command in a trial's result leaves out callbacks.pruning, which only a search has."""
    options = [*TINY, "hydra/sweeper=optuna", "hydra.sweeper.n_trials=1", "hydra.sweep.dir=sweep"]
    pruning = ["callbacks.pruning.pruner.n_warmup_steps=1", "~callbacks.pruning.monitor"]
    pruning += ["++callbacks.pruning.monitor=val/accuracy"]
    command("train", "-m", *options, *pruning)
    (trial,) = results(tmp_path / "sweep")
    assert set(pruning) <= {*trial["overrides"]}
    assert "pruning" not in trial["command"]
    command(*shlex.split(trial["command"])[1:], "hydra.run.dir=single/0")
    (single,) = results(tmp_path / "single")
    assert single["metrics"] == trial["metrics"]


def test_the_error_for_a_folder_of_another_run_says_how_to_merge(ends_badly, put_run, tmp_path):
    put_run(tmp_path / "run", "seed=7")
    line = ends_badly("train", *TINY, "resume=true", "hydra.run.dir=run")
    assert "another run (seed=7)" in line
    assert "another folder (two sweeps are merged by lightning-dist report DIR DIR)" in line


# A sweep of two jobs. In one, os.abort is called instead of building a callback, and kills the
# process as a crash in C code does. The callback Timer of the other changes nothing.
DIES = "+callbacks.broken._target_=os.abort,lightning.pytorch.callbacks.Timer"


@pytest.mark.slow
def test_a_killed_job_with_its_own_process_ends_no_other_job(ends_badly, tmp_path):
    options = ["own_process=true", *TINY, f"hydra.sweep.dir={tmp_path}/sweep"]
    assert "1 of 2 jobs failed" in ends_badly("train", "-m", DIES, *options)
    killed, other = results(tmp_path / "sweep")
    assert killed["status"] == "failed"
    assert killed["error"] == "the job ended with exit status -6"
    assert other["status"] == "completed"


@pytest.mark.slow
def test_a_launcher_that_loses_a_job_says_what_to_do(ends_badly, tmp_path):
    line = ends_badly("train", "-m", *JOBLIB, DIES, *TINY, f"hydra.sweep.dir={tmp_path}/sweep")
    assert line.startswith("lightning-dist: error: the launcher lost a job, which was killed")
    assert "own_process=true" in line
    assert "resume=true" in line
    killed = results(tmp_path / "sweep")[0]
    assert killed["status"] == "failed"
    assert "was killed" in killed["error"]


@pytest.fixture
def with_experiment(tmp_path):
    """Return a function that writes experiment=late and returns the options for its folder."""

    def write(text: str) -> list[str]:
        folder = tmp_path / "mine" / "experiment"
        folder.mkdir(parents=True)
        header = "# @package _global_\ndefaults:\n  - /experiment/digits\n"
        (folder / "late.yaml").write_text(header + text)
        return ["--config-dir", str(tmp_path / "mine")]

    return write


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("  - override /hydra/launcher: joblib\n", "hydra/launcher=joblib"),
        ("  - override /hydra/sweeper: optuna\n", "hydra/sweeper=optuna"),
    ],
)
def test_a_sweep_over_experiments_is_refused_if_one_chooses_a_launcher_or_sweeper(
    refused, tmp_path, with_experiment, text, advice
):
    options = with_experiment(text)
    message = refused("train", "-m", *options, "experiment=digits,late", *TINY)
    assert "experiment=late sets hydra." in message
    assert advice in message
    assert not list(tmp_path.rglob("result.json"))


def test_the_papers_sweeps_are_launched(refused, tmp_path):
    """Both jobs of this sweep start, and fail because there is no ImageNet here."""
    options = ["distill=none", "trainer=cpu", "print_config=false"]
    line = refused("train", "-m", "+sweep=imagenet", *options)
    assert "2 of 2 jobs failed" in line


def test_a_sweep_over_experiments_that_choose_no_launcher_is_launched(
    command, tmp_path, with_experiment
):
    command("train", "-m", *with_experiment(""), "experiment=late,digits", *TINY)
    assert len(list(tmp_path.rglob("result.json"))) == 2


def test_an_error_names_the_extra_of_a_missing_package(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    missing = [
        ("ray", ["-m", "hydra/launcher=ray"]),
        ("optuna", ["-m", "hydra/sweeper=optuna"]),
        ("deepspeed", ["trainer=deepspeed"]),
    ]
    for extra, options in missing:
        message = refused("train", *options, *[x for x in TINY if x != "trainer=cpu"])
        assert f"pip install 'lightning-dist[{extra}]'" in message


def study(folder: Path) -> list[FrozenTrial]:
    storage = open_storage(folder / "optuna.journal")
    return optuna.load_study(study_name=STUDY, storage=storage).trials


@pytest.fixture
def search(tmp_path):
    """Return a function that runs a search without training.

    A job returns the value for its number in `results`, or its number if `results` has no value.
    """

    class Launcher:
        def __init__(self, results: dict[int, float]) -> None:
            self.results = results

        def launch(self, jobs, initial_job_idx):
            numbers = range(initial_job_idx, initial_job_idx + len(jobs))
            return [SimpleNamespace(return_value=self.results.get(x, float(x))) for x in numbers]

    def run(*sweeps: str, resume: bool = False, results=None, **options) -> list[FrozenTrial]:
        sampler = optuna.samplers.TPESampler(seed=0)
        options = {"n_trials": 2, "n_jobs": 1, "sampler": sampler, **options}
        sweeper = OptunaSweeper(storage=str(tmp_path / "optuna.journal"), **options)
        sweep = {"dir": str(tmp_path), "subdir": "job${hydra.job.num}"}
        hydra = {"sweep": sweep, "job": {"num": "???"}}
        known = {"resume": resume, "monitor": "val/accuracy", "monitor_mode": "max"}
        sweeper.config = OmegaConf.create({**known, "x": 0, "y": 0, "hydra": hydra})
        sweeper.launcher = Launcher(results or {})
        sweeper.sweep(list(sweeps))
        return study(tmp_path)

    return run


def test_a_resumed_search_does_not_draw_its_first_trials_again(search):
    search("x=interval(0.0,1.0)", n_trials=3)
    trials = search("x=interval(0.0,1.0)", n_trials=6, resume=True)
    assert len({trial.params["x"] for trial in trials}) == 6


@pytest.mark.parametrize("name", ["n_trials", "n_jobs"])
def test_a_search_without_trials_or_jobs_is_refused(search, name):
    with pytest.raises(ValueError, match=f"hydra.sweeper.{name} is 0: give a whole number of at l"):
        search("x=1,2", **{name: 0})


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ("x=1,2", "x=1,2,3"),
        ("x=1,2", "x=interval(1,2)"),
        ("x=interval(1.0,2.0)", "x=tag(log,interval(1.0,2.0))"),
    ],
)
def test_a_search_resumed_with_other_kinds_of_values_is_refused(search, tmp_path, first, then):
    before = search(first)
    with pytest.raises(HydraException, match=r"kinds of values for x .*another hydra.sweep.dir"):
        search(then, n_trials=4, resume=True)
    assert study(tmp_path) == before


def test_a_search_prints_its_best_trial_at_its_end(search, tmp_path, capsys):
    results = {0: 0.5, 1: 0.75, 2: float("nan")}
    trials = search("x=interval(0.0,1.0)", "y=1,2", n_trials=3, results=results)
    chosen = f"x={trials[1].params['x']:.4g} y={trials[1].params['y']}"
    line = f"best trial 1: val/accuracy 0.75, {chosen}, {tmp_path}/job1"
    assert capsys.readouterr().out.splitlines() == [line]


def test_a_search_without_a_completed_trial_prints_no_best_trial(search, capsys):
    search("x=interval(0.0,1.0)", n_trials=1, results={0: float("nan")})
    assert not capsys.readouterr().out


SEARCH = ["hydra/sweeper=optuna", "hydra.sweep.dir=sweep", "callbacks.progress=null"]
SEARCH += ["trainer=cpu", "test_teacher=false", "print_config=false", "trainer.max_epochs=2"]
SEARCH += ["experiment=digits"]


@pytest.mark.slow
def test_a_search_prunes_trials_that_do_not_learn_and_reports_every_validation(command, tmp_path):
    pruner = "callbacks.pruning.pruner"
    options = ["optimizer.lr=0.0,0.02", f"~{pruner}.n_startup_trials", f"~{pruner}.n_warmup_steps"]
    options += [f"{pruner}._target_=optuna.pruners.ThresholdPruner", f"+{pruner}.lower=0.15"]
    command("train", "-m", *SEARCH, *options, "hydra.sweeper.n_trials=5")
    trials, runs = study(tmp_path / "sweep"), results(tmp_path / "sweep")
    assert {trial.params["optimizer.lr"] for trial in trials} == {"0.0", "0.02"}
    for trial, run in zip(trials, runs, strict=True):
        assert f"optimizer.lr={trial.params['optimizer.lr']}" in run["overrides"]
        tau = trial.params["distill.loss.tau"]
        assert 0.5 <= tau <= 8
        assert f"distill.loss.tau={tau:.4g}" in run["overrides"]
        with open(tmp_path / "sweep" / str(trial.number) / "logs" / "metrics.csv") as file:
            seen = [float(x["val/accuracy"]) for x in csv.DictReader(file) if x["val/accuracy"]]
        assert list(trial.intermediate_values.values()) == pytest.approx(seen)
        if trial.params["optimizer.lr"] == "0.0":
            assert trial.state == TrialState.PRUNED
            assert run["status"] == "failed"
            assert run["error"].startswith(f"Pruned: epoch 0: val/accuracy is {seen[0]:.4g}, and")
        else:
            assert trial.state == TrialState.COMPLETE
            assert trial.value == run["metrics"]["val/accuracy"]


@pytest.mark.slow
def test_a_search_resumes_with_its_unfinished_trial(command, tmp_path):
    options = [*SEARCH, "data.train_size=64", "distill.loss.gamma=2", "distill.weight=1"]
    command("train", "-m", *options, "hydra.sweeper.n_trials=2")
    first = results(tmp_path / "sweep")
    storage = open_storage(tmp_path / "sweep" / "optuna.journal")
    unfinished = optuna.load_study(study_name=STUDY, storage=storage)
    trial = unfinished.ask(
        {"distill.loss.tau": optuna.distributions.FloatDistribution(1, 2, log=True)}
    )
    options += ["resume=true", "hydra.sweeper.n_jobs=2"]
    command("train", "-m", *options, "hydra.sweeper.n_trials=4")
    trials, runs = study(tmp_path / "sweep"), results(tmp_path / "sweep")
    assert runs[:2] == first
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * len(runs)
    assert f"distill.loss.tau={trial.params['distill.loss.tau']:.4g}" in runs[2]["overrides"]
    assert trials[1].params.keys() == {"distill.loss.tau", "distill.loss.beta"}


@pytest.mark.slow
def test_trials_that_failed_are_run_again_in_their_folders(command, ends_badly, tmp_path):
    options = [*SEARCH, "hydra.sweeper.n_trials=2", "teacher.weights=later.safetensors"]
    assert "2 of 2 jobs failed" in ends_badly("train", "-m", *options)
    before = [run["overrides"] for run in results(tmp_path / "sweep")]
    shutil.copy(ASSETS / "digits_teacher.safetensors", tmp_path / "later.safetensors")
    command("train", "-m", *options, "resume=true")
    runs = results(tmp_path / "sweep")
    assert [run["overrides"] for run in runs] == before
    assert [run["status"] for run in runs] == ["completed"] * 2
    assert [trial.state for trial in study(tmp_path / "sweep")] == [TrialState.COMPLETE] * 2
