"""The losses of torchvision's detectors for batches in which some images have no label."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# An object, the name of its method or sub-module, and what is called instead, with the original as
# its first argument.
_Replacement = tuple[Any, str, Callable[..., Any]]


def no_objects(device: torch.device) -> dict[str, Tensor]:
    """Return the target, or the prediction, for an image without objects."""
    labels = torch.zeros(0, dtype=torch.int64, device=device)
    boxes = torch.zeros(0, 4, device=device)
    return {"boxes": boxes, "labels": labels, "scores": boxes[:, 0]}


def losses_over_labels(
    detector: nn.Module,
    images: Sequence[Tensor],
    targets: Sequence[Mapping[str, Tensor] | None],
) -> dict[str, Tensor]:
    """Return a detector's losses of the images with a label, from one call with all images.

    So the backbone, its batch norms and the heads get every image, and a two-stage detector
    proposes and classifies boxes in every image.

    Args:
        detector: a torchvision detector in training mode, or one with the same methods.
        images: tensors ``(3, H, W)``.
        targets: the target of each image; ``None`` marks an image without a label.

    Returns:
        A dict from names to losses. If no image has a label, they are 0, with a gradient of 0.

    Raises:
        ValueError: if the detector has no such methods, or has losses of masks or keypoints.
    """
    rows = [index for index, target in enumerate(targets) if target is not None]
    given = [no_objects(images[0].device) if target is None else target for target in targets]
    if not rows:
        # All parameters take part, because DDP waits for the gradient of each of them.
        return {name: 0 * value for name, value in detector(list(images), given).items()}
    if len(rows) == len(targets):
        return detector(list(images), given)
    with _replaced(_of_rows(detector, rows)) as missing:
        losses = detector(list(images), given)
    if missing:
        raise ValueError(_refusal(detector, f"it did not call {', '.join(sorted(missing))}"))
    return losses


def _of_rows(detector: nn.Module, rows: list[int]) -> list[_Replacement]:
    """Return what to replace in a detector, so that it computes the losses of some images only."""

    def chosen(values: Sequence[Any]) -> list[Any]:
        return [values[row] for row in rows]

    def one_stage(compute_loss: Any, targets: Any, outputs: Any, anchors: Any, *rest: Any) -> Any:
        outputs = {name: output[rows] for name, output in outputs.items()}
        return compute_loss(chosen(targets), outputs, chosen(anchors), *rest)

    def proposals(compute_loss: Any, scores: Tensor, boxes: Tensor, *by_image: Any) -> Any:
        by_anchor = (x.unflatten(0, (len(by_image[0]), -1)) for x in (scores, boxes))
        return compute_loss(*(x[rows].flatten(0, 1) for x in by_anchor), *map(chosen, by_image))

    counts: list[int] = []  # the number of boxes that the heads have sampled in each image

    def samples(select_training_samples: Any, *arguments: Any) -> Any:
        boxes, *by_image = select_training_samples(*arguments)
        counts[:] = map(len, boxes)
        return boxes, *map(chosen, by_image)

    def predictions(box_predictor: Any, features: Tensor) -> Any:
        return tuple(torch.cat(chosen(x.split(counts))) for x in box_predictor(features))

    heads: Any = getattr(detector, "roi_heads", None)
    if heads is None:
        return [(detector, "compute_loss", one_stage)]
    for kind in ("mask", "keypoint"):
        if getattr(heads, f"has_{kind}", bool)():
            raise ValueError(_refusal(detector, f"it has a loss of {kind}s"))
    return [
        (getattr(detector, "rpn", None), "compute_loss", proposals),
        (heads, "select_training_samples", samples),
        (heads, "box_predictor", predictions),
    ]


@contextmanager
def _replaced(replacements: list[_Replacement]) -> Iterator[set[str]]:
    """Replace methods and sub-modules of some objects, and yield the names of those not called."""
    for owner, name, _ in replacements:
        if not hasattr(owner, name):
            raise ValueError(_refusal(owner, f"it has no {name}"))
    missing = {name for _, name, _ in replacements}
    before = [owner.__dict__.get(name) for owner, name, _ in replacements]

    def called(name: str, original: Any, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            missing.discard(name)
            return function(original, *arguments)

        return call

    try:
        for owner, name, function in replacements:
            # In __dict__, it comes before the method of the class, and before the sub-module.
            owner.__dict__[name] = called(name, getattr(owner, name), function)
        yield missing
    finally:
        for (owner, name, _), kept in zip(replacements, before, strict=True):
            owner.__dict__.pop(name)
            if kept is not None:
                owner.__dict__[name] = kept


def _refusal(detector: Any, why: str) -> str:
    return (
        f"{type(detector).__name__} cannot train on a batch in which only some images have a "
        f"label: {why}; use one of torchvision's Faster R-CNN, RetinaNet or FCOS"
    )
