"""Functions that write a network to torch.export or ONNX, read it back and compare the outputs."""

import copy
import io
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from lightning_dist.taps import logits_of

Shape = tuple[int, int, int]

TOLERANCE = 1e-5  # The largest difference allowed: absolute, plus relative to the largest output.
# The name of the extra file, inside a .pt2 file, that stores facts about the network.
METADATA = "metadata.json"
_TRACED_BATCH = 2  # With one image, torch.export would fix the batch size at 1.
_CHECKED_BATCHES = (1, 3)
# A graph with free height and width is also checked on images whose height is larger by the first
# number of pixels, and whose width by the second. Both are multiples of the usual strides.
_EXTRA_PIXELS = (32, 64)


@dataclass
class Graph:
    """A network that takes one tensor and returns tensors, with settings to trace and check it.

    Args:
        network: the network, on the CPU and in evaluation mode.
        shapes: the shapes of the input: the first is for tracing, the others for the check. They
            are (N, C, H, W), or (C, H, W) for a network that takes one image; H and W in pixels.
        inputs: the name of the input.
        outputs: the names of the outputs.
        dynamic: a dict from the index of each free dimension of the input to its name.
        dynamic_size: True if height and width are free.
        draw: ``torch.randn`` or ``torch.rand``, the function that draws the images.
        advice: the end of the error message if the network cannot be written; it says what the user
            can do.
        probe: the same graph with a lower score threshold, which is written and checked first. It
            is needed if a detector finds nothing in random images, because comparing empty outputs
            would check nothing.
    """

    network: nn.Module
    shapes: Sequence[tuple[int, ...]]
    inputs: str
    outputs: list[str]
    dynamic: dict[int, str]
    dynamic_size: bool
    draw: Callable[..., Tensor] = torch.randn
    advice: str = "use safetensors"
    probe: "Graph | None" = None

    def example(self) -> Tensor:
        """Return a random input of the first shape, for tracing."""
        return _random(self.shapes[0], 0, self.draw)

    def checked_with(self) -> list[Tensor]:
        """Return random inputs of the other shapes, for the check."""
        return [_random(shape, i, self.draw) for i, shape in enumerate(self.shapes[1:], start=1)]

    def check(self, written: Callable[[Tensor], Any]) -> None:
        """Raise a ValueError if the network that was read back gives other outputs.

        Args:
            written: the network that was read back, as a function of the input.

        Raises:
            ValueError: if an output differs by more than `TOLERANCE`.
        """
        assert_same_outputs(written, self.network, self.checked_with())


class LogitsOnly(nn.Module):
    """A network that returns the logits in the output of another network.

    Args:
        network: a network that returns a mapping or another container, in which
            :func:`lightning_dist.taps.logits_of` finds the logits.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (N, C, H, W) of images (N, C, H, W)."""
        return logits_of(self.network(images))


class Detections(nn.Module):
    """A network that runs a torchvision detector on one image, and returns labels from 0 on.

    Args:
        detector: a detector of torchvision.
        label_offset: a number that is subtracted from the detector's labels.
    """

    def __init__(self, detector: nn.Module, label_offset: int) -> None:
        super().__init__()
        self.detector = detector
        self.label_offset = label_offset

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return boxes (K, 4) in pixels, labels (K,) and scores (K,) of an image (3, H, W)."""
        (found,) = self.detector([image])
        return found["boxes"], found["labels"] - self.label_offset, found["scores"]


def logits_graph(network: nn.Module, shape: Shape, dynamic_size: bool) -> Graph:
    """Return the graph of a network for classification or segmentation, from images to logits.

    Args:
        network: a network in whose output :func:`lightning_dist.taps.logits_of` finds the logits.
        shape: (C, H, W) of an image; H and W in pixels.
        dynamic_size: allow images of any height and width. The number of images is always free.

    Returns:
        The graph, with the input ``images`` (N, C, H, W) and the output ``logits``.

    Raises:
        ValueError: if the network fails on images of this shape, or does not return logits.
    """
    network = network.float()
    try:
        output = network(torch.zeros(_TRACED_BATCH, *shape))
    except Exception as error:  # Unsuitable inputs cause errors of many kinds in layers.
        raise ValueError(
            f"the student does not run on images of {' x '.join(map(str, shape))} "
            f"({_first_line(error)}): set input_size"
        ) from error
    if not isinstance(output, Tensor):
        try:
            logits_of(output)
        except ValueError as error:
            raise ValueError(
                f"the student returns a {type(output).__name__} in which no logits are found "
                f"({error}), but this format stores only networks that return logits: use "
                "safetensors"
            ) from error
        network = LogitsOnly(network).eval()
    sizes = [shape]
    dynamic = {0: "batch"}
    advice = "use safetensors"
    if dynamic_size:
        channels, height, width = shape
        sizes.append((channels, height + _EXTRA_PIXELS[0], width + _EXTRA_PIXELS[1]))
        dynamic |= {2: "height", 3: "width"}
        advice = "leave out dynamic_size"
    checked = [(batch, *size) for size in sizes for batch in _CHECKED_BATCHES]
    shapes = [(_TRACED_BATCH, *shape), *checked]
    return Graph(network, shapes, "images", ["logits"], dynamic, dynamic_size, advice=advice)


def detections_graph(detector: Any, label_offset: int | None, shape: Shape | None) -> Graph:
    """Return the graph of a torchvision detector, from one image of any size to detections.

    Args:
        detector: a detector of torchvision.
        label_offset: a number that is subtracted from the detector's labels. The default is 1 for a
            two-stage detector, whose label 0 is the background, and 0 for other detectors.
        shape: (C, H, W) of the image for tracing, H and W in pixels; by default a square whose side
            is the detector's ``min_size``.

    Returns:
        The graph, with the input ``image`` (C, H, W) and the outputs ``boxes``, ``labels`` and
        ``scores``.
    """
    if label_offset is None:
        label_offset = int(hasattr(detector, "roi_heads"))
    channels, height, width = shape or (3, *2 * (detector.transform.min_size[-1],))
    larger = (channels, height + _EXTRA_PIXELS[0], width + _EXTRA_PIXELS[1])
    shapes = [(channels, height, width), larger]
    graph = Graph(
        Detections(detector.float(), label_offset).eval(),
        [shapes[0], *shapes],
        "image",
        ["boxes", "labels", "scores"],
        {1: "height", 2: "width"},
        dynamic_size=True,
        draw=torch.rand,  # A detector takes pixels in 0..1 and normalises them itself.
    )
    images = graph.checked_with()
    if all(len(graph.network(image)[-1]) for image in images):
        return graph
    probe = Detections(_with_low_threshold(detector, images), label_offset).eval()
    return replace(graph, probe=replace(graph, network=probe))


def _with_low_threshold(detector: Any, images: Sequence[Tensor]) -> Any:
    """Return a copy of a detector whose score threshold keeps about ten boxes of each image."""
    detector = copy.deepcopy(detector)
    holder = getattr(detector, "roi_heads", detector)
    holder.score_thresh = 0.0
    best = (detector([image])[0]["scores"].sort().values[-11:] for image in images)
    # The threshold lies between two scores, so that rounding cannot move a box across it.
    holder.score_thresh = min((float(x[:2].mean()) if len(x) > 10 else 0.0) for x in best)
    return detector


def save_pt2(graph: Graph, path: Path, facts: Mapping[str, Any]) -> None:
    """Write a file for ``torch.export.load``, and check it.

    Args:
        graph: the network.
        path: the file to write.
        facts: facts about the network, stored as JSON in the extra file `METADATA`.

    Raises:
        ValueError: if torch.export cannot trace the network, or the file gives other outputs.
    """
    with as_refusal("torch_export", graph.advice):
        program = _exported(graph)
        # To memory first: on a full disk, torch's own writer of files ends the process.
        file = io.BytesIO()
        torch.export.save(program, file, extra_files={METADATA: json.dumps(facts)})
        path.write_bytes(file.getbuffer())
        graph.check(torch.export.load(path).module())


def save_onnx(graph: Graph, path: Path, facts: Mapping[str, Any]) -> None:
    """Write an ONNX file, and check it in onnxruntime.

    Args:
        graph: the network.
        path: the file to write.
        facts: facts about the network, each stored as JSON in ``metadata_props``.

    Raises:
        ImportError: if a package is missing; the message says how to install it.
        ValueError: if the exporter cannot trace the network, or the file gives other outputs.
    """
    onnx, onnxruntime = _import_onnx()
    if graph.probe is not None:
        save_onnx(graph.probe, path, facts)
    with as_refusal("onnx", graph.advice):
        if isinstance(graph.network, Detections):
            _write_onnx_by_tracing(graph, path)
        else:
            _write_onnx(graph, path)
        model = onnx.load(path)
        onnx.helper.set_model_props(model, {name: json.dumps(x) for name, x in facts.items()})
        onnx.save(model, path)
        quiet = onnxruntime.SessionOptions()
        quiet.log_severity_level = 4  # Do not print errors, because they are also raised.
        session = onnxruntime.InferenceSession(path, quiet, providers=["CPUExecutionProvider"])

        def run(images: Tensor) -> list[Tensor]:
            outputs = session.run(graph.outputs, {graph.inputs: images.numpy()})
            return [torch.from_numpy(output) for output in outputs]

        graph.check(run)


def _write_onnx(graph: Graph, path: Path) -> None:
    """Write an ONNX file from the graph that torch.export creates."""
    program = torch.onnx.export(
        _exported(graph),
        input_names=[graph.inputs],
        output_names=graph.outputs,
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    program.save(path, external_data=False)


def _write_onnx_by_tracing(graph: Graph, path: Path) -> None:
    """Write an ONNX file of a detector with the older exporter of torch.

    torch.export cannot trace a detector, but torchvision supports the older exporter.
    """
    free = {name: {0: "found"} for name in graph.outputs} | {graph.inputs: graph.dynamic}
    torch.onnx.export(
        graph.network,
        (graph.example(),),
        path,
        input_names=[graph.inputs],
        output_names=graph.outputs,
        dynamic_axes=free,
        dynamo=False,
    )


@contextmanager
def as_refusal(format: str, advice: str) -> Iterator[None]:
    """Turn any error while a format is written and checked into a ValueError that names the format.

    Warnings are not printed, because the check finds the problems that they describe.

    Args:
        format: the name of the format.
        advice: the end of the error message; it says what the user can do instead.

    Returns:
        A context manager.

    Raises:
        ValueError: if an error occurs; the message contains the first line of the error and the
            advice.
        OSError: if the disk fails; this error is not turned into a ValueError.
        ImportError: if a package is missing; this error is not turned into a ValueError.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (OSError, ImportError):
        raise
    except Exception as error:  # Exporters and runtimes raise errors of many kinds.
        raise ValueError(
            f"format={format} cannot hold this student ({_first_line(error)}): {advice}"
        ) from error


def assert_same_outputs(
    written: Callable[[Tensor], Any],
    network: Callable[[Tensor], Any],
    inputs: Sequence[Tensor],
) -> None:
    """Raise a ValueError if a network that was read back gives other outputs than the original.

    Args:
        written: the network that was read back, as a function that returns one or more tensors.
        network: the original network, or a function with the same inputs and outputs.
        inputs: the tensors with which both are called, of shapes that the network takes.

    Raises:
        ValueError: if an output has another shape, or differs by more than `TOLERANCE`.
    """
    for images in inputs:
        pairs = zip(_tuple(written(images)), _tuple(network(images)), strict=True)
        if not all(_close(output, expected) for output, expected in pairs):
            shape = tuple(images.shape)
            raise ValueError(
                f"the file gives other outputs than the student for images of shape {shape}"
            )


def _close(output: Tensor, expected: Tensor) -> bool:
    if output.shape != expected.shape:
        return False
    if not output.numel():
        return True
    allowed = TOLERANCE * (1 + expected.abs().max().item())
    return (output - expected).abs().max().item() <= allowed


def _exported(graph: Graph) -> ExportedProgram:
    # The batch size must be completely free (Dim). Height and width may have constraints, such as
    # being even, and torch.export finds those (Dim.AUTO).
    free = {i: Dim(name) if name == "batch" else Dim.AUTO for i, name in graph.dynamic.items()}
    return torch.export.export(graph.network, (graph.example(),), dynamic_shapes=(free,))


def _import_onnx() -> tuple[Any, Any]:
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401 -- torch.onnx imports it.
    except ImportError as error:
        raise ImportError(
            f"format=onnx needs packages that are not installed ({error}): "
            "pip install 'lightning-dist[onnx]'"
        ) from error
    return onnx, onnxruntime


def _random(shape: Sequence[int], seed: int, draw: Callable[..., Tensor]) -> Tensor:
    """Return a random tensor without using the global random generator."""
    return draw(tuple(shape), generator=torch.Generator().manual_seed(seed))


def _tuple(outputs: Any) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
