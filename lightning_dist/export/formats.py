"""``export_student``: writes a trained network to a file that can be used without this package."""

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import timm
import timm.data
import torch
from torch import nn
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from lightning_dist.export.graphs import (
    Shape,
    as_refusal,
    assert_same_outputs,
    detections_graph,
    logits_graph,
    save_onnx,
    save_pt2,
)
from lightning_dist.files.card import CARD_KEY, Card

# The formats, and the file or folder to which each format is written if no path is given.
FORMATS = {
    "safetensors": "student.safetensors",
    "timm": "student_timm",
    "torch_export": "student.pt2",
    "onnx": "student.onnx",
}

# Arguments of timm.create_model that are not written to model_args: num_classes has an entry of its
# own in config.json, and the others are not for the network.
_OWN = ".export-"  # the start of the names of temporary folders; the process id follows
_OF_CREATION = ("model_name", "num_classes", "cache_dir", "checkpoint_path")
# These entries of timm's pretrained_cfg describe the published weights, not the student's weights.
_OF_OTHER_WEIGHTS = (
    *("url", "file", "hf_hub_id", "hf_hub_filename", "source", "state_dict", "tag", "custom_load"),
    *("test_input_size", "test_crop_pct", "pool_size", "paper_ids", "paper_name", "origin_url"),
    *("license", "notes", "label_names", "label_descriptions", "label_offset"),
)


def export_student(
    student: nn.Module,
    path: str | Path | None = None,
    format: str = "safetensors",
    *,
    card: Card | None = None,
    input_size: Sequence[int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    class_names: Sequence[str] | None = None,
    architecture: Mapping[str, Any] | None = None,
    label_offset: int | None = None,
    dynamic_size: bool = False,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Write a network in evaluation mode to a file that can be used without this package.

    The exported network takes normalised images, as the student does. The facts about the network
    (``card``, ``mean``, ``std``, ``class_names`` and so on) are stored as JSON: in the header of
    ``safetensors``, in ``metadata_props`` of ``onnx``, in the extra file ``metadata.json`` of
    ``torch_export``. For ``timm``, only facts for which ``config.json`` has an entry are stored.

    The file is first written to a temporary folder. Except for ``safetensors``, it is then read and
    its outputs on random images are compared with the student's, if possible with other batch sizes
    than in tracing. No value may differ by more than 1e-5 plus 1e-5 times the largest absolute
    value of the student's output. After that, the file is moved to ``path``.

    - ``safetensors``: the weights of any network. To load them, build the network with its own
      code.
    - ``timm``: a folder for ``timm.create_model("local-dir:FOLDER", pretrained=True)``, if the
      student is a network of timm. Its ``predict.py`` labels image files with timm alone.
    - ``torch_export``: the network's graph, for ``torch.export.load(path).module()``. It takes
      float32 images (N, C, H, W) and returns logits. If the network does not return a tensor,
      the graph returns the entry ``logits`` or ``out`` or the first item.
    - ``onnx``: the same graph, from ``images`` to ``logits``. The graph of a torchvision detector
      takes one ``image`` (3, H, W) of any size and returns ``boxes``, ``labels`` and ``scores``.

    Args:
        student: the network; it is not changed.
        path: the file to write, or the folder for ``timm``; an existing file is replaced. By
            default ``student.safetensors``, ``student_timm``, ``student.pt2`` or ``student.onnx``.
        format: one of the four formats above.
        card: the card of the network; it gives the facts below that are not given. The format
            ``timm`` also takes its resizing and crop from the card.
        input_size: (C, H, W), the number of channels and the height and width in pixels of the
            network's images.
        mean: the mean of each channel, subtracted from pixels scaled to 0..1.
        std: the standard deviation of each channel, by which the pixels are then divided.
        class_names: the names of the classes in the order of the logits, or of a detector's labels.
        architecture: the Hydra config that builds the network. For the format ``timm``, it must
            contain the arguments that the network's name does not imply, such as ``in_chans``.
        label_offset: a number subtracted from a detector's labels in ``onnx``, so that the labels
            start at 0. The default is 1 for a two-stage detector, whose label 0 is the background,
            and 0 for other detectors.
        dynamic_size: allow images of any height and width in the graph of ``torch_export`` and
            ``onnx``. (The batch size can always vary, but a detector takes one image.)
        extra: a dict of further facts to store, with values that JSON supports.

    Returns:
        The path of the file or folder.

    Raises:
        ValueError: if the format is unknown or does not support this network; if the file that was
            read back gives other outputs; if weights are not finite; or if ``input_size``, ``mean``
            and ``std`` do not fit together.
        ImportError: if ``onnx`` needs packages that are not installed.
        OSError: if the file cannot be written.

    Example:
        >>> import tempfile
        >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> folder = tempfile.mkdtemp()
        >>> path = export_student(
        ...     network, f"{folder}/student.pt2", "torch_export", input_size=(3, 16, 16)
        ... )
        >>> torch.export.load(path).module()(torch.zeros(5, 3, 16, 16)).shape
        torch.Size([5, 8])
    """
    if format not in FORMATS:
        raise ValueError(f"there is no format {format!r}: use {_one_of(FORMATS)}")
    # torch.compile returns a wrapper with the network in this attribute.
    student = getattr(student, "_orig_mod", student)
    network = copy.deepcopy(student).cpu().eval().requires_grad_(False)
    network.to(memory_format=torch.contiguous_format)
    _refuse_nonfinite(network)
    given = {"input_size": input_size, "mean": mean, "std": std, "class_names": class_names}
    facts = _facts_of(card) | {k: v for k, v in given.items() if v is not None} | dict(extra or {})
    shape = _image_shape(facts["input_size"]) if "input_size" in facts else None
    if shape is not None:
        _check_channels(shape[0], mean=facts.get("mean"), std=facts.get("std"))
    facts |= {"architecture": architecture, "input_size": shape}
    path = Path(FORMATS[format] if path is None else path)
    save = _saver(format, network, shape, label_offset, dynamic_size)
    with _staged(path) as temporary, torch.no_grad():
        save(temporary, {name: value for name, value in facts.items() if value is not None})
    return path


def _saver(
    format: str,
    network: nn.Module,
    shape: Shape | None,
    label_offset: int | None,
    dynamic_size: bool,
) -> Callable[[Path, dict[str, Any]], None]:
    """Return a function that writes the network and the facts about it to a path.

    Raises:
        ValueError: if the format does not support the network; the message names the formats that
            do.
    """
    detector = isinstance(getattr(network, "transform", None), GeneralizedRCNNTransform)
    others = _one_of(["safetensors", "onnx"] if detector else set(FORMATS) - {"timm"})
    if format == "safetensors":
        return lambda path, facts: _save_safetensors(network, path, facts)
    if format == "timm":
        if not _is_of_timm(network):
            raise ValueError(
                f"format=timm holds networks of timm, and the student is a {_kind(network)}: "
                f"use {others}"
            )
        return lambda path, facts: _save_timm(network, path, facts, f"use {others}")
    if detector and format == "torch_export":
        raise ValueError(
            "format=torch_export cannot hold a detector, whose number of boxes depends on the "
            f"image: use {others}"
        )
    if detector:
        graph = detections_graph(network, label_offset, shape)
    elif shape is None:
        raise ValueError(
            f"format={format} traces the student on images of some size, and the size of its "
            "images is unknown: set input_size"
        )
    else:
        graph = logits_graph(network, shape, dynamic_size)
    return lambda path, facts: (save_pt2 if format == "torch_export" else save_onnx)(
        graph, path, {**facts, "dynamic_size": graph.dynamic_size}
    )


def _save_safetensors(network: nn.Module, path: Path, facts: Mapping[str, Any]) -> None:
    header = {name: json.dumps(value) for name, value in facts.items()}
    path.touch()
    mode = path.stat().st_mode
    safetensors.torch.save_model(network, str(path), metadata=header)
    # safetensors creates the file with mode 0600, so that only its owner may read it: restore the
    # usual mode.
    path.chmod(mode)


def _save_timm(network: Any, path: Path, facts: Mapping[str, Any], advice: str) -> None:
    """Write the two files from which timm builds a network: config.json and model.safetensors.

    Raises:
        ValueError: if the network that timm builds from the files gives other outputs; the message
            ends with the advice.
    """
    preset = {k: v for k, v in network.pretrained_cfg.items() if k not in _OF_OTHER_WEIGHTS}
    for name in ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode"):
        if name in facts:
            preset[name] = facts[name]
    config = {
        "architecture": preset.pop("architecture"),
        "num_classes": network.num_classes,
        "num_features": network.num_features,
        "model_args": {
            name: value
            for name, value in facts.get("architecture", {}).items()
            if name not in _OF_CREATION and not name.startswith(("_", "pretrained"))
        },
        "pretrained_cfg": preset | {"num_classes": network.num_classes},
    }
    if "class_names" in facts:
        config["label_names"] = facts["class_names"]
    if CARD_KEY in facts:
        config[CARD_KEY] = facts[CARD_KEY]
    path.mkdir()
    shutil.copyfile(Path(__file__).with_name("predict_timm.py"), path / "predict.py")
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    # The card is in both files, because users also load the weights alone.
    header = {name: json.dumps(facts[name]) for name in (CARD_KEY,) if name in facts}
    safetensors.torch.save_model(network, str(path / "model.safetensors"), metadata=header)
    shape = facts.get("input_size") or timm.data.resolve_model_data_config(network)["input_size"]
    # A new network draws random weights: restore the state of the random generator afterwards.
    with as_refusal("timm", advice), torch.random.fork_rng(devices=[]):
        rebuilt = timm.create_model(f"local-dir:{path}", pretrained=True).eval()
        assert_same_outputs(rebuilt, network, [torch.randn(2, *shape)])


def _facts_of(card: Card | None) -> dict[str, Any]:
    """Return the facts of a card under the names in the files, and the card itself."""
    if card is None:
        return {}
    facts = card.to_plain()
    names = ("mean", "std", "class_names", "channels", "interpolation", "crop_pct", "crop_mode")
    found = {name: facts[name] for name in names if name in facts}
    if card.size is not None:
        found["input_size"] = [1 if card.channels == "gray" else 3, *card.size]
    return found | {CARD_KEY: facts}


@contextmanager
def _staged(path: Path) -> Iterator[Path]:
    """Yield a temporary path for a file or a folder, and move the file or folder to `path`.

    Raises:
        OSError: if `path` cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_left_overs(path.parent)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f"{_OWN}{os.getpid()}-") as folder:
            temporary = Path(folder) / path.name
            yield temporary
            if temporary.is_dir():
                path.mkdir(exist_ok=True)
                for file in temporary.iterdir():
                    os.replace(file, path / file.name)
            else:
                os.replace(temporary, path)
    except (OSError, safetensors.SafetensorError) as error:
        raise OSError(f"{path} cannot be written ({error}): choose another place") from error


def _remove_left_overs(folder: Path) -> None:
    """Delete the temporary folders of exports of this machine that were killed."""
    for old in folder.glob(f"{_OWN}*"):
        process = old.name.removeprefix(_OWN).partition("-")[0]
        try:
            os.kill(int(process), 0)  # Signal 0 only asks whether the process exists.
        except ProcessLookupError:
            shutil.rmtree(old, ignore_errors=True)
        except (ValueError, OSError, OverflowError):
            pass  # It is not of an export, or of one of another user.


def _refuse_nonfinite(network: nn.Module) -> None:
    """Raise a ValueError if a weight of the network is NaN or infinite."""
    for name, value in network.state_dict().items():
        if value.is_floating_point() and not value.isfinite().all():
            raise ValueError(
                f"the student's {name!r} is not finite: its training diverged; export another "
                "checkpoint"
            )


def _image_shape(size: Sequence[int]) -> Shape:
    """Return the size as (C, H, W); raise a ValueError if it is not three numbers above 0."""
    if len(size) != 3 or any(not isinstance(n, int) or n < 1 for n in size):
        raise ValueError(
            f"input_size is {list(size)}: give the channels, height and width of an image in pixels"
        )
    channels, height, width = size
    return channels, height, width


def _check_channels(channels: int, **statistics: Sequence[float] | None) -> None:
    """Raise a ValueError if a mean or standard deviation does not fit the number of channels."""
    for name, values in statistics.items():
        if values is not None and len(values) not in (1, channels):
            raise ValueError(
                f"{name} has {len(values)} entries, but input_size has {channels} channels: give "
                "one entry for each channel, or one entry for all"
            )


def _is_of_timm(network: nn.Module) -> bool:
    architecture = (getattr(network, "pretrained_cfg", None) or {}).get("architecture")
    return architecture is not None and timm.is_model(architecture)


def _kind(network: nn.Module) -> str:
    return f"{type(network).__name__} of {type(network).__module__}"


def _one_of(names: Any) -> str:
    *first, last = [name for name in FORMATS if name in names]
    return f"{', '.join(first)} or {last}"
