"""Tests that the notebooks run, show the described results, and are saved without outputs."""

import base64
import io
import os
import re
import tempfile
from functools import cache
from pathlib import Path

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from matplotlib.image import imread
from nbclient import NotebookClient
from nbformat import NotebookNode

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
TIMEOUT = 300  # The longest time for one cell, in seconds.

each_notebook = pytest.mark.parametrize("name", sorted(p.name for p in NOTEBOOKS.glob("*.ipynb")))


@cache
def executed(name: str) -> NotebookNode:
    """Run a notebook once in a new folder with this Python, and return it with its outputs."""
    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
    # If jupyter_client finds no installed kernel, it starts ipykernel with sys.executable.
    specs = KernelSpecManager(kernel_dirs=[])
    kernel = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=specs)
    with tempfile.TemporaryDirectory() as folder:
        env = {
            **os.environ,
            "IPYTHONDIR": f"{folder}/.ipython",
            "MPLBACKEND": "module://matplotlib_inline.backend_inline",
            "OMP_NUM_THREADS": "1",
        }
        client = NotebookClient(
            notebook, km=kernel, timeout=TIMEOUT, resources={"metadata": {"path": folder}}
        )
        return client.execute(env=env)


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(notebook: NotebookNode) -> str:
    """Return all text that the cells have printed."""
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    return "".join(output.text for output in outputs if output.get("name") == "stdout")


@each_notebook
def test_notebook_is_kept_without_outputs(name: str) -> None:
    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
    nbformat.validate(notebook)
    assert [cell for cell in code_cells(notebook) if cell.outputs or cell.execution_count] == []
    assert [cell for cell in notebook.cells if cell.metadata] == []
    assert notebook.metadata == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }


@pytest.mark.slow
@each_notebook
def test_notebook_ends_in_a_figure(name: str) -> None:
    outputs = code_cells(executed(name))[-1].outputs
    images = [
        output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})
    ]
    assert images
    pixels = imread(io.BytesIO(base64.b64decode(images[-1])))
    assert min(pixels.shape[:2]) > 100
    assert pixels[..., :3].std() > 0.05  # The figure is not blank.


@pytest.mark.slow
def test_quickstart_shows_that_distillation_helps() -> None:
    text = printed(executed("quickstart.ipynb"))
    found = re.findall(r"^(.+?) +[\d,]+ parameters, test accuracy +([\d.]+)%$", text, re.MULTILINE)
    accuracy = {name: float(value) for name, value in found}
    assert accuracy["teacher"] > 98
    assert accuracy["student distilled"] > 75
    assert accuracy["student distilled"] > accuracy["student alone"] + 3


@pytest.mark.slow
def test_quickstart_shows_relations_nearer_to_the_teacher() -> None:
    text = printed(executed("quickstart.ipynb"))
    found = re.findall(r"^(student .+?) +(-?\d\.\d+) +(-?\d\.\d+)$", text, re.MULTILINE)
    correlations = {name: (float(inter), float(intra)) for name, inter, intra in found}
    before, alone, distilled = correlations.values()
    assert list(correlations) == ["student before training", "student alone", "student distilled"]
    for term in (0, 1):  # the inter-class and the intra-class term
        assert abs(before[term]) < 0.3
        assert before[term] < alone[term] < distilled[term]
