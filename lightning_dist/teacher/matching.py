"""Functions that compare a teacher's card with that of the data, and convert what differs."""

from lightning_dist.files.card import Card
from lightning_dist.teacher.bridge import InputBridge, is_same_name, match_classes


def bridge_between(network: Card, data: Card) -> InputBridge | None:
    """Return the conversion from the data's images to those that a network expects.

    Args:
        network: the card of the network.
        data: the card of the data.

    Returns:
        The bridge, or ``None`` if nothing has to be converted or the normalisation of one side is
        unknown.

    Raises:
        ValueError: if the numbers of channels do not fit together.
    """
    if network.mean is None or network.std is None or data.mean is None or data.std is None:
        return None
    # Networks for segmentation and detection take images of any size.
    resized = network.crop_mode is not None and network.task in (None, "classification")
    size = network.size if resized and network.size != data.size else None
    bridge = InputBridge(
        network.mean,
        network.std,
        data.mean,
        data.std,
        size=size,
        interpolation="bilinear" if network.interpolation == "bilinear" else "bicubic",
        flip_channels="bgr" in (network.channels, data.channels)
        and network.channels != data.channels
        and len(data.mean) > 1,
    )
    changes = bridge.affine is not None or bridge.flip_channels or bridge.size is not None
    return bridge if changes else None


def class_map_between(network: Card, data: Card) -> list[int] | None:
    """Return, for each class of the data, the index of the network's class with the same name.

    Args:
        network: the card of the network.
        data: the card of the data.

    Returns:
        The indices, or ``None`` if the classes are the same, or one side has no names. It is also
        ``None`` if a network of timm or torchvision has other names: they may be other names of the
        same classes, such as WordNet's ids.

    Raises:
        ValueError: if a network of this package has not all classes of the data; the message names
            both sides.
    """
    ours, own = data.class_names, network.class_names
    if ours is None or own is None:
        return None
    if len(ours) == len(own) and all(map(is_same_name, ours, own)):
        return None
    try:
        return match_classes(ours, own)
    except ValueError as error:
        if network.origin != "run":
            return None
        raise ValueError(
            f"the network{f' from {network.source}' if network.source else ''} was trained on the "
            f"classes {_some(own)} and the data has {_some(ours)}. {error}"
        ) from error


def _some(names: tuple[str, ...]) -> str:
    """Return the first names, and the number of the others."""
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(map(repr, names[:8])) + more
