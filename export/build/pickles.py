"""What a checkpoint's pickle may say, checked before torch's weights-only reader sees it.

That reader runs no code, but it builds whatever it is told to: buffers of terabytes, text that doubles at every step,
tuples nested so deep that hashing one ends the process, tensors that reach beyond their storage. Here the opcodes are
walked and nothing is built but tuples of what stands in the file. Does not know where the bytes of a storage lie.
"""

from __future__ import annotations

import io
import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

from ...runtime.errors import printable

LONGEST_PICKLE = 4_000_000  # the largest published checkpoint's has 0.2 MB
_MOST_STEPS = 500_000  # some 45 for each tensor; with the optimiser's state mar-h has 3,000
_DEEPEST = 1000
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C

_ITEM_BYTES = {
    "DoubleStorage": 8, "FloatStorage": 4, "HalfStorage": 2, "BFloat16Storage": 2, "LongStorage": 8,
    "IntStorage": 4, "ShortStorage": 2, "CharStorage": 1, "ByteStorage": 1, "BoolStorage": 1,
}  # fmt: skip
_DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
_NUMBERS = ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "b1")
_NOT_PLAIN = "more than tensors and plain containers"
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_WITH_ARGUMENT = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING"}
_CONTAINERS = {"EMPTY_DICT": "dict", "EMPTY_LIST": "list"}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class RefusedError(Exception):
    """The pickle holds what no checkpoint needs; the text says what."""


class CodeError(RefusedError):
    """It names a Python class or function that a checkpoint needs not; the text is its full name."""


@dataclass(frozen=True)
class StoredValues:
    """One storage that tensors lie in: its key in the file, number of values, and bytes of each."""

    key: str
    values: int
    item_bytes: int

    @property
    def bytes(self) -> int:
        """Size in the file."""
        return self.values * self.item_bytes


@dataclass(eq=False)
class _Built:
    """What the reader would have built: ``dict``, ``list``, ``OrderedDict``, ``Namespace``, ``tensor``, ``dtype``,
    ``bytes`` or ``other``.

    ``content`` holds a list's items, a dictionary's keys, the number of bytes (of one value).
    """

    kind: str
    content: list[Any] = field(default_factory=list)
    has_state: bool = False


@dataclass(frozen=True)
class _Global:
    name: str


def check_pickle(content: bytes) -> dict[str, StoredValues]:
    """The storages that an archive's data.pkl names.

    Raises:
        RefusedError: it holds more than tensors and plain containers, or tensors that cannot be.
        ValueError, EOFError, LookupError: it is no pickle.
    """
    walk = _Walk()
    walk.run(io.BytesIO(content))
    return walk.storages


def check_legacy(start: bytes) -> tuple[list[StoredValues], int]:
    """The same for a file of torch before 1.6: five pickles, then the storages.

    Args:
        start: the file's first bytes, ``LONGEST_PICKLE`` of them or all.

    Returns:
        The storages in the order in which they lie in the file, and where the pickles end.
    """
    file, walk = io.BytesIO(start), _Walk(legacy=True)
    if walk.run(file) != _LEGACY_MAGIC or type(walk.run(file)) is not int:  # magic number, protocol version
        raise RefusedError("no magic number")
    walk.run(file)  # what the writer's machine was like
    walk.run(file)
    listed = walk.run(file)
    keys: list[Any] = listed.content if _is(listed, "list") else [listed]
    if not all(type(key) is str for key in keys) or sorted(keys) != sorted(walk.storages):
        raise RefusedError("a list of storages that is not that of the tensors")
    return [walk.storages[key] for key in keys], file.tell()


class _Walk:
    """Follows opcodes on a stack of what stands in the file. Stack values are never hashed, compared or printed before
    their type is known: that alone can take forever."""

    def __init__(self, legacy: bool = False) -> None:
        self.storages: dict[str, StoredValues] = {}
        self._legacy, self._steps = legacy, 0

    def run(self, file: io.BytesIO) -> Any:
        """One pickle; what it holds at the top."""
        stack: list[Any] = []
        marks: list[list[Any]] = []
        memo: dict[int, Any] = {}
        for step in pickletools.genops(file):
            self._steps += 1
            if self._steps > _MOST_STEPS:
                raise RefusedError(f"more than {_MOST_STEPS} steps")
            name, argument = step[0].name, cast(Any, step[1])
            if name in _WITH_ARGUMENT:
                stack.append(argument)
            elif name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            elif name in _CONTAINERS:
                stack.append(_Built(_CONTAINERS[name]))
            elif name in ("BINPUT", "LONG_BINPUT"):
                memo[argument] = stack[-1]
            elif name in ("BINGET", "LONG_BINGET"):
                stack.append(memo[argument])
            elif name == "MARK":
                if len(marks) == _DEEPEST:
                    raise RefusedError(f"nested more than {_DEEPEST} deep")
                marks.append(stack)
                stack = []
            elif name in _TUPLES:
                count = _TUPLES[name]
                if len(stack) < count:
                    raise IndexError("the stack is empty")
                stack[-count:] = [tuple(stack[-count:])]
            elif name in ("TUPLE", "APPENDS", "SETITEMS"):
                items, stack = stack, marks.pop()
                if name == "TUPLE":
                    stack.append(tuple(items))
                else:
                    _fill(stack[-1], items, name == "SETITEMS")
            elif name in ("APPEND", "SETITEM"):
                count = 1 if name == "APPEND" else 2
                items = stack[-count:]
                del stack[-count:]
                _fill(stack[-1], items, name == "SETITEM")
            elif name == "GLOBAL":
                stack.append(_Global(_allowed(argument)))
            elif name in ("REDUCE", "NEWOBJ"):
                arguments = stack.pop()
                stack.append(_called(stack.pop(), arguments, name))
            elif name == "BUILD":
                state, target = stack.pop(), stack[-1]
                _check_state(target, state)
            elif name == "BINPERSID":
                stack.append(self._storage(stack.pop()))
            elif name == "STOP":
                return stack.pop()
            elif name != "PROTO":
                raise RefusedError(f"opcode {name}")
        raise EOFError("no end of the pickle")

    def _storage(self, identity: Any) -> StoredValues:
        _expect(type(identity) is tuple and len(identity) == (6 if self._legacy else 5))
        word, kind, key, place, values, *view = list[Any](identity)
        _expect(type(word) is str and word == "storage" and type(place) is str and view in ([], [None]))
        item_bytes = _ITEM_BYTES.get(kind.name.removeprefix("torch ")) if type(kind) is _Global else None
        if item_bytes is None or type(key) is not str or not key.isascii() or type(values) is not int or values < 0:
            raise RefusedError(_NOT_PLAIN)
        storage = StoredValues(key, values, item_bytes)
        if self.storages.setdefault(key, storage) != storage:
            raise RefusedError("a storage of two sizes")
        return storage


def _fill(target: Any, items: list[Any], pairs: bool) -> None:
    if pairs:
        _expect(_is(target, "dict", "OrderedDict") and len(items) % 2 == 0)
        items = items[::2]
        _expect(all(item is None or type(item) in (str, int, float, bool) for item in items))
    else:
        _expect(_is(target, "list"))
    target.content.extend(items)


def _check_state(target: Any, state: Any) -> None:
    """What BUILD may add to what was just made, once."""
    _expect(_is(target, "OrderedDict", "Namespace", "dtype") and not target.has_state)
    if target.kind == "dtype":  # version, byte order, and nothing of what only arrays and records have
        _expect(type(state) is tuple and len(state) == 8 and type(state[1]) is str and state[1] in ("<", "|"))
        _expect(all(part is None or type(part) is int for part in (state[0], *state[2:])))
        _expect((state[0], *state[2:]) == (3, None, None, None, -1, -1, 0))
    else:
        _expect(_is(state, "dict"))
        # A dictionary's attribute could stand in for its methods; a module's state dict has one of them.
        _expect(target.kind == "Namespace" or all(name == "_metadata" for name in state.content))
    target.has_state = True


def _allowed(name: str) -> str:
    """A global's name as it stands in the file, ``module name``, if checkpoints need it."""
    module, _, what = name.partition(" ")
    if name in _CALLED or (module == "torch" and what in (*_ITEM_BYTES, *_DTYPES)):
        return name
    # Protocol 2 spells builtins as Python 2 did, and names the platform's module where Python says os.
    module = {"__builtin__": "builtins", "posix": "os", "nt": "os"}.get(module, module)
    raise CodeError(printable(f"{module}.{what}"))


def _called(function: Any, arguments: Any, opcode: str) -> Any:
    """What calling a global gives, where its arguments are such as torch.save writes."""
    _expect(type(function) is _Global and type(arguments) is tuple)
    _expect((opcode == "NEWOBJ") == (function.name == "argparse Namespace") and function.name in _CALLED)
    return _CALLED[function.name](*arguments)


def _empty(kind: str) -> Callable[..., _Built]:
    def make(*arguments: Any) -> _Built:
        _expect(not arguments)
        return _Built(kind)

    return make


def _tensor(*arguments: Any) -> _Built:
    """Checks torch._utils._rebuild_tensor_v2: (storage, offset, shape, strides, requires_grad, hooks)."""
    _expect(len(arguments) == 6)
    storage, offset, shape, strides, gradient, hooks = arguments
    _expect(type(storage) is StoredValues and type(gradient) is bool and _is(hooks, "OrderedDict"))
    _expect(type(shape) is tuple and type(strides) is tuple and len(shape) == len(strides) <= 64)
    _expect(all(type(number) is int for number in (offset, *shape, *strides)))
    if min(offset, *shape, *strides, 0) < 0:
        raise RefusedError("a tensor of negative size, stride or offset")
    reach = offset + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True)) + 1
    if (reach if 0 not in shape else offset) > storage.values:
        raise RefusedError("a tensor that reaches beyond its storage")
    return _Built("tensor")


def _parameter(*arguments: Any) -> _Built:
    """Checks torch._utils._rebuild_parameter: (tensor, requires_grad, hooks)."""
    _expect(len(arguments) == 3 and _is(arguments[0], "tensor") and type(arguments[1]) is bool)
    _expect(_is(arguments[2], "OrderedDict"))
    return _Built("tensor")


def _size_or_device(*arguments: Any) -> _Built:
    """Checks torch.Size, of a tuple, and torch.device, of a name and a number."""
    parts = arguments[0] if len(arguments) == 1 and type(arguments[0]) is tuple else arguments
    _expect(all(type(part) in (str, int) for part in parts))
    return _Built("other")


def _number_type(*arguments: Any) -> _Built:
    """Checks numpy.dtype of a plain number: (code, align, copy)."""
    _expect(len(arguments) == 3 and type(arguments[0]) is str and arguments[0] in _NUMBERS)
    _expect(all(type(flag) is bool for flag in arguments[1:]))
    return _Built("dtype", [int(arguments[0][1])])


def _encoded(*arguments: Any) -> _Built:
    """Checks _codecs.encode, which is how protocol 2 writes the bytes of a number."""
    text, codec = arguments if len(arguments) == 2 else (None, None)
    if (
        type(text) is not str
        or type(codec) is not str
        or codec != "latin1"
        or len(text) > 8
        or max(text, default="") > "\xff"
    ):
        raise CodeError("_codecs.encode")
    return _Built("bytes", [len(text)])


def _scalar(*arguments: Any) -> _Built:
    """Checks numpy.core.multiarray.scalar: (type, its bytes)."""
    _expect(len(arguments) == 2 and _is(arguments[0], "dtype") and _is(arguments[1], "bytes"))
    _expect(arguments[0].content == arguments[1].content)
    return _Built("other")


def _path(*arguments: Any) -> _Built:
    """Checks a path of its parts."""
    _expect(all(type(part) is str for part in arguments))
    return _Built("other")


_CALLED: dict[str, Callable[..., _Built]] = {
    "collections OrderedDict": _empty("OrderedDict"),
    "argparse Namespace": _empty("Namespace"),
    "torch._utils _rebuild_tensor_v2": _tensor,
    "torch._utils _rebuild_parameter": _parameter,
    "torch Size": _size_or_device,
    "torch device": _size_or_device,
    "numpy dtype": _number_type,
    "numpy.core.multiarray scalar": _scalar,
    "numpy._core.multiarray scalar": _scalar,
    "_codecs encode": _encoded,
    **{f"{module} {name}": _path for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")},
}


def _is(value: Any, *kinds: str) -> bool:
    return type(value) is _Built and value.kind in kinds


def _expect(condition: bool) -> None:
    if not condition:
        raise RefusedError(_NOT_PLAIN)
