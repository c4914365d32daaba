"""The journey of docs/fine_tuning.md: its three commands, on the digits that the page writes."""

import logging
import re
import shlex
from pathlib import Path

import timm
import torch

from journeys import QUIET, metrics, run_in, student_state
from lightning_dist.files.card_files import read_card

PAGE = (Path(__file__).parents[2] / "docs" / "fine_tuning.md").read_text()
DIGITS = tuple("0123456789")


def commands() -> list[list[str]]:
    """Return the arguments of the commands of the page."""
    lines = PAGE.replace("\\\n", " ").splitlines()
    return [shlex.split(x)[1:] for x in lines if x.startswith("lightning-dist train")]


def test_the_three_commands_lead_from_pretrained_weights_to_a_student(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
    exec(compile(code.replace("900", "360"), "example", "exec"), {})
    torch.manual_seed(7)
    pretrained = timm.create_model("test_resnet", num_classes=20)
    torch.save(pretrained.state_dict(), "pretrained.pth")
    short = ["data.image_size=32", "data.num_workers=0", "trainer.max_epochs=1", *QUIET]
    said = []
    for arguments in commands():
        caplog.clear()
        with caplog.at_level(logging.INFO):
            run_in(tmp_path, monkeypatch, *arguments, *short, "callbacks.resume=null")
        said.append(caplog.text)
    assert "starts from pretrained.pth, except the new layer fc" in said[0]
    assert "starts from distilled/checkpoints/last.ckpt\n" in said[2]
    assert {"test/agreement"} <= metrics(tmp_path / "distilled").keys()
    assert "test/accuracy" in metrics(tmp_path / "student")
    for run in ("teacher", "distilled", "student"):
        assert read_card(tmp_path / run / "checkpoints/last.ckpt").class_names == DIGITS
    assert len(student_state(tmp_path / "distilled")) == len(student_state(tmp_path / "student"))
