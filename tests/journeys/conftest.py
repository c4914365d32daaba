"""Fixtures of the journeys: a teacher that was trained on a folder of images."""

import json
import shutil

import pytest

from journeys import TEACHER, run_in, write_images


@pytest.fixture(scope="session")
def journey(tmp_path_factory):
    """Train a teacher of a folder of images, and return the folder with both."""
    folder = tmp_path_factory.mktemp("journey")
    write_images(folder / "images")
    with pytest.MonkeyPatch.context() as monkeypatch:
        run_in(folder, monkeypatch, "train", *TEACHER, "hydra.run.dir=teacher")
    return folder


@pytest.fixture
def run(journey, tmp_path, monkeypatch):
    """Return a function that runs a command in a copy of the journey's folder."""
    shutil.copytree(journey, tmp_path, dirs_exist_ok=True)

    def run(*arguments: str) -> None:
        run_in(tmp_path, monkeypatch, *arguments)

    return run


@pytest.fixture
def own(journey):
    """Return the metrics of the teacher's own run."""
    return json.loads((journey / "teacher" / "result.json").read_text())["metrics"]
