"""Functions that read and write cards in files of every kind, and load weights with their card."""

import json
import logging
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lightning_dist.files.card import CARD_KEY, Card
from lightning_dist.files.limits import refuse_strange_safetensors, refuse_strange_torch_file
from lightning_dist.files.onnx_metadata import onnx_metadata
from lightning_dist.files.text import MOST_READ, error_line, printable, read_bounded
from lightning_dist.files.weights import load_weights, read_checkpoint, resolve_path
from lightning_dist.files.writing import naming

log = logging.getLogger(__name__)


def card_in(contents: Mapping[str, Any], path: str | Path) -> Card | None:
    """Return the card in the contents of a checkpoint, or ``None`` if it has none.

    Args:
        contents: the contents, as
            :func:`lightning_dist.files.weights.read_checkpoint` returns them.
        path: the file that they come from, for the message.

    Raises:
        ValueError: if the card is damaged.
    """
    return Card.from_plain(contents[CARD_KEY], path) if CARD_KEY in contents else None


def read_card(path: str | Path) -> Card | None:
    """Return the card in a file, or ``None`` if the file has none.

    Args:
        path: a checkpoint, a file or folder that ``lightning-dist export`` has written, a folder of
            predictions, or a ``.json`` file with a card.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if the file or its card is damaged.
    """
    folder = Path(path).expanduser()
    described = (folder / name for name in ("card.json", "config.json"))
    file = next((file for file in described if file.is_file()), resolve_path(path))
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {path}, or the folder has no card.json")
    read = _READERS.get(file.suffix, read_checkpoint)
    try:
        contents = read(file)
    except PermissionError:
        raise
    except Exception as error:  # The readers raise errors of many kinds for damaged files.
        raise ValueError(f"{path} cannot be read: {error_line(str(error))}") from error
    return card_in(contents, path) if isinstance(contents, Mapping) else None


def write_card(card: Card, path: Path) -> None:
    """Write a card to a ``.json`` file, which :func:`read_card` reads."""
    with naming(path):
        path.write_text(json.dumps({CARD_KEY: card.to_plain()}, indent=2) + "\n")


def load_with_card(network: nn.Module, path: str | Path, ema: bool | None = None) -> Card | None:
    """Load a weight file into a network, and return the card of the weights.

    Args:
        network: the network.
        path: the file, as in :func:`lightning_dist.files.weights.load_weights`.
        ema: load the averaged weights (true) or the others (false) of a file with both; by default
            those that the card names, and without a card the averaged ones.

    Returns:
        The card, or ``None`` if the file has none.

    Raises:
        FileNotFoundError, ValueError: as in :func:`lightning_dist.files.weights.load_weights`.
    """
    return _load(network, path, ema, keep_heads=False)[0]


def load_initial_weights(
    network: nn.Module, path: str | Path, *, ema: bool | None = None
) -> list[str]:
    """Load weights into a network before it is trained, such as those of a pretrained student.

    If an output layer has another number of classes in the file, the layer of the network is not
    changed, and its name is logged.

    Args:
        network: the network.
        path: the file, or the folder of a run, as in
            :func:`lightning_dist.files.weights.load_weights`.
        ema: load the averaged weights (true) or the others (false) of a file with both; by default
            those that the card names, and without a card the averaged ones.

    Returns:
        The names of the layers that are not changed, and have to be trained.

    Raises:
        FileNotFoundError, ValueError: as in :func:`lightning_dist.files.weights.load_weights`.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 10)).state_dict(),
        ...         f"{folder}/pretrained.pth")
        ...     load_initial_weights(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3)),
        ...         f"{folder}/pretrained.pth")
        ['1']
    """
    _, kept = _load(network, path, ema, keep_heads=True)
    new = f", except the new {'layers' if len(kept) > 1 else 'layer'} {', '.join(kept)}"
    file = printable(str(resolve_path(path)))
    rank_zero_info(f"{type(network).__name__} starts from {file}{new if kept else ''}")
    return kept


def _load(
    network: nn.Module, path: str | Path, ema: bool | None, keep_heads: bool
) -> tuple[Card | None, list[str]]:
    """Load a weight file; return the card of the weights, and the names of the unchanged layers."""
    contents = read_checkpoint(path)
    # The file has one set of weights, and the card is in another file.
    if resolve_path(path).suffix == ".safetensors":
        card = read_card(path)
        if ema is not None and card is not None and card.averaged is not ema:
            has = card.describe() or "other weights"
            raise ValueError(f"{path} has {has} only: leave out ema={str(ema).lower()}")
        return card, load_weights(network, path, contents=contents, keep_heads=keep_heads)
    card = card_in(contents, path)
    averaged = card.averaged if ema is None and card is not None else ema
    kept = load_weights(network, path, averaged=averaged, contents=contents, keep_heads=keep_heads)
    if card is not None and averaged is not None:
        card = card.of_weights(averaged)
    if card is None and not keep_heads:
        _warn_of_old_run(contents, path, averaged)
    return card, kept


def _warn_of_old_run(contents: Mapping[str, Any], path: str | Path, averaged: bool | None) -> None:
    """Log what is assumed of a checkpoint of this package without a card."""
    names = contents.get("state_dict")
    if "pytorch-lightning_version" not in contents or not isinstance(names, Mapping):
        return  # The file is from another program: the user sets its images and classes.
    if not any(str(name).startswith("student.") for name in names):
        return
    has_average = any(str(name).startswith("student_ema.") for name in names)
    used = "averaged" if has_average and averaged is not False else "student's own"
    log.warning(
        "%s has no card, because an earlier version wrote it. Assumed: the %s weights; images as "
        "the student gets them, unless inputs or student_mean convert them; the student's classes "
        "in their order, unless class_map selects others",
        path,
        used,
    )


def _read_header(path: Path) -> dict[str, Any]:
    refuse_strange_safetensors(path)
    with safetensors.safe_open(str(path), framework="pt") as file:
        return {k: json.loads(v) for k, v in (file.metadata() or {}).items() if k == CARD_KEY}


def _read_json(path: Path) -> Any:
    return json.loads(read_bounded(path).decode("utf-8"))


def _read_pt2(path: Path) -> Any:
    refuse_strange_torch_file(path)
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.filename.endswith("extra/metadata.json") and entry.file_size < MOST_READ:
                return json.loads(archive.read(entry))
    return {}


def _read_onnx(path: Path) -> dict[str, Any]:
    found = onnx_metadata(path)
    return {CARD_KEY: json.loads(found[CARD_KEY])} if CARD_KEY in found else {}


_READERS: dict[str, Callable[[Path], Any]] = {
    ".safetensors": _read_header,
    ".json": _read_json,
    ".pt2": _read_pt2,
    ".onnx": _read_onnx,
}
