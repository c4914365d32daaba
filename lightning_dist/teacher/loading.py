"""load_teacher: a teacher by a timm or torchvision name, a factory, or as a network."""

import difflib
import importlib
import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import timm.data
import timm.models
import torchvision.models
from torch import nn

from lightning_dist.teacher.bridge import InputBridge
from lightning_dist.teacher.teacher import Teacher


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
    """Build a teacher from wherever its network and weights come.

    Args:
        source: ``"timm/resnet34.tv_in1k"`` or the name alone; ``"torchvision/resnet50"``; a
            function ``"package.module:function"`` or itself, which returns the network; or the
            network.
        weights: file to load, see :func:`lightning_dist.weights.load_weights`. Nothing is
            downloaded then.
        pretrained: of a timm or torchvision name: load the library's weights. A torchvision network
            that has several takes a name such as ``"IMAGENET1K_V2"``; of timm it is part of the
            name. ``False`` leaves the weights random.
        num_classes: classes of the network; by default as many as the library's weights have, or as
            the function makes.
        student_mean: of each channel of the student's images. With ``student_std`` the teacher gets
            an :class:`lightning_dist.teacher.InputBridge` to the normalisation and size that timm
            or torchvision tell of the network.
        student_std: of each channel of the student's images.
        arguments: further arguments of the function that builds the network.
        options: of :class:`lightning_dist.Teacher`: ``inputs``, ``class_map``, ``dtype``,
            ``compile``, ``channels_last``.

    Returns:
        The teacher.

    Raises:
        ValueError: for an unknown name (near ones are listed), a head of another size than
            the weights', or a bridge to a normalisation that is not known.
        TypeError: if ``source`` is something else, or makes something else than a network.

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
    load = bool(pretrained) and weights is None
    pixels: dict[str, Any] | None = None  # what the source tells of the network's images
    if isinstance(source, nn.Module):
        if given:
            raise ValueError(f"{', '.join(given)} cannot change a network that is built already")
        network = source
    elif isinstance(source, str) and source.startswith("torchvision/"):
        name = source.removeprefix("torchvision/")
        entry = pretrained if isinstance(pretrained, str) else "DEFAULT"
        network, pixels = _from_torchvision(name, entry, load, given)
    elif isinstance(source, str) and (":" not in source or source.startswith("timm/")):
        network, pixels = _from_timm(source.removeprefix("timm/"), load, given)
    elif callable(factory := _import(source) if isinstance(source, str) else source):
        network = factory(**given)
    else:
        raise TypeError(
            f"the teacher's source is a {type(source).__name__}: give a name such as "
            "'timm/resnet34.tv_in1k', 'torchvision/resnet50' or 'package.module:function', a "
            "function or a torch.nn.Module"
        )
    if student_mean is not None and options.get("inputs") is None:
        if pixels is None:
            raise ValueError(
                f"{source} does not tell its normalisation: leave out student_mean and student_std "
                "and give inputs=InputBridge(mean, std, student_mean, student_std)"
            )
        assert student_std is not None
        options["inputs"] = InputBridge(
            student_mean=student_mean, student_std=student_std, **pixels
        )
    return Teacher(network, weights, **options)


def _from_timm(
    name: str, load: bool, arguments: dict[str, Any]
) -> tuple[nn.Module, dict[str, Any]]:
    architecture = name.split(".")[0]
    if ":" not in name:  # otherwise a place such as hf-hub:owner/name
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
        arguments = {"weights_backbone": None, **arguments}  # by default it is downloaded
    with _weights_only():
        network = torchvision.models.get_model(name, weights=chosen if load else None, **arguments)
    preset = chosen.transforms()
    if not hasattr(preset, "mean"):  # detectors normalise their images themselves
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
    """Arguments of InputBridge; a crop size of one number is that of a square."""
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
    """A library gives a pretrained network of other classes a head of random weights."""
    wanted = arguments.get("num_classes")
    if wanted is not None and classes and wanted != classes:
        raise ValueError(
            f"the weights of {what} have {classes} classes and num_classes is {wanted}: leave it "
            "out and set class_map, or set weights to a file of a network trained on your classes"
        )


def _refuse_name(what: str, name: str, known: Iterable[str]) -> None:
    names = [candidate for candidate in known if not candidate.startswith("_")]
    near = difflib.get_close_matches(name, names, n=8, cutoff=0.5) or sorted(names)[:8]
    hint = f"did you mean {', '.join(map(repr, near))}?" if near else "there is none"
    raise ValueError(f"there is no {what} {name!r}: {hint}")


def _parameters(function: Callable[..., Any]) -> Iterable[str]:
    return inspect.signature(function).parameters


@contextmanager
def _weights_only() -> Iterator[None]:
    """Let torch.load read nothing but weights: torchvision asks for a whole pickle."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
