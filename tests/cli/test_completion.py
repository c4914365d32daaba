"""Tests of the completion with the TAB key: the candidates, and the scripts for the shells."""

import os
import shutil
import subprocess
import sys

import pytest

from lightning_dist.cli import VERBS
from lightning_dist.cli.completion import complete

SHELLS = ("bash", "zsh", "fish")


def test_verbs_are_completed():
    assert complete("lightning-dist ") == sorted(VERBS)
    assert complete("/usr/bin/lightning-dist pre") == ["predict"]
    assert complete("lightning-dist --v") == ["--version"]
    assert complete("lightning-dist completion z") == ["zsh"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("train exp", ["experiment="]),
        ("train hydra/la", ["hydra/launcher="]),
        ("train +sw", ["+sweep="]),
        ("train ~exp", ["~experiment"]),
        (
            "train experiment=scenes/s",
            [f"experiment=scenes/segmentation{x}" for x in ("", "_teacher")],
        ),
        ("train -m experiment=digits distill=none,dk", ["distill=none,dkd"]),
        ("train callbacks=[default,ea", ["callbacks=[default,early_stopping"]),
        ("train student=cif", ["student=cifar/"]),
        ("train student=cifar/resnet5", ["student=cifar/resnet50", "student=cifar/resnet56"]),
        ("train trainer.max_e", ["trainer.max_epochs="]),
        ("train -m trainer.max_e", ["trainer.max_epochs="]),
        ("train seed=0,1 trainer.max_e", ["trainer.max_epochs="]),
        ("train 'student.channels=[4, 8]' trainer.max_e", ["trainer.max_epochs="]),
        ("train ++trainer.max_e", ["++trainer.max_epochs="]),
        ("train optimizer=adamw optimizer.l", ["optimizer.lr="]),
        ("train monitor_mode=", ["monitor_mode=max"]),
        ("train --multi", ["--multirun"]),
        ("eval ck", ["ckpt="]),
    ],
)
def test_config_groups_keys_and_values_are_completed(words, expected):
    assert complete(f"lightning-dist {words}") == expected


@pytest.mark.parametrize(
    "words",
    ["train student.channels=", "eval ckpt=", "eval exp", "report ou", "trian ", "train 'e"],
)
def test_without_a_match_there_are_no_candidates(words):
    """The shell then completes file names (the user may type a path here)."""
    assert complete(f"lightning-dist {words}") == []


def test_configs_in_a_users_folder_are_completed(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").touch()
    line = f"lightning-dist train --config-dir {tmp_path} experiment=mi"
    assert complete(line) == ["experiment=mine"]


@pytest.mark.parametrize("shell", SHELLS)
def test_candidates_are_printed_one_per_line_for_the_shell(command, capsys, shell):
    # bash must add no space after "key=", so its script turns this off (nospace). A complete
    # candidate for bash therefore ends with a space of its own.
    space = " " if shell == "bash" else ""
    command("completion", shell, "lightning-dist e")
    assert capsys.readouterr().out == f"eval{space}\nexport{space}\n"
    command("completion", shell, "lightning-dist train experiment=scenes/detection_f")
    printed = capsys.readouterr().out
    name = "experiment=scenes/detection_fasterrcnn"
    assert printed == f"{name}{space}\n{name}_teacher{space}\n"
    command("completion", shell, "lightning-dist train trainer.max_e")
    assert capsys.readouterr().out == "trainer.max_epochs=\n"
    command("completion", shell, "lightning-dist train ckpt_path=")
    assert capsys.readouterr().out == ""


def test_a_shell_that_has_no_script_is_refused(command, capsys):
    with pytest.raises(SystemExit) as stop:
        command("completion", "tcsh")
    assert stop.value.code == 2
    assert "'bash', 'zsh', 'fish'" in capsys.readouterr().err


@pytest.mark.parametrize("shell", SHELLS)
def test_a_script_has_no_syntax_error(command, capsys, tmp_path, shell):
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    command("completion", shell)
    (tmp_path / "script").write_text(capsys.readouterr().out)
    subprocess.run([shell, "-n", "script"], check=True, cwd=tmp_path, timeout=60)


@pytest.fixture
def in_bash(tmp_path):
    """Return a function that completes a line in bash, as the TAB key does, from the cursor.

    It returns the candidates for the last part of the word (bash splits words at "=" too).
    """
    if shutil.which("bash") is None:
        pytest.skip("bash is not installed")
    program = tmp_path / "bin" / "lightning-dist"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m lightning_dist "$@"\n')
    program.chmod(0o755)

    def run(line: str, setup: str = "") -> list[str]:
        script = (
            f'{setup}\neval "$(lightning-dist completion bash)"\n'
            '[[ "$(complete -p lightning-dist)" == *_lightning_dist* ]] || exit 1\n'
            'COMP_LINE="$1 and what follows the cursor" COMP_POINT=${#1}\n'
            "_lightning_dist lightning-dist\n"
            'printf "%s\\n" "${COMPREPLY[@]}"'
        )
        path = os.pathsep.join([str(program.parent), os.environ["PATH"]])
        ended = subprocess.run(
            ["bash", "-c", script, "bash", line],
            env=os.environ | {"PATH": path},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert ended.returncode == 0, ended.stderr
        return ended.stdout.splitlines()

    return run


def test_bash_completes(in_bash):
    assert in_bash("lightning-dist ex") == ["export "]
    assert in_bash("lightning-dist train -m experiment=digits_t") == ["digits_teacher "]
    assert in_bash("lightning-dist train trainer.max_e") == ["trainer.max_epochs="]


def test_bash_completes_whole_words_if_it_does_not_split_at_the_equals_sign(in_bash):
    line, setup = (
        "lightning-dist train experiment=digits_t",
        "COMP_WORDBREAKS=${COMP_WORDBREAKS//=}",
    )
    assert in_bash(line, setup) == ["experiment=digits_teacher "]
