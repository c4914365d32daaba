"""Tests that a full disk ends a command with one line that names the file, and that the next works.

Further tests of this are beside those of checkpoints, of the report and of exports.
"""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from disk import almost_full_disk

TRAIN = ("train", "experiment=digits", "trainer=cpu", "print_config=false", "test_teacher=false")
TRAIN += ("callbacks.progress=null", "trainer.max_epochs=1", "+trainer.limit_train_batches=1")
# A trial run writes no checkpoints and no log, and Hydra then writes no files.
TRIAL = ("+trainer.fast_dev_run=true", "hydra.output_subdir=null")


@pytest.mark.parametrize(
    ("left", "options", "named"),
    [
        (0, [], "run/.lock-holder'"),
        (100, [], "the files of Hydra in hydra.run.dir"),
        (100, TRIAL, "run/result.json'"),
        (3500, ["hydra.output_subdir=null"], "run/logs/hparams.yaml'"),
        (10_000, [], "cannot write the checkpoint .*run/checkpoints/best.ckpt"),
        (20_000, ["distill.cache=cache"], "cache/[0-9a-f]*/view-000.part'"),
    ],
)
def test_a_run_names_the_file_and_the_next_one_completes(
    refused, command, tmp_path, left, options, named
):
    run = (*TRAIN, *options, "hydra.run.dir=run")
    with almost_full_disk(left):
        assert re.search(named, refused(*run))
    command(*run, "resume=true")
    assert json.loads((tmp_path / "run/result.json").read_text())["status"] == "completed"
    assert not [path for path in tmp_path.rglob("*") if "part" in path.name]


def test_a_run_whose_result_cannot_be_written_does_not_end_as_completed(refused, tmp_path):
    run = (*TRAIN, *TRIAL, "hydra.run.dir=run")
    # There is room for the result at the start of the run, but the metrics are too much.
    with almost_full_disk(850):
        assert re.search(r"File too large: '.*run/result.json'", refused(*run))
    assert json.loads((tmp_path / "run/result.json").read_text())["status"] == "failed"


@pytest.mark.parametrize(("left", "named"), [(100, "card.json"), (900, "predictions.csv")])
def test_predict_names_the_file(refused, command, tmp_path, left, named):
    command(*TRAIN, "hydra.run.dir=run")
    (tmp_path / "images").mkdir()
    for index in range(8):
        Image.new("L", (8, 8)).save(tmp_path / "images" / f"{index:0200}.png")
    predict = ("predict", "ckpt=run/checkpoints/last.ckpt", "images=images", "trainer=cpu")
    with almost_full_disk(left):
        line = refused(*predict, "out=predictions", "hydra.output_subdir=null")
    assert line.endswith(f"File too large: '{Path('predictions') / named}'")
