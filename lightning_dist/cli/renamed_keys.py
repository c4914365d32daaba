"""The renamed keys of the config, so that an error about an old name gives the new name."""

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
    """Replace an error of Hydra about an old name of a key by one that gives the new name.

    Args:
        message: the message of the error, which is returned unchanged if it names no old key.

    Example:
        >>> with_new_name("Could not override 'dist_activation'.")
        "'dist_activation' has another name now: use distill.loss.activation"
    """
    found = _NOT_FOUND.search(message)
    if found is None or found[1] not in NEW_NAMES:
        return message
    return f"{found[1]!r} has another name now: use {NEW_NAMES[found[1]]}"


def refuse_renamed_keys(config: Container[str]) -> None:
    """Refuse old names of keys; Hydra accepts them as new keys, for example in experiment files.

    Args:
        config: the composed config.

    Raises:
        ValueError: if the config has an old name; the message gives the new name.
    """
    for old, new in NEW_NAMES.items():
        if old in config:
            raise ValueError(f"{old!r} has another name now: use {new}")
