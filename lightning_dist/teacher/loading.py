"""``load_teacher``: build a teacher from a timm or torchvision name, a function or a network."""

import dataclasses
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

from lightning_dist.files.card import Card, card_of_timm, card_of_torchvision
from lightning_dist.files.card_files import read_card
from lightning_dist.files.weights import weights_only_loads
from lightning_dist.teacher.teacher import Teacher

# The names of timm with a slash or a colon begin with one of these.
_OF_TIMM = ("timm/", "hf-hub:", "hf_hub:", "local-dir:")


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
            ``"local-dir:FOLDER"``, a folder that ``lightning-dist export format=timm`` has written;
            ``"torchvision/resnet50"``; a function that returns the network, or its path
            ``"package.module:function"``; the network itself.
        weights: a weight file, see :func:`lightning_dist.files.weights.load_weights`. With it,
            nothing is downloaded. If the file has a card, as every file of this package, the
            teacher expects the images and classes that the card names, instead of the library's.
        pretrained: load the weights that timm or torchvision has for the name. If torchvision has
            several weights for a network, give the name of one, such as ``"IMAGENET1K_V2"``; in
            timm that is a part of the network's name. ``False`` leaves the weights random.
        num_classes: the number of classes of the network; by default that of the library's weights,
            or the function's own default.
        student_mean: the mean of each channel in the student's normalisation. With ``student_std``,
            the teacher gets an :class:`lightning_dist.teacher.InputBridge` to the normalisation and
            image size that its card names: that of the file, or what timm or torchvision documents.
            The data modules of this package have a card, and need neither.
        student_std: the standard deviation of each channel in the student's normalisation.
        arguments: further arguments of the function that builds the network.
        options: options of :class:`lightning_dist.Teacher`: ``inputs``, ``class_map``, ``dtype``,
            ``compile``, ``channels_last``, ``ema``.

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
    network, card = _build(source, pretrained, weights is None, given)
    if student_mean is None and not (pretrained and weights is None):
        # The weights are not the library's, so they may be trained on images with another
        # normalisation.
        card = None
    if card is not None and not (pretrained and weights is None):
        own = "random weights" if weights is None else Path(weights).name
        # The card of a file replaces this one.
        card = dataclasses.replace(card, source=f"{own}, with the images of {card.source}")
    teacher = Teacher(network, weights, card=card, **options)
    if student_mean is not None and teacher.inputs is None:
        if teacher.card is None or teacher.card.mean is None:
            raise ValueError(
                f"the normalisation of {source} is unknown: leave out student_mean and student_std "
                "and give inputs=InputBridge(mean, std, student_mean, student_std)"
            )
        assert student_std is not None
        teacher.adapt(Card(mean=tuple(student_mean), std=tuple(student_std)))
    return teacher


def classes_of_weights(
    source: Any, weights: str | Path | None = None, pretrained: bool | str = True
) -> int | None:
    """Return the number of classes of a teacher's weights, or ``None`` if it is unknown.

    Nothing is built or downloaded: the number is that of the weights' card, or that of the library.

    Args:
        source: the source, as in :func:`load_teacher`.
        weights: the weight file, as in :func:`load_teacher`.
        pretrained: the library's weights, as in :func:`load_teacher`.
    """
    name = source if isinstance(source, str) else ""
    file = weights or (name.removeprefix("local-dir:") if name.startswith("local-dir:") else None)
    if file is not None:
        card = read_card(file)
        return None if card is None else card.num_classes
    if name.startswith("torchvision/"):
        network = name.removeprefix("torchvision/")
        if network not in torchvision.models.list_models():
            _refuse_name("torchvision network", network, torchvision.models.list_models())
        entry = pretrained if isinstance(pretrained, str) else "DEFAULT"
        return len(torchvision.models.get_model_weights(network)[entry].meta["categories"]) or None
    config = timm.models.get_pretrained_cfg(name.removeprefix("timm/")) if name else None
    return config.num_classes if config is not None and pretrained else None


def _build(
    source: str | nn.Module | Callable[..., nn.Module],
    pretrained: bool | str,
    may_load: bool,
    given: dict[str, Any],
) -> tuple[nn.Module, Card | None]:
    """Return the network of a source, and its card, or ``None`` if no library has one.

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
    of_timm = isinstance(source, str) and (":" not in source or source.startswith(_OF_TIMM))
    if isinstance(source, str) and of_timm:
        return _from_timm(source.removeprefix("timm/"), load, given)
    factory = _import(source) if isinstance(source, str) else source
    if not callable(factory):
        raise TypeError(
            f"the teacher's source is a {type(source).__name__}: give a name such as "
            "'timm/resnet34.tv_in1k', 'torchvision/resnet50' or 'package.module:function', a "
            "function or a torch.nn.Module"
        )
    return factory(**given), None


def _from_timm(name: str, load: bool, arguments: dict[str, Any]) -> tuple[nn.Module, Card]:
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
    network: Any = timm.create_model(name, pretrained=load, **arguments)
    if load and ":" in name:  # The card of the file is known only now.
        _check_head(name, network.pretrained_cfg.get("num_classes"), arguments)
    folder = name.removeprefix("local-dir:")
    own = read_card(folder) if folder != name else None  # The folder was exported by this package.
    config = timm.data.resolve_model_data_config(network)
    return network, own or card_of_timm(config, name, network.num_classes)


def _from_torchvision(
    name: str, entry: str, load: bool, arguments: dict[str, Any]
) -> tuple[nn.Module, Card]:
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
    categories = chosen.meta.get("categories") if load else None
    return network, card_of_torchvision(chosen.transforms(), name, categories)


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
