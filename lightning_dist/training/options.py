"""Functions that check the options of a DistillationCallback, and make terms from them."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from lightning_dist.checks import check_number
from lightning_dist.taps import Entry
from lightning_dist.terms import Nonfinite, Term, Weight, default_loss, needs_target

ONLY = "distill"  # The name of the term that is made of loss, weight and output.


def check_options(
    task_weight: float, nonfinite: Nonfinite, student: str = "", backward: int | None = None
) -> None:
    """Refuse options of a DistillationCallback that are out of range; see there.

    Raises:
        TypeError: if ``student`` is not a path.
        ValueError: if another option is wrong.
    """
    check_number("task_weight", task_weight)
    if nonfinite not in ("raise", "skip"):
        raise ValueError(f"nonfinite is {nonfinite!r}: use 'raise' or 'skip'")
    if backward is not None:
        check_number("backward", backward, int, least=0)
    if not isinstance(student, str):
        raise TypeError(f"student is a {type(student).__name__}: give its dotted path, a str")


def check_weight(name: str, weight: Weight) -> None:
    """Refuse a weight that is neither a finite number nor a function.

    Args:
        name: the name of the weight, for the message.
        weight: the weight.

    Raises:
        ValueError: if it is neither.
    """
    if not callable(weight):
        check_number(name, weight)


def terms_from(
    terms: Mapping[str, Term] | None,
    loss: nn.Module | Callable[[Tensor, Tensor], Tensor] | None,
    weight: Weight | None,
    output: Entry | None,
) -> dict[str, Term]:
    """Return the terms that the options of a DistillationCallback describe.

    Args:
        terms: a dict from names to terms, or ``None`` for one term of the other options.
        loss: the loss of that term; DIST by default.
        weight: its weight; 2 by default.
        output: its option ``output``.

    Raises:
        TypeError: if ``terms`` or one of its values is of the wrong kind.
        ValueError: if ``terms`` is empty or not the only option, or if a term has a wrong value.
    """
    if terms is None:
        # Not "loss or default_loss()": bool() of a compiled module fails.
        loss = default_loss() if loss is None else loss
        terms = {ONLY: Term(loss, 2.0 if weight is None else weight, output=output)}
    elif any(x is not None for x in (loss, weight, output)):
        raise ValueError("give either loss, weight and output, or terms")
    if not terms:
        raise ValueError("terms is empty: name at least one Term")
    if not isinstance(terms, Mapping):
        raise TypeError(f"terms is a {type(terms).__name__}: give a dict of names and Terms")
    for name, term in terms.items():
        if not isinstance(term, Term):
            raise TypeError(f"term {name!r} is a {type(term).__name__}: give a Term")
        _check_term(name, term)
    return dict(terms)


def with_further_terms(
    own: Mapping[str, Term],
    further: Mapping[str, Term],
    labels_for: Callable[[Any], Callable[[Any, Tensor], dict[str, Any]] | None],
) -> dict[str, Term]:
    """Return the terms of a module together with further ones, whose losses may need labels.

    Args:
        own: a dict from names to the module's own terms.
        further: a dict from other names to further terms.
        labels_for: a function that returns ``from_batch`` for a loss, or ``None``.

    Raises:
        ValueError: if a name occurs twice.
    """
    terms = dict(own)
    for name, term in further.items():
        if name in own:
            raise ValueError(f"distill_terms has the name {name!r}, which the module uses itself")
        given = term.from_batch or labels_for(term.loss)
        terms[name] = dataclasses.replace(term, from_batch=given)
    return terms


def _check_term(name: str, term: Term) -> None:
    """Refuse a term whose loss, weight or option has the wrong kind."""
    if not callable(term.loss) or isinstance(term.loss, type):
        raise TypeError(f"the loss of term {name!r} is {term.loss!r}: give a function")
    if term.parameters() and ("." in name or not name or hasattr(nn.ModuleDict, name)):
        raise ValueError(
            f"term {name!r} has a loss with parameters, which torch cannot register under this "
            "name: choose another one, without dots"
        )
    if term.rows not in ("same", "tiled", "interleaved"):
        raise ValueError(
            f"rows of term {name!r} is {term.rows!r}: use 'same', 'tiled' or 'interleaved'"
        )
    if term.from_batch is not None and not callable(term.from_batch):
        raise TypeError(
            f"from_batch of term {name!r} is {term.from_batch!r}: give a function of the batch "
            "and the student's output"
        )
    if term.from_batch is None and needs_target(term.loss):
        raise ValueError(
            f"the loss of term {name!r} needs labels: give the term from_batch, a function "
            'such as lambda batch, logits: {"target": batch[1]}'
        )
    check_weight(f"the weight of term {name!r}", term.weight)
