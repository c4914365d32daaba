"""Networks as graphs that run without their Python code: torch.export and ONNX, both checked."""

import copy
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

TOLERANCE = 1e-5  # absolute, and again relative to the largest output
METADATA = "metadata.json"  # in a .pt2 file
_TRACED_BATCH = 2  # one image would fix the batch at one
_CHECKED_BATCHES = (1, 3)
_MORE = (32, 64)  # pixels of height and width by which a free size is checked; strides divide them


@dataclass
class Graph:
    """A network that takes one tensor and returns tensors, and how it is traced and checked.

    Args:
        network: the network.
        shapes: of the input: first the one to trace with, then those to check with.
        inputs: what the input is called.
        outputs: what the outputs are called.
        dynamic: which dimensions of the input are free, with their names.
        dynamic_size: whether height and width are.
        draw: ``torch.randn`` or ``torch.rand``, what images are drawn with.
        mend: what to do where it cannot be written.
        rehearsal: what is written and checked first where the network's own outputs are empty on
            random images, which would compare nothing: the same with a lower threshold.
    """

    network: nn.Module
    shapes: Sequence[tuple[int, ...]]
    inputs: str
    outputs: list[str]
    dynamic: dict[int, str]
    dynamic_size: bool
    draw: Callable[..., Tensor] = torch.randn
    mend: str = "use safetensors"
    rehearsal: "Graph | None" = None

    def example(self) -> Tensor:
        """An input to trace with."""
        return _random(self.shapes[0], 0, self.draw)

    def checked_with(self) -> list[Tensor]:
        """The inputs to check with."""
        return [_random(shape, i, self.draw) for i, shape in enumerate(self.shapes[1:], start=1)]

    def check(self, found: Callable[[Tensor], Any]) -> None:
        """See :func:`compare`."""
        compare(found, self.network, self.checked_with())


class MainOutput(nn.Module):
    """``out`` of a network that returns a mapping, as segmentation networks do."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)["out"]


class Detections(nn.Module):
    """What a detector of torchvision finds in one image: boxes, labels from 0 on, and scores."""

    def __init__(self, detector: nn.Module, label_offset: int) -> None:
        super().__init__()
        self.detector = detector
        self.label_offset = label_offset

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (found,) = self.detector([image])
        return found["boxes"], found["labels"] - self.label_offset, found["scores"]


def logits_graph(network: nn.Module, shape: tuple[int, int, int], dynamic_size: bool) -> Graph:
    """The graph of a classifier or segmentation network, from any number of images to logits.

    Raises:
        ValueError: if the network does not take such images, or returns something else.
    """
    network = network.float()
    try:
        output = network(torch.zeros(_TRACED_BATCH, *shape))
    except Exception as error:  # whatever a network's layers say of other inputs
        raise ValueError(
            f"the student does not run on images of {' x '.join(map(str, shape))} "
            f"({_line(error)}): set input_size"
        ) from error
    if isinstance(output, Mapping) and isinstance(output.get("out"), Tensor):
        network = MainOutput(network).eval()
    elif not isinstance(output, Tensor):
        raise ValueError(
            f"the student returns a {type(output).__name__}, and a graph holds a network that "
            "returns a tensor, or a mapping with 'out': use safetensors"
        )
    sizes = [shape]
    dynamic = {0: "batch"}
    mend = "use safetensors"
    if dynamic_size:
        channels, height, width = shape
        sizes.append((channels, height + _MORE[0], width + _MORE[1]))
        dynamic |= {2: "height", 3: "width"}
        mend = "leave out dynamic_size"
    checked = [(batch, *size) for size in sizes for batch in _CHECKED_BATCHES]
    shapes = [(_TRACED_BATCH, *shape), *checked]
    return Graph(network, shapes, "images", ["logits"], dynamic, dynamic_size, mend=mend)


def detections_graph(
    detector: Any, label_offset: int | None, shape: tuple[int, int, int] | None
) -> Graph:
    """The graph of a detector of torchvision, from one image of any size to what is found."""
    if label_offset is None:
        label_offset = int(hasattr(detector, "roi_heads"))
    channels, height, width = shape or (3, *2 * (detector.transform.min_size[-1],))
    shapes = [(channels, height + i * _MORE[0], width + i * _MORE[1]) for i in range(2)]
    graph = Graph(
        Detections(detector.float(), label_offset).eval(),
        [shapes[0], *shapes],
        "image",
        ["boxes", "labels", "scores"],
        {1: "height", 2: "width"},
        dynamic_size=True,
        draw=torch.rand,  # it normalises itself
    )
    images = graph.checked_with()
    if all(len(graph.network(image)[-1]) for image in images):
        return graph
    finding = Detections(_finding(detector, images), label_offset).eval()
    return replace(graph, rehearsal=replace(graph, network=finding))


def _finding(detector: Any, images: Sequence[Tensor]) -> Any:
    """A copy of a detector whose score threshold lets about ten boxes of each image pass."""
    detector = copy.deepcopy(detector)
    holder = getattr(detector, "roi_heads", detector)
    holder.score_thresh = 0.0
    best = (detector([image])[0]["scores"].sort().values[-11:] for image in images)
    # Between two scores, so that a rounding does not decide.
    holder.score_thresh = min((float(x[:2].mean()) if len(x) > 10 else 0.0) for x in best)
    return detector


def save_pt2(graph: Graph, path: Path, facts: Mapping[str, Any]) -> None:
    """Write what ``torch.export.load`` reads, with the facts in the extra file of `METADATA`.

    Raises:
        ValueError: if torch.export cannot follow the network, or what it read back computes
            something else.
    """
    with refusing("torch_export", graph.mend):
        program = _exported(graph)
        torch.export.save(program, path, extra_files={METADATA: json.dumps(facts)})
        graph.check(torch.export.load(path).module())


def save_onnx(graph: Graph, path: Path, facts: Mapping[str, Any]) -> None:
    """Write an ONNX file, with the facts in its ``metadata_props``, and check it in onnxruntime.

    Raises:
        ImportError: if a package is missing; says how to install it.
        ValueError: if the exporter cannot follow the network, or onnxruntime computes something
            else.
    """
    onnx, onnxruntime = _import_onnx()
    if graph.rehearsal is not None:
        save_onnx(graph.rehearsal, path, facts)
    with refusing("onnx", graph.mend):
        (_trace if isinstance(graph.network, Detections) else _translate)(graph, path)
        model = onnx.load(path)
        onnx.helper.set_model_props(model, {name: json.dumps(x) for name, x in facts.items()})
        onnx.save(model, path)
        quiet = onnxruntime.SessionOptions()
        quiet.log_severity_level = 4  # its errors are raised too
        session = onnxruntime.InferenceSession(path, quiet, providers=["CPUExecutionProvider"])

        def run(images: Tensor) -> list[Tensor]:
            outputs = session.run(graph.outputs, {graph.inputs: images.numpy()})
            return [torch.from_numpy(output) for output in outputs]

        graph.check(run)


def _translate(graph: Graph, path: Path) -> None:
    program = torch.onnx.export(
        _exported(graph),
        input_names=[graph.inputs],
        output_names=graph.outputs,
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    program.save(path, external_data=False)


def _trace(graph: Graph, path: Path) -> None:
    """For detectors, which torch.export cannot follow; torchvision supports this tracer."""
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
def refusing(format: str, mend: str) -> Iterator[None]:
    """Whatever goes wrong while a format is written and checked, as a refusal of the student.

    Warnings are silenced: they are about what the check finds out.

    Raises:
        ValueError: says why, and the mend.
        OSError, ImportError: as they were.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (OSError, ImportError):
        raise
    except Exception as error:  # exporters and runtimes raise errors of many kinds
        raise ValueError(
            f"format={format} cannot hold this student ({_line(error)}): {mend}"
        ) from error


def compare(
    found: Callable[[Tensor], Any],
    network: Callable[[Tensor], Any],
    inputs: Sequence[Tensor],
) -> None:
    """Run what was written beside the network.

    Raises:
        ValueError: if it gives other outputs.
    """
    for images in inputs:
        pairs = zip(_tuple(found(images)), _tuple(network(images)), strict=True)
        if not all(_close(ours, expected) for ours, expected in pairs):
            shape = tuple(images.shape)
            raise ValueError(f"it gives other outputs on images of the shape {shape}")


def _close(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape:
        return False
    if not found.numel():
        return True
    allowed = TOLERANCE * (1 + expected.abs().max().item())
    return (found - expected).abs().max().item() <= allowed


def _exported(graph: Graph) -> ExportedProgram:
    # Named where nothing but "any number" will do; a network may want a size of even numbers.
    free = {i: Dim(name) if name == "batch" else Dim.AUTO for i, name in graph.dynamic.items()}
    return torch.export.export(graph.network, (graph.example(),), dynamic_shapes=(free,))


def _import_onnx() -> tuple[Any, Any]:
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401 -- torch.onnx writes with it
    except ImportError as error:
        raise ImportError(
            f"format=onnx needs packages that are not installed ({error}): "
            "pip install 'lightning-dist[onnx]'"
        ) from error
    return onnx, onnxruntime


def _random(shape: Sequence[int], seed: int, draw: Callable[..., Tensor]) -> Tensor:
    """The global stream stays as it is."""
    return draw(tuple(shape), generator=torch.Generator().manual_seed(seed))


def _tuple(outputs: Any) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
