"""Functions that load weight files and checkpoints without running code that a file may contain."""

import importlib.util
import json
import os
import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from lightning_dist.files.limits import (
    refuse_holes,
    refuse_strange_safetensors,
    refuse_strange_torch_file,
    refuse_too_much,
)
from lightning_dist.files.pickles import BESIDE_WEIGHTS
from lightning_dist.files.text import error_line, printable, read_bounded

# Training programs store weights under these entries of a checkpoint, and put these prefixes before
# the names. Averaged weights come first, because a program that averages weights evaluates and
# publishes the averaged ones.
_WRAPPERS = (
    *("state_dict_ema", "model_ema", "ema_model", "params_ema"),
    *("state_dict", "model_state_dict", "model", "net", "network", "module", "weights", "params"),
)
_AVERAGED = _WRAPPERS[:4]
_OF_AVERAGE = "student_ema."
_PREFIXES = ("", "student_ema.module.", "module.", "student.", "model.", "net.", "_orig_mod.")

_COUNTER = "num_batches_tracked"
_LONGEST_NAME = 255  # bytes; a system call raises an error for a longer name of a file
_MOST_LEVELS = 16  # The largest number of parts of a prefix that all names share.


class _Unread:
    """A placeholder for objects that are not weights; it ignores their data in the file."""

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def load_weights(
    network: nn.Module,
    path: str | Path,
    convert: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] | None = None,
    *,
    averaged: bool | None = None,
    contents: Mapping[str, Any] | None = None,
    keep_heads: bool = False,
) -> list[str]:
    """Load a weight file into a network: all entries, or no entry if one of them does not fit.

    Args:
        network: the network to load the weights into.
        path: a ``.safetensors`` file, or a torch file such as ``.pth`` or a Lightning ``.ckpt``.
            ``pkg://PACKAGE/FILE`` is a file inside a Python package. For the folder of a run, it is
            the checkpoint that was tested; for a folder of ``format=timm``, the weights. The
            weights may be in an entry such as ``state_dict``, ``model``, ``model_state_dict``,
            ``net`` or ``model_ema``, and their names may start with ``student.``, ``model.`` and
            the like, with any prefix that all names share, or with the one prefix under which the
            whole network is in the file. ``num_batches_tracked`` of batch norms may be missing.
        convert: a function that renames the entries of another program to the network's names; by
            default the network's own method ``convert_state_dict``, if it has this method.
        averaged: load the averaged (EMA) weights if true, the others if false. By default the
            averaged weights are loaded if the file contains both.
        contents: the contents of the file, if :func:`read_checkpoint` has read it already.
        keep_heads: accept a file whose output layers have another number of outputs, or that has no
            last layer; these layers of the network are not changed.

    Returns:
        The names of the layers that are not changed.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if the file is damaged, contains code, or does not fit the network; the message
            lists the entries that are missing, unexpected or of another shape. If ``averaged`` is
            true but the file has no averaged weights.
    """
    expected = network.state_dict()
    state = _unwrap(read_checkpoint(path) if contents is None else contents, path, averaged)
    if convert is None:
        convert = getattr(network, "convert_state_dict", None)
    state = _strip(dict(convert(state)) if convert is not None else state, expected, path)
    _match_counters(state, expected)
    kept = _kept_heads(state, expected) if keep_heads else {}
    state |= {name: expected[name] for names in kept.values() for name in names}
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
        *_listed(
            "on the meta device or sparse",
            {name for name, x in state.items() if x.is_meta or x.layout != torch.strided},
        ),
    ]
    if problems:
        raise ValueError(
            f"{path} does not fit {type(network).__name__}: {'; '.join(problems)}. "
            f"{_advice(state, expected)}"
        )
    network.load_state_dict(state)
    return list(kept)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Return the contents of a weight file or checkpoint, with tensors on the CPU.

    Command-line arguments (``argparse.Namespace``) and NumPy values are not loaded: objects without
    data replace them.

    Args:
        path: a path as in :func:`load_weights`.

    Returns:
        A dict from the names to the entries of the file.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if the file is damaged, or contains other objects than tensors, numbers, strings
            and plain containers.
    """
    file = resolve_path(path)
    if not file.is_file():
        raise FileNotFoundError(f"there is no weight file {path}")
    try:
        refuse_holes(file)
        if file.suffix == ".safetensors":
            refuse_strange_safetensors(file)
            return safetensors.torch.load_file(file)
        refuse_strange_torch_file(file)
        with torch.serialization.safe_globals([(_Unread, name) for name in BESIDE_WEIGHTS]):
            contents = torch.load(file, map_location="cpu", weights_only=True)
        refuse_too_much(contents, file)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise ValueError(
            f"{path} is damaged, or contains {found[1][:100] if found else 'code'} beside tensors. "
            "Such objects can run code and are never loaded. Save only the weights, in the program "
            "that wrote the file: safetensors.torch.save_file(network.state_dict(), path)"
        ) from error
    except PermissionError:
        raise
    except Exception as error:  # Damaged files cause errors of many kinds.
        reason = error_line(str(error))
        raise ValueError(f"{path} is damaged or no weight file: {reason}") from error
    if not isinstance(contents, Mapping):
        raise ValueError(f"{path} holds a {type(contents).__name__}: expected a state_dict")
    return dict(contents)


@contextmanager
def weights_only_loads() -> Iterator[None]:
    """Make torch.load read only weights here, because torchvision does not request that."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def resolve_path(path: str | Path) -> Path:
    """Return the path of the file; the given path may be ``pkg://...`` or start with ``~``.

    The folder of a run becomes its tested checkpoint, and an exported folder its weights. The
    package of a ``pkg://`` path is not imported: that would run its code.

    Raises:
        FileNotFoundError: if there is no such package.
    """
    text = str(path)
    if not text.startswith("pkg://"):
        file = Path(text).expanduser()
        return _weights_in(file) if file.is_dir() else file
    package, _, name = text.removeprefix("pkg://").partition("/")
    top, *inner = package.split(".")
    try:
        found = importlib.util.find_spec(top) if top else None
    except ValueError:  # the package of a running script has no spec
        found = None
    folders = [
        Path(folder, *inner) for folder in (found and found.submodule_search_locations) or ()
    ]
    if not folders:
        raise FileNotFoundError(f"there is no package {printable(package, 100)!r} for {path}")
    return next((x / name for x in folders if (x / name).is_file()), folders[0] / name)


def _weights_in(folder: Path) -> Path:
    """Return the file with the weights in the folder of a run or of an export.

    A folder of another kind is returned as it is.

    Raises:
        ValueError: if the result of the run is damaged.
    """
    names, result = ["last.ckpt"], folder / "result.json"
    if result.is_file():
        try:
            tested = json.loads(read_bounded(result))["checkpoint"]
            # The name alone: the folder of the run may have been moved.
            name = Path(tested or "").name
            if len(os.fsencode(name)) > _LONGEST_NAME:
                raise ValueError("no file has such a name")
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise ValueError(f"{result} is damaged: name a file in {folder}/checkpoints") from error
        names.insert(0, name)
    files = [*(folder / "checkpoints" / name for name in names), folder / "model.safetensors"]
    return next((file for file in files if file.is_file()), folder)


def _unwrap(
    contents: Mapping[str, Any], path: str | Path, averaged: bool | None
) -> dict[str, Tensor]:
    """Return the weights in a checkpoint's contents; raise a ValueError if it has no weights."""
    wrappers = [key for key in _WRAPPERS if averaged is not False or key not in _AVERAGED]
    has_average = any(key in contents for key in _AVERAGED)
    for _ in wrappers:
        inner = (contents.get(key) for key in wrappers)
        contents = next((x for x in inner if isinstance(x, Mapping) and x), contents)
    others = [
        name
        for name, value in contents.items()
        if not (isinstance(name, str) and isinstance(value, Tensor))
    ]
    if others or not contents:
        entries = (
            f"entries that are no tensors ({', '.join(f'{name!r:.100}' for name in others[:5])})"
        )
        raise ValueError(
            f"{path} has {entries if others else 'no entries'}: "
            f"expected a state_dict, alone or under one of {', '.join(_WRAPPERS)}"
        )
    own = {name for name in contents if name.startswith(_OF_AVERAGE)}
    if averaged and not (own or has_average):
        raise ValueError(f"{path} has no averaged weights: leave out ema=true")
    if averaged is None or not own:
        return dict(contents)
    return {name: value for name, value in contents.items() if (name in own) == averaged}


def _strip(
    state: dict[str, Tensor], expected: Mapping[str, Tensor], path: str | Path
) -> dict[str, Tensor]:
    """Remove a prefix of the names, so that as many of them as possible fit the network.

    Raises:
        ValueError: if the whole network is in the file under several unknown prefixes.
    """
    needed = [name for name in expected if not name.endswith(_COUNTER)]

    def fitting(prefix: str) -> int:
        return sum(prefix + name in state for name in needed)

    parts = next(iter(state)).split(".", _MOST_LEVELS)[:-1]
    levels = (".".join(parts[:end]) + "." for end in range(1, len(parts) + 1))
    common = (prefix for prefix in levels if all(name.startswith(prefix) for name in state))
    known = [outer + inner for outer in _PREFIXES for inner in _PREFIXES]
    best = max((*known, *common), key=fitting)
    if needed and fitting(best) < len(needed):
        ends = {key.removesuffix(needed[0]) for key in state if key.endswith(f".{needed[0]}")}
        whole = sorted(x for x in ends if all(x + name in state for name in needed))
        if len(whole) > 1:
            raise ValueError(
                f"{path} has several networks of this kind, under {', '.join(map(repr, whole))}: "
                "save one of them alone"
            )
        best = whole[0] if whole else best
    if not best or not fitting(best):
        return state
    return {
        name.removeprefix(best): value for name, value in state.items() if name.startswith(best)
    }


def _match_counters(state: dict[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Add and remove batch norms' counters of batches in place, as torch itself does.

    Old programs and converters leave them out, and a frozen batch norm has none.
    """
    for name in [name for name in state if name.endswith(_COUNTER) and name not in expected]:
        del state[name]
    for name, value in expected.items():
        if name.endswith(_COUNTER):
            state.setdefault(name, value)


def _kept_heads(
    state: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> dict[str, list[str]]:
    """Return a dict from the output layers that a file cannot fill to the names of their entries.

    Such an output layer has the same inputs but another number of outputs in the file; or it is the
    last layer of the network, and the file does not contain it.
    """
    layers: dict[str, list[str]] = {}
    for name in expected:
        layers.setdefault(name.rpartition(".")[0], []).append(name)
    matrices = [name for name, value in expected.items() if value.dim() > 1]
    last = matrices[-1].rpartition(".")[0] if matrices else None
    kept = {}
    for layer, names in layers.items():
        found = [name for name in names if name in state]
        resized = [name for name in found if state[name].shape != expected[name].shape]
        same_inputs = all(
            state[name].dim() == expected[name].dim() > 0
            and state[name].shape[1:] == expected[name].shape[1:]
            for name in resized
        )
        has_matrix = any(expected[name].dim() > 1 for name in resized)
        is_resized = has_matrix and same_inputs and len(found) == len(names)
        if is_resized or (not found and layer == last):
            kept[layer] = names
    return kept


def _listed(what: str, names: set[str]) -> list[str]:
    """Return a list of one line with the first names, or an empty list if there are no names."""
    if not names:
        return []
    shown = [printable(name, 100) for name in sorted(names)[:8]]
    more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
    return [f"{len(names)} {what}: {', '.join(shown)}{more}"]


def _advice(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """Return advice for the error message: set num_classes, if only the class numbers differ."""
    heads = set()
    same_names = state.keys() == expected.keys()
    for name in expected.keys() & state.keys():
        in_network, in_file = expected[name].shape, state[name].shape
        if in_network != in_file:
            both_have_dimensions = len(in_network) > 0 and len(in_file) > 0
            same_names &= both_have_dimensions and in_network[1:] == in_file[1:]
            heads.add(in_file[:1])
    if same_names and len(heads) == 1:
        (classes,) = heads.pop()
        return f"The file's head has {classes} classes: set num_classes={classes} of the network"
    return "Build the network as it was trained (architecture, num_classes)"
