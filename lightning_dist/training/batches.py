"""``split_batch``: the inputs and the target of a batch, which is a pair or a mapping."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

INPUT_KEYS = ("image", "images", "pixel_values", "inputs")
TARGET_KEYS = ("label", "labels", "mask", "masks", "target")


def split_batch(
    batch: Any, keys: tuple[str, str] | None = None, method: str = "split_batch"
) -> tuple[Any, Any]:
    """Return the inputs and the target of a batch.

    Args:
        batch: a pair, or a mapping such as ``{"pixel_values": ..., "labels": ...}``.
        keys: the keys of the inputs and of the target in a mapping; by default the first of
            ``INPUT_KEYS`` and of ``TARGET_KEYS`` that the mapping has.
        method: the method to override for batches of another form, for the message.

    Raises:
        TypeError: if the batch is neither a pair nor a mapping with these keys; the message
            describes the batch.

    Example:
        >>> split_batch({"pixel_values": 1, "labels": 2})
        (1, 2)
    """
    advice = f"give pairs (inputs, target), set batch_keys, or override {method}"
    if isinstance(batch, Mapping):
        inputs, target = keys or (find_key(batch, INPUT_KEYS), find_key(batch, TARGET_KEYS))
        if inputs not in batch or target not in batch:
            found = ", ".join(map(repr, batch))
            missing = f", not {inputs!r} and {target!r}" if keys else ""
            raise TypeError(f"the batch is a mapping with the keys {found}{missing}: {advice}")
        return batch[inputs], batch[target]
    if isinstance(batch, (Tensor, str)) or not hasattr(batch, "__len__") or len(batch) != 2:
        size = f" of {len(batch)} items" if isinstance(batch, (list, tuple)) else ""
        raise TypeError(f"the batch is a {type(batch).__name__}{size}: {advice}")
    inputs, target = batch
    return inputs, target


def find_key(batch: Mapping[str, Any], keys: Sequence[str]) -> str | None:
    """Return the first of some keys that a mapping has, or ``None``."""
    return next((key for key in keys if key in batch), None)
