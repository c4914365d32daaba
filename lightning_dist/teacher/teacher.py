"""Teacher: a frozen network that is in no module tree, optimizer or checkpoint."""

import copy
import functools
import itertools
import operator
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lightning_dist.checks import class_axis
from lightning_dist.files.card import Card
from lightning_dist.files.card_files import load_with_card
from lightning_dist.taps import (
    Snapshot,
    counts,
    find_part,
    is_tapped,
    logits_of,
    record_outputs,
    tap,
    with_logits,
)
from lightning_dist.teacher.base import Inputs, Tap, TeacherBase
from lightning_dist.teacher.bridge import InputBridge
from lightning_dist.teacher.calls import (
    explain_refused_call,
    freeze,
    refuse_shared_parts,
    refuse_unreadable,
)
from lightning_dist.teacher.isolation import differ, generators_of, own_inputs, own_numbers
from lightning_dist.teacher.matching import bridge_between, class_map_between
from lightning_dist.teacher.sharding import gathered, is_sharded


class Teacher(TeacherBase):
    """A frozen network in eval mode that is called while the student runs.

    It is deliberately not an ``nn.Module``: a LightningModule does not register it, so it is not
    trained, saved, averaged, broadcast by DDP or switched by ``module.train()``. In ``fit`` it
    works on its own copies of everything that it changes in its inputs, and torch's random
    generators are restored after each call.

    Args:
        network: the trained network, which may also be a module of TorchScript or
            ``torch.export.load(...).module()``. It is frozen in place.
        weights: a file to load into the network, see
            :func:`lightning_dist.files.weights.load_weights`. If the file has a card, it replaces
            ``card``.
        dtype: the dtype of the network's weights and inputs, such as ``torch.bfloat16`` or
            ``"bfloat16"``. By default, the network keeps its dtype, and the Trainer's autocast
            applies to it too.
        inputs: a function that converts the student's inputs to the network's inputs, if the two
            were trained on images of different normalisation, size or channel order, or take
            different arguments. It takes and returns ``(args, kwargs)`` of the call, as an
            :class:`InputBridge` does.
        class_map: for each class of the student, the index of the network's class. It selects
            logits along ``class_dim`` of the tensor that :func:`lightning_dist.taps.logits_of`
            finds in the output. :func:`lightning_dist.teacher.match_classes` builds it from names.
        class_dim: the dimension of the classes in the logits; by default 1. Logits with three
            dimensions need it: ``1`` for ``(N, C, L)``, ``-1`` for ``(B, T, V)``.
        compile: run the network through ``torch.compile``. While one of its parts has a hook, for
            example because a distillation term compares that part, the network runs uncompiled.
        channels_last: keep the network's weights and images ``(N, C, H, W)`` in channels-last
            memory format.
        random_numbers: the numbers that a network draws in ``fit``, if it draws any in eval mode,
            such as noise or stochastic depth. With ``"own"`` they depend on torch's initial seed
            and the step only. With ``"student"`` they are those that the student draws next: a copy
            of a student that draws the same numbers has the same output.
        ema: load the averaged weights (true) or the others (false) of a file with both; by default
            those that the card of the file names, and without a card the averaged ones.
        card: the images and classes that the network expects. Where those of the Trainer's data
            module differ, the teacher converts them, unless ``inputs`` or ``class_map`` is given.

    Raises:
        TypeError: if ``network`` is not a module.
        ValueError: if ``dtype`` is not the name of a dtype, if ``class_map`` is empty or has a
            negative index, or if ``random_numbers`` is unknown.

    Example:
        >>> teacher = Teacher(nn.Linear(4, 3), class_map=[2, 0])
        >>> teacher(torch.ones(5, 4)).shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        network: nn.Module,
        weights: str | Path | None = None,
        dtype: torch.dtype | str | None = None,
        *,
        inputs: Callable[[Any], Any] | None = None,
        class_map: Sequence[int] | None = None,
        class_dim: int | None = None,
        compile: bool = False,
        channels_last: bool = False,
        random_numbers: Literal["own", "student"] = "own",
        ema: bool | None = None,
        card: Card | None = None,
    ) -> None:
        if random_numbers not in ("own", "student"):
            raise ValueError(f"random_numbers is {random_numbers!r}: use 'own' or 'student'")
        if not isinstance(network, nn.Module):
            raise TypeError(f"the teacher is a {type(network).__name__}: give a torch.nn.Module")
        if isinstance(dtype, str):
            named = getattr(torch, dtype, None)
            if not isinstance(named, torch.dtype):
                raise ValueError(f"dtype is {dtype!r}: use a name such as 'bfloat16' or 'float32'")
            dtype = named
        if class_map is not None and (not len(class_map) or min(class_map) < 0):
            raise ValueError(
                f"class_map is {list(class_map)}: give the teacher's class, counted from 0, for "
                "each class of the student"
            )
        self.card = card
        if weights is not None:
            self.card = load_with_card(network, weights, ema) or card
        if dtype is not None:
            network.to(dtype)
        self._format = torch.channels_last if channels_last else torch.preserve_format
        if channels_last:
            network.to(memory_format=torch.channels_last)
        self.network = network
        self.dtype = dtype
        self.inputs = inputs
        self._own_inputs, self._own_map = inputs is not None, class_map is not None
        self._knows_images = inputs is not None  # Whether the images of the student are known.
        self.compile = compile
        self._compiled: Callable[..., Any] | None = None
        self.class_dim = class_dim
        self._map_classes(class_map)
        # The attributes of the modules with a mode, and the modules that have it elsewhere.
        self._modes: tuple[list[dict[str, Any]], list[nn.Module]] | None = None
        self._writes: dict[str, bool] = {}  # For each part, whether its calls change their inputs.
        self.random_numbers = random_numbers
        # The generators that the network may use.
        self._generators: list[torch.Generator] | None = None
        self._trainer: Trainer | None = None
        # A frozen module of TorchScript has no mode.
        self._found = [(m, m.training) for m in network.modules() if hasattr(m, "training")]
        self._trained = [p for p in network.parameters() if p.requires_grad]
        self.freeze()

    def adapt(self, data: Card | None) -> None:
        """Convert the images and classes of the data; see :class:`TeacherBase`."""
        if self.card is None or data is None:
            return
        self._knows_images = data.mean is not None
        if not self._own_inputs:
            self.inputs = bridge_between(self.card, data)
        if self._own_map:
            return
        class_map = class_map_between(self.card, data)
        map_of_detector: Any = getattr(self.network, "map_classes", None)
        # The network is the heads of a detector, which map the classes themselves.
        if map_of_detector is not None:
            map_of_detector(class_map)
        elif class_map is not None and self.card.task == "detection":
            raise ValueError(
                f"the detector from {self.card.source} has the classes {self.card.class_names} and "
                f"the data {data.class_names}: give both the same order"
            )
        else:
            self._map_classes(class_map)

    def _map_classes(self, class_map: Sequence[int] | None) -> None:
        self.class_map = None if class_map is None else list(class_map)
        self._columns = None if class_map is None else torch.tensor(self.class_map)
        # These are computed once and not at each call, because a vocabulary has 100,000 classes.
        self._largest = max(self.class_map or [0])
        self._takes_the_first = self.class_map == list(range(self._largest + 1))

    def describe(self) -> str:
        """Return one line with the name of the network and what it is given."""
        config = getattr(self.network, "pretrained_cfg", None) or {}
        name = config.get("architecture") or type(self.network).__name__
        facts = self.card.describe() if self.card is not None else ""
        facts = facts or "no card: it gets the student's images as they are"
        if self.inputs is not None and (self.card is None or self._own_inputs):
            facts += ", converted by the given inputs"
        elif self.card is not None and self.card.mean is not None and not self._knows_images:
            facts += "; the data has no card, so it gets the student's images as they are"
        if self.class_map is not None:
            facts += f", {len(self.class_map)} of its classes by the class_map"
        return f"{name}, {facts}"

    def release(self) -> None:
        """Restore ``requires_grad`` and the training mode of the network as they were before."""
        for parameter in self._trained:
            parameter.requires_grad_(True)
        for module, training in self._found:
            module.training = training

    def freeze(self) -> None:
        """Put every part of the network in eval mode, without gradients."""
        freeze(self.network)

    def to(self, device: torch.device | str) -> "Teacher":
        """Move the network to a device; a sharded network stays on the devices of its mesh."""
        if not is_sharded(self.network):
            self.network.to(device)
        return self

    def attach(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        taps: Sequence[Tap],
        inputs: Inputs,
    ) -> None:
        """Freeze the network and move it to the Trainer's device; see :class:`TeacherBase`.

        Raises:
            MisconfigurationException: if the network shares tensors or layers with the module.
        """
        try:
            refuse_shared_parts(self.network, pl_module)
        except MisconfigurationException:
            # The constructor has frozen the shared tensors, but the student must train them.
            self.release()
            raise
        self.expect(taps)
        self.freeze()
        self._writes, self._modes, self._generators = {}, None, None
        self._trainer = trainer
        self.to(trainer.strategy.root_device)

    @contextmanager
    def answers(
        self, student: nn.Module, batch: Any, parts: Sequence[str], inputs: Inputs
    ) -> Iterator[dict[str, list[Any]]]:
        """Call the network with the student's inputs; see :class:`TeacherBase`."""
        outputs: dict[str, list[Any]] = {part: [] for part in parts}
        # The list has an item for each call of the student that is running.
        running: list[Snapshot | None] = []
        number = itertools.count()

        def begin(part: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            running.append(None)
            if not counts():
                return
            # Call the teacher before the student, which may change its inputs in place. The
            # teacher's activations are then also freed before the student's are stored.
            with self._own_numbers(next(number)):
                output = self._ask_protected(part, args, kwargs)
            if not part and "" in outputs:
                running[-1] = Snapshot.of(output)

        def end(_: Any = None) -> None:
            # A student that calls itself ends its inner calls first, and is recorded in this order.
            found = running.pop()
            if found is not None:
                outputs[""].append(found)

        with ExitStack() as taps:
            for part, found in outputs.items():
                if part:
                    taps.callback(record_outputs(self.network, part, found))
            if callable(inputs):
                given = inputs(batch)
                begin("", given if isinstance(given, tuple) else (given,), {})
                end()
            else:
                for path, part in inputs.items():
                    before = functools.partial(begin, part)
                    taps.callback(tap(student, path, before=before, after=end))
            yield outputs

    def _own_numbers(self, call: int) -> AbstractContextManager[None]:
        """Return a context in which the network draws the numbers that ``random_numbers`` names.

        Args:
            call: the number of the call in this step, so that its numbers differ.
        """
        if self._generators is None:
            tensors = (*self.network.parameters(), *self.network.buffers())
            roots = [] if self._trainer is None else [self._trainer.strategy.root_device]
            self._generators = generators_of([*roots, *(x.device for x in tensors)])
        if self.random_numbers == "student":
            return own_numbers(self._generators, None)
        # The seed is a function of the step, so that a resumed run draws the same numbers.
        step = 0 if self._trainer is None else self._trainer.fit_loop.total_batch_idx
        seed = hash((torch.initial_seed(), step, call)) % 2**63
        return own_numbers(self._generators, seed)

    def _ask_protected(self, part: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the network so that it cannot change the student's own inputs.

        The first call gets copies of the tensors. If it writes to a copy, all later calls get
        copies too. Otherwise, later calls get the student's own tensors, and a change of their
        version counters reveals a write. Containers and other objects are always copies.

        Raises:
            MisconfigurationException: if the student gets what only one of the two can read, or if
                the network writes to its input, but not in its first call.
        """
        writes = self._writes.get(part)
        if writes is None:
            refuse_unreadable(self, args, kwargs)
        inputs, tensors = own_inputs((args, kwargs), clone=writes is not False)
        if any(x.is_inference() for x in tensors):  # A write to these inputs could not be noticed.
            return self.ask(part, *own_inputs(inputs, clone=True)[0])
        before = [x._version for x in tensors]
        output = self.ask(part, *inputs)
        written = before != [x._version for x in tensors]
        if written and writes is False:
            raise MisconfigurationException(
                f"{self} changed its input in place, but not in its first call, so the student "
                "would train on the changed input: let its forward work on a copy (x = x.clone())"
            )
        if writes is None and not written:
            written = differ(tensors, own_inputs((args, kwargs), clone=False)[1])
        self._writes[part] = bool(writes or written)
        return output

    def fingerprint(self) -> str:
        """Return the kind, size, dtype and checksum of the network, see :class:`TeacherBase`."""
        state = [x for x in self.network.state_dict().values() if isinstance(x, Tensor)]
        size = sum(x.numel() for x in state)
        dtype = state[0].dtype if state else None
        checksum = 0
        for value in [] if is_sharded(self.network) else state:
            flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            checksum = zlib.crc32(flat.numpy().data, checksum)
        known = "unknown" if is_sharded(self.network) else f"{checksum:08x}"
        return f"{self}, {size:,} numbers of {dtype}, checksum {known}"

    def expect(self, taps: Sequence[Tap]) -> None:
        """Prepare for the terms of a run; an ensemble overrides this.

        Args:
            taps: as in :meth:`attach`; empty after the run.
        """

    def detach(self) -> None:
        """Move the network to the CPU."""
        self._trainer = None
        self.expect(())
        self.to("cpu")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the network on the student's inputs, converted for the network.

        Args:
            args: the positional arguments of the student's call, in any nesting of containers.
            kwargs: the keyword arguments of the student's call.

        Returns:
            The output of the network. If there is a ``class_map``, its logits are those of the
            student's classes.

        Raises:
            ValueError: if the call has no image for ``inputs`` to convert, or if ``class_map`` has
                an index that is not a class of the network.
        """
        return self.ask("", args, kwargs)

    @torch.no_grad()
    def ask(self, part: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Call the network as in :meth:`__call__`, or a part of it.

        A part gets the inputs without any conversion; their dtype is not converted either.

        Args:
            part: the path of a sub-module or a method, see
                :func:`lightning_dist.taps.find_part`; ``""`` is the network.
            args: the positional arguments of the call.
            kwargs: the keyword arguments of the call.

        Returns:
            The output of the call.
        """
        if self._is_training():
            self.freeze()
        if part:
            module, name = find_part(self.network, part)
            method = module if name == "forward" else getattr(module, name)
            return self._run(method, args, kwargs)
        return self._answer(args, kwargs)

    def _is_training(self) -> bool:
        """Return whether a module of the network is in training mode.

        This looks at each module in each call, so it does as little as possible for each.
        """
        if self._modes is None:
            modules = list(self.network.modules())
            others = [m for m in modules if "training" not in vars(m)]  # such as TorchScript's
            self._modes = [vars(m) for m in modules if "training" in vars(m)], others
        attributes, others = self._modes
        if True in map(operator.itemgetter("training"), attributes):
            return True
        return any(getattr(module, "training", False) for module in others)

    def _answer(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Return the output of a call of the frozen network; an ensemble overrides this method."""
        if self.inputs is not None:
            args, kwargs = self.inputs((args, kwargs))
        parameter = next((p for p in self.network.parameters() if p.is_floating_point()), None)
        if parameter is not None:
            args, kwargs = tree_map_only(
                Tensor, lambda x: self._prepare(x, parameter.dtype), (args, kwargs)
            )
        output = self._run(self.network, args, kwargs)
        if self._columns is None:
            return output
        return with_logits(output, self.to_student_classes(logits_of(output)))

    def _run(self, part: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Call the network or a part of it, without autocast if ``dtype`` is set."""
        parameter = next(self.network.parameters(), None)
        context: Any = nullcontext()
        if parameter is not None and self.dtype is not None:
            context = torch.autocast(parameter.device.type, enabled=False)
        with context, gathered(self.network):
            try:
                return self._runner(part)(*args, **kwargs)
            except (TypeError, ValueError, RuntimeError, AssertionError) as error:
                if part is self.network:
                    explain_refused_call(self, self.network, args, kwargs, error)
                raise

    def as_network(self) -> nn.Module:
        """Return the network, or a module that also converts the inputs and the logits."""
        if self.inputs is None and self.class_map is None and self.dtype is None:
            return self.network
        return TeacherNetwork(self)

    def with_network(self, network: nn.Module, inputs: InputBridge | None = None) -> "Teacher":
        """Return a teacher with the same settings and another network; see :class:`TeacherBase`."""
        teacher = copy.copy(self)
        teacher.network, teacher._modes, teacher._generators = network, None, None
        if inputs is not None:
            teacher.inputs, teacher._own_inputs = inputs, True
        # release() restores these flags and modes.
        teacher._found, teacher._trained = self._found, self._trained
        teacher.freeze()
        return teacher

    def _prepare(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        if not x.is_floating_point():
            return x
        return x.to(dtype, memory_format=self._format if x.dim() == 4 else torch.preserve_format)

    def _runner(self, part: Callable[..., Any]) -> Callable[..., Any]:
        if part is not self.network or not self.compile:
            return part
        # A compiled network ignores hooks that are registered later, and is compiled anew for taps.
        if any(m._forward_hooks or is_tapped(m) for m in self.network.modules()):
            return part
        if self._compiled is None:
            self._compiled = torch.compile(self.network)
        return self._compiled

    def to_student_classes(self, logits: Tensor, part: str = "") -> Tensor:
        """Return the logits of the student's classes, selected from the network's by ``class_map``.

        Args:
            logits: logits of the network's classes.
            part: the dotted path of the part that returned them; ``""`` is the network.

        Raises:
            ValueError: if the map has an index that is not a class of the network, or if the logits
                have three dimensions and ``class_dim`` is not set.
        """
        if self._columns is None or self.class_map is None:
            return logits
        axis = class_axis(logits.shape, self.class_dim)
        if self._largest >= logits.shape[axis]:
            raise ValueError(
                f"class_map has the index {self._largest} and {type(self.network).__name__} "
                f"{logits.shape[axis]} classes: give indices into the teacher's classes"
            )
        if self._takes_the_first:
            return logits.narrow(axis, 0, len(self.class_map))  # A view needs no memory.
        if self._columns.device != logits.device:
            self._columns = self._columns.to(logits.device)
        return logits.index_select(axis, self._columns)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {
            "_compiled": None,
            "_modes": None,
            "_writes": {},
            "_generators": None,
            "_trainer": None,
            "_found": [],
            "_trained": [],
        }

    def __deepcopy__(self, memo: dict[int, Any]) -> "Teacher":
        return self  # A copy of the module, such as one with averaged weights, shares the teacher.

    def __repr__(self) -> str:
        return f"Teacher({type(self.network).__name__})"


def is_other_teacher(saved: str, own: str) -> bool:
    """Return whether two fingerprints are those of different teachers.

    Weights in another dtype, and a checksum that is unknown, are not compared.

    Args:
        saved: the fingerprint in a checkpoint.
        own: the fingerprint of the teacher at hand.
    """
    (_, *numbers), (_, *others) = saved.rsplit(", ", 2), own.rsplit(", ", 2)
    if numbers[0] != others[0]:
        return numbers[0].split()[0] != others[0].split()[0]
    return "checksum unknown" not in (numbers[1], others[1]) and numbers[1] != others[1]


def as_teacher(teacher: nn.Module | TeacherBase) -> TeacherBase:
    """Return a teacher of any kind unchanged, and a network as a :class:`Teacher`.

    Raises:
        TypeError: if the argument is neither a teacher nor a network.
    """
    return teacher if isinstance(teacher, TeacherBase) else Teacher(teacher)


class TeacherNetwork(nn.Module):
    """A module that calls a teacher, including the conversion of inputs and logits."""

    def __init__(self, teacher: Teacher) -> None:
        super().__init__()
        # It is registered, so that it moves to devices with this module.
        self.network = teacher.network
        self.teacher = teacher

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.teacher(*args, **kwargs)
