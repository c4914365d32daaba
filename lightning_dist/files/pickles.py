"""A check of the pickles in torch files, which bounds the time and the memory of loading them."""

import pickle
import pickletools
from pathlib import Path
from typing import IO, Any, NamedTuple

# torch.save needs about 35 opcodes for a tensor, and no tuples of tuples of tuples.
_MOST_OPCODES, _MOST_BYTES, _MOST_IN_A_TUPLE = 500_000, 32 * 2**20, 100_000
# A file of the format before torch 1.6 begins with this number of pickles.
_PICKLES_OF_OLD_FORMAT = 5
# Objects that training programs store in addition to the weights: command-line arguments, and
# NumPy's numbers under the names that NumPy 1 and NumPy 2 use.
BESIDE_WEIGHTS = (
    "argparse.Namespace",
    "numpy.dtype",
    "numpy.ndarray",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
)
# The modules from which torch itself takes classes and functions for weights. Its other packages
# allow more while they are imported: torch.distributed a class that opens connections, and
# torch.nested traceback.FrameSummary, which reads a file by its name.
_OF_TORCH = (
    *("torch", "torch.cuda", "torch.sparse", "torch.cuda.sparse", "torch.storage"),
    *("torch._utils", "torch._tensor", "torch.nn.parameter", "torch.serialization"),
)
_BUILTINS = ("set", "complex", "bytearray")
_COLLECTIONS = ("OrderedDict", "Counter")
# Each call of codecs.encode can double the length of its bytes. torch.save calls it only with this
# encoding, to store bytes.
_ENCODE, _ENCODING = "_codecs encode", "latin1"


class _Value(NamedTuple):
    """A description of a value on the stack: its text or name, and the items of a tuple."""

    text: str | None = None
    items: tuple["_Value", ...] = ()
    size: int = 1  # It counts all values inside; a value that is in two tuples counts twice.


class _Effect(NamedTuple):
    """The effect of an opcode on the stack: the values that it takes and adds."""

    to_mark: bool
    taken: int  # This number excludes the values from the mark on.
    made: int


_UNKNOWN = _Value()
_EFFECTS = {
    opcode.name: _Effect(
        to_mark := pickletools.stackslice in opcode.stack_before,
        len(opcode.stack_before) - 2 * to_mark,
        len(opcode.stack_after),
    )
    for opcode in pickletools.opcodes
}
_TUPLES = ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3")


def refuse_strange_pickles(file: IO[bytes], number: int = 1) -> None:
    """Raise an error if loading pickles with torch would take long or fill the memory.

    Nothing is unpickled. A few bytes are enough for a tuple that is in two tuples, which are both
    in two tuples, and so on: as a key of a dict, Python would compute its hash forever.

    Args:
        file: the file, at the start of the pickles.
        number: the number of pickles.

    Raises:
        ValueError: if the pickles have too many opcodes or bytes, create bytes by a number, or
            contain a tuple with too many values; or if they are damaged.
        pickle.UnpicklingError: if they contain other objects than those of weight files; the
            message names the class or function.
    """
    bounded = _Bounded(file)
    for _ in range(number):
        _follow(bounded)


def refuse_strange_old_format(path: Path) -> None:
    """Raise an error as :func:`refuse_strange_pickles`, for a file of torch before version 1.6."""
    with open(path, "rb") as file:
        refuse_strange_pickles(file, _PICKLES_OF_OLD_FORMAT)


class _Bounded:
    """A file that raises a ValueError if it is read too often or too far."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.opcodes = self.bytes = 0

    def read(self, count: int) -> bytes:
        self.bytes += count
        if self.bytes > _MOST_BYTES:
            raise ValueError(f"its pickle has more than {_MOST_BYTES} bytes")
        return self.file.read(count)

    def readline(self) -> bytes:
        line = self.file.readline(1000)  # of a name
        self.bytes += len(line)
        return line


def _follow(file: _Bounded) -> None:
    """Follow the opcodes of a pickle, with descriptions on the stack instead of values."""
    stack: list[_Value] = []
    memo: dict[Any, _Value] = {}
    marks: list[int] = []
    for opcode, argument, _ in pickletools.genops(file):  # type: ignore[arg-type]
        file.opcodes += 1
        if file.opcodes > _MOST_OPCODES:
            raise ValueError(f"its pickle has more than {_MOST_OPCODES} opcodes")
        name = opcode.name
        if name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1] if stack else _UNKNOWN
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo.get(argument, _UNKNOWN))
        elif name == "MARK":
            marks.append(len(stack))
        elif name in ("BINUNICODE", "GLOBAL"):
            if name == "GLOBAL":
                _refuse_global(*str(argument).split(" ", 1))
            stack.append(_Value(argument))
        else:
            to_mark, count, made = _EFFECTS[name]
            start = (marks.pop() if marks else 0) if to_mark else max(0, len(stack) - count)
            result = _UNKNOWN
            if name in _TUPLES:
                result = _tuple_of(stack[start:])
            elif name == "REDUCE":
                _refuse_encoding(stack[start:])
            # Below the mark is the list or the dict that gets the values.
            del stack[max(0, start - count) if to_mark else start :]
            stack += [result] * made


def _refuse_global(module: str, name: str) -> None:
    """Raise an error for a class or function that torch may call, but not for weights."""
    is_of_weights = (
        module in _OF_TORCH
        or (module in ("builtins", "__builtin__") and name in _BUILTINS)
        or (module == "collections" and name in _COLLECTIONS)
        or f"{module} {name}" == _ENCODE
        or f"{module}.{name}" in BESIDE_WEIGHTS
    )
    if not is_of_weights:
        raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")
    if name == "bytearray":  # torch calls it with a number of zeros
        raise ValueError("it holds a bytearray")


def _tuple_of(items: list[_Value]) -> _Value:
    size = 1 + sum(item.size for item in items)
    if size > _MOST_IN_A_TUPLE:
        raise ValueError(f"its pickle has a tuple of more than {_MOST_IN_A_TUPLE} values")
    return _Value(None, tuple(items), size)


def _refuse_encoding(taken: list[_Value]) -> None:
    """Raise an error for a call of codecs.encode that torch.save would not write."""
    if not taken or taken[0].text != _ENCODE:
        return
    arguments = [value.text for value in taken[-1].items] if len(taken) > 1 else []
    if len(arguments) != 2 or arguments[0] is None or arguments[1] != _ENCODING:
        raise ValueError("it encodes bytes in another way than torch.save")
