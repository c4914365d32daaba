"""Keys of the config that had another name, so that an error about an old one gives the new one."""

import re
from collections.abc import Container

NEW_NAMES = {
    "distributed": "trainer.devices, trainer.num_nodes or another trainer=",
    "dist_tau": "distill.loss.tau, or for all runs of a protocol a file in distill/dist/",
    "dist_activation": "distill.loss.activation",
    "recipe": "protocol",
    "module.ema_decay": "callbacks=[default,ema] callbacks.ema.decay",
}
_NOT_FOUND = re.compile(r"Could not (?:override|delete|find|load) '([^'/]+)")


def with_new_name(message: str) -> str:
    """Return an error of Hydra's, with the new name of the key where it is about an old one.

    Args:
        message: the error.

    Example:
        >>> with_new_name("Could not override 'dist_activation'.")
        "'dist_activation' has another name now: use distill.loss.activation"
    """
    found = _NOT_FOUND.search(message)
    if found is None or found[1] not in NEW_NAMES:
        return message
    return f"{found[1]!r} has another name now: use {NEW_NAMES[found[1]]}"


def refuse_renamed_keys(config: Container[str]) -> None:
    """Refuse old names that Hydra takes for new keys, as it does in experiment files.

    Args:
        config: the composed config.

    Raises:
        ValueError: naming the first of them, and its new name.
    """
    for old, new in NEW_NAMES.items():
        if old in config:
            raise ValueError(f"{old!r} has another name now: use {new}")
