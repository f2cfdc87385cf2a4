"""What a pickle describes, read without running it.

A pickle is a program: its instructions may import any function and call it. Here they are interpreted one by one on
plain data. A name that an instruction would import stays a name, and "calling" it gives what this module has for that
name, such as a description of an array; everything else is refused. Nothing is imported, no object of another library
is made, no attribute is set, and what is allocated is bounded by the length of the file. Values may be nested to any
depth, so nothing here hashes, compares or prints one before its type is known: Python does so by recursion, and would
crash, or never end where parts are shared. Keys are texts and numbers. Needs numpy alone, and Python 3.10.
"""

from __future__ import annotations

import math
import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import IO, Any, Protocol, cast

import numpy as np


class RefusedPickle(ValueError):
    """The pickle asks for something that is not allowed, or is no pickle; one line without the file's name."""


class Stream(Protocol):
    """A file, or memory; `read` never gives more than there is."""

    def read(self, size: int, /) -> bytes: ...
    def readline(self) -> bytes: ...
    def tell(self) -> int: ...


@dataclass(frozen=True)
class Name:
    """A function or class that the pickle names, 'module.name'."""

    name: str


@dataclass
class DType:
    """A numpy type of numbers, 'f4' or '<f4'."""

    code: str

    def build(self, state: Any) -> None:
        order = state[1] if isinstance(state, tuple) and len(state) >= 2 else None
        if not isinstance(order, str) or order not in {"<", ">", "|", "="}:
            raise RefusedPickle("an array has a type that is not a plain number")
        self.code = (order if order != "=" else "<") + self.code.lstrip("<>|=")

    def numpy(self) -> np.dtype[Any]:
        return np.dtype(self.code)


@dataclass
class Array:
    """A numpy array: its bytes, and how they are meant. `data` is None until the pickle gives it a state."""

    dtype: DType | None = None
    shape: tuple[int, ...] = ()
    is_fortran: bool = False
    data: bytes | None = None

    def numpy(self) -> np.ndarray[Any, Any]:
        """A writable copy in the byte order of this machine."""
        if self.dtype is None or self.data is None:
            raise RefusedPickle("an array has no content")
        found = np.frombuffer(self.data, self.dtype.numpy()).reshape(self.shape, order="F" if self.is_fortran else "C")
        return found.astype(found.dtype.newbyteorder("="), order="C", copy=True)


@dataclass(frozen=True)
class Storage:
    """A block of numbers beside the pickle: its key, the name of its torch type, and how many they are."""

    key: str
    type_name: str
    num_elements: int


@dataclass(frozen=True)
class TensorView:
    """A torch tensor: part of a storage; offset and strides in elements."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        return math.prod(self.size)


# numpy's letters for numbers: boolean, signed and unsigned integers, floats. No objects, texts, dates or records.
_NUMBER_CODES = {
    f"{kind}{size}" for kind, sizes in {"i": "1248", "u": "1248", "f": "248"}.items() for size in sizes
} | {"b1"}
STORAGE_TYPES = (
    "FloatStorage",
    "DoubleStorage",
    "HalfStorage",
    "BFloat16Storage",
    "LongStorage",
    "IntStorage",
    "ShortStorage",
    "CharStorage",
    "ByteStorage",
    "BoolStorage",
)
_NDARRAY = "numpy.ndarray"
_KEY_TYPES = (str, bytes, int, float, bool, type(None))
_KEY_BITS = 64  # of a number: hashes of longer ones are made equal easily, and a dict of such takes for ever
_MAX_DIMENSIONS = 64  # numpy's


def _is_sizes(value: Any) -> bool:
    return (
        isinstance(value, tuple)
        and len(value) <= _MAX_DIMENSIONS
        and all(type(entry) is int and 0 <= entry < 2**63 for entry in value)
    )


def _dtype(code: Any, *_: Any) -> DType:
    if not isinstance(code, str) or code.lstrip("<>|=") not in _NUMBER_CODES:
        shown = code if isinstance(code, str) else type(code).__name__
        raise RefusedPickle(f"an array has the type {str(shown)[:20]!r}, which is not a plain number")
    return DType(code)


@dataclass
class Machine:
    """Interprets one pickle.

    Args:
        stream: stands at the pickle's start, and after `run` behind its end.
        budget: bytes of content that may be copied in all; a small multiple of the file's length.
        persistent: what a reference out of the pickle means; None refuses them.
    """

    stream: Stream
    budget: int
    persistent: Callable[[Any], Any] | None = None
    _stack: list[Any] = field(default_factory=list)
    _below: list[list[Any]] = field(default_factory=list)  # the stacks below each mark
    _memo: dict[int, Any] = field(default_factory=dict)

    def run(self) -> Any:
        """The value that the pickle describes: plain Python data, `Array`, `TensorView`, `Name`.

        Raises:
            RefusedPickle: it asks for something else, is truncated, or is no pickle.
        """
        try:
            for opcode, argument, _ in pickletools.genops(cast(IO[bytes], self.stream)):
                if opcode.name == "STOP":
                    return self._stack.pop()
                self._step(opcode.name, argument)
        except RefusedPickle:
            raise
        except (ValueError, TypeError, IndexError, KeyError, OverflowError, MemoryError) as error:
            reason = " ".join(str(error).split())[:100]
            raise RefusedPickle(f"truncated, corrupt or not a pickle ({type(error).__name__}: {reason})") from error
        raise RefusedPickle("truncated: the pickle has no end")

    # -- instructions -------------------------------------------------------------------------------------------------

    def _step(self, name: str, argument: Any) -> None:
        stack = self._stack
        if name in _IGNORED:
            return
        if name in _PUSHED:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name]())
        elif name in {"MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT"}:
            if name == "PUT" and argument >= 2**32:  # no pickler counts so far; equal hashes make a dict slow
                raise RefusedPickle(f"a memo number of {argument.bit_length()} bits; at most 32 are allowed")
            self._memo[len(self._memo) if name == "MEMOIZE" else argument] = stack[-1]
        elif name in {"GET", "BINGET", "LONG_BINGET"}:
            stack.append(self._memo[argument])
        elif name == "MARK":
            self._below.append(stack)
            self._stack = []
        elif name in _TUPLES:
            count = _TUPLES[name]
            stack[-count:] = [tuple(stack[-count:])] if len(stack) >= count else [self._underflow()]
        elif name in {"TUPLE", "LIST", "DICT"}:
            entries = self._pop_mark()
            self._stack.append(tuple(entries) if name == "TUPLE" else entries if name == "LIST" else _pairs(entries))
        elif name in {"APPEND", "APPENDS"}:
            entries = [stack.pop()] if name == "APPEND" else self._pop_mark()
            self._top(list).extend(entries)
        elif name in {"SETITEM", "SETITEMS"}:
            entries = [stack.pop(-2), stack.pop()] if name == "SETITEM" else self._pop_mark()
            self._top(dict).update(_pairs(entries))
        elif name == "POP":
            if stack:
                stack.pop()
            else:
                self._pop_mark()
        elif name == "POP_MARK":
            self._pop_mark()
        elif name == "DUP":
            stack.append(stack[-1])
        elif name == "GLOBAL":
            stack.append(self._name(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            stack.append(self._name(module, attribute))
        elif name in {"REDUCE", "NEWOBJ"}:
            arguments, function = stack.pop(), stack.pop()
            stack.append(self._call(function, arguments))
        elif name == "BUILD":
            state = stack.pop()
            self._build(stack[-1], state)
        elif name in {"BINPERSID", "PERSID"} and self.persistent is not None:
            stack.append(self.persistent(argument if name == "PERSID" else stack.pop()))
        elif name == "INST":
            self._name(*argument.split(" ", 1))
            raise RefusedPickle(f"instruction INST on {argument!r} is not allowed")
        else:
            raise RefusedPickle(f"instruction {name} is not allowed")

    def _underflow(self) -> Any:
        raise RefusedPickle("corrupt: an instruction lacks its operands")

    def _pop_mark(self) -> list[Any]:
        entries = self._stack
        self._stack = self._below.pop()
        return entries

    def _top(self, kind: type) -> Any:
        if not self._stack or type(self._stack[-1]) is not kind:
            raise RefusedPickle(f"corrupt: entries are put into something that is not a {kind.__name__}")
        return self._stack[-1]

    # -- names and what they stand for --------------------------------------------------------------------------------

    def _name(self, module: Any, attribute: Any) -> Name:
        if not (isinstance(module, str) and isinstance(attribute, str)):
            raise RefusedPickle("a name in it is no text")
        # numpy 2 moved its modules; both names are the same function.
        name = f"{module}.{attribute}".replace("numpy._core.", "numpy.core.", 1)
        if name not in _ALLOWED:
            shown = "".join(character if character.isprintable() else "?" for character in name)[:80]
            raise RefusedPickle(f"it asks for '{shown}', which is refused, and nothing of it was run")
        return Name(name)

    def _call(self, function: Any, arguments: Any) -> Any:
        if not isinstance(function, Name) or not isinstance(arguments, tuple):
            raise RefusedPickle("it calls something that is no name")
        name = function.name
        if name == "numpy.core.multiarray._reconstruct":
            if len(arguments) != 3 or arguments[0] != Name(_NDARRAY):
                raise RefusedPickle(f"'{name}' is allowed for {_NDARRAY} only")
            return Array()
        if name == "numpy.core.multiarray.scalar":
            dtype, data = arguments
            return self._array(dtype, (), data, is_fortran=False).numpy().item()
        if name == "numpy.core.numeric._frombuffer":
            data, dtype, shape, order = arguments
            return self._array(dtype, shape, data, is_fortran=order == "F")
        if name in {"torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2"}:
            return _view(*arguments[:4])
        if name == "torch._utils._rebuild_parameter":
            return arguments[0]
        if name == "torch.Size":
            return tuple(self._paid(*arguments))
        if name == "collections.defaultdict":
            return {}
        if name in {"collections.OrderedDict", "collections.Counter"}:
            return _mapping(self._paid(*arguments)) if arguments else {}
        if name == "numpy.dtype":
            return _dtype(*arguments)
        if name == "_codecs.encode":
            text, encoding = arguments
            if not (isinstance(text, str) and isinstance(encoding, str)) or encoding not in {"latin1", "latin-1"}:
                raise RefusedPickle("'_codecs.encode' is allowed for latin1 text only")
            return self._paid(text).encode("latin1")
        if name in _BYTES and arguments == ():
            return b""
        raise RefusedPickle(f"it calls '{name}', which is allowed as a name only")

    def _paid(self, content: Any) -> Any:
        """A sequence or mapping that is about to be copied: a small file must not make large copies again and again."""
        if not isinstance(content, (str, bytes, bytearray, list, tuple, dict)):
            raise RefusedPickle("it copies something that is no text, list or mapping")
        self.budget -= len(content)
        if self.budget < 0:
            raise RefusedPickle("what it describes is larger than the file")
        return content

    def _build(self, target: Any, state: Any) -> None:
        if isinstance(target, Array):
            if not isinstance(state, tuple) or len(state) not in {4, 5}:
                raise RefusedPickle("an array has no valid state")
            shape, dtype, is_fortran, data = state[-4:]  # the version in front is left out by old files
            made = self._array(dtype, shape, data, is_fortran=bool(is_fortran))
            vars(target).update(vars(made))
        elif isinstance(target, DType):
            target.build(state)
        elif type(target) is not dict:  # attributes of an ordered dict, such as a state dict's versions, are left out
            raise RefusedPickle("it sets attributes of something that is no array and no dict")

    def _array(self, dtype: Any, shape: Any, data: Any, *, is_fortran: bool) -> Array:
        if not isinstance(dtype, DType) or not _is_sizes(shape):
            raise RefusedPickle("an array has no valid type or shape")
        if not isinstance(data, (str, bytes, bytearray)):
            raise RefusedPickle("an array holds objects instead of numbers")
        expected = math.prod(shape) * dtype.numpy().itemsize
        if expected != len(data):
            raise RefusedPickle(f"an array of shape {shape} needs {expected} bytes and has {len(data)}")
        # Python 2 wrote bytes as text.
        raw = self._paid(data).encode("latin1") if isinstance(data, str) else bytes(self._paid(data))
        return Array(DType(dtype.code), shape, is_fortran, raw)


def _view(storage: Any, offset: Any, size: Any, stride: Any) -> TensorView:
    if not isinstance(storage, Storage) or not _is_sizes((offset,)) or not _is_sizes(size) or not _is_sizes(stride):
        raise RefusedPickle("a tensor has no valid storage, offset, size or stride")
    view = TensorView(storage, offset, size, stride)
    if len(size) != len(stride):
        raise RefusedPickle("a tensor has as many strides as dimensions, but not here")
    last = offset + sum((length - 1) * step for length, step in zip(size, stride))
    if view.num_elements and (last >= storage.num_elements or view.num_elements > storage.num_elements):
        raise RefusedPickle(f"a tensor of size {size} reaches beyond its storage of {storage.num_elements} elements")
    return view


def _pairs(entries: list[Any]) -> dict[Any, Any]:
    if len(entries) % 2:
        raise RefusedPickle("corrupt: a key without a value")
    return {_key(key): value for key, value in zip(entries[::2], entries[1::2])}


def _mapping(content: Any) -> dict[Any, Any]:
    """A copy of a dict, or of a list of pairs."""
    if isinstance(content, dict):
        return dict(content)
    if not isinstance(content, (list, tuple)) or not all(type(pair) in (list, tuple) for pair in content):
        raise RefusedPickle("a mapping is made of something that is no list of pairs")
    return {_key(key): value for key, value in content}


def _key(value: Any) -> Any:
    if type(value) not in _KEY_TYPES:
        raise RefusedPickle(f"a key is a {type(value).__name__}; allowed are texts and numbers")
    if type(value) is int and value.bit_length() > _KEY_BITS:
        raise RefusedPickle(f"a key is a number of more than {_KEY_BITS} bits")
    return value


_IGNORED = {"PROTO", "FRAME"}
_PUSHED = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_DICT": dict,
    "EMPTY_SET": list,
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_BYTES = {"builtins.bytes", "__builtin__.bytes"}
_ALLOWED = {
    _NDARRAY,
    "numpy.dtype",
    "numpy.core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy.core.numeric._frombuffer",
    "_codecs.encode",
    "collections.OrderedDict",
    "collections.Counter",
    "collections.defaultdict",
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
    "torch.Size",
    *(f"torch.{name}" for name in STORAGE_TYPES),
    *_BYTES,
}
