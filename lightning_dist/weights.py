"""Reading weight files as data: nothing in a file is ever executed."""

import importlib.resources
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

# Where training programs put the weights in their checkpoints, and what they prefix the names with.
_WRAPPERS = ("state_dict", "model", "state_dict_ema", "model_ema")
_PREFIXES = ("", "module.", "student.", "model.", "net.", "_orig_mod.")


def load_weights(network: nn.Module, path: str | Path) -> None:
    """Load a weight file into a network, every entry or none.

    Args:
        network: what the weights are for.
        path: a ``.safetensors`` file, or a torch file such as ``.pth`` or a Lightning ``.ckpt``;
            ``pkg://PACKAGE/FILE`` names a file that a Python package ships. The weights may lie
            under ``state_dict``, ``model`` or ``state_dict_ema``, and their names may start with
            ``module.``, ``student.``, ``model.``, ``net.`` or ``_orig_mod.``.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged, holds code, or does not fit the network; the entries
            that are missing, unexpected or of another shape are listed.
    """
    state = _strip(_unwrap(read_checkpoint(path), path), network.state_dict())
    expected = network.state_dict()
    problems = [
        *_listed("missing", expected.keys() - state.keys()),
        *_listed("unexpected", state.keys() - expected.keys()),
        *_listed(
            "of another shape",
            {
                f"{name} {tuple(state[name].shape)} for {tuple(expected[name].shape)}"
                for name in expected.keys() & state.keys()
                if expected[name].shape != state[name].shape
            },
        ),
    ]
    if problems:
        raise ValueError(
            f"{path} does not fit {type(network).__name__}: {'; '.join(problems)}. "
            "Build the network as it was trained (architecture, number of classes)"
        )
    network.load_state_dict(state)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The contents of a weight file or checkpoint, tensors on the CPU.

    Args:
        path: as in :func:`load_weights`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged or holds anything but tensors and plain containers.
    """
    file = _resolve(path)
    if not file.is_file():
        raise FileNotFoundError(f"there is no weight file {path}")
    try:
        if file.suffix == ".safetensors":
            return safetensors.torch.load_file(file)
        contents = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is damaged or holds code, which is never executed. Save what you trust anew "
            "as plain tensors: safetensors.torch.save_file(state_dict, path)"
        ) from error
    except (safetensors.SafetensorError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise ValueError(f"{path} is damaged or no weight file: {error}") from error
    if not isinstance(contents, Mapping):
        raise ValueError(f"{path} holds a {type(contents).__name__}: expected a state_dict")
    return dict(contents)


def _resolve(path: str | Path) -> Path:
    text = str(path)
    if not text.startswith("pkg://"):
        return Path(text).expanduser()
    package, _, name = text.removeprefix("pkg://").partition("/")
    return Path(str(importlib.resources.files(package).joinpath(name)))


def _unwrap(contents: Mapping[str, Any], path: str | Path) -> dict[str, Tensor]:
    for key in _WRAPPERS:
        if isinstance(contents.get(key), Mapping):
            return _unwrap(contents[key], path)
    others = [name for name, value in contents.items() if not isinstance(value, Tensor)]
    if others:
        raise ValueError(
            f"{path} has entries that are no tensors ({', '.join(map(repr, others[:5]))}): "
            f"expected a state_dict, alone or under one of {', '.join(_WRAPPERS)}"
        )
    return dict(contents)


def _strip(state: dict[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take off the prefixes under which the most names fit, level by level."""

    def fitting(prefix: str) -> int:
        return sum(prefix + name in state for name in expected)

    candidates = {outer + inner for outer in _PREFIXES for inner in _PREFIXES}
    best = max(sorted(candidates, key=len), key=fitting)
    if not best or not fitting(best):
        return state
    return {
        name.removeprefix(best): value for name, value in state.items() if name.startswith(best)
    }


def _listed(what: str, names: set[str]) -> list[str]:
    if not names:
        return []
    shown = sorted(names)[:8]
    more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
    return [f"{len(names)} {what}: {', '.join(shown)}{more}"]
