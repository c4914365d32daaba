"""The callback and the synchronised loss in two CPU processes."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

FOLDER = Path(__file__).parent / "distributed"
SCRIPT = FOLDER / "train.py"
pytestmark = pytest.mark.slow


def start(*arguments: str | Path) -> str:
    """Run Python to a good end; what it wrote to stderr."""
    run = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return run.stderr


def train(folder: Path, *options: str) -> list[dict]:
    """Run the script; what each rank saved."""
    folder.mkdir()
    stderr = start(SCRIPT, "--out", folder, *options)
    if "--strategy=ddp_find_unused_parameters_true" not in options:  # torch names what it was told
        assert "unused parameters" not in stderr
    return [torch.load(file, weights_only=True) for file in sorted(folder.iterdir())]


@pytest.fixture(scope="module")
def joined(tmp_path_factory):
    """One process on the joined batches."""
    folder = tmp_path_factory.mktemp("joined")
    return {
        uneven: train(folder / str(uneven), "--devices=1", *["--uneven"] * uneven)[0]
        for uneven in (False, True)
    }


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("uneven", [False, True], ids=["even", "uneven"])
def test_sync_trains_the_student_of_one_process_with_the_joined_batches(
    tmp_path, joined, strategy, uneven
):
    options = ["--sync", f"--strategy={strategy}", *["--uneven"] * uneven]
    ranks = train(tmp_path / "ranks", *options)
    assert len(ranks) == 2
    assert ranks[0]["distill"] == ranks[1]["distill"]
    assert ranks[0]["distill"] == pytest.approx(joined[uneven]["distill"], rel=1e-10)
    for rank in ranks:
        assert rank["teacher_unchanged"]
        torch.testing.assert_close(
            rank["weights"], joined[uneven]["weights"], rtol=1e-10, atol=1e-12
        )


@pytest.mark.parametrize("strategy", ["ddp", "ddp_find_unused_parameters_true"])
def test_without_sync_each_rank_correlates_over_its_own_batch(tmp_path, joined, strategy):
    ranks = train(tmp_path / "ranks", f"--strategy={strategy}")
    assert ranks[0]["distill"] != ranks[1]["distill"]
    assert ranks[0]["distill"] != pytest.approx(joined[False]["distill"], rel=1e-3)
    assert all(rank["teacher_unchanged"] for rank in ranks)
    torch.testing.assert_close(ranks[0]["weights"], ranks[1]["weights"], rtol=0, atol=0)


def test_spawned_processes(tmp_path):
    """ddp_spawn trains in children only: the teacher that comes back is this process's own."""
    ranks = train(tmp_path / "ranks", "--strategy=ddp_spawn")
    assert len(ranks) == 1
    assert ranks[0]["teacher_unchanged"]


def test_every_rank_averages_the_student_of_the_joined_batches(tmp_path):
    (joined,) = train(tmp_path / "joined", "--ema", "--devices=1", "--sync")
    ranks = train(tmp_path / "ranks", "--ema", "--strategy=ddp", "--sync")
    assert len(ranks) == 2
    for rank in ranks:
        torch.testing.assert_close(rank["weights"], joined["weights"], rtol=1e-10, atol=1e-12)
    weights = joined["weights"]
    assert not torch.equal(weights["student_ema.module.0.weight"], weights["student.0.weight"])


def test_an_averaged_student_trains_in_spawned_processes(tmp_path):
    (main,) = train(tmp_path / "ranks", "--ema", "--strategy=ddp_spawn")
    weights = main["weights"]
    assert not torch.equal(weights["student_ema.module.0.weight"], weights["student.0.weight"])


@pytest.mark.parametrize(
    ("count", "batch"),
    [
        pytest.param(5, 1, id="a-batch-of-copies"),
        pytest.param(7, 3, id="a-copy-in-a-batch"),
        pytest.param(6, 2, id="even"),
        pytest.param(1, 2, id="a-rank-without-samples"),
    ],
)
def test_metrics_of_two_processes_are_those_of_the_set(tmp_path, count, batch):
    arguments = ["--out", tmp_path / "found.json", "--count", str(count), "--batch", str(batch)]
    start(FOLDER / "evaluate.py", *arguments)
    found = json.loads((tmp_path / "found.json").read_text())
    spec = importlib.util.spec_from_file_location("evaluate", FOLDER / "evaluate.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    images, masks = script.samples(count).tensors
    with torch.no_grad():
        logits = script.new_student().eval()(images)
    losses = [
        F.cross_entropy(x[None], y[None], ignore_index=255)
        for x, y in zip(logits, masks, strict=True)
    ]
    predicted, truth = logits.argmax(1).numpy(), masks.numpy()
    kept = truth != 255
    table = np.zeros((script.CLASSES, script.CLASSES))
    np.add.at(table, (truth[kept], predicted[kept]), 1)
    iou = table.diagonal() / (table.sum(0) + table.sum(1) - table.diagonal())
    for split in ("val", "test"):
        assert found[f"{split}/miou"] == pytest.approx(iou.mean(), rel=1e-5)
        accuracy = table.diagonal().sum() / table.sum()
        assert found[f"{split}/pixel_accuracy"] == pytest.approx(accuracy, rel=1e-5)
        assert found[f"{split}/loss"] == pytest.approx(np.mean(losses), rel=1e-5)


def test_mean_average_precision_of_two_processes_is_that_of_one(tmp_path):
    found = []
    for devices in (1, 2):
        arguments = ["--out", tmp_path / "found.json", "--devices", str(devices)]
        start(FOLDER / "evaluate_detection.py", *arguments)
        found.append(json.loads((tmp_path / "found.json").read_text()))
    assert found[1] == pytest.approx(found[0], abs=1e-6)
    assert 0.3 < found[0]["test/map"] < 1


TINY = ["data.train_size=16", "data.val_size=4", "data.test_size=5", "data.global_batch_size=8"]
SWITCHES = "ddp trainer.strategy.static_graph=true trainer.strategy.gradient_as_bucket_view=true"


@pytest.mark.parametrize(
    ("experiment", "strategies"),
    [
        pytest.param(["digits"], ["ddp", "fsdp2", "ddp_spawn", SWITCHES], id="classification"),
        pytest.param(
            ["scenes/segmentation", *TINY], ["ddp", "fsdp2", "ddp_spawn"], id="segmentation"
        ),
        pytest.param(
            ["scenes/detection_fasterrcnn", *TINY],
            # The box head is asked alone, also of a sharded teacher.
            ["ddp", "fsdp2", "fsdp2 module.shard_teacher=true", "ddp_spawn"],
            id="detection",
        ),
    ],
)
def test_every_strategy_trains_the_same_student(tmp_path, experiment, strategies):
    results, weights = [], []
    for number, chosen in enumerate(strategies):
        folder = tmp_path / str(number)
        strategy, *options = chosen.split()
        name, *overrides = experiment
        start(
            *("-m", "lightning_dist", "train", f"experiment={name}"),
            *(f"trainer={strategy}", "trainer.accelerator=cpu", "trainer.devices=2"),
            *("trainer.max_epochs=1", "callbacks.progress=null", "test_teacher=false"),
            *(f"hydra.run.dir={folder}", "print_config=false", *overrides, *options),
        )
        results.append(json.loads((folder / "result.json").read_text()))
        saved = torch.load(results[-1]["checkpoint"], weights_only=True)
        weights.append(saved["state_dict"])
        assert all(key.startswith("student.") for key in saved["state_dict"]), "no teacher"
    # While they fit, ranks evaluate with their own batch norms' statistics but under ddp; in the
    # test all have the checkpoint's.
    tested = [
        {name: value for name, value in result["metrics"].items() if name.startswith("test/")}
        for result in results
    ]
    for metrics, state in zip(tested[1:], weights[1:], strict=True):
        assert metrics == pytest.approx(tested[0], rel=1e-4, abs=1e-4)
        torch.testing.assert_close(state, weights[0], rtol=1e-3, atol=1e-4)


def test_torchrun_starts_the_processes_of_one_run(tmp_path):
    stderr = start(
        *("-m", "torch.distributed.run", "--nproc-per-node=2"),
        *("-m", "lightning_dist", "train", "trainer=multinode", "trainer.accelerator=cpu"),
        *("trainer.num_nodes=1", "trainer.devices=2", "trainer.max_epochs=1"),
        *("print_config=false", "callbacks.progress=null", f"hydra.run.dir={tmp_path / 'run'}"),
    )
    assert "MEMBER: 2/2" in stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["status"] == "completed"
    assert Path(result["checkpoint"]).exists()
