"""Tests that every Python example of the README and of docs/ runs."""

import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import WeightsEnum
from torchvision.models.detection import RetinaNet_ResNet50_FPN_Weights

from lightning_dist import DistillationCallback, DistillModule, DISTLoss, Term

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def examples_of(page: Path) -> list[str]:
    """Return the Python examples of a page; those on Transformers continue each other."""
    codes = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S)
    return ["".join(codes)] if page.stem == "transformers" else codes


EXAMPLES = [
    pytest.param(code, id=f"{page.name}-{number}")
    for page in PAGES
    for number, code in enumerate(examples_of(page))
]


class Classifier(LightningModule):
    """A module that a reader of the README could have."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(6, 4)

    def training_step(self, batch, batch_idx):
        inputs, target = batch
        return F.cross_entropy(self.net(inputs), target)

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), lr=0.1)


class Download(dict):
    """A placeholder for published weights; loading it does nothing."""


@pytest.fixture
def _no_downloads(monkeypatch):
    load = nn.Module.load_state_dict

    def load_what_is_here(network, state, *args, **kwargs):
        return None if isinstance(state, Download) else load(network, state, *args, **kwargs)

    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda *_, **__: Download())
    monkeypatch.setattr(nn.Module, "load_state_dict", load_what_is_here)


@pytest.fixture
def _tiny_coco(tmp_path):
    """Write a COCO of one image with COCO's 80 class names."""
    names = RetinaNet_ResNet50_FPN_Weights.DEFAULT.meta["categories"]
    categories = [{"id": i, "name": n} for i, n in enumerate(names) if n not in (names[0], "N/A")]
    content = {
        "images": [{"id": 1, "file_name": "a.jpg"}],
        "annotations": [{"image_id": 1, "category_id": 90, "bbox": [1, 1, 8, 8]}],
        "categories": categories,
    }
    for split in ("train2017", "val2017"):
        (tmp_path / "data/coco/annotations").mkdir(parents=True, exist_ok=True)
        file = tmp_path / f"data/coco/annotations/instances_{split}.json"
        file.write_text(json.dumps(content))
        (tmp_path / "data/coco" / split).mkdir()
        Image.new("RGB", (16, 16)).save(tmp_path / "data/coco" / split / "a.jpg")


@pytest.mark.usefixtures("_no_downloads", "_tiny_coco")
@pytest.mark.parametrize("code", EXAMPLES)
def test_an_example_runs(tmp_path, monkeypatch, code):
    monkeypatch.chdir(tmp_path)
    if "transformers" in code:
        pytest.importorskip("transformers", reason="transformers is in the extra test")
    batches = DataLoader(TensorDataset(torch.randn(16, 6), torch.arange(16) % 4), batch_size=8)
    names = {
        "student": nn.Linear(6, 4),
        "teacher": nn.Linear(6, 4),
        "my_module": Classifier(),
        "my_datamodule": batches,
        "module": DistillModule(nn.Linear(6, 4), nn.Linear(6, 4)),
        "datamodule": batches,
        # docs/attach.md names these imports once, before its examples.
        **{"torch": torch, "nn": nn, "F": F, "LightningModule": LightningModule},
        **{"DistillationCallback": DistillationCallback, "DISTLoss": DISTLoss, "Term": Term},
    }
    # The test has no checkpoint from which an example could resume.
    code = code.replace('ckpt_path="run/last.ckpt"', "ckpt_path=None")
    exec(compile(code, "example", "exec"), names)


def test_the_examples_of_transformers_are_short():
    """The first block makes data; each other one distils a model."""
    page = (ROOT / "docs/transformers.md").read_text()
    _, *models = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    lines = [sum(1 for line in code.splitlines() if line.strip()) for code in models]
    assert len(lines) == 2
    assert max(lines) <= 15


def test_there_are_examples():
    assert len(EXAMPLES) >= 5
