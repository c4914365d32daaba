"""A dry training step that shows which parts of a module run, and which settings fit a teacher."""

import copy
import functools
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_dist.taps import counts, logits_of, tap
from lightning_dist.teacher.isolation import generators_of, own_inputs, own_numbers


@dataclass
class PartCall:
    """A call of a part of a module in a dry step.

    Attributes:
        path: the dotted path of the part in the module.
        depth: the number of calls in which the call is nested.
        args: the positional arguments.
        kwargs: the keyword arguments.
        output: the output, ``None`` if the call raised an error.
        counts: whether the call can be distilled, that is, has a gradient.
    """

    path: str
    depth: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any = None
    counts: bool = True


def explain(callback: Any, pl_module: LightningModule, batch: Any) -> str:
    """Print what one training step calls, and which settings of a DistillationCallback fit.

    The step runs on a copy of the module, without a Trainer. The module, the batch and torch's
    random generators do not change.

    Args:
        callback: the DistillationCallback. As a method, ``callback.explain(module, batch)``.
        pl_module: the module, on the device of the batch.
        batch: a training batch.

    Returns:
        The printed lines: the parts in the order of their calls with the shapes of inputs and
        outputs, what the teacher would be called with and would return, and settings that fit.
    """
    devices = {x.device for x in (*pl_module.parameters(), *pl_module.buffers())}
    network = callback.teacher.network
    where = next((x.device for x in network.parameters()), torch.device("cpu"))
    try:
        with own_numbers(generators_of(devices), None), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # self.log without a Trainer
            calls, error = _dry_step(copy.deepcopy(pl_module), own_inputs(batch, clone=True)[0])
            network.to(next(iter(devices), where))
            lines = [
                f"training_step of {type(pl_module).__name__} calls, in this order:",
                *(_line(call) for call in calls),
            ]
            if error:
                lines.append(f"and then fails without a Trainer: {error}")
            lines += _settings(callback, calls)
    finally:
        network.to(where)
    text = "\n".join(lines)
    print(text)
    return text


def _dry_step(pl_module: LightningModule, batch: Any) -> tuple[list[PartCall], str]:
    """Run a step, and return its calls and the error that ended it, if any."""
    calls: list[PartCall] = []
    running: list[PartCall] = []

    def begin(path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kept, kept_kwargs = own_inputs((args, kwargs), clone=True)[0]
        running.append(PartCall(path, len(running), kept, kept_kwargs, counts=counts()))
        calls.append(running[-1])

    def end(output: Any) -> None:
        running.pop().output = output

    pl_module.train()
    with ExitStack() as stack, torch.enable_grad():
        for path, _ in pl_module.named_modules():
            stack.callback(tap(pl_module, path, before=functools.partial(begin, path), after=end))
        stack.enter_context(_manual(pl_module, calls))
        try:
            pl_module.training_step(batch, 0)
        except Exception as error:  # a step may need a Trainer; the calls so far are worth showing
            return calls, f"{type(error).__name__}: {error}"
    return calls, ""


@contextmanager
def _manual(pl_module: LightningModule, calls: list[PartCall]) -> Iterator[None]:
    """Let a step that optimizes manually run without a Trainer."""
    if pl_module.automatic_optimization:
        yield
        return
    made = pl_module.configure_optimizers()
    found = made if isinstance(made, (list, tuple)) else [made]
    optimizers = [x["optimizer"] if isinstance(x, Mapping) else x for x in found]

    def manual_backward(loss: Tensor, *args: Any, **kwargs: Any) -> None:
        number = sum(call.path == "manual_backward" for call in calls)
        calls.append(PartCall("manual_backward", 0, (number,), {}, loss))
        loss.backward(*args, **kwargs)

    def own_optimizers(*_: Any, **__: Any) -> Any:
        return optimizers[0] if len(optimizers) == 1 else optimizers

    def nothing(*_: Any, **__: Any) -> None:
        pass

    names = ("lr_schedulers", "toggle_optimizer", "untoggle_optimizer", "clip_gradients")
    pl_module.__dict__ |= dict.fromkeys(names, nothing)
    pl_module.__dict__ |= {"manual_backward": manual_backward, "optimizers": own_optimizers}
    yield


def _line(call: PartCall) -> str:
    indent = "  " * (call.depth + 1)
    if call.path == "manual_backward":
        return f"{indent}manual_backward: backward={call.args[0]}"
    given = [*map(_shape, call.args), *(f"{k}={_shape(x)}" for k, x in call.kwargs.items())]
    name = call.path or "the module itself"
    unused = "" if call.counts else ", without a gradient: not distilled"
    return f"{indent}{name}({', '.join(given)}) -> {_shape(call.output)}{unused}"


def _shape(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{[*value.shape]}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_shape(x)}" for key, x in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "(" + ", ".join(map(_shape, value)) + ")"
    return type(value).__name__


def _settings(callback: Any, calls: list[PartCall]) -> list[str]:
    """Return lines with the teacher's outputs and with the settings that fit them."""
    lines, fitting, apart = [], [], []
    parts = [x for x in calls if x.counts and x.path != "manual_backward"]
    first = {part.path: part for part in reversed(parts)}
    outer = [path for path, part in reversed(first.items()) if part.depth == 0]
    for path, part in reversed(first.items()):
        try:
            output = callback.teacher(*part.args, **part.kwargs)
            shape = logits_of(output).shape
        except Exception:  # the inputs of most parts are no inputs of the teacher
            continue
        lines.append(f"with the inputs of {path!r}, the teacher returns {_shape(output)}")
        if _logits_shape(part.output) == shape:
            fitting.append(f"  student={path!r}")
        elif path in outer:
            same = [other for other in outer if _logits_shape(first[other].output) == shape]
            inputs = {path: ""}
            apart += [
                f"  student='', inputs={inputs}, terms=dict(a=Term(loss, student={x!r}))"
                for x in same
            ]
    if not lines:
        lines = [
            "the teacher takes the inputs of none of these parts: give inputs=FUNCTION, a function "
            "of the batch that returns the teacher's input"
        ]
    if fitting or apart:
        lines += ["settings that fit:", *(fitting or apart)]
    else:
        lines.append("settings that fit: none with equal shapes")
    own = callback.student
    inner = [path for path in outer if path.startswith(f"{own}." if own else "")]
    judged = "the step calls" if own in first else "the step does not call as a whole"
    if own not in first and inner:
        judged += f", but its parts {', '.join(map(repr, inner))}"
    return [*lines, f"this callback has student={own!r}, which {judged}"]


def _logits_shape(output: Any) -> torch.Size | None:
    try:
        return logits_of(output).shape
    except ValueError:
        return None
