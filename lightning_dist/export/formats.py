"""export_student: a trained network as a file that is used without this package."""

import copy
import json
import os
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
    compare,
    detections_graph,
    logits_graph,
    refusing,
    save_onnx,
    save_pt2,
)

# What each format is written to where no path is given.
FORMATS = {
    "safetensors": "student.safetensors",
    "timm": "student_timm",
    "torch_export": "student.pt2",
    "onnx": "student.onnx",
}
Shape = tuple[int, int, int]

# Arguments of timm.create_model that are no arguments of the network.
_OF_CREATION = ("model_name", "num_classes", "cache_dir", "checkpoint_path")
# What timm knows of a network's published weights that is not true of the student's.
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
    input_size: Sequence[int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    class_names: Sequence[str] | None = None,
    architecture: Mapping[str, Any] | None = None,
    label_offset: int | None = None,
    dynamic_size: bool = False,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Write a network in evaluation mode to a file that nothing of this package is needed to use.

    The network stays as it was trained: it takes normalised images. What normalises them travels
    along with the other facts, each as JSON: in the header of ``safetensors``, the
    ``metadata_props`` of ``onnx``, the extra file ``metadata.json`` of ``torch_export``, and for
    ``timm`` as far as its ``config.json`` has a place for them.

    All formats but ``safetensors`` are read back and compared with the network on random images, at
    other batch sizes than they were traced with: outputs may differ by 1e-5, and by 1e-5 of the
    largest one. Only then the file gets its name, so that there is never half of one.

    - ``safetensors``: the weights, of any network. Its own code builds the network again.
    - ``timm``: a folder for ``timm.create_model("local-dir:FOLDER", pretrained=True)``, of a
      network of timm.
    - ``torch_export``: the network's graph, for ``torch.export.load(path).module()``. It takes
      float32 images (N, C, H, W) and returns logits; of a network that returns a mapping, ``out``.
    - ``onnx``: the same graph, from ``images`` to ``logits``. Of a detector of torchvision, from
      one ``image`` (3, H, W) of any size to its ``boxes``, ``labels`` and ``scores``.

    Args:
        student: the network; it stays as it is.
        path: file to write, or folder for ``timm``; replaced where it exists. By default
            ``student.safetensors``, ``student_timm``, ``student.pt2`` or ``student.onnx``.
        format: one of the above.
        input_size: channels, height and width of an image in the network, in pixels.
        mean: of each channel, which is subtracted from pixels scaled to 0..1.
        std: of each channel, by which they are then divided.
        class_names: in the order of the logits, or of a detector's labels.
        architecture: what builds the network: its Hydra config. ``timm`` needs those of its
            arguments that are not in the network's name, such as ``in_chans``.
        label_offset: subtracted from a detector's labels in ``onnx``, so that they count from 0. By
            default 1 of a two-stage detector, whose 0 is the background, and 0 of another.
        dynamic_size: let height and width be free in ``torch_export`` and ``onnx``, as the batch
            is.
        extra: further facts to write beside these, of JSON's types.

    Returns:
        The path.

    Raises:
        ValueError: if there is no such format, it cannot hold this network, or what it holds
            computes something else; if weights are not finite, or the facts do not fit.
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
    student = getattr(student, "_orig_mod", student)  # of torch.compile
    network = copy.deepcopy(student).cpu().eval().requires_grad_(False)
    network.to(memory_format=torch.contiguous_format)
    _refuse_nonfinite(network)
    shape = None if input_size is None else _image_shape(input_size)
    for name, values in {"mean": mean, "std": std}.items():
        if shape is not None and values is not None and len(values) not in (1, shape[0]):
            raise ValueError(
                f"{name} has {len(values)} entries and input_size {shape[0]} channels: give one "
                "for each, or one for all"
            )
    facts = {
        "architecture": architecture,
        "input_size": shape,
        "mean": mean,
        "std": std,
        "class_names": class_names,
        **(extra or {}),
    }
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
    """What writes the network to a path, with facts.

    Raises:
        ValueError: if the format cannot hold the network; says which one can.
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
            f"format={format} follows the student on images of some size, and the data do not tell "
            "theirs: set input_size"
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
    path.chmod(mode)  # for its owner alone, as safetensors leaves it


def _save_timm(network: Any, path: Path, facts: Mapping[str, Any], mend: str) -> None:
    """The folder that timm's own networks are published as: config.json and model.safetensors."""
    told = ("input_size", "mean", "std", "interpolation", "crop_pct")
    preset = {k: v for k, v in network.pretrained_cfg.items() if k not in _OF_OTHER_WEIGHTS}
    preset |= {name: facts[name] for name in told if name in facts}
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
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    safetensors.torch.save_model(network, str(path / "model.safetensors"))
    shape = facts.get("input_size") or timm.data.resolve_model_data_config(network)["input_size"]
    with refusing("timm", mend), torch.random.fork_rng(devices=[]):  # a new network draws weights
        again = timm.create_model(f"local-dir:{path}", pretrained=True).eval()
        compare(again, network, [torch.randn(2, *shape)])


@contextmanager
def _staged(path: Path) -> Iterator[Path]:
    """A path to write to; what is there in the end, a file or a folder of files, becomes `path`.

    Raises:
        OSError: if that cannot be.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as folder:
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


def _refuse_nonfinite(network: nn.Module) -> None:
    for name, value in network.state_dict().items():
        if value.is_floating_point() and not value.isfinite().all():
            raise ValueError(
                f"the student's {name!r} is not finite: its training diverged; export another "
                "checkpoint"
            )


def _image_shape(size: Sequence[int]) -> Shape:
    if len(size) != 3 or any(not isinstance(n, int) or n < 1 for n in size):
        raise ValueError(
            f"input_size is {list(size)}: give the channels, height and width of an image in pixels"
        )
    channels, height, width = size
    return channels, height, width


def _is_of_timm(network: nn.Module) -> bool:
    architecture = (getattr(network, "pretrained_cfg", None) or {}).get("architecture")
    return architecture is not None and timm.is_model(architecture)


def _kind(network: nn.Module) -> str:
    return f"{type(network).__name__} of {type(network).__module__}"


def _one_of(names: Any) -> str:
    *first, last = [name for name in FORMATS if name in names]
    return f"{', '.join(first)} or {last}"
