"""Tests that commands that do not train import none of the slow packages for training."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_dist.cli import card

PROGRAM = """
import sys
from lightning_dist.cli import main
try:
    main()
except SystemExit as ended:
    status = ended.code or 0
else:
    status = 0
print(status, *sorted({name.partition(".")[0] for name in sys.modules}))
"""


def loaded(folder: Path, *arguments: str) -> tuple[int, set[str]]:
    """Run lightning-dist in a new process; return its status and the packages it has imported."""
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    status, *packages = run.stdout.splitlines()[-1].split()
    return int(status), set(packages)


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["trian"], 2),
        (["completion", "bash"], 0),
        (["completion", "bash", "lightning-dist tr"], 0),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_a_command_without_a_config_imports_no_slow_package(tmp_path, arguments, status):
    found, packages = loaded(tmp_path, *arguments)
    assert found == status
    assert not packages & {"torch", "lightning", "hydra", "omegaconf", "timm", "numpy"}


def test_keys_are_completed_without_torch(tmp_path):
    _, packages = loaded(tmp_path, "completion", "bash", "lightning-dist train trainer.max_e")
    assert not packages & {"torch", "lightning", "timm"}


def test_a_report_is_written_without_torch(tmp_path, put_run):
    for seed, value in enumerate([0.8, 0.9]):
        metrics = {"test/accuracy": value}
        put_run(tmp_path / "sweep" / f"a{seed}", f"seed={seed}", "distill=kd", metrics=metrics)
        put_run(tmp_path / "sweep" / f"b{seed}", f"seed={seed}", "distill=none", metrics=metrics)
    status, packages = loaded(tmp_path, "report", "sweep")
    assert status == 0
    assert (tmp_path / "sweep" / "report.html").exists()
    assert not packages & {"torch", "lightning", "hydra", "timm"}


def test_a_report_is_refused_without_torch(tmp_path):
    status, packages = loaded(tmp_path, "report", "nowhere")
    assert status == 1
    assert not packages & {"torch", "lightning", "hydra", "timm"}


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 has no safe path")
@pytest.mark.parametrize("option", ["-c", "-m"])
@pytest.mark.parametrize("with_module", [False, True], ids=["lightning-dist", "python -m"])
def test_processes_import_modules_of_the_working_folder_only_if_the_command_does(
    command, tmp_path, monkeypatch, option, with_module
):
    """Workers of `ddp_spawn` and of joblib start with -c and -m, and import multiprocessing."""
    (tmp_path / "probe.py").write_text("open('trace', 'w').close()")
    arguments = [option, "import probe" if option == "-c" else "probe"]
    folder = [str(tmp_path.resolve())] if with_module else []
    monkeypatch.setattr(sys, "path", folder + [path for path in sys.path if path])
    monkeypatch.setattr(card, "main", lambda: subprocess.run([sys.executable, *arguments]))
    command("card", "x")
    assert (tmp_path / "trace").exists() == with_module
    assert "PYTHONSAFEPATH" not in os.environ
