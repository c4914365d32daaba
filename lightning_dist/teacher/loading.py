"""``load_teacher``: build a teacher from a timm or torchvision name, a function or a network."""

import difflib
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import timm.data
import timm.models
import torchvision.models
from torch import nn

from lightning_dist.teacher.bridge import InputBridge
from lightning_dist.teacher.teacher import Teacher
from lightning_dist.weights import weights_only_loads


def load_teacher(
    source: str | nn.Module | Callable[..., nn.Module],
    *,
    weights: str | Path | None = None,
    pretrained: bool | str = True,
    num_classes: int | None = None,
    student_mean: Sequence[float] | None = None,
    student_std: Sequence[float] | None = None,
    arguments: Mapping[str, Any] | None = None,
    **options: Any,
) -> Teacher:
    """Return a teacher, with a network and weights from a library, a function or a file.

    Args:
        source: one of: ``"timm/resnet34.tv_in1k"``, with or without ``timm/``;
            ``"torchvision/resnet50"``; a function that returns the network, or its path
            ``"package.module:function"``; the network itself.
        weights: a weight file, see :func:`lightning_dist.weights.load_weights`. With it, nothing is
            downloaded.
        pretrained: load the weights that timm or torchvision has for the name. If torchvision has
            several weights for a network, give the name of one, such as ``"IMAGENET1K_V2"``; in
            timm that is a part of the network's name. ``False`` leaves the weights random.
        num_classes: the number of classes of the network; by default that of the library's weights,
            or the function's own default.
        student_mean: the mean of each channel in the student's normalisation. With ``student_std``,
            the teacher gets an :class:`lightning_dist.teacher.InputBridge` to the normalisation and
            image size that timm or torchvision documents for the network.
        student_std: the standard deviation of each channel in the student's normalisation.
        arguments: further arguments of the function that builds the network.
        options: options of :class:`lightning_dist.Teacher`: ``inputs``, ``class_map``, ``dtype``,
            ``compile``, ``channels_last``.

    Returns:
        The teacher, which is frozen and in evaluation mode.

    Raises:
        ValueError: if a name is unknown (the message lists similar ones), if ``num_classes`` is not
            that of the library's weights, or if an InputBridge is needed but the network's
            normalisation is unknown.
        TypeError: if ``source`` has another type, or its function does not return a network.

    Example:
        >>> teacher = load_teacher("timm/test_resnet.r160_in1k", pretrained=False,
        ...     student_mean=(0.5, 0.5, 0.5), student_std=(0.25, 0.25, 0.25))
        >>> teacher.inputs.size
        (160, 160)
    """
    if (student_mean is None) != (student_std is None):
        raise ValueError("give student_mean and student_std both, or neither")
    given = dict(arguments or {})
    if num_classes is not None:
        given["num_classes"] = num_classes
    network, pixels = _build(source, pretrained, weights is None, given)
    if student_mean is not None and options.get("inputs") is None:
        if pixels is None:
            raise ValueError(
                f"the normalisation of {source} is unknown: leave out student_mean and student_std "
                "and give inputs=InputBridge(mean, std, student_mean, student_std)"
            )
        assert student_std is not None
        options["inputs"] = InputBridge(
            student_mean=student_mean, student_std=student_std, **pixels
        )
    return Teacher(network, weights, **options)


def _build(
    source: str | nn.Module | Callable[..., nn.Module],
    pretrained: bool | str,
    may_load: bool,
    given: dict[str, Any],
) -> tuple[nn.Module, dict[str, Any] | None]:
    """Return the network of a source, and the arguments of its InputBridge, or ``None`` if unknown.

    Raises:
        ValueError: if the source is unknown or does not take the arguments.
        TypeError: if the source has another type.
    """
    load = bool(pretrained) and may_load
    if isinstance(source, nn.Module):
        if given:
            raise ValueError(f"{', '.join(given)} cannot change a network that is built already")
        return source, None
    if isinstance(source, str) and source.startswith("torchvision/"):
        name = source.removeprefix("torchvision/")
        entry = pretrained if isinstance(pretrained, str) else "DEFAULT"
        return _from_torchvision(name, entry, load, given)
    if isinstance(source, str) and (":" not in source or source.startswith("timm/")):
        return _from_timm(source.removeprefix("timm/"), load, given)
    factory = _import(source) if isinstance(source, str) else source
    if not callable(factory):
        raise TypeError(
            f"the teacher's source is a {type(source).__name__}: give a name such as "
            "'timm/resnet34.tv_in1k', 'torchvision/resnet50' or 'package.module:function', a "
            "function or a torch.nn.Module"
        )
    return factory(**given), None


def _from_timm(
    name: str, load: bool, arguments: dict[str, Any]
) -> tuple[nn.Module, dict[str, Any]]:
    architecture = name.split(".")[0]
    if ":" not in name:  # A name with a colon is an address such as hf-hub:owner/name.
        if not timm.is_model(architecture):
            _refuse_name("timm network", architecture, timm.list_models())
        tags = timm.list_pretrained(f"{architecture}.*")
        if "." in name and name not in tags:
            _refuse_name("timm weights", name, tags)
        if load:
            config = timm.models.get_pretrained_cfg(name)
            _check_head(f"timm's {name}", config.num_classes if config else None, arguments)
    network = timm.create_model(name, pretrained=load, **arguments)
    config = timm.data.resolve_model_data_config(network)
    return network, _pixels(
        config["mean"], config["std"], config["input_size"][-2:], config["interpolation"]
    )


def _from_torchvision(
    name: str, entry: str, load: bool, arguments: dict[str, Any]
) -> tuple[nn.Module, dict[str, Any] | None]:
    if name not in torchvision.models.list_models():
        _refuse_name("torchvision network", name, torchvision.models.list_models())
    choices = torchvision.models.get_model_weights(name)
    if entry not in choices.__members__:
        _refuse_name(f"weights of torchvision's {name}", entry, choices.__members__)
    chosen = choices[entry]
    if load:
        _check_head(f"torchvision's {name}", len(chosen.meta.get("categories", ())), arguments)
    elif "weights_backbone" in _parameters(torchvision.models.get_model_builder(name)):
        # By default, torchvision downloads weights for the backbone.
        arguments = {"weights_backbone": None, **arguments}
    with weights_only_loads():
        network = torchvision.models.get_model(name, weights=chosen if load else None, **arguments)
    preset = chosen.transforms()
    if not hasattr(preset, "mean"):  # Detectors normalise their images themselves.
        return network, None
    return network, _pixels(
        preset.mean, preset.std, getattr(preset, "crop_size", None), preset.interpolation.value
    )


def _pixels(
    mean: Sequence[float],
    std: Sequence[float],
    size: Sequence[int] | None,
    interpolation: str,
) -> dict[str, Any]:
    """Return arguments of InputBridge; a crop size of one number is the side of a square."""
    return {
        "mean": mean,
        "std": std,
        "size": size[0] if size is not None and len(size) == 1 else size,
        "interpolation": interpolation if interpolation == "bilinear" else "bicubic",
    }


def _import(path: str) -> Any:
    module_name, _, name = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(f"the teacher's source {path!r}: {error}") from error
    if not hasattr(module, name):
        _refuse_name(f"function of {module_name}", name, vars(module))
    return getattr(module, name)


def _check_head(what: str, classes: int | None, arguments: Mapping[str, Any]) -> None:
    """Raise a ValueError if ``num_classes`` differs from the number of classes of the weights.

    Without this check, timm and torchvision would build a head with random weights.
    """
    wanted = arguments.get("num_classes")
    if wanted is not None and classes and wanted != classes:
        raise ValueError(
            f"the weights of {what} have {classes} classes and num_classes is {wanted}: leave it "
            "out and set class_map, or set weights to a file of a network trained on your classes"
        )


def _refuse_name(what: str, name: str, known: Iterable[str]) -> None:
    """Raise a ValueError that lists names similar to an unknown one."""
    names = [candidate for candidate in known if not candidate.startswith("_")]
    near = difflib.get_close_matches(name, names, n=8, cutoff=0.5) or sorted(names)[:8]
    hint = f"did you mean {', '.join(map(repr, near))}?" if near else "there is none"
    raise ValueError(f"there is no {what} {name!r}: {hint}")


def _parameters(function: Callable[..., Any]) -> Iterable[str]:
    return inspect.signature(function).parameters
