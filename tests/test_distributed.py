"""Tests of the callback, the synchronised loss, metrics and the command in two CPU processes.

Starting a process takes longer than most cases. So one launch runs many cases, which save their
results in files, and the tests read these files.
"""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import psutil
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from interruption import OVERRIDES, differences
from lightning_dist import cli
from processes import Processes

FOLDER = Path(__file__).parent / "distributed"
pytestmark = pytest.mark.slow

TRAININGS = {
    "ddp even": {"sync": True, "strategy": "ddp"},
    "ddp uneven": {"sync": True, "strategy": "ddp", "uneven": True},
    "fsdp2 even": {"sync": True, "strategy": "fsdp2"},
    "fsdp2 uneven": {"sync": True, "strategy": "fsdp2", "uneven": True},
    "averaged": {"sync": True, "strategy": "ddp", "ema": True},
    "unlabeled": {"sync": True, "strategy": "ddp", "unlabeled": True},
    "without sync": {"strategy": "ddp"},
    # This case must be the last one here: torch may warn of "unused parameters", and the fixture
    # `launched` checks that no earlier case caused this warning.
    "find unused": {"strategy": "ddp_find_unused_parameters_true"},
}
SETS = {  # The number of images, and the batch size.
    "a-batch-of-copies": (5, 1),
    "a-copy-in-a-batch": (7, 3),
    "even": (6, 2),
    "a-rank-without-samples": (1, 2),
}
TINY = ["data.train_size=16", "data.val_size=4", "data.test_size=5", "data.global_batch_size=8"]
SWITCHES = "ddp trainer.strategy.static_graph=true trainer.strategy.gradient_as_bucket_view=true"
EXPERIMENTS = {
    "digits": ([], ["multinode trainer.num_nodes=1", "fsdp2", SWITCHES]),
    "scenes/segmentation": (TINY, ["ddp", "fsdp2"]),
    # The distillation calls the teacher's box head without the rest, also if it is sharded.
    "scenes/detection_fasterrcnn": (TINY, ["ddp", "fsdp2 module.shard_teacher=true"]),
}
# The experiment to test with ddp_spawn, which pickles the module: it has the most parts to pickle.
SPAWNED = "scenes/detection_fasterrcnn"
AVERAGED = ["callbacks=[default,ema]", "callbacks.ema.decay=0.5"]
# A run for the tests of sweeps: 128 images in global batches of 64.
SWEPT = ["experiment=digits", "trainer=ddp_sim", "trainer.max_epochs=1", "data.train_size=128"]
SWEPT += ["test_teacher=false", "print_config=false", "callbacks.progress=null"]
# The batches in which a run of two epochs of 20 batches is interrupted; a step takes two batches.
SIGNAL_IN, FAIL_IN = 13, 30


def script(name: str) -> ModuleType:
    """Import a script, so that this process can run it."""
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def launch(cases: list, *launcher: str) -> subprocess.CompletedProcess:
    """Run the cases in one launch, and fail the test if the launch fails."""
    with Processes() as processes:
        run = processes.run(*launcher, FOLDER / "run.py", json.dumps(cases), timeout=1800)
    assert run.returncode == 0, run.stderr
    return run


def train(folder: Path, experiment: str, chosen: str, *overrides: str) -> list[str]:
    """Return the arguments of the command that trains an experiment for an epoch in two processes.

    Args:
        folder: the folder of the run.
        experiment: the name of the experiment.
        chosen: the name of the trainer, and overrides after it, separated by spaces.
        *overrides: further overrides.
    """
    strategy, *options = chosen.split()
    return [
        *("train", f"experiment={experiment}", f"trainer={strategy}", "trainer.accelerator=cpu"),
        *("trainer.devices=2", "trainer.max_epochs=1", "callbacks.progress=null"),
        *("test_teacher=false", "print_config=false", f"hydra.run.dir={folder}"),
        *(*overrides, *options),
    ]


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run commands and scripts in two processes that torchrun starts; return their folder."""
    folder = tmp_path_factory.mktemp("launched")
    cases: list = [
        train(folder / name / str(number), name, chosen, *overrides)
        for name, (overrides, strategies) in EXPERIMENTS.items()
        for number, chosen in enumerate(strategies)
    ]
    cases += [["train", *SWEPT, f"hydra.run.dir={folder / 'alone'}"]]
    two = ["trainer=ddp_sim", "trainer.max_epochs=2"]
    batches = {"signal_in": SIGNAL_IN, "fail_in": FAIL_IN}
    interrupted = {"out": str(folder / "interrupted"), "overrides": [*OVERRIDES, *two]}
    cases += [{"script": "interrupt", **interrupted, **batches}]
    cases += [{"script": "digests", "out": str(folder / "digests")}]
    for name, (count, batch) in SETS.items():
        sizes = {"count": count, "batch": batch}
        cases += [{"script": "evaluate", "out": f"{folder / name}.json", **sizes}]
    cases += [{"script": "evaluate_detection", "out": f"{folder}/detection.json", "devices": 2}]
    cases += [{"script": "skip", "out": str(folder / "skip")}]
    for task in ("segmentation", "detection"):
        cases += [{"script": "unlabeled", "out": str(folder / f"unlabeled {task}"), "task": task}]
    cases += [{"script": "joined", "out": str(folder / "joined")}]
    for name, options in TRAININGS.items():
        cases += [{"script": "train", "out": str(folder / name), **options}]
    # Each backward pass uses only one of the two networks.
    strategy = "ddp_find_unused_parameters_true"
    cases += [{"script": "manual", "out": str(folder / "manual"), "strategy": strategy}]
    run = launch(cases, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    assert "MEMBER: 2/2" in run.stderr
    assert "unused parameters" not in run.stderr.partition("find_unused_parameters=True")[0]
    return folder


@pytest.fixture(scope="module")
def spawned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the command that starts its processes with ddp_spawn; return the folder of the run."""
    folder = tmp_path_factory.mktemp("spawned")
    launch([train(folder, SPAWNED, "ddp_spawn", *EXPERIMENTS[SPAWNED][0], *AVERAGED)])
    return folder


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run a sweep of two runs, the first of which fails on one rank; return its working folder."""
    folder = tmp_path_factory.mktemp("swept")
    fails = ["+callbacks.fail._target_=interrupt.Fail", "+callbacks.fail.rank=1,7"]
    before = {*psutil.Process().children(recursive=True)}
    command = ["lightning-dist", "train", "-m", *SWEPT, *fails, "hydra.sweep.dir=sweep"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("PYTHONPATH", str(FOLDER))
        patch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as ended:
            cli.main()
    assert ended.value.code == 1
    assert {*psutil.Process().children(recursive=True)} <= before
    return folder


@pytest.fixture(scope="module")
def joined(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict]:
    """Return a function that trains in this process on the joined batches of both ranks."""

    def run(**options: bool) -> dict:
        folder = tmp_path_factory.mktemp("joined")
        script("train").main(folder, devices=1, **options)
        return saved(folder)[0]

    return run


def saved(folder: Path) -> list[dict]:
    """Load the file that each rank of a training saved, in the order of the ranks."""
    return [torch.load(file, weights_only=True) for file in sorted(folder.iterdir())]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("uneven", [False, True], ids=["even", "uneven"])
def test_sync_trains_the_same_student_as_one_process_with_joined_batches(
    launched, joined, strategy, uneven
):
    alone = joined(uneven=uneven)
    ranks = saved(launched / f"{strategy} {'uneven' if uneven else 'even'}")
    assert len(ranks) == 2
    assert ranks[0]["distill"] == ranks[1]["distill"]
    assert ranks[0]["distill"] == pytest.approx(alone["distill"], rel=1e-10)
    for rank in ranks:
        assert rank["teacher_unchanged"]
        torch.testing.assert_close(rank["weights"], alone["weights"], rtol=1e-10, atol=1e-12)


def test_ranks_with_unequal_numbers_of_labels_train_the_student_of_the_joined_batches(
    launched, joined
):
    alone = joined(sync=True, unlabeled=True)
    for rank in saved(launched / "unlabeled"):
        torch.testing.assert_close(rank["weights"], alone["weights"], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("task", ["segmentation", "detection"])
def test_ranks_with_unequal_numbers_of_labelled_images_train_as_one_process(
    launched, tmp_path, task
):
    script("unlabeled").main(tmp_path / "alone", task, devices=1)
    (alone,), ranks = saved(tmp_path / "alone"), saved(launched / f"unlabeled {task}")
    assert [rank["steps"] for rank in ranks] == [alone["steps"]] * 2 == [4, 4]
    for rank in ranks:
        torch.testing.assert_close(rank["weights"], alone["weights"], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["without sync", "find unused"])
def test_without_sync_each_rank_correlates_over_its_own_batch(launched, joined, name):
    ranks = saved(launched / name)
    assert ranks[0]["distill"] != ranks[1]["distill"]
    assert ranks[0]["distill"] != pytest.approx(joined()["distill"], rel=1e-3)
    assert all(rank["teacher_unchanged"] for rank in ranks)
    torch.testing.assert_close(ranks[0]["weights"], ranks[1]["weights"], rtol=0, atol=0)


def test_several_optimizers_of_two_processes_train_as_in_one(launched, tmp_path):
    script("manual").main(tmp_path / "alone", devices=1)
    (alone,), ranks = saved(tmp_path / "alone"), saved(launched / "manual")
    assert [rank["teacher_unchanged"] for rank in ranks] == [True, True]
    for rank in ranks:
        for part in ("net", "projection"):
            torch.testing.assert_close(rank[part], alone[part], rtol=1e-10, atol=1e-12)


def test_the_other_rank_does_not_wait_for_a_rank_that_skips_a_term(launched):
    """Only the skipped term trains a part of the student, and only one rank skips it, once."""
    ranks = [json.loads(file.read_text()) for file in sorted((launched / "skip").iterdir())]
    assert [rank["skipped"] for rank in ranks] == [0, 1]
    assert [rank["steps"] for rank in ranks] == [4, 4]
    assert ranks[0]["weights"] == ranks[1]["weights"]
    assert np.isfinite(np.array(ranks[0]["weights"]["net.extra.weight"])).all()


def test_every_rank_averages_the_student_of_the_joined_batches(launched, joined):
    ranks, alone = saved(launched / "averaged"), joined(ema=True, sync=True)
    assert len(ranks) == 2
    for rank in ranks:
        torch.testing.assert_close(rank["weights"], alone["weights"], rtol=1e-10, atol=1e-12)
    weights = alone["weights"]
    assert not torch.equal(weights["student_ema.module.0.weight"], weights["student.0.weight"])


def test_an_averaged_student_trains_in_forked_processes(tmp_path):
    """The process that called fit gets the weights and the average; its teacher is unchanged."""
    script("train").main(tmp_path, strategy="ddp_fork", ema=True)
    (main,) = saved(tmp_path)
    assert main["teacher_unchanged"]
    weights = main["weights"]
    assert not torch.equal(weights["student_ema.module.0.weight"], weights["student.0.weight"])


@pytest.mark.parametrize("name", SETS)
def test_metrics_of_two_processes_equal_those_of_the_whole_set(launched, name):
    found, evaluate = json.loads((launched / f"{name}.json").read_text()), script("evaluate")
    images, masks = evaluate.samples(SETS[name][0]).tensors
    with torch.no_grad():
        logits = evaluate.new_student().eval()(images)
    losses = [
        F.cross_entropy(x[None], y[None], ignore_index=255)
        for x, y in zip(logits, masks, strict=True)
    ]
    predicted, truth = logits.argmax(1).numpy(), masks.numpy()
    kept = truth != 255
    table = np.zeros((evaluate.CLASSES, evaluate.CLASSES))
    np.add.at(table, (truth[kept], predicted[kept]), 1)
    iou = table.diagonal() / (table.sum(0) + table.sum(1) - table.diagonal())
    for split in ("val", "test"):
        assert found[f"{split}/miou"] == pytest.approx(iou.mean(), rel=1e-5)
        accuracy = table.diagonal().sum() / table.sum()
        assert found[f"{split}/pixel_accuracy"] == pytest.approx(accuracy, rel=1e-5)
        assert found[f"{split}/loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    with torch.no_grad():
        teacher = evaluate.new_student(seed=4).eval()(images)
    rows = [x.movedim(1, -1).flatten(0, -2).softmax(1).double() for x in (logits, teacher)]
    of_teacher = {
        "agreement": (rows[0].argmax(1) == rows[1].argmax(1)).double().mean().item(),
        "inter_class_correlation": correlation(rows[0].T, rows[1].T),
        "intra_class_correlation": correlation(*rows),
    }
    for name, value in of_teacher.items():
        assert found[f"val/{name}"] == found[f"test/{name}"] == pytest.approx(value, rel=1e-5)


def test_both_of_two_joined_loaders_are_shared_by_the_processes(launched):
    ranks, joined = saved(launched / "joined"), script("joined")
    for rank in ranks:
        # Of each batch, 3 samples have a label; 4 batches are a pass over the longer loader.
        assert [[y == -100 for y in labels] for _, labels in rank["seen"]] == 4 * [
            3 * [False] + 3 * [True]
        ]
    numbers = [n for rank in ranks for inputs, _ in rank["seen"] for n in inputs]
    more = [n for n in numbers if n >= 100]
    assert sorted(more) == list(range(100, 100 + joined.UNLABELED))
    # The labelled samples are used twice.
    assert sorted(n for n in numbers if n < 100) == sorted(2 * list(range(joined.LABELED)))
    torch.testing.assert_close(ranks[0]["weights"], ranks[1]["weights"], rtol=0, atol=0)


def correlation(student: Tensor, teacher: Tensor) -> float:
    """Return the mean correlation of the columns."""
    pairs = zip(student.T, teacher.T, strict=True)
    return float(np.mean([np.corrcoef(a, b)[0, 1] for a, b in pairs]))


def test_mean_average_precision_of_two_processes_equals_that_of_one(launched, tmp_path):
    script("evaluate_detection").main(tmp_path / "found.json", devices=1)
    alone = json.loads((tmp_path / "found.json").read_text())
    together = json.loads((launched / "detection.json").read_text())
    assert together["found"] == pytest.approx(alone["found"], abs=1e-6)
    assert together["boxes"] == alone["boxes"]
    assert 0.3 < alone["found"]["test/map"] < 1


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_strategy_trains_the_same_student(launched, spawned, experiment):
    folders = sorted((launched / experiment).iterdir())
    assert len(folders) == len(EXPERIMENTS[experiment][1])
    if experiment == SPAWNED:
        folders.append(spawned)
    tested, weights = [], []
    for folder in folders:
        result = json.loads((folder / "result.json").read_text())
        assert result["status"] == "completed"
        # Compare only the test: in a validation during fit, each rank has its own batch norm
        # statistics (except under ddp); in the test, all ranks have those of the checkpoint.
        metrics = result["metrics"].items()
        tested.append({name: value for name, value in metrics if name.startswith("test/")})
        state = torch.load(result["checkpoint"], weights_only=True)["state_dict"]
        parts = {key.partition(".")[0] for key in state}
        averaged = {"student_ema"} if folder == spawned else set()
        assert parts == {"student", *averaged}  # The teacher is not saved.
        weights.append({key: x for key, x in state.items() if key.startswith("student.")})
    for metrics, state in zip(tested[1:], weights[1:], strict=True):
        # Leave out the metrics of the averaged weights.
        own = {name: metrics[name] for name in tested[0]}
        assert own == pytest.approx(tested[0], rel=1e-4, abs=1e-4)
        torch.testing.assert_close(state, weights[0], rtol=1e-3, atol=1e-4)


def test_interrupted_processes_resume_to_the_last_bit(launched):
    """One rank gets a signal, and later both ranks fail; like SIGKILL, an error saves nothing."""
    folder = launched / "interrupted"
    ended = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert [status for status, _ in ended[0]] == [0, 143, "the run fails", 0]
    assert [status for status, _ in ended[1]] == [0, 0, "the run fails", 0]
    # After the signal, the step was completed and saved. After the error, the last checkpoint is
    # that of the first epoch.
    assert [step for _, step in ended[0]] == [20, 7, 10, 20]
    assert differences(folder / "whole", folder / "resumed") == []


def test_every_process_has_the_same_digest(launched):
    """The order of a set of strings, and the addresses of objects, differ in each process."""
    here = script("digests").digest_of_all()
    found = [path.read_text() for path in (launched / "digests").iterdir()]
    assert found == [here, here]


def test_a_rank_that_fails_ends_its_run_of_a_sweep_and_no_other(swept):
    results = [json.loads((swept / f"sweep/{x}/result.json").read_text()) for x in (0, 1)]
    assert [result["status"] for result in results] == ["failed", "completed"]
    assert results[0]["error"] == "RuntimeError: the rank fails"


def test_a_run_of_a_sweep_gives_what_it_gives_alone(swept, launched):
    result = json.loads((swept / "sweep" / "1" / "result.json").read_text())
    alone = json.loads((launched / "alone" / "result.json").read_text())
    assert "test/accuracy" in result["metrics"]
    assert result["metrics"] == alone["metrics"]
    assert torch.load(result["checkpoint"], weights_only=True)["global_step"] == 2


def test_a_sweep_of_several_processes_writes_to_its_folder_only(swept):
    assert [path.name for path in swept.iterdir()] == ["sweep"]
    assert {path.name for path in (swept / "sweep").iterdir() if path.is_dir()} == {"0", "1"}
